"""Pseudo-labels for contrast from a network's own maps, refined by a CRF on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tag2mask.core import Batch
from tag2mask.ops.cams import resize_corners
from tag2mask.ops.contrast import IGNORE, confidence, top_pixels, valid_on_grid
from tag2mask.ops.mean_field import Refiner, colours_of

Size = tuple[int, int]


@dataclass(frozen=True)
class Labeller:
    """Each pixel's most confident tagged class, or background; 255 on padding.

    background: score of the background, in 0..1. saliency: the score is 1 - side["saliency"] instead. refiner: what
    is done to the labels, if anything; refine_side: on a square grid of that side instead of the one asked for.
    ignore_padding: padding gets 255. negative_floor: see `ops.cams.min_max_norm`.
    """

    background: float
    saliency: bool
    refiner: Refiner | None
    refine_side: int | None
    ignore_padding: bool
    negative_floor: bool

    @torch.no_grad()
    def assign(self, cams: Tensor, batch: Batch, size: Size) -> tuple[Tensor, Tensor]:
        """Maps [B K h' w'] -> (confidence [B K h w] in 0..1 per map, labels [B h w])."""
        valid = valid_on_grid(batch.valid, size)
        if not self.ignore_padding:
            valid = torch.ones_like(valid)
        maps = confidence(resize_corners(cams.relu(), size), valid, negative_floor=self.negative_floor)
        score, best = (maps * batch.tags[:, :, None, None]).max(dim=1)
        background = torch.full_like(score, self.background)
        if self.saliency:
            background = 1 - F.interpolate(batch.side["saliency"], size=size, mode="area")[:, 0]
        return maps, torch.where(valid, torch.where(score > background, best + 1, 0), IGNORE)

    @torch.no_grad()
    def refine(self, labels: Tensor, cams: Tensor, batch: Batch, images: Tensor) -> Tensor:
        """Labels [B h w] that `assign` made of `cams`, refined with the colours of `images` [B 3 H W]."""
        if self.refiner is None:
            return labels
        grid, given = (labels.shape[1], labels.shape[2]), labels
        size = grid if self.refine_side is None else (self.refine_side, self.refine_side)
        if size != grid:
            labels = self.assign(cams, batch, size)[1]
        inside = labels != IGNORE
        colours = colours_of(resize_corners(images, size))
        labels = self.refiner(torch.where(inside, labels, 0), colours, batch.tags.shape[1] + 1, inside)
        labels = torch.where(inside, labels, IGNORE)
        if size != grid:
            labels = F.interpolate(labels[:, None].float(), size=grid, mode="nearest-exact")[:, 0].long()
        return torch.where(given == IGNORE, IGNORE, labels)


@torch.no_grad()
def prototype_weights(maps: Tensor, labels: Tensor, top: int, *, assigned: bool, ground_ties: bool) -> Tensor:
    """The weight of every pixel in the prototype of every class over the global batch: [B 1+K h w], background first.

    Of a class: its confidence `maps` [B K h w] on its `top` most confident pixels, which are among those labelled so
    (labels [B h w]) if `assigned`, else any. Of background: 1 on every pixel labelled so; with `ground_ties` on the
    first `top` pixels of the batch.
    """
    inside = (labels != IGNORE)[:, None]
    classes = torch.arange(1, maps.shape[1] + 1, device=maps.device).view(1, -1, 1, 1)
    candidates = labels[:, None] == classes if assigned else inside.expand_as(maps)
    weights = torch.where(top_pixels(maps, candidates, top), maps, 0)
    ground = top_pixels(torch.zeros_like(maps[:, :1]), inside, top) if ground_ties else labels[:, None] == 0
    return torch.cat([ground.to(maps.dtype), weights], dim=1)
