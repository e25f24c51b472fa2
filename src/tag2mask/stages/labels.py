"""Stage: soft maps -> index masks, by a background score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from tag2mask import progress
from tag2mask.data.maps import map_path, read_maps
from tag2mask.errors import UserError
from tag2mask.export import write_mask
from tag2mask.ops.cams import power_background, to_mask
from tag2mask.schema import Input
from tag2mask.stages.context import Context

MASKS = ("labels", "crf")  # the kinds of stages that make masks of the train images


@dataclass(frozen=True, kw_only=True)
class Background:
    """How strong the background is at a pixel: the constant `score` in 0..1, or (1 - largest map)^alpha. Give one."""

    score: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if (self.score is None) == (self.alpha is None):
            raise UserError("give either score (a constant in 0..1) or alpha (a power)")
        if self.score is not None and not 0 <= self.score < 1:
            raise UserError(f"score {self.score} is not in 0..1")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"alpha {self.alpha} is not positive")

    def __call__(self, maps: Tensor) -> float | Tensor:
        """The score for the maps [P H W] of one image: a number or [H W]."""
        if self.score is not None:
            return self.score
        assert self.alpha is not None
        return power_background(maps, self.alpha)


def labels(
    ctx: Context,
    *,
    of: Annotated[Path, Input(("cams", "clip_es", "attention", "amn_maps", "walk"))],
    background: Background,
) -> None:
    """Pseudo-masks: at every pixel the largest of the background score and the maps of the tagged classes.

    of: the soft maps. background: the background score.
    """
    samples = ctx.source.split("train")
    mine = ctx.devices.share(len(samples))
    for index in progress.track(mine, "labels", len(mine), show=ctx.devices.main):
        path = mask_path(ctx.out, samples.names[index])
        if not path.exists():
            stored = read_maps(map_path(of, samples.names[index]))
            maps = stored.full()
            write_mask(path, to_mask(maps, torch.from_numpy(stored.classes), background(maps)).numpy())


def mask_path(folder: Path, name: str) -> Path:
    """The file of the mask of an image."""
    return folder / "masks" / f"{name}.png"
