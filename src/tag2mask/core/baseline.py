"""A baseline: a network that learns CAMs from tags, split in two so that a method can step in between."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tag2mask.core.types import FULL, Batch, CamOutput, Features, Losses, Progress, View


class Baseline(nn.Module):
    """Override `encode`, `classify` and `losses`; the rest has a default.

    views: the looks at a batch that `losses` reads. needs: side inputs it reads, e.g. {"saliency"}.
    dims: channels of every tap that `encode` returns; methods size their heads from it. classifier: the 1x1
    convolution, or what ends in one, that makes the CAMs of the tap "last". widened: channels that a method adds to it.
    """

    views: tuple[View, ...] = (FULL,)
    needs: frozenset[str] = frozenset()
    dims: dict[str, int]
    classifier: nn.Module
    widened: int = 0

    def widen(self, channels: int) -> None:
        """Make the classifier, new, read `channels` more of the tap "last" (or fewer), as a method's `adapt` gives."""
        old = self.classifier
        assert isinstance(old, nn.Conv2d), "a baseline whose classifier is more than a convolution has its own widen"
        self.classifier = nn.Conv2d(old.in_channels + channels, old.out_channels, kernel_size=1, bias=False)
        nn.init.xavier_uniform_(self.classifier.weight)
        self.dims = self.dims | {"last": self.dims["last"] + channels}
        self.widened += channels

    def remember(self, tags: Tensor) -> None:
        """Make a memory for the training images, whose tags are [N K]; before training only, not at inference."""

    def encode(self, images: Tensor) -> Features:
        """[B 3 H W] -> features by tap; "last" is the one that the classifier reads."""
        raise NotImplementedError

    def classify(self, features: Features, images: Tensor) -> CamOutput:
        """Logits and CAMs from the (possibly adapted) features; `images` for those that look at pixels (PCM)."""
        raise NotImplementedError

    def losses(self, batch: Batch, outs: dict[View, CamOutput], progress: Progress) -> Losses:
        """Scalars to sum; outs has an entry for every view in `views`. Reads buffers, never writes them."""
        raise NotImplementedError

    @torch.no_grad()
    def export(self, out: CamOutput, tags: Tensor) -> Tensor:
        """The map to export, [B K h w] with tags [B K]; by default the best one. A method's `cams` goes before it."""
        return out.best

    @torch.no_grad()
    def after_step(self) -> None:
        """Memory that follows the weights, after each optimiser step (OAA's running maximum)."""

    def export_memory(self) -> dict[str, Tensor]:
        """What a later stage reads of this network besides its weights, once it is trained (OAA's attention)."""
        return {}
