"""k-means within every class at once.

Lloyd: Least Squares Quantization in PCM, IEEE Transactions on Information Theory 28, 1982. The start is that of Arthur
and Vassilvitskii: k-means++: The Advantages of Careful Seeding, SODA 2007, in its greedy form: of a few candidates that
are drawn for a centre, the one that leaves the smallest sum of squared distances is taken.

Nothing loops over classes or entries. Sums are matrix products, which come out the same on every process; a sum by
index does not on a GPU. Draws belong to centres, not to classes: the order of the classes makes no difference.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def kmeans(
    points: Tensor, present: Tensor, clusters: int, *, seed: int, iterations: int = 100
) -> tuple[Tensor, Tensor]:
    """The cluster means of every class: points [C Q D], present bool [C Q] -> (centres [C K D], found bool [C K]).

    A class of no more than K = `clusters` entries keeps them as they are, in their order; centres that are not found
    are zero. Ends when no entry changes its cluster, or after `iterations`; the host reads one flag in each.
    """
    if points.shape[1] == 0:
        return points.new_zeros(len(points), clusters, points.shape[2]), present.new_zeros(len(points), clusters)
    draws = torch.rand(clusters, candidates(clusters), generator=torch.Generator().manual_seed(seed))
    points = torch.where(present[..., None], points, 0)
    origin = points.sum(dim=1, keepdim=True) / present.sum(dim=1).clamp(min=1)[:, None, None]
    centred = torch.where(present[..., None], points - origin, 0)  # far from the origin, distances lose their digits
    centres, found = lloyd(centred, present, *spread(centred, present, draws.to(points)), iterations=iterations)
    kept, inside = _first(points, present, clusters)
    few = present.sum(dim=1, keepdim=True) <= clusters
    found = torch.where(few, inside, found)
    return torch.where(found[..., None], torch.where(few[..., None], kept, centres + origin), 0), found


def candidates(clusters: int) -> int:
    """Candidates per centre: 2 + log K, as Arthur and Vassilvitskii did."""
    return 2 + int(math.log(clusters))


@torch.no_grad()
def spread(points: Tensor, present: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """k-means++: entries as centres, each drawn with a chance that grows with the squared distance to the others.

    points [C Q D], present bool [C Q], draws [K T] in 0..1 -> (centres [C K D], found bool [C K]). Centre k is the best
    of T candidates; candidate t is the first entry at which the cumulated squared distances (for the first centre:
    the number of entries) exceed the share draws[k, t] of their sum. Centres for which no entry is left that differs
    from those before are not found.
    """
    lengths = points.square().sum(dim=2)
    nearest = present.to(points.dtype)  # squared distance to the nearest centre; of the first centre all are as far
    chosen, found = [], []
    for k in range(len(draws)):
        cumulated = nearest.cumsum(dim=1)
        drawn = torch.searchsorted(cumulated, draws[k] * cumulated[:, -1:], right=True)
        # Rounding may pass the end or hit an entry with no chance at all: then the last that has one.
        last = torch.where(nearest > 0, torch.arange(nearest.shape[1], device=points.device), 0).amax(1, keepdim=True)
        drawn = torch.minimum(drawn, last)
        apart = _squared(points, lengths, _pick(points, drawn))
        apart = torch.where(present[..., None], apart, 0)  # [C Q T]
        if k > 0:
            apart = torch.minimum(apart, nearest[..., None])
        best = apart.sum(dim=1).argmin(dim=1)
        found.append(cumulated[:, -1] > 0)
        chosen.append(drawn.gather(1, best[:, None])[:, 0])
        nearest = apart.gather(2, best[:, None, None].expand(-1, apart.shape[1], 1))[..., 0]
        nearest = nearest.scatter(1, chosen[-1][:, None], 0)
    places = torch.stack(chosen, dim=1)
    return _pick(points, places), torch.stack(found, dim=1)


@torch.no_grad()
def lloyd(points: Tensor, present: Tensor, centres: Tensor, found: Tensor, *, iterations: int) -> tuple[Tensor, Tensor]:
    """Every entry to its nearest centre, every centre to the mean of its entries, again and again.

    points [C Q D], present bool [C Q], centres [C K D], found bool [C K]: centres to start from. Of equally near ones
    the first is taken. The j-th centre without entries moves to the entry that is j-th farthest from its own centre,
    or is no longer found if that lies on it. Returns centres and found as of the last iteration.
    """
    lengths = points.square().sum(dim=2)
    moving, before = torch.arange(len(points), device=points.device), torch.full_like(present, -1, dtype=torch.long)
    numbers = torch.arange(centres.shape[1], device=points.device)
    for _ in range(iterations):
        x, inside, size = points[moving], present[moving], lengths[moving]
        apart = _squared(x, size, centres[moving]).masked_fill(~found[moving][:, None], torch.inf)
        distance, nearest = apart.min(dim=2)
        nearest = torch.where(inside, nearest, -1)
        members = (nearest[..., None] == numbers).to(x.dtype)
        counts = members.sum(dim=1)
        means = (members.mT @ x) / counts.clamp(min=1)[..., None]

        empty = counts == 0
        far, order = torch.where(inside & (distance < torch.inf), distance, 0).sort(dim=1, descending=True, stable=True)
        turn = empty.cumsum(dim=1) - 1
        place = turn.clamp(0, far.shape[1] - 1)
        helped = empty & (turn == place) & (far.gather(1, place) > 0)
        means = torch.where(helped[..., None], _pick(x, order.gather(1, place)), means)

        centres = centres.index_copy(0, moving, means)
        found = found.index_copy(0, moving, ~empty | helped)
        changed = (nearest != before[moving]).any(dim=1) | helped.any(dim=1)
        before = before.index_copy(0, moving, nearest)
        moving = moving[changed]
        if len(moving) == 0:
            break
    return centres, found


def _squared(points: Tensor, lengths: Tensor, centres: Tensor) -> Tensor:
    """Squared distances [C Q K] of points [C Q D], whose squared lengths are [C Q], to centres [C K D].

    Zero where it is no more than what rounding makes of zero.
    """
    sizes = lengths[..., None] + centres.square().sum(dim=2)[:, None]
    apart = torch.baddbmm(sizes, points, centres.mT, alpha=-2)
    return torch.where(apart > 32 * torch.finfo(points.dtype).eps * sizes, apart, 0)


def _first(points: Tensor, present: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` entries that are present, (rows [C count D], bool [C count])."""
    order = (~present).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    missing = count - order.shape[1]
    return F.pad(_pick(points, order), (0, 0, 0, missing)), F.pad(present.gather(1, order), (0, missing))


def _pick(points: Tensor, places: Tensor) -> Tensor:
    """points [C Q D] at places [C P] -> [C P D]."""
    return points.gather(1, places[..., None].expand(-1, -1, points.shape[2]))
