"""Pairs of nearby cells of a grid: which there are, how alike two cells are, what their labels say, and the losses.

Ahn and Kwak: Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised Semantic
Segmentation, CVPR 2018, arXiv:1803.10464 (PSA). Ahn, Cho and Kwak: Weakly Supervised Learning of Instance Segmentation
with Inter-pixel Relations, CVPR 2019, arXiv:1904.05044 (IRN).

    P    = {(i, j) : |p_i - p_j| < radius}              each pair once              (PSA sec. 3.2, IRN sec. 4.2)
    a_ij = exp(-mean_d |f_i - f_j|)                     from features               (PSA sec. 3.2)
    a_ij = 1 - max_{k on the path from i to j} B_k      from boundaries             (IRN sec. 4.4)
    L    = bg / 4 + fg / 4 + neg / 2                                                (PSA sec. 3.2, IRN sec. 4.4)
    bg   = mean of -log a_ij over the pairs that are both background; fg: both of the same class;
    neg  = mean of -log(1 - a_ij) over the pairs of different labels; a pair with an unlabelled cell is in none

PSA prints the sum over d and weights 1, 1, 2: here, as in its released code, the mean and a quarter of those. A path is
every cell that is closer than one cell to the line from i to j, both ends included, within the rectangle they span.

Nothing of all pairs is ever held: the pairs of one offset are two slices of the grid, and the losses go through the
offsets one by one and compute each again for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tag2mask.core import Losses
from tag2mask.data.source import IGNORE
from tag2mask.errors import UserError
from tag2mask.ops.gather import mean_over_processes, processes
from tag2mask.refine.grid import Size

EPS = 1e-5
Border = Literal["all", "psa"]


@dataclass(frozen=True)
class Pairs:
    """All pairs of one offset: (y, x) in the window [top:bottom, left:right], and (y + dy, x + dx)."""

    dy: int
    dx: int
    top: int
    bottom: int
    left: int
    right: int

    def first(self, x: Tensor) -> Tensor:
        """The first cells, [... h w] -> [... h' w']; no copy."""
        return x[..., self.top : self.bottom, self.left : self.right]

    def second(self, x: Tensor) -> Tensor:
        """The second cells, [... h w] -> [... h' w']; no copy."""
        return x[..., self.top + self.dy : self.bottom + self.dy, self.left + self.dx : self.right + self.dx]


def pairs_of(size: Size, radius: int, border: Border = "all") -> list[Pairs]:
    """Every pair of cells closer than `radius` on an h x w grid, once; offsets without a pair are left out.

    border: "all" pairs; "psa": as in PSA's released code only those whose first cell is not in the last radius - 1
    rows, nor in the first or last radius - 1 columns. Ten cells of a grid then have no pair at all (with radius 5).
    Where a side is shorter than 2 radius + 1, the radius is (side - 1) // 2, as in SEAM's copy of that code.
    Raises UserError for a radius under 2.
    """
    if radius < 2:
        raise UserError(f"radius: {radius} leaves no pairs; give a whole number from 2")
    height, width = size
    if border == "psa" and min(size) < 2 * radius + 1:
        radius = (min(size) - 1) // 2
    reach = max(0, radius - 1) if border == "psa" else 0
    found = []
    for dy in range(radius):
        for dx in range(1 if dy == 0 else 1 - radius, radius):
            if dy * dy + dx * dx < radius * radius:
                top, bottom = 0, height - max(dy, reach)
                left, right = max(-dx, reach), width - max(dx, reach, 0)
                if top < bottom and left < right:
                    found.append(Pairs(dy, dx, top, bottom, left, right))
    return found


def alikeness(features: Tensor, pairs: Pairs) -> Tensor:
    """exp(-mean_d |f_i - f_j|), [... D h w] -> [... h' w'] in 0..1; four times as fast with channels last in memory."""
    return (-(pairs.first(features) - pairs.second(features)).abs_().mean(dim=-3)).exp()


def path(dy: int, dx: int) -> list[tuple[int, int, int]]:
    """The cells from (0, 0) to (dy, dx), dy >= 0, row by row: (row, first column, how many)."""
    runs = []
    for y in range(dy + 1):
        columns = [x for x in range(min(0, dx), max(0, dx) + 1) if (dy * x - dx * y) ** 2 < dy * dy + dx * dx]
        runs.append((y, columns[0], len(columns)))
    return runs


def runs_of(maps: Tensor, longest: int) -> list[Tensor]:
    """The maxima of 1, 2, ..., `longest` cells side by side: item n is [... h w - n], by its leftmost cell."""
    runs = [maps]
    for length in range(2, min(longest, maps.shape[-1]) + 1):
        runs.append(torch.maximum(runs[-1][..., :-1], maps[..., length - 1 :]))
    return runs


def path_maximum(runs: Sequence[Tensor], pairs: Pairs) -> Tensor:
    """The maximum over the path of every pair, [... h' w']; `runs` by `runs_of(maps, radius)`."""
    found: Tensor | None = None
    for y, x, length in path(pairs.dy, pairs.dx):
        rows = slice(pairs.top + y, pairs.bottom + y)
        part = runs[length - 1][..., rows, pairs.left + x : pairs.right + x]
        found = part if found is None else torch.maximum(found, part)
    assert found is not None  # row 0 is always there
    return found


def agreement(labels: Tensor, pairs: Pairs) -> Tensor:
    """Labels [B h w] -> bool [3 B h' w']: both background, both of the same class, of different labels."""
    one, two = pairs.first(labels), pairs.second(labels)
    known, same = (one != IGNORE) & (two != IGNORE), one == two
    return torch.stack([known & same & (one == 0), known & same & (one != 0), known & ~same])


def affinity_losses(affinity: Callable[[Pairs], Tensor], labels: Tensor, pairs: Sequence[Pairs]) -> Losses:
    """The three terms of L, each with its weight: {"background", "foreground", "different"}.

    affinity: the values [B h' w'] in 0..1 of the pairs of one offset, differentiable; it is called twice. labels
    [B h w]. Means are over the pairs of the global batch, so the mean over processes is the single-process value; a
    kind of which there is no pair is 0.
    """
    background, foreground, different = mean_over_pairs(lambda p: _costs(affinity(p)), labels, pairs).unbind()
    return {"background": background / 4, "foreground": foreground / 4, "different": different / 2}


def mean_over_pairs(costs: Callable[[Pairs], Tensor], labels: Tensor, pairs: Sequence[Pairs]) -> Tensor:
    """The mean cost over the pairs of each kind (see `agreement`), [3]; costs(p) is [3 B h' w'], one row a kind."""
    if not pairs:
        raise ValueError("a grid without pairs cannot be trained on")

    def totals(each: Pairs) -> tuple[Tensor, Tensor]:
        kinds = agreement(labels, each)
        return (costs(each) * kinds).sum(dim=(1, 2, 3)), kinds.sum(dim=(1, 2, 3))

    parts = [checkpoint(totals, each, use_reentrant=False, preserve_rng_state=False) for each in pairs]
    sums, counts = (torch.stack(each).sum(dim=0) for each in zip(*parts, strict=True))
    return sums / (mean_over_processes(counts.float()) + EPS / processes())


def _costs(affinity: Tensor) -> Tensor:
    near = -(affinity + EPS).log()
    return torch.stack([near, near, -(1 + EPS - affinity).log()])
