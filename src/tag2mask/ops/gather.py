"""Values from all processes. One of the two places that know about torch.distributed (the other is engine/).

A loss that uses them must have this property: the mean of its values over the processes is the single-process value
for the same global batch (data-parallel training averages gradients the same way).

Process r of W holds samples r, r + W, r + 2 W, ... of the global batch; results are in the order of the global
batch, so that whatever is computed from them equals the single-process value.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """[n ...] on each of W processes -> [n W ...] on all, in the order of the global batch. No gradient flows."""
    x, world = x.detach(), processes()
    if world == 1:
        return x
    x = x.contiguous()  # bytes travel: parts in another memory format would come out in another order
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x)
    return torch.stack(parts, dim=1).flatten(0, 1)


@torch.no_grad()
def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on all of them. No gradient flows."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if processes() > 1:
        dist.all_reduce(total)
    return total


@torch.no_grad()
def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, on all of them. No gradient flows."""
    return sum_over_processes(x) / processes()
