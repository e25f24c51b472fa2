"""Maps of two runs side by side: image, map of the first, map of the second, truth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tag2mask import progress
from tag2mask.analyse.panels import write_grid
from tag2mask.analyse.work import Work
from tag2mask.collect import results
from tag2mask.data.maps import map_path, read_maps
from tag2mask.data.same_size import ahead
from tag2mask.data.source import Samples
from tag2mask.errors import UserError
from tag2mask.export import heatmap, overlay
from tag2mask.metrics import Confusion
from tag2mask.ops.cams import best_class, to_mask
from tag2mask.pipeline import write_json
from tag2mask.report import Panel

KINDS = ("cams", "clip_es", "pacam", "attention", "amn_maps")


def compare(
    first: Work, second: Work, out: Path, *, stage: str | None = None, images: int = 8, workers: int = 2
) -> dict[str, Any]:
    """Maps of both runs on the split "score"; writes compare.json and compare.png.

    stage: which maps, by the name of their stage in both recipes; the last stage that makes maps if not given.
    images: rows of the picture. Where both runs have scored their maps (an evaluate_maps stage with truth), an image's
    score is the mean IoU of its seeds at the threshold that the run reports. Then half of the picture are images that
    gain most from the first run to the second, the other half those that lose most; else they are spread evenly.
    Images without tags are left out. Returns {"works", "stages", "thresholds", "threshold_by", "gained", "lost",
    "shown", "images": {name: {"first", "second", "gain"}}}.

    Raises UserError for runs on different data, and where there are no maps of an image.
    """
    if first.source.fingerprint != second.source.fingerprint or first.classes != second.classes:
        raise UserError(f"{second.path}: was made from other data than {first.path}; compare runs on the same data")
    works = (first, second)
    stages = [work.pick(KINDS, stage) for work in works]
    thresholds = [_threshold(work, name) for work, name in zip(works, stages, strict=True)]
    folders = [work.folder(name) for work, name in zip(works, stages, strict=True)]
    samples = first.source.split("score")
    tagged = np.flatnonzero(samples.tags.any(axis=1)).tolist()
    if not tagged:
        raise UserError(f"{first.path}: no image of split 'score' has a tag, there is nothing to compare")
    scores: dict[str, dict[str, float]] = {}
    if samples.mask is not None and None not in thresholds:
        looked = ahead(lambda i: (i, _scores(samples, i, folders, thresholds, len(first.classes))), tagged, workers)
        for index, pair in progress.track(looked, "compare", len(tagged)):
            if not any(np.isnan(pair)):
                scores[samples.names[index]] = {"first": pair[0], "second": pair[1], "gain": pair[1] - pair[0]}
    shown = _chosen(samples, tagged, scores, images)
    titles = [
        f"{place}: {work.path.resolve().name}, {name}"
        for place, (work, name) in enumerate(zip(works, stages, strict=True), 1)
    ]
    rows = [_row(samples, index, folders, titles, scores.get(samples.names[index])) for index in shown]
    write_grid(out / "compare.png", rows)
    found = {
        "works": [str(work.path) for work in works],
        "stages": stages,
        "thresholds": thresholds,
        "threshold_by": "oracle",
        "gained": sum(score["gain"] > 0 for score in scores.values()),
        "lost": sum(score["gain"] < 0 for score in scores.values()),
        "shown": [samples.names[index] for index in shown],
        "images": scores,
    }
    write_json(out / "compare.json", found)
    return found


def table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows for people."""
    rows = []
    for name in found["shown"]:
        score = found["images"].get(name)
        numbers = {k: None if score is None else f"{100 * score[k]:.1f}" for k in ("first", "second", "gain")}
        rows.append({"image": name, **numbers})
    return rows


def _threshold(work: Work, maps: str) -> float | None:
    """The background score that the run reports for these maps."""
    found = [r for r in results(work.path, work.record) if r["kind"] == "maps" and r["of"] == maps]
    return next((float(r["threshold"]) for r in found if "threshold" in r), None)


def _scores(
    samples: Samples, index: int, folders: list[Path], thresholds: list[float | None], num_classes: int
) -> list[float]:
    """Mean IoU of the seeds of one image for each run; NaN where no pixel has truth."""
    assert samples.mask is not None
    truth, found = samples.mask(index), []
    for folder, threshold in zip(folders, thresholds, strict=True):
        assert threshold is not None
        stored = read_maps(map_path(folder, samples.names[index]))
        own = Confusion(num_classes)
        own.update(to_mask(stored.full(), torch.from_numpy(stored.classes), threshold).numpy(), truth)
        found.append(own.scores().miou)
    return found


def _chosen(samples: Samples, tagged: list[int], scores: Mapping[str, Mapping[str, float]], count: int) -> list[int]:
    """Positions of the images to show: half gain most, half lose most (the worst last); or spread evenly."""
    ranked = sorted((i for i in tagged if samples.names[i] in scores), key=lambda i: -scores[samples.names[i]]["gain"])
    if not ranked:
        return [tagged[int(i)] for i in np.linspace(0, len(tagged) - 1, min(count, len(tagged))).round()]
    if len(ranked) <= count:
        return ranked
    return ranked[: count - count // 2] + (ranked[-(count // 2) :] if count > 1 else [])


def _row(
    samples: Samples, index: int, folders: list[Path], titles: list[str], score: Mapping[str, float] | None
) -> list[Panel]:
    image, name = samples.image(index), samples.names[index]
    row = [Panel(name, image)]
    for folder, title, label in zip(folders, titles, ("first", "second"), strict=True):
        best = best_class(read_maps(map_path(folder, name)).full())[1]
        told = "" if score is None else f"\nmIoU {100 * score[label]:.1f}"
        row.append(Panel(title + told, heatmap(image, best.numpy())))
    if samples.mask is not None:
        row.append(Panel("truth", overlay(image, samples.mask(index))))
    return row
