"""Stages: how good the tag scores, the soft maps and the masks are, where there is truth to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from tag2mask import progress
from tag2mask.data.augment import normalise
from tag2mask.data.images import read_mask
from tag2mask.data.maps import map_path, read_maps
from tag2mask.data.same_size import ahead, same_size_batches
from tag2mask.data.source import Mask, Samples, Source, Split
from tag2mask.errors import UserError
from tag2mask.metrics import Confusion, MaskShares, ThresholdCurve, mean_average_precision
from tag2mask.ops.cams import best_class
from tag2mask.pipeline import Stage, write_json
from tag2mask.schema import Input
from tag2mask.stages.background import chosen
from tag2mask.stages.classify import load_classifier
from tag2mask.stages.context import BatchSize, Context
from tag2mask.stages.labels import MASKS, mask_path

RESULT, PER_IMAGE = "result.json", "per_image.json"
NO_MASKS = "there are no truth masks for this split"
NO_IMAGES = "there are no images in this split"


def evaluate_classifier(
    ctx: Context, *, of: Annotated[Path, Input(("classify",))], split: Split = "test", batch: BatchSize = 16
) -> None:
    """Average precision of the tag scores of one split: a classifier that fails here cannot make good maps.

    of: the classifier. split: train, score or test. batch: images of the same size that go through together.
    """
    samples = ctx.source.split(split)
    if len(samples) == 0:
        return _write(ctx, "classifier", split, samples, {"skipped": NO_IMAGES})
    if not ctx.devices.main:
        return None
    objective = load_classifier(of).to(ctx.devices.device)
    scores = np.zeros(samples.tags.shape, np.float32)
    with progress.bar("tag scores", len(samples)) as advance, torch.no_grad():
        for indices, pixels in same_size_batches(samples.image, range(len(samples)), batch, ctx.workers):
            images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2)).to(ctx.devices.device)
            scores[indices] = objective.look(images).logits.cpu().numpy()
            advance(len(indices))
    mean, each = mean_average_precision(scores, samples.tags)
    values = [None if np.isnan(ap) else float(ap) for ap in each]
    result = {"map": None if np.isnan(mean) else mean, "ap": dict(zip(ctx.source.classes, values, strict=True))}
    return _write(ctx, "classifier", split, samples, result)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The background scores that are tried: `first`, `first` + `step`, ..., `last`.

    SEAM, PPC and HSC report the best of 0.00, 0.01, ..., 0.59.
    """

    first: float = 0.0
    last: float = 0.99
    step: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last < 1 or not 1e-4 <= self.step <= self.last - self.first:
            raise UserError("thresholds need 0 <= first < last < 1 and a step from 0.0001 to last - first")

    def values(self) -> list[float]:
        """All of them; the last one is left out if no number of steps leads to it."""
        count = int((self.last - self.first) / self.step + 1e-6) + 1
        return [round(self.first + i * self.step, 8) for i in range(count)]


def evaluate_maps(
    ctx: Context,
    *,
    of: Annotated[Path, Input(("cams", "clip_es", "pacam", "attention", "amn_maps", "walk"))],
    split: Split = "score",
    thresholds: Sweep = Sweep(),
) -> None:
    """Seeds at every constant background score of a range, in one pass over the maps.

    of: the soft maps. split: where they are scored; its images must be in the train split too. thresholds: the range.
    The threshold that is reported is the best one, chosen with the masks it is scored on ("oracle").
    """
    samples = ctx.source.split(split)
    if samples.mask is None or len(samples) == 0:
        return _write(ctx, "maps", split, samples, {"skipped": NO_MASKS if len(samples) else NO_IMAGES})
    if not ctx.devices.main:
        return None
    truth = samples.mask
    curve = ThresholdCurve(len(ctx.source.classes), thresholds.values())

    def one(index: int) -> tuple[Mask, Any, Mask]:
        stored = read_maps(map_path(of, samples.names[index]))
        position, value = best_class(stored.full())
        best = torch.from_numpy(stored.classes)[position] if len(stored.classes) else position
        return best.to(torch.uint8).numpy(), value.numpy(), truth(index)

    for counted in progress.track(ahead(one, range(len(samples)), ctx.workers), "seeds", len(samples)):
        curve.update(*counted)
    threshold, scores = curve.best()
    found = {"threshold": threshold, "threshold_by": "oracle", "thresholds": asdict(thresholds)}
    result = found | scores.to_dict(ctx.source.classes)
    return _write(ctx, "maps", split, samples, result | {"curve": curve.to_dict()})


