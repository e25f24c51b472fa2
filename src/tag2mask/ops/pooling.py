"""Features pooled over images, regions and classes of the global batch, with gradient.

On several processes every one has the values of the global batch, and the gradient of its own part times the number
of processes: once gradients are averaged over the processes, they are those of one process with the global batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tag2mask.ops.gather import gather, processes, rank, sum_over_processes


def sum_with_gradient(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    return sum_over_processes(x) + processes() * (x - x.detach())


def gather_with_gradient(x: Tensor) -> Tensor:
    """[n ...] -> [N ...] of the global batch, in its order."""
    every = gather(x)
    mine = torch.arange(rank(), len(every), processes(), device=x.device)
    return every.index_add(0, mine, processes() * (x - x.detach()))


def masked_means(features: Tensor, mask: Tensor) -> Tensor:
    """The mean feature of every image of the global batch over its mask, zero where the mask is empty.

    features [B D h w], mask bool [B h w] -> [N D].
    """
    sums = (features * mask[:, None]).sum(dim=(2, 3))
    return gather_with_gradient(sums / mask.sum(dim=(1, 2)).clamp(min=1)[:, None])


def class_means(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i w_ci f_i / sum_i w_ci over the pixels i of the global batch, for every class c at once.

    features [B D h w], weights [B C h w], not negative -> (means [C D], found bool [C]: False where the weights sum to
    zero; such a mean is zero).
    """
    sums = sum_with_gradient(torch.einsum("bchw,bdhw->cd", weights, features))
    totals = sum_over_processes(weights.sum(dim=(0, 2, 3)))
    return sums / torch.where(totals > 0, totals, 1)[:, None], totals > 0


def top_of_each(scores: Tensor, top: int) -> Tensor:
    """Scores [B C h w] with all but the `top` highest of every map set to 0; of equal ones the first are kept."""
    values, order = scores.flatten(2).sort(dim=2, descending=True, stable=True)
    kept = torch.zeros_like(values).scatter(2, order[..., :top], values[..., :top])
    return kept.view(scores.shape)
