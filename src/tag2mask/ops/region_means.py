"""Means of losses over the pixels of regions, in the three ways in which formulas with a bare sum are read."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tag2mask.ops.gather import processes, sum_over_processes


def mean_over_regions(
    losses: Tensor, regions: Tensor, weights: Tensor, kind: Literal["classes", "pixels", "sum"], images: int
) -> Tensor:
    """The weighted mean of the losses [P] of pixels in regions [P]: a scalar, 0 if there is nothing.

    regions: 0..C-1, or another number for pixels that count nowhere. weights [C] of the regions. kind: "classes" takes
    the mean over the pixels of each region of the global batch, then the weighted mean of those that have any;
    "pixels" the weighted mean over all pixels; "sum" the weighted sum over the pixels of an image, then the mean over
    images, of which this process has `images`. The mean over processes is the value of the global batch.
    """
    inside = regions[:, None] == torch.arange(len(weights), device=regions.device)
    if kind == "sum":
        shares = weights / images
    else:
        counts = sum_over_processes(inside.sum(dim=0))
        parts = weights * ((counts > 0) if kind == "classes" else counts)
        shares = weights * processes() / _or_one(parts.sum())
        if kind == "classes":
            shares = shares / counts.clamp(min=1)
    return (torch.where(inside, shares, 0).sum(dim=1) * losses).sum()


def _or_one(total: Tensor) -> Tensor:
    """1 in place of 0, to divide by."""
    return torch.where(total > 0, total, 1)
