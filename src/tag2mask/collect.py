"""Gathers what a run left in its work folder into the values that the report page and the tables show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tag2mask import findings, schema
from tag2mask.baselines import BASELINES
from tag2mask.data.images import read_mask
from tag2mask.data.maps import map_path, read_maps
from tag2mask.data.source import Samples, Split
from tag2mask.engine import read_log
from tag2mask.errors import UserError
from tag2mask.export import heatmap, overlay, voc_palette
from tag2mask.ops.cams import best_class, to_mask
from tag2mask.pipeline import MANIFEST, read_json
from tag2mask.recipe import SOURCES
from tag2mask.report import GalleryItem, Panel, RunSummary, StageRow, TrainingCurve
from tag2mask.report.peers import Peers
from tag2mask.stages.evaluate import PER_IMAGE, RESULT
from tag2mask.stages.labels import MASKS, mask_path

BEST, WORST = 4, 4
FEW_MASKS = "-few-masks"  # what the names of runs on few masks end in
NO_TAGS = ("few_masks", "predict", "evaluate_masks")  # kinds of stages that do without tags


def find_record(work: Path, name: str | None) -> dict[str, Any]:
    """The record of a run in `work`: the one called `name`, else the newest. Raises UserError if there is none."""
    found = sorted(work.glob("*.run.json"), key=lambda path: path.stat().st_mtime)
    if name is None:  # what was only made to stand beside a run is no run to look at
        found = [path for path in found if not path.name.endswith(f"{FEW_MASKS}.run.json")] or found
    else:
        found = [path for path in found if path.name == f"{name}.run.json"]
    if not found:
        what = f"run of {name!r}" if name else "run"
        raise UserError(f"{work}: no {what} here; give the folder that was used as --work")
    try:
        record: dict[str, Any] = read_json(found[-1])
    except ValueError:
        raise UserError(f"{found[-1]}: is damaged; run the recipe again, finished stages are skipped") from None
    return record


def results(work: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results of all finished evaluation stages, in the order of the recipe."""
    found = []
    for name, stage in record["stages"].items():
        path = work / stage["folder"] / RESULT
        if path.exists() and (path.parent / MANIFEST).exists():
            found.append({"stage": name, "of": stage["inputs"].get("of", "")} | read_json(path))
    return found


def summarise(work: Path, record: Mapping[str, Any], others: Sequence[Path] = ()) -> RunSummary:
    """Everything the report page shows; `others` are work folders with runs to compare with."""
    manifests = {name: _manifest(work / stage["folder"]) for name, stage in record["stages"].items()}
    finished = {name: manifest for name, manifest in manifests.items() if manifest}
    notes = [f"Stage {name} is not finished." for name, manifest in manifests.items() if not manifest]
    curves = []
    for name, stage in record["stages"].items():
        log = work / stage["folder"] / "train.jsonl"
        if log.exists():
            curves.append(TrainingCurve(name, read_log(log)))
    last: Mapping[str, Any] = next(reversed(finished.values()), {})
    source = schema.make(SOURCES[record["data"]["name"]], record["data"])
    source.check(work / "checked-images.json", show=False)
    classes, split = tuple(source.classes), cache(source.split)
    tags = confidence = None
    if {manifest["data"] for manifest in finished.values()} <= {source.fingerprint}:
        tags = findings.tag_check(work, record, split, classes)
        confidence = findings.confidence(work, record, split, classes)
    else:
        notes.append("The data have changed since this run, so that its maps are not looked at; run the recipe again.")
    peers = Peers([work, *others])
    compared, plain = findings.compared(work, record, peers)
    return RunSummary(
        title=record["title"],
        recipe=record["name"],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=record["command"],
        seconds=sum(float(m["seconds"]) for m in finished.values()),
        device=str(last.get("device", "")),
        versions=last.get("versions", {}),
        data={"name": record["data"]["name"], **record["summary"]},
        supervision=supervision(work, record),
        stages=[_stage_row(name, record["stages"][name], m) for name, m in finished.items()],
        curves=curves,
        results=results(work, record),
        gallery=_gallery(work, record, finished, classes, split),
        notes=notes,
        legend=_legend(("background", *classes)),
        tags=tags,
        confidence=confidence,
        compared=compared,
        plain=plain,
        few_masks=findings.few_masks(work, record, peers),
        commands=findings.commands(work, record),
    )


def _stage_row(name: str, stage: Mapping[str, Any], manifest: Mapping[str, Any]) -> StageRow:
    return StageRow(
        name,
        do=manifest["kind"],
        folder=stage["folder"],
        seconds=manifest["seconds"],
        peak_mb=manifest["peak_mb"],
        device=manifest["device"],
        settings=manifest["settings"],
        inputs=stage["inputs"],
    )


