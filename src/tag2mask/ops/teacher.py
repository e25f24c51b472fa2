"""A network that follows another one: a moving average of its weights over the steps (He et al. 2020, MoCo, eq. 2)."""

from __future__ import annotations

import copy
from typing import Generic, Self, TypeVar

import torch
from torch import nn

from tag2mask.core import TrainingOnly

M = TypeVar("M", bound=nn.Module)


class Teacher(TrainingOnly, Generic[M]):
    """`model`: a copy that learns nothing by itself, is always in evaluation mode, and starts equal to what it copies.

    After each step `follow` takes the copy to momentum * copy + (1 - momentum) * original; buffers (statistics of
    norms) become the original's. With momentum 0 the copy always equals the original: weights are shared, dropout and
    gradients are not.

    What the original keeps for its own training alone, its `TrainingOnly` parts, is not copied: the copy has empty
    ones. Calls under `torch.no_grad()` are the caller's business.
    """

    def __init__(self, original: M, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        left_out = {id(part): TrainingOnly() for part in original.modules() if isinstance(part, TrainingOnly)}
        self.model: M = copy.deepcopy(original, left_out).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, original: M) -> None:
        """One step of the moving average towards `original`, which has the structure of what was copied."""
        own = dict(self.model.named_parameters())
        torch._foreach_lerp_(list(own.values()), [original.get_parameter(name) for name in own], 1 - self.momentum)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(original.get_buffer(name))
