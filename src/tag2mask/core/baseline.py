"""A baseline: a network that learns CAMs from tags, split in two so that a method can step in between."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tag2mask.core.types import FULL, Batch, CamOutput, Features, Losses, View


class Baseline(nn.Module):
    """Override `encode`, `classify` and `losses`; the rest has a default.

    views: the looks at a batch that `losses` reads. needs: side inputs it reads, e.g. {"saliency"}.
    dims: channels of every tap that `encode` returns; methods size their heads from it.
    """

    views: tuple[View, ...] = (FULL,)
    needs: frozenset[str] = frozenset()
    dims: dict[str, int]

    def encode(self, images: Tensor) -> Features:
        """[B 3 H W] -> features by tap; "last" is the one that the classifier reads."""
        raise NotImplementedError

    def classify(self, features: Features, images: Tensor) -> CamOutput:
        """Logits and CAMs from the (possibly adapted) features; `images` for those that look at pixels (PCM)."""
        raise NotImplementedError

    def losses(self, batch: Batch, outs: dict[View, CamOutput]) -> Losses:
        """Scalars to sum; outs has an entry for every view in `views`."""
        raise NotImplementedError

    @torch.no_grad()
    def export(self, out: CamOutput, tags: Tensor) -> Tensor:
        """The map to export, [B K h w] with tags [B K]; by default the best one. A method's `cams` goes before it."""
        return out.best

    @torch.no_grad()
    def after_step(self) -> None:
        """Memory that follows the weights, after each optimiser step (OAA's running maximum)."""