def _legend(names: tuple[str, ...]) -> dict[str, tuple[int, int, int]]:
    return {name: (int(r), int(g), int(b)) for name, (r, g, b) in zip(names, voc_palette(), strict=False)}


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    return found


def supervision(work: Path, record: Mapping[str, Any]) -> list[str]:
    """What the finished stages of a run learnt from: image tags, what the recipe or a network names, weights."""
    derived = record.get("summary", {}).get("tags_derived_from")  # masks know more than a person's tags
    tags = f"image tags derived from {derived}" if derived else "image tags"
    drawn = [stage for stage in record["stages"].values() if stage["kind"] == "few_masks"]
    found = [tags] * any(stage["kind"] not in NO_TAGS for stage in record["stages"].values())
    found += record.get("supervision", ())  # a record of an earlier version has none
    if drawn:
        counts = [_manifest(work / stage["folder"]).get("settings", {}).get("count", 0) for stage in drawn]
        found.append(f"up to {max(counts)} true masks" if len(counts) > 1 else f"{counts[0]} true masks")
    for stage in record["stages"].values():
        net = _manifest(work / stage["folder"]).get("settings", {}).get("net")
        if net is None:
            continue
        if net["name"] in BASELINES:
            found += [f"{side} maps" for side in sorted(BASELINES[net["name"]].needs)]
        if weights := net["backbone"]["weights"]:
            origin = "the timm hub" if weights == "hub" else Path(weights).name
            found.append(f"weights of {net['backbone']['name']} from {origin}")
    return list(dict.fromkeys(found))


def _gallery(
    work: Path,
    record: Mapping[str, Any],
    finished: Mapping[str, Any],
    classes: tuple[str, ...],
    split_of: Callable[[Split], Samples],
) -> list[GalleryItem]:
    """Images of the pseudo-masks and of the segmenter: the best and the worst where there is truth, else the first."""
    folders = {name: work / stage["folder"] for name, stage in record["stages"].items()}
    items: list[GalleryItem] = []
    for name, manifest in finished.items():
        if manifest["kind"] != "evaluate_masks":
            continue
        of = record["stages"][name]["inputs"]["of"]
        split = manifest["settings"]["split"]
        samples = split_of(split)
        scores: dict[str, float] = {}
        if (folders[name] / PER_IMAGE).exists():
            scores = read_json(folders[name] / PER_IMAGE)
        cams = record["stages"][of]["inputs"].get("of") if record["stages"][of]["kind"] in MASKS else None
        threshold = _seed_threshold(work, record, cams)
        for index in _chosen(samples, scores):
            panels = _panels(samples, index, folders, of, cams, threshold, len(classes))
            tags = [classes[k] for k in np.flatnonzero(samples.tags[index])]
            score = scores.get(samples.names[index])
            what = "Pseudo-masks" if cams is not None else "Segmenter"
            items.append(GalleryItem(samples.names[index], tags, score, panels, group=f"{what} on “{split}”"))
    return items


def _panels(
    samples: Samples,
    index: int,
    folders: Mapping[str, Path],
    of: str,
    cams: str | None,
    threshold: float | None,
    num_classes: int,
) -> list[Panel]:
    image, name = samples.image(index), samples.names[index]
    panels = [Panel("image", image)]
    if cams is not None:
        stored = read_maps(map_path(folders[cams], name))
        maps = stored.full()
        panels.append(Panel("CAM", heatmap(image, best_class(maps)[1].numpy())))
        if threshold is not None:
            seed = to_mask(maps, torch.from_numpy(stored.classes), threshold).numpy()
            panels.append(Panel(f"seed at {threshold:.2f}", overlay(image, seed)))
    caption = "pseudo-mask" if cams is not None else "segmenter"
    panels.append(Panel(caption, overlay(image, read_mask(mask_path(folders[of], name), num_classes))))
    if samples.mask is not None:
        panels.append(Panel("truth", overlay(image, samples.mask(index))))
    return panels


def _chosen(samples: Samples, scores: Mapping[str, float]) -> list[int]:
    """The best and the worst of the tagged images that have a score; without scores, images spread evenly."""
    tagged = [i for i in range(len(samples)) if samples.tags[i].any()] or list(range(len(samples)))
    ranked = sorted((i for i in tagged if samples.names[i] in scores), key=lambda i: -scores[samples.names[i]])
    if not ranked:
        count = min(len(tagged), BEST + WORST)
        return [tagged[int(place)] for place in np.linspace(0, len(tagged) - 1, count)] if tagged else []
    return list(dict.fromkeys(ranked[:BEST] + ranked[-WORST:]))


def _seed_threshold(work: Path, record: Mapping[str, Any], cams: str | None) -> float | None:
    for result in results(work, record):
        if result["kind"] == "maps" and result["of"] == cams and "threshold" in result:
            return float(result["threshold"])
    return None
