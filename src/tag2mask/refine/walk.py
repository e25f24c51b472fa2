"""Random walk over a grid of affinities: maps flow along what belongs together and stop at what does not.

Ahn and Kwak, CVPR 2018, arXiv:1803.10464 (PSA, section 3.3); Ahn, Cho and Kwak, CVPR 2019, arXiv:1904.05044 (IRN,
section 5).

    T = A^beta D^-1      A^beta: affinities to the power beta, 1 on the diagonal; D: its column sums
    y = x T^t            every value becomes a weighted mean of those around it

    symbol    here            meaning
    a_ij      Affinity        affinity of two cells closer than `radius`, 0 for all others; symmetric
    x, y      maps            one row per map
    t         steps

The released code of both papers squares the dense matrix T eight times: (h w)^2 numbers and 8 (h w)^3 products. Here
nothing dense is made. T has one entry per cell and neighbour (69 with radius 5) and is applied to the few maps.
T = D^1/2 S D^-1/2 with a symmetric S whose spectrum lies in [-1, 1], and there

    s^t = sum_k c_k T_k(s),   c_k = 2 C(t, (t - k) / 2) / 2^t for k > 0 of the parity of t, half of that for k = 0

with Chebyshev's polynomials T_k. All c_k are positive and |T_k(s)| <= 1, so the sum of those that are cut off bounds
what is lost. It falls like exp(-k^2 / 2t): of 256 products with T, 70 are enough for 1e-5.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tag2mask.errors import UserError
from tag2mask.refine.grid import Size
from tag2mask.refine.pairs import Border, Pairs, alikeness, pairs_of, path_maximum, runs_of

BLOCK = 2**18  # entries of the matrix that are put in place at a time


class Affinity:
    """How much nearby cells of an h x w grid belong together; make one with `from_features` or `from_edges`.

    values [n h w]: for each of n offsets the affinity in 0..1 of every pair at the place of its first cell, and 0
    where there is no pair. Memory grows with the number of cells: with radius 5 it is 136 bytes a cell here and about
    1.5 kB a cell within `propagate`.
    """

    def __init__(self, values: Tensor, pairs: Sequence[Pairs], size: Size) -> None:
        self.values, self.pairs, self.size = values, tuple(pairs), size

    @classmethod
    @torch.no_grad()
    def from_features(cls, features: Tensor, *, radius: int = 5, border: Border = "all") -> Affinity:
        """PSA: exp(-mean |f_i - f_j|) of features [D h w]. border: see `pairs_of`.

        Raises UserError for features that are not [D h w] or not finite.
        """
        _check("features", features, "[D h w]")
        size = features.shape[1], features.shape[2]
        features = features.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # channels last: see `alikeness`
        return cls._fill(pairs_of(size, radius, border), size, features, lambda each: alikeness(features, each))

    @classmethod
    @torch.no_grad()
    def from_edges(cls, edge: Tensor, *, radius: int = 5) -> Affinity:
        """IRN: 1 - the largest boundary on the path, of boundaries [h w] in 0..1.

        Raises UserError for boundaries that are not [h w], not finite, or out of range.
        """
        _check("edge", edge, "[h w]")
        if edge.numel() and not (edge.amin() >= 0 and edge.amax() <= 1):
            raise UserError("edge: has values out of 0..1; give boundaries after the sigmoid")
        size, runs = (edge.shape[0], edge.shape[1]), runs_of(edge, radius)
        return cls._fill(pairs_of(size, radius), size, edge, lambda each: 1 - path_maximum(runs, each))

    @classmethod
    def _fill(cls, pairs: Sequence[Pairs], size: Size, like: Tensor, of: Callable[[Pairs], Tensor]) -> Affinity:
        values = like.new_zeros(len(pairs), *size, dtype=torch.promote_types(like.dtype, torch.float32))
        for plane, each in zip(values, pairs, strict=True):
            each.first(plane).copy_(of(each))
        return cls(values, pairs, size)

    @torch.no_grad()
    def propagate(self, maps: Tensor, *, beta: float = 10.0, steps: int = 256, tol: float = 1e-5) -> Tensor:
        """maps [C h w] -> x T^steps [C h w]; on the device of the affinities.

        beta: power of the affinities; the larger, the less flows. tol: share that may be lost by not doing every step;
        0 does every step. With e the difference to the exact walk and d the column sums of A^beta, for every map
        sqrt(sum_i d_i e_i^2) <= tol sqrt(sum_i d_i x_i^2), besides rounding.
        No map in, no map out. Column sums are in float64: a biased one would come in to the power of `steps`.
        Raises UserError for maps of another size, maps that are not finite, and settings out of range.
        """
        if not 0 < beta < math.inf:
            raise UserError(f"beta: {beta} must be a positive number; PSA takes 8, IRN 10")
        if steps < 1:
            raise UserError(f"steps: {steps} must be a whole number from 1")
        if not 0 <= tol < 1:
            raise UserError(f"tol: {tol} must be a number from 0 to 1; 0 does every step")
        _check("maps", maps, "[C h w]")
        if tuple(maps.shape[1:]) != self.size:
            (height, width), (own_height, own_width) = maps.shape[1:], self.size
            raise UserError(
                f"maps: are {height} x {width}, the affinities {own_height} x {own_width}; resize the maps first"
            )
        work = torch.promote_types(maps.dtype, self.values.dtype)
        if maps.shape[0] == 0 or math.prod(self.size) == 0:
            return maps.to(self.values.device, work, copy=True)
        matrix, root = self._symmetric(beta, work)
        columns = maps.flatten(1).to(root.device, work).T * root[:, None]
        walked = _power(matrix, columns.contiguous(), chebyshev(steps, tol), steps) / root[:, None]
        return walked.T.reshape(maps.shape)

    def _symmetric(self, beta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(S = D^-1/2 A^beta D^-1/2 sparse [N N], square roots of the column sums [N]) with N = h w cells."""
        powers = self.values**beta
        sums = torch.ones(self.size, dtype=torch.float64, device=powers.device)
        for plane, each in zip(powers, self.pairs, strict=True):
            each.first(sums).add_(each.first(plane))
            each.second(sums).add_(each.first(plane))
        scale = sums.rsqrt()

        # One plane per neighbour, by its place in a row of the matrix: the earlier ones, the cell itself, the later.
        width, middle = self.size[1], len(self.pairs)
        order = sorted(range(middle), key=lambda n: self.pairs[n].dy * width + self.pairs[n].dx)
        planes = torch.zeros(2 * middle + 1, *self.size, dtype=dtype, device=powers.device)
        shifts = torch.zeros(2 * middle + 1, dtype=torch.int32)
        planes[middle] = 1 / sums
        for place, n in enumerate(order, start=1):
            each = self.pairs[n]
            value = each.first(powers[n]) * each.first(scale) * each.second(scale)
            each.first(planes[middle + place]).copy_(value)
            each.second(planes[middle - place]).copy_(value)
            shifts[middle + place] = each.dy * width + each.dx
            shifts[middle - place] = -shifts[middle + place]
        return _sparse(planes.flatten(1).T, shifts.to(planes.device)), sums.sqrt().flatten().to(dtype)


