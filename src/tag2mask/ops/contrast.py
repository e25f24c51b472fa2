"""Pixels, their labels and their class prototypes: what the contrastive methods share.

Nothing here loops over classes or waits for the device. Statistics are of the global batch. Label maps hold 0 for
background, 1..K for the classes and 255 for pixels that take no part; "groups" are whatever the caller numbers 0..C-1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tag2mask.ops.cams import min_max_norm
from tag2mask.ops.gather import gather, processes, rank, sum_over_processes

IGNORE = 255
EXCLUDED = -1e9  # a logit that no softmax notices; finite, so that a row of nothing else has no NaN


def valid_on_grid(valid: Tensor, size: tuple[int, int]) -> Tensor:
    """[B 1 H W] of 0/1 -> bool [B h w]: cells whose centre is on the image and not on padding."""
    return F.interpolate(valid.float(), size=size, mode="nearest-exact")[:, 0] > 0.5


def confidence(cams: Tensor, valid: Tensor, *, negative_floor: bool = False) -> Tensor:
    """`min_max_norm` of [B K h w], minimum and maximum taken over the valid pixels (bool [B h w]) only."""
    cams, inside = cams.relu(), valid.unsqueeze(1)
    highest = (cams * inside).amax(dim=(-2, -1), keepdim=True)
    return min_max_norm(torch.where(inside, cams, highest), negative_floor=negative_floor)


def pseudo_labels(maps: Tensor, tags: Tensor, background: float | Tensor, valid: Tensor) -> Tensor:
    """The most confident of the tagged classes, or background where none exceeds `background`.

    maps [B K h w] as from `confidence`; tags [B K] of 0/1; background: a number or [B h w]; valid bool [B h w].
    Returns labels [B h w].
    """
    score, best = (maps * tags[:, :, None, None]).max(dim=1)
    return torch.where(valid, torch.where(score > background, best + 1, 0), IGNORE)


@torch.no_grad()
def top_pixels(scores: Tensor, candidates: Tensor, top: int) -> Tensor:
    """The `top` highest scores of every group over the global batch, among the candidates; fewer if there are fewer.

    scores and candidates (bool) [B C h w] -> bool [B C h w]. Of equal scores the first in the batch is taken.
    """
    everywhere = gather(scores.masked_fill(~candidates, -torch.inf)).transpose(0, 1)
    ranked = everywhere.flatten(1)
    last = ranked.topk(min(top, ranked.shape[1]), dim=1).values[:, -1:]
    above, level = ranked > last, (ranked == last) & (last > -torch.inf)
    chosen = above | (level & (level.cumsum(dim=1) <= top - above.sum(dim=1, keepdim=True)))
    return chosen.view(everywhere.shape).transpose(0, 1)[rank() :: processes()]


@torch.no_grad()
def weighted_means(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i w_ci f_i / sum_i w_ci over the pixels i of the global batch, for every group c at once. No gradient flows.

    features [B D h w], weights [B C h w] -> (means [C D], found bool [C]: False where the weights sum to zero; such a
    mean is zero).
    """
    sums = torch.einsum("bchw,bdhw->cd", weights, features)
    both = sum_over_processes(torch.cat([sums, weights.sum(dim=(0, 2, 3)).unsqueeze(1)], dim=1))
    sums, totals = both[:, :-1], both[:, -1:]
    found = totals != 0
    return torch.where(found, sums / torch.where(found, totals, 1), 0), found[:, 0]


def positives(labels: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """(column of every pixel's own prototype [P], 0 where there is none; bool [P]: whether there is one).

    labels [P]: columns of the prototypes, or 255; found [C]: which prototypes exist.
    """
    columns = torch.where(labels == IGNORE, 0, labels)
    return columns, (labels != IGNORE) & found[columns]


def pixel_contrast(similarity: Tensor, labels: Tensor, found: Tensor, temperature: float) -> Tensor:
    """Mean over the pixels of -log softmax of the similarity to their own prototype (PPC, Du et al. 2022, eq. 4).

    similarity [P C] of this process's pixels to the prototypes; labels [P] columns of it, or 255; found bool [C]:
    prototypes that exist. Others are no negatives, and pixels whose own does not exist are left out of the mean; the
    mean of no pixels is 0. The mean over processes is the mean over the global batch.
    """
    columns, defined = positives(labels, found)
    logits = (similarity / temperature).masked_fill(~found, EXCLUDED)
    losses = F.cross_entropy(logits, torch.where(defined, columns, -1), ignore_index=-1, reduction="sum")
    return losses * processes() / sum_over_processes(defined.sum()).clamp(min=1)


def rank_within_group(keys: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rank of every element among those of its group, 0 for the smallest key; of equal keys the first comes first.

    keys [... P]; groups [P] in 0..count-1. Returns (ranks [... P], sizes of the groups [count]).
    """
    groups_of = groups.expand_as(keys)
    order = keys.argsort(dim=-1, stable=True)
    order = order.gather(-1, groups_of.gather(-1, order).argsort(dim=-1, stable=True))
    sizes = (groups.unsqueeze(1) == torch.arange(count, device=groups.device)).sum(dim=0)
    starts = sizes.cumsum(0) - sizes
    positions = torch.arange(groups.numel(), device=groups.device) - starts[groups_of.gather(-1, order)]
    return torch.empty_like(order).scatter_(-1, order, positions), sizes