def evaluate_masks(ctx: Context, *, of: Annotated[Path, Input((*MASKS, "predict"))], split: Split = "score") -> None:
    """Masks against the truth of one split; without truth, the share of the pixels that each class covers.

    of: the masks. split: train, score or test; the masks must exist for its images. Images whose true masks helped to
    choose the background score (val-masks) are left out; where none is left, all are scored and it is an oracle's.
    """
    samples = ctx.source.split(split)
    if len(samples) == 0:
        return _write(ctx, "masks", split, samples, {"skipped": NO_IMAGES})
    if not ctx.devices.main:
        return None
    classes = ctx.source.classes
    total, shares, truths = Confusion(len(classes)), MaskShares(len(classes)), MaskShares(len(classes))
    per_image: dict[str, float] = {}
    kept, how = _unseen(of, samples)
    for name, mask, truth in progress.track(_pairs(ctx, of, samples, kept), "masks", len(kept)):
        shares.update(mask)
        if truth is not None:
            own = Confusion(len(classes))
            own.update(mask, truth)
            total.merge(own)
            truths.update(truth)
            per_image[name] = own.scores().miou
    result = how | {"images": len(kept)} | shares.to_dict(classes)
    if samples.mask is None:
        return _write(ctx, "masks", split, samples, result | {"skipped": NO_MASKS})
    result |= {"truth_shares": truths.to_dict(classes)["shares"]}
    write_json(ctx.out / PER_IMAGE, {name: score for name, score in per_image.items() if not np.isnan(score)})
    return _write(ctx, "masks", split, samples, {"threshold_by": "recipe"} | result | total.scores().to_dict(classes))


def check_split(source: Source, stage: Stage) -> None:
    """Look whether every image to score will have its map or mask. Raises UserError if not."""
    split, of = stage.settings["split"], stage.inputs["of"]
    made = of.settings.get("split", "train")
    scored, there = source.split(split).names, set(source.split(made).names)
    missing = [name for name in scored if name not in there]
    if missing:
        raise UserError(
            f"split: {of.name} is made for the images in {made!r}, and {len(missing)} of the {len(scored)} images in "
            f"{split!r} are not there, the first is {missing[0]}; set split: {made} or correct the lists of the data"
        )


def _unseen(of: Path, samples: Samples) -> tuple[list[int], dict[str, Any]]:
    """The images to score, and the threshold of their masks with how it was chosen, if it was."""
    told = chosen(of)
    if told is None:
        return list(range(len(samples))), {}
    seen = set(told.pop("looked_at"))
    kept = [index for index, name in enumerate(samples.names) if name not in seen]
    if kept and told["threshold_by"] != "oracle":
        return kept, told
    return list(range(len(samples))), told | {"threshold_by": "oracle"}


def _pairs(ctx: Context, of: Path, samples: Samples, kept: Sequence[int]) -> Iterator[tuple[str, Mask, Mask | None]]:
    def one(index: int) -> tuple[str, Mask, Mask | None]:
        mask = read_mask(mask_path(of, samples.names[index]), len(ctx.source.classes))
        return samples.names[index], mask, samples.mask(index) if samples.mask else None

    return ahead(one, kept, ctx.workers)


def _write(ctx: Context, kind: str, split: Split, samples: Samples, result: dict[str, Any]) -> None:
    head = {"kind": kind, "split": split, "images": len(samples), "classes": list(ctx.source.classes)}
    if ctx.devices.main:
        write_json(ctx.out / RESULT, head | result)
