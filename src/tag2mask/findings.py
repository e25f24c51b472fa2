"""What a finished run tells about itself without any mask, and beside other runs: read from work folders."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tag2mask import progress
from tag2mask.data.maps import map_path, read_logits, read_maps
from tag2mask.data.source import Samples, Split
from tag2mask.metrics.confidence import MapConfidence
from tag2mask.pipeline import MANIFEST, read_json
from tag2mask.report import Compared, Confidence, FewMasks, TagCheck, check_tags, suspects_to_picture
from tag2mask.report.peers import Made, Peers, seedless
from tag2mask.stages.background import Background, chosen
from tag2mask.stages.evaluate import RESULT
from tag2mask.stages.labels import MASKS

LOOKED_AT = 500  # images whose maps are read for the confidence, evenly spread
COUNTS = (5, 10, 20, 50)  # true masks to train on, where there are as many
LONG = 2000  # images to go through that are worth a progress bar

Record = Mapping[str, Any]
Splits = Callable[[Split], Samples]


def tag_check(work: Path, record: Record, split: Splits, classes: Sequence[str]) -> TagCheck | None:
    """The tags of the train split as the classifier of the first maps sees them; None where no logits were kept."""
    folder = next((work / s["folder"] for s in record["stages"].values() if s["kind"] == "cams"), None)
    if folder is None or not (folder / MANIFEST).exists():
        return None
    train = split("train")
    names = progress.track(train.names, "tags", len(train), show=len(train) >= LONG)
    logits = np.stack([read_logits(map_path(folder, name)) for name in names])
    if np.isnan(logits).any(axis=1).all():
        return None
    found = check_tags(train.names, classes, train.tags, logits)
    place = {name: index for index, name in enumerate(train.names)}
    return replace(
        found,
        pictures={name: train.image(place[name]) for name in suspects_to_picture(found.suspects)},
        file=f"{record['name']}-suspicions.csv",
    )


def confidence(work: Path, record: Record, split: Splits, classes: Sequence[str]) -> Confidence | None:
    """How clearly the maps that the last masks were made of speak, at the background score of these masks.

    Without masks it is the last maps that were measured, at the threshold that was reported for them.
    """
    found = _used_maps(work, record)
    if found is None:
        return None
    of, background, words = found
    train = split("train")
    tagged = np.flatnonzero(train.tags.any(axis=1))
    places = tagged[np.linspace(0, len(tagged) - 1, min(LOOKED_AT, len(tagged))).astype(int)] if len(tagged) else tagged
    counts = MapConfidence(len(classes))
    maps = work / record["stages"][of]["folder"]
    for index in places.tolist():
        stored = read_maps(map_path(maps, train.names[index]))
        ground = background(torch.from_numpy(stored.maps).float())
        counts.update(stored.maps, stored.classes, ground.numpy() if isinstance(ground, torch.Tensor) else ground)
    by_class = {name: counts.of_class(k) for k, name in enumerate(classes)}
    return Confidence(of=of, images=len(places), background=words, classes=by_class)


def compared(work: Path, record: Record, peers: Peers) -> tuple[list[Compared], str]:
    """Every result with those of comparable runs, and the name of the runs without methods, empty without methods."""
    found, plain = [], ""
    for name, stage in record["stages"].items():
        if not (work / stage["folder"] / RESULT).exists() or not _done(work, stage):
            continue
        head = {"stage": name, "of": stage["inputs"].get("of", "")}
        key = read_json(work / stage["folder"] / MANIFEST)["key"]
        same, without = peers.like(key), []
        if methods := peers.methods(key):
            without = peers.like(key, methods=False)
            plain = _plain_name(set(methods.values()))
        found.append(Compared(*([head | _result(peers, m) for m in made] for made in (same, without))))
    return found, plain


def few_masks(work: Path, record: Record, peers: Peers) -> FewMasks | None:
    """What was measured with the same segmenter, trained on few masks of the same data; None if nothing was."""
    for stage in reversed(record["stages"].values()):
        if stage["kind"] != "evaluate_masks" or not _done(work, stage):
            continue
        own = read_json(work / stage["folder"] / MANIFEST)
        trained = [made for made in peers.chain(own["key"]) if made.kind == "segment"]
        result = read_json(work / stage["folder"] / RESULT)
        if not trained or result.get("miou") is None:
            continue
        scores: dict[int, list[float]] = {}
        for made in peers.made.values():
            if made.kind == "evaluate_masks" and made.manifest["settings"] == own["settings"]:
                steps = [*peers.chain(made.manifest["key"])]
                if steps[0].kind == "few_masks" and _alike(steps, [*peers.chain(own["key"])]):
                    count = int(steps[0].manifest["settings"]["count"])
                    scores.setdefault(count, []).append(read_json(made.folder / RESULT)["miou"])
        if scores:
            return FewMasks(stage["inputs"]["of"], result["split"], result["miou"], sorted(scores.items()))
    return None


def commands(work: Path, record: Record) -> dict[str, str]:
    """Command lines that make what a report lacks: runs "plain" (without methods) and with another "seed"; "few-masks".

    They go on from the recipe as it was run, which lies in the work folder, and leave this run's own record alone.
    """
    settings = {name: _settings(work / s["folder"]) for name, s in record["stages"].items()}
    recipe = work / f"{record['name']}.recipe.yaml"
    with_methods = [f"{name}.methods=null" for name, own in settings.items() if own.get("methods")]
    seeds = [f"{n}.train.seed={own['train']['seed'] + 1}" for n, own in settings.items() if own.get("train")]
    again = ["tag2mask", "report", str(work), "--name", str(record["name"])]
    found = {}
    for key, changed in (("plain", with_methods), ("seed", seeds)):
        if changed:
            words = ["tag2mask", "run", str(recipe), *(w for c in changed for w in ("-s", c)), "--work", str(work)]
            found[key] = f"{shlex.join(words)} && {shlex.join(again)}"
    there = record["summary"].get("splits", {}).get("score", 0)
    counts = ",".join(str(count) for count in COUNTS if count <= there)
    if counts and any(s["kind"] == "segment" for s in record["stages"].values()):
        words = ["tag2mask", "few-masks", str(work), "--counts", counts, "--name", str(record["name"])]
        found["few-masks"] = shlex.join(words)
    return found


def _done(work: Path, stage: Mapping[str, Any]) -> bool:
    return bool((work / stage["folder"] / MANIFEST).exists())


def _result(peers: Peers, made: Made) -> dict[str, Any]:
    result: dict[str, Any] = read_json(made.folder / RESULT)
    return result | {"seed": peers.seeds(made)}


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    return dict(read_json(path)["settings"]) if path.exists() else {}


def _used_maps(work: Path, record: Record) -> tuple[str, Background, str] | None:
    """The maps that are used last, the background score that is set against them, and the same in words."""
    done = [stage for stage in record["stages"].values() if _done(work, stage)]
    for stage in reversed(done):
        if stage["kind"] in MASKS:
            return (stage["inputs"]["of"], *_background(work / stage["folder"]))
    for stage in reversed(done):
        result = read_json(work / stage["folder"] / RESULT) if stage["kind"] == "evaluate_maps" else {}
        if (score := result.get("threshold")) is not None:
            return stage["inputs"]["of"], Background(score=float(score)), f"{score:g} ({result['threshold_by']})"
    return None


def _background(folder: Path) -> tuple[Background, str]:
    """The background score of a stage of masks, and the same in words."""
    given = Background(**_settings(folder)["background"])
    told = chosen(folder)
    if told is not None:
        return Background(score=float(told["threshold"])), f"{told['threshold']:g} ({told['threshold_by']})"
    if given.alpha is not None:
        return given, f"(1 - largest map)^{given.alpha:g}"
    return given, f"{given.score:g}"


def _plain_name(nets: set[str]) -> str:
    return "plain CAM" if nets == {"cam"} else f"{' and '.join(sorted(nets))} alone"


def _alike(few: Sequence[Any], own: Sequence[Any]) -> bool:
    """Whether two chains (training, prediction, evaluation) apply the same segmenter to the same data."""
    trained = next(made for made in own if made.kind == "segment")
    first = {k: v for k, v in seedless(few[0].manifest["settings"]).items() if k != "count"}
    same_data = few[0].manifest["data"] == trained.manifest["data"]
    predicted = [made.manifest["settings"] for made in (few[1], own[own.index(trained) + 1])]
    return bool(same_data and first == seedless(trained.manifest["settings"]) and predicted[0] == predicted[1])