def chebyshev(steps: int, tol: float) -> list[float]:
    """c_0, c_1, ..., c_n of s^steps: as few as leave at most `tol` to the rest; all of them are positive or 0."""
    weights = [0.0] * (steps + 1)
    whole = 2**steps
    for k in range(steps % 2, steps + 1, 2):
        weights[k] = (1 if k == 0 else 2) * math.comb(steps, (steps - k) // 2) / whole
    lost, last = 0.0, steps
    while last > 0 and lost + weights[last] <= tol:
        lost += weights[last]
        last -= 1
    return weights[: last + 1]


def _power(matrix: Tensor, x: Tensor, weights: Sequence[float], steps: int) -> Tensor:
    """S^steps x, of S [N N] and x [N C]: by the series `weights`, or step by step where that is no longer."""
    if len(weights) > steps:
        for _ in range(steps):
            x = matrix @ x
        return x
    before, now = x, matrix @ x
    total = weights[0] * before
    for k, weight in enumerate(weights[1:], start=1):
        if k > 1:
            before, now = now, torch.addmm(before, matrix, now, beta=-1, alpha=2)
        if weight:
            total.add_(now, alpha=weight)
    return total


def _sparse(rows: Tensor, shifts: Tensor) -> Tensor:
    """The matrix [N N] with rows[i, n] at (i, i + shifts[n]), zeros left out; shifts ascend. Done in blocks of rows."""
    count, block = len(rows), max(1, BLOCK // len(shifts))
    index = torch.int32 if rows.numel() < 2**31 else torch.int64  # small where that is enough
    starts = torch.zeros(count + 1, dtype=index, device=rows.device)
    starts[1:] = (rows != 0).sum(dim=1).cumsum(0)
    total = int(starts[-1])
    values, columns = rows.new_empty(total), starts.new_empty(total)
    done = 0
    for first in range(0, count, block):
        part = rows[first : first + block]
        places = torch.arange(first, first + len(part), dtype=index, device=rows.device)[:, None] + shifts
        kept = part != 0
        own = part[kept]
        values[done : done + len(own)], columns[done : done + len(own)] = own, places[kept]
        done += len(own)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, (count, count), check_invariants=False)


def _check(name: str, x: Tensor, shape: str) -> None:
    if x.ndim != len(shape.split()) or not x.is_floating_point():
        raise UserError(f"{name}: must be {shape} floats, not {str(x.dtype).removeprefix('torch.')} {list(x.shape)}")
    if not x.isfinite().all():
        raise UserError(f"{name}: has values that are not finite; look where they come from")
