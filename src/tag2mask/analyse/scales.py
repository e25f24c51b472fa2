"""How much maps depend on the scale of the images: table 5 of RCM and MAM.

Each scale alone gives maps and seeds, at its own best background score and at the one that is best for all scales
together (the largest mean of their mIoUs). The spread is the standard deviation over the scales, divided by their
number, which is how the numbers of that table come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tag2mask import progress
from tag2mask.analyse.svg import Curve, line_chart
from tag2mask.analyse.work import Work
from tag2mask.data.augment import normalise
from tag2mask.data.maps import Maps
from tag2mask.data.same_size import same_size_batches
from tag2mask.data.source import Samples
from tag2mask.engine import Devices
from tag2mask.errors import UserError
from tag2mask.metrics import ThresholdCurve
from tag2mask.ops.cams import best_class
from tag2mask.pipeline import write_json
from tag2mask.stages.cams import multi_scale
from tag2mask.stages.evaluate import NO_MASKS, Sweep


def scale_table(
    work: Work, out: Path, *, scales: Sequence[float], devices: Devices, stage: str | None = None, workers: int = 2
) -> dict[str, Any]:
    """Seeds of every scale alone and of all together, on the split "score"; writes scales.json and scales.svg.

    scales: factors on the images' size. stage: which classifier; the last one if not given. Mirror images and batches
    are as in the first cams stage that reads it, thresholds as in the first evaluate_maps stage of that.
    Returns {"scales": [{"scale", "miou", "threshold", "miou_common"}], "together", "mean", "spread", "mean_common",
    "spread_common", "threshold_common", ...}; mIoU in 0..1. Raises UserError without truth, or for one scale given
    twice, or out of range.
    """
    if len(set(scales)) != len(scales) or not scales or not all(0.05 <= scale <= 8 for scale in scales):
        raise UserError("--scales: give different numbers from 0.05 to 8, separated by commas, e.g. 0.5,1,1.5,2")
    samples = work.source.split("score")
    if samples.mask is None or len(samples) == 0:
        raise UserError(f"scales: split 'score': {NO_MASKS}; give data.masks and run the recipe again")
    name, objective = work.classifier(stage, devices)
    looks, sweep = _as_in_the_run(work, name)
    groups = [(scale,) for scale in scales] + ([tuple(scales)] if len(scales) > 1 else [])
    curves = [ThresholdCurve(len(work.classes), sweep.values()) for _ in groups]
    tags = torch.from_numpy(samples.tags)
    with progress.bar("scales", len(samples)) as advance:
        for indices, pixels in same_size_batches(samples.image, range(len(samples)), looks["batch"], workers):
            images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2)).to(devices.device)
            for group, curve in zip(groups, curves, strict=True):
                maps, _ = multi_scale(objective, images, tags[indices], scales=group, flip=looks["flip"])
                for index, own in zip(indices, maps, strict=True):
                    _count(curve, samples, index, own)
            advance(len(indices))
    found = summary(scales, curves[: len(scales)])
    if len(groups) > 1:
        threshold, best = curves[-1].best()
        found["together"] = {"scales": list(scales), "miou": float(best.miou), "threshold": threshold}
    found |= {"classifier": name, "split": "score", "images": len(samples), "flip": looks["flip"]}
    found |= {"threshold_by": "oracle", "thresholds": asdict(sweep)}
    write_json(out / "scales.json", found)
    _draw(out / "scales.svg", found, curves)
    return found


def summary(scales: Sequence[float], curves: Sequence[ThresholdCurve]) -> dict[str, Any]:
    """The numbers of every scale, and their mean and spread at own and at common thresholds."""
    values = np.array([[score.miou for score in curve.scores()] for curve in curves])  # [S T]
    common = int(values.mean(axis=0).argmax())
    bests = [curve.best() for curve in curves]
    own, shared = np.array([best.miou for _, best in bests]), values[:, common]
    return {
        "scales": [
            {"scale": scale, "miou": float(a), "threshold": threshold, "miou_common": float(b)}
            for scale, a, (threshold, _), b in zip(scales, own, bests, shared, strict=True)
        ],
        "mean": float(own.mean()),
        "spread": float(own.std()),
        "threshold_common": curves[0].to_dict()["threshold"][common],
        "mean_common": float(shared.mean()),
        "spread_common": float(shared.std()),
    }


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for people."""
    common = f"all at {found['threshold_common']:.2f}"

    def row(scale: str, miou: str, threshold: str, shared: str) -> dict[str, Any]:
        return {"scale": scale, "own best": miou, "at": threshold, common: shared}

    rows = [
        row(f"{r['scale']:g}", _percent(r["miou"]), f"{r['threshold']:.2f}", _percent(r["miou_common"]))
        for r in found["scales"]
    ]
    own = f"{_percent(found['mean'])} ± {_percent(found['spread'])}"
    rows.append(row("mean ± spread", own, "", f"{_percent(found['mean_common'])} ± {_percent(found['spread_common'])}"))
    if together := found.get("together"):
        rows.append(row("all together", _percent(together["miou"]), f"{together['threshold']:.2f}", ""))
    return rows


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _as_in_the_run(work: Work, classifier: str) -> tuple[dict[str, Any], Sweep]:
    """({"flip", "batch"}, thresholds) of the stages that follow the classifier, or their defaults."""
    looks, sweep = {"flip": True, "batch": 4}, Sweep()
    for stage in work.readers(classifier, "cams")[:1]:
        settings = work.manifest(stage)["settings"]
        looks = {key: settings[key] for key in looks}
        for reader in work.readers(stage, "evaluate_maps")[:1]:
            sweep = Sweep(**work.manifest(reader)["settings"]["thresholds"])
    return looks, sweep


def _count(curve: ThresholdCurve, samples: Samples, index: int, maps: torch.Tensor) -> None:
    """Add the seeds of one image, as if its maps [P h w], half precision, had been written and read."""
    assert samples.mask is not None
    truth = samples.mask(index)
    classes = np.flatnonzero(samples.tags[index]).astype(np.int64)
    height, width = truth.shape
    position, value = best_class(Maps(classes, maps.numpy(), (height, width), np.zeros(0, np.float32)).full())
    best = torch.from_numpy(classes)[position] if len(classes) else position
    curve.update(best.to(torch.uint8).numpy(), value.numpy(), truth)


def _draw(path: Path, found: dict[str, Any], curves: Sequence[ThresholdCurve]) -> None:
    names = [f"scale {row['scale']:g}: {_percent(row['miou'])} % at {row['threshold']:.2f}" for row in found["scales"]]
    if together := found.get("together"):
        names.append(f"all together: {_percent(together['miou'])} % at {together['threshold']:.2f}")
    lines = []
    for name, curve in zip(names, curves, strict=True):
        values = curve.to_dict()
        points = zip(values["threshold"], values["miou"], strict=True)
        lines.append(Curve(name, [(t, 100 * v) for t, v in points if t is not None and v is not None]))
    title = f"Seeds of {found['classifier']}, every scale alone"
    line_chart(path, lines, title=title, x_label="background score", y_label="mIoU, %")
