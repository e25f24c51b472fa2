"""The permutohedral lattice: Gaussian filters of scattered points, at a cost that grows with their number only.

Adams, Baek, Davis: Fast High-Dimensional Filtering Using the Permutohedral Lattice, Eurographics 2010.

    sum_j exp(-|f_i - f_j|^2 / 2) v_j  ~  c slice(blur(splat(v)))_i

    symbol   here                  meaning
    f        points / sigmas       positions in d dimensions, in units of the standard deviation
             E f                   the same in d + 1 coordinates that sum to 0, scaled so that the three steps together
                                   have variance 1 (section 3); lattice points are those whose coordinates are whole
                                   and leave the same remainder k when divided by d + 1
             corners               every point lies in a simplex with one lattice point of each remainder k = 0..d
    b_k      weights               barycentric coordinates, not negative, sum 1 (proposition 4.2 and what follows)
    splat    Lattice.splat         v_i times b_k is added to corner k of the simplex of i
    blur     Lattice.blur          along each of the d + 1 directions in turn: x/2 + 1 + x/2 with the two neighbours
    slice    Lattice.slice         b_k times corner k of the simplex of i, summed

Lattice points exist where a simplex with a point in it has a corner; elsewhere there is nothing to blur into. The
constant c is left out: those who filter divide by the filtered ones. What remains differs from the Gaussian by a few
percent; it is the filter that dense CRFs have been used with since they were published.

A lattice point is known by a key, a linear function of its coordinates modulo 2^64 with fixed random coefficients:
its neighbours' keys differ from its own by constants, and coordinates may be of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NOWHERE = 0x5DEECE66D1234567  # the key of points that take no part


def scales(dims: int) -> list[float]:
    """Factors of the d coordinates before they are mixed: (d + 1) sqrt(2 / 3) / sqrt(i (i + 1)) for i = 1..d."""
    return [(dims + 1) * math.sqrt(2 / 3) / math.sqrt(i * (i + 1)) for i in range(1, dims + 1)]


def coefficients(count: int) -> list[int]:
    """Random odd integers of 64 bits, as signed ones; the same in every run (splitmix64 of 1, 2, ...)."""
    mask, found = 2**64 - 1, []
    for index in range(1, count + 1):
        word = index * 0x9E3779B97F4A7C15 & mask
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & mask
        word = (word ^ word >> 27) * 0x94D049BB133111EB & mask
        word = (word ^ word >> 31) | 1
        found.append(word - 2**64 if word >> 63 else word)
    return found


def embed(points: Tensor, sigmas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Points [... d] -> (keys of the corners [... d+1] int64, barycentric weights [... d+1] float64).

    In double precision, and in this order of operations, wherever it is done: a point on the border of two simplices
    must be in the same one for every implementation, as lattice points exist or not by that.
    """
    dims = points.shape[-1]
    size = dims + 1
    factors = [scale / sigma for scale, sigma in zip(scales(dims), sigmas, strict=True)]
    scaled = points.double() * torch.tensor(factors, dtype=torch.float64, device=points.device)
    beyond = torch.zeros_like(scaled[..., 0])  # sum of the coordinates behind this one
    elevated: list[Tensor] = []
    for k in range(dims, 0, -1):
        elevated.append(beyond - k * scaled[..., k - 1])
        beyond = beyond + scaled[..., k - 1]
    high = torch.stack([beyond, *reversed(elevated)], dim=-1)

    # The corner of remainder 0: all coordinates rounded down to multiples of d + 1, then, so that they sum to 0, as
    # many as it takes rounded up instead, those with the largest rests. Of equal rests the first counts as larger.
    cells = (high / size).floor()
    rests = high - cells * size
    up = -cells.sum(dim=-1, keepdim=True).long()
    ordered, order = rests.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(size, device=points.device)
    rank = (torch.empty_like(order).scatter_(-1, order, place.expand_as(order)) - up) % size
    c = torch.tensor(coefficients(size), device=points.device)
    wrapped = place < up  # in the order of the rests
    base = ((cells.long() * c).sum(dim=-1) + torch.where(wrapped, c[order], 0).sum(dim=-1)) * size
    turned = (place + up) % size
    rests = ordered.gather(-1, turned) - size * (place + up >= size)

    weights = (rests[..., :-1] - rests[..., 1:]) / size  # of the corners d, d-1, .., 1
    first = 1 - (rests[..., :1] - rests[..., -1:]) / size
    weights = torch.cat([first, weights.flip(-1)], dim=-1)

    # Corner k adds k to all coordinates, and takes d + 1 from the k ones that rank last.
    by_rank = torch.empty_like(order).scatter_(-1, rank, c.expand_as(order))
    taken = size * by_rank.flip(-1).cumsum(dim=-1)
    keys = base[..., None] + place * c.sum()
    keys[..., 1:] -= taken[..., :-1]
    return keys, weights


