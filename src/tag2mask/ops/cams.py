"""Class activation maps: pooling, normalisation, background scores, and maps -> masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


def pool(cams: Tensor) -> Tensor:
    """Global average pooling, [B K h w] -> logits [B K] (Zhou et al. 2016, section 2)."""
    return cams.mean(dim=(2, 3))


def max_norm(cams: Tensor) -> Tensor:
    """ReLU, then divide every map [... h w] by (its maximum + 1e-5): values in 0..1, a map of zeros stays zero."""
    cams = cams.relu()
    return cams / (cams.amax(dim=(-2, -1), keepdim=True) + EPS)


def min_max_norm(cams: Tensor, *, negative_floor: bool = False) -> Tensor:
    """ReLU, then every map [... h w] to (value - min - 1e-5) / (max - min + 1e-5), and 0 where that is negative.

    Values in 0..1, just below 1 at the maximum; a constant map, of zeros or not, becomes zeros. The normalisation of
    SEAM and of the methods that build on it; gradients flow through the minimum and the maximum too.

    negative_floor: as in the released code of SEAM (seeds), PPC and HSC (prototypes and labels). Values below
    min + 1e-5 become -(min + 1e-5) / (max - min + 1e-5), a jump that can go below -1, and a map of zeros becomes -1
    everywhere; all other values are the same.
    """
    cams = cams.relu()
    low, high = cams.amin(dim=(-2, -1), keepdim=True), cams.amax(dim=(-2, -1), keepdim=True)
    above = cams - low - EPS
    above = torch.where(cams < low + EPS, -low - EPS, above) if negative_floor else above.relu()
    return above / (high - low + EPS)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, [B K h w] -> [B K H W], corners not aligned."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def resize_corners(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, [B K h w] -> [B K H W], corners aligned: how SEAM and what builds on it resize."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def power_background(maps: Tensor, alpha: float) -> Tensor:
    """Background score (1 - max_k map)^alpha, [K h w] -> [h w] (PSA, Ahn & Kwak 2018, eq. 2); K = 0 gives ones."""
    if len(maps) == 0:
        return maps.new_ones(maps.shape[1:])
    return (1 - maps.amax(dim=0)).clamp(0, 1) ** alpha


def best_class(maps: Tensor) -> tuple[Tensor, Tensor]:
    """[P h w] -> (position of the largest map [h w], its value [h w]); with P = 0 positions and values are 0."""
    if len(maps) == 0:
        zeros = maps.new_zeros(maps.shape[1:])
        return zeros.long(), zeros
    value, position = maps.max(dim=0)
    return position, value


def to_mask(maps: Tensor, classes: Tensor, background: float | Tensor) -> Tensor:
    """Seeds: the arg-max of the background score and the maps of the tagged classes; background wins ties.

    maps [P h w] in 0..1 of the P tagged classes; classes [P] their indices in 0..K-1; background: a number or
    [h w]. Returns [h w] uint8, 0 for background and class index + 1 elsewhere.
    """
    position, value = best_class(maps)
    if len(maps) == 0:
        return torch.zeros_like(value, dtype=torch.uint8)
    return torch.where(value > background, classes[position] + 1, 0).to(torch.uint8)
