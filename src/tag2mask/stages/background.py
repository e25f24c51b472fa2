"""The background score of masks: given as a number, or chosen once, before the first mask is made.

"auto" looks at maps and images alone; "val-masks n=K" and "oracle" look at true masks, and results say so. The choice
is kept in the stage's folder, so that a run that was killed goes on with the same score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tag2mask import progress
from tag2mask.data.maps import Maps, map_path, read_maps
from tag2mask.data.source import Mask, Samples, Source
from tag2mask.errors import UserError
from tag2mask.metrics import Confusion, ThresholdCurve
from tag2mask.ops.cams import best_class, power_background
from tag2mask.ops.threshold import crossing, moments, spread_score
from tag2mask.pipeline import Stage, read_json, write_json
from tag2mask.stages.context import Context

CHOSEN = "threshold.json"
WORDS = re.compile(r"auto|oracle|val-masks n=([1-9]\d*)")
FEW = 64  # images on which a score is carried over to refined masks
TRIED = tuple(i / 100 for i in range(5, 100, 5))  # scores of refined masks that are compared with true ones

# (score, places in the train split) -> (place, refined mask) of each, in any order
Refined = Callable[[float, Sequence[int]], Iterator[tuple[int, Mask]]]


@dataclass(frozen=True, kw_only=True)
class Background:
    """How strong the background is at a pixel: `score`, or (1 - largest map)^alpha. Give one.

    score: a constant in 0..1; "auto", chosen from the maps without any mask; "val-masks n=20", the best on 20 images of
    the score split that have a true mask; "oracle", the best on all of them.
    """

    score: float | str | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if (self.score is None) == (self.alpha is None):
            raise UserError("give either score (a constant in 0..1) or alpha (a power)")
        if isinstance(self.score, str):
            if not WORDS.fullmatch(self.score):
                raise UserError(f"score {self.score!r} is neither a number nor auto, val-masks n=20 or oracle")
        elif self.score is not None and not 0 <= self.score < 1:
            raise UserError(f"score {self.score} is not in 0..1")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"alpha {self.alpha} is not positive")

    def __call__(self, maps: Tensor) -> float | Tensor:
        """The score for the maps [P H W] of one image: a number or [H W]. It must have been chosen (`settled`)."""
        if self.alpha is not None:
            return power_background(maps, self.alpha)
        assert isinstance(self.score, float | int)
        return self.score


def settled(ctx: Context, of: Path, background: Background, refined: Refined | None = None) -> Background:
    """`background` with a number in place of a word.

    Chosen by the first process on soft maps `of`, or read where an earlier run has chosen. refined: makes the masks, if
    they are not the seeds themselves.
    """
    if not isinstance(background.score, str):
        return background
    path = ctx.out / CHOSEN
    if ctx.devices.main and not path.exists():
        choice = (
            _from_maps(ctx, of, refined) if background.score == "auto" else _from_masks(ctx, of, background, refined)
        )
        write_json(path, choice)
        progress.say(f"background score: {choice['threshold']:.2f}, {choice['threshold_by']}")
    ctx.devices.wait()
    return Background(score=float(read_json(path)["threshold"]))


def chosen(folder: Path) -> dict[str, Any] | None:
    """What a stage of masks has chosen: {"threshold", "threshold_by", "looked_at": names}; None if it was told.

    `looked_at` are the images whose true masks were used. Empty for "no-mask".
    """
    path = folder / CHOSEN
    return dict(read_json(path)) if path.exists() else None


def check_background(source: Source, stage: Stage) -> None:
    """Look whether there are the masks that the choice of a score needs. Raises UserError if not."""
    score = stage.settings["background"]["score"]
    if not isinstance(score, str) or score == "auto":
        return
    samples = source.split("score")
    if samples.mask is None:
        raise UserError(
            f"background.score: {score} needs true masks of the score split; give data.masks, or score: auto"
        )
    found = WORDS.fullmatch(score)
    wanted, there = int(found[1] or 1) if found else 1, int(samples.tags.any(axis=1).sum())
    if there < wanted:
        raise UserError(f"background.score: {score}, but the score split has {there} tagged images; ask for fewer")
    missing = set(samples.names) - set(source.split("train").names)
    if missing:
        raise UserError(
            f"background.score: {score} needs the score split within train; {min(missing)} is not, correct data.score"
        )


def _from_maps(ctx: Context, of: Path, refined: Refined | None) -> dict[str, Any]:
    samples = ctx.source.split("train")
    tagged = np.flatnonzero(samples.tags.any(axis=1)).tolist()
    seen = []
    for index in progress.track(tagged, "background score", len(tagged)):
        path = map_path(of, samples.names[index])
        seen.append(moments(torch.from_numpy(read_maps(path).maps)))
        if not np.isfinite(seen[-1]).all():
            raise UserError(f"{path}: has values that are not finite; delete the file and run the recipe again")
    score = round(spread_score(seen), 2) if seen else 0.5  # without a tag, every mask is background
    if refined is not None and tagged:
        score = _carried_over(of, samples, evenly(tagged, FEW), score, refined)
    return {"threshold": score, "threshold_by": "no-mask", "looked_at": []}


def _carried_over(of: Path, samples: Samples, few: Sequence[int], score: float, refined: Refined) -> float:
    """The score whose refined masks cover as much of `few` images as the seeds at `score`."""

    def covered(tried: float) -> float:
        return float(np.mean([(mask > 0).mean() for _, mask in refined(tried, few)]))

    seeds = [
        float((best_class(read_maps(map_path(of, samples.names[i])).full())[1] > score).float().mean()) for i in few
    ]
    return crossing(covered, float(np.mean(seeds)))


def _from_masks(ctx: Context, of: Path, background: Background, refined: Refined | None) -> dict[str, Any]:
    scored, score = ctx.source.split("score"), str(background.score)
    found = WORDS.fullmatch(score)
    assert scored.mask is not None and found is not None
    held = list(range(len(scored)))
    if found[1]:
        held = evenly(np.flatnonzero(scored.tags.any(axis=1)).tolist(), int(found[1]))
    best = _best_seeds(ctx, of, scored, held) if refined is None else _best_refined(ctx, scored, held, refined)
    return {"threshold": best, "threshold_by": score, "looked_at": [scored.names[i] for i in held]}


def _best_seeds(ctx: Context, of: Path, scored: Samples, held: Sequence[int]) -> float:
    assert scored.mask is not None
    curve = ThresholdCurve(len(ctx.source.classes))
    for index in progress.track(held, "background score", len(held)):
        stored = read_maps(map_path(of, scored.names[index]))
        curve.update(*_named(stored), scored.mask(index))
    return curve.best()[0]


def _best_refined(ctx: Context, scored: Samples, held: Sequence[int], refined: Refined) -> float:
    assert scored.mask is not None
    place = {name: index for index, name in enumerate(ctx.source.split("train").names)}
    truth_of = {place[scored.names[index]]: index for index in held}
    totals = [Confusion(len(ctx.source.classes)) for _ in TRIED]
    for score, total in progress.track(zip(TRIED, totals, strict=True), "background score", len(TRIED)):
        for index, mask in refined(score, list(truth_of)):
            total.update(mask, scored.mask(truth_of[index]))
    return TRIED[int(np.nanargmax([total.scores().miou for total in totals]))]


def _named(stored: Maps) -> tuple[Mask, np.ndarray[Any, np.dtype[np.float32]]]:
    """Best class [H W] and its value, as `ThresholdCurve` takes them."""
    position, value = best_class(stored.full())
    best = torch.from_numpy(stored.classes)[position] if len(stored.classes) else position
    return best.to(torch.uint8).numpy(), value.numpy()


def evenly(places: Sequence[int], count: int) -> list[int]:
    """`count` of the places, evenly over the list; all of them if there are no more."""
    if len(places) <= count:
        return list(places)
    return [places[i * len(places) // count] for i in range(count)]