class Lattice:
    """The lattice of a batch of point sets.

    points [B N d]; sigmas: the standard deviations of the d coordinates. valid [B N]: points that are False neither
    send nor receive. compact: allocate what is needed, which makes the host wait for the device; otherwise what could
    be needed at most.
    """

    def __init__(
        self, points: Tensor, sigmas: Sequence[float], valid: Tensor | None = None, *, compact: bool = False
    ) -> None:
        self.batch, self.count, dims = points.shape
        device = points.device
        keys, weights = embed(points, sigmas)
        keys = keys + torch.arange(self.batch, device=device)[:, None, None] * coefficients(dims + 2)[-1]
        if valid is not None:
            keys = torch.where(valid[..., None], keys, NOWHERE)
            weights = torch.where(valid[..., None], weights, 0)
        self.weights = weights.to(points.dtype).flatten(0, 1)
        ordered, order = keys.flatten().sort()
        new = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()])
        row = new.cumsum(dim=0)
        rows = int(row[-1]) + 1 if compact else len(row)
        self.corners = torch.empty_like(row).scatter_(0, order, row).view_as(self.weights)
        self._pixel, self._share = order // (dims + 1), self.weights.flatten()[order]
        self._start = torch.searchsorted(row, torch.arange(rows + 1, device=device))
        known = torch.full((rows,), torch.iinfo(torch.int64).max, device=device).scatter_(0, row, ordered)
        # One row more, always zero, for neighbours that do not exist.
        self.neighbours = torch.full((dims + 1, rows + 1, 3), rows, device=device)
        self.neighbours[..., 0] = torch.arange(rows + 1, device=device)
        total = sum(coefficients(dims + 1))
        for direction, c in enumerate(coefficients(dims + 1)):
            step = (total - (dims + 1) * c + 2**63) % 2**64 - 2**63
            wanted = known + step
            at = torch.searchsorted(known, wanted).clamp(max=rows - 1)
            after = torch.where(known[at] == wanted, at, rows)
            self.neighbours[direction, :rows, 1] = after
            self.neighbours[direction, :, 2].scatter_(0, after, torch.arange(rows, device=device))
            self.neighbours[direction, rows, 2] = rows
        self._halves = self.weights.new_tensor([1.0, 0.5, 0.5]).expand(rows + 1, 3)

    def splat(self, values: Tensor) -> Tensor:
        """Values [B N L] -> what the lattice points hold [rows L], a row of zeros at the end."""
        return F.embedding_bag(
            self._pixel, values.flatten(0, 1), self._start, mode="sum", per_sample_weights=self._share
        )

    def blur(self, table: Tensor) -> Tensor:
        """[rows L] -> [rows L], along every direction in turn."""
        for around in self.neighbours:
            table = F.embedding_bag(around, table, mode="sum", per_sample_weights=self._halves)
        return table

    def slice(self, table: Tensor) -> Tensor:
        """[rows L] -> values at the points [B N L]."""
        values = F.embedding_bag(self.corners, table, mode="sum", per_sample_weights=self.weights)
        return values.view(self.batch, self.count, -1)

    def filter(self, values: Tensor) -> Tensor:
        """Values [B N L] -> their sums over all points, weighted by (about) the Gaussian of the distance [B N L].

        A lattice of one point set serves any number of sets of values.
        """
        if self.batch == 1 and len(values) > 1:
            together = values.transpose(0, 1).flatten(1)[None]  # [1 N B*L]
            apart: Tensor = self.filter(together)[0].unflatten(1, (len(values), -1))
            return apart.transpose(0, 1)
        return self.slice(self.blur(self.splat(values)))
