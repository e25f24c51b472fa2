"""The plug-in contract: what a contrastive, prototype or memory method may add to a baseline."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tag2mask.core.baseline import Baseline
from tag2mask.core.types import FULL, Batch, CamOutput, Features, Losses, Progress, View


class Method(nn.Module):
    """Override only what the paper needs. Parameters train, persistent buffers are saved; nothing else is state.

    Life of a method: bind, remember; on_epoch_start for each epoch; adapt, losses and after_step for each step; and
    cams when maps are exported.
    """

    views: tuple[View, ...] = (FULL,)

    def bind(self, net: Baseline, num_classes: int) -> None:
        """Create heads sized from `net.dims`, banks, prototypes, a teacher copy of `net`.

        A method that overrides `adapt` is bound before the others. Raises UserError with a sentence when this method
        and this baseline cannot work together.
        """

    def remember(self, tags: Tensor) -> None:
        """Make a memory for the training images, whose tags are [N K]; before training only, not at inference."""

    def adapt(self, features: Features) -> Features:
        """Change features before the classifier reads them, in training and at inference (RCA)."""
        return features

    def losses(self, batch: Batch, outs: dict[View, CamOutput], progress: Progress) -> Losses:
        """Scalars to add. Reads buffers, never writes them. A schedule is a weight, never a branch:
        a head that is skipped on some steps breaks the gradient reduction across processes."""
        return {}

    @torch.no_grad()
    def on_epoch_start(self, epoch: int) -> None:
        """Slow updates, alike on every process (k-means over a bank)."""

    @torch.no_grad()
    def after_step(self, net: Baseline) -> None:
        """Fast updates after the optimiser: EMA of prototypes or teacher, enqueue."""

    @torch.no_grad()
    def cams(self, out: CamOutput, tags: Tensor) -> Tensor:
        """The map to export, [B K h w]; by default the network's best."""
        return out.best
