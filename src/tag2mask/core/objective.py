"""Baseline + methods = one module whose forward is one training step. This is what data-parallel wraps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tag2mask.core.baseline import Baseline
from tag2mask.core.method import Method
from tag2mask.core.types import Batch, CamOutput, Losses, Progress, View
from tag2mask.errors import UserError


class Objective(nn.Module):
    """A baseline with any methods on top.

    Every view that several parts ask for is computed once. Encoder and classifier run in bfloat16 if
    `bf16`; losses always run in float32.

    Raises UserError when two methods both change the features or both define the map to export, or when a
    method cannot work with this baseline.
    """

    def __init__(
        self, net: Baseline, methods: Mapping[str, Method] | None = None, *, num_classes: int, bf16: bool = False
    ) -> None:
        super().__init__()
        methods = methods or {}
        self.net = net
        self.methods = nn.ModuleDict(methods)
        self.bf16 = bf16
        for hook in ("adapt", "cams"):
            owners = [name for name, m in methods.items() if getattr(type(m), hook) is not getattr(Method, hook)]
            if len(owners) > 1:
                raise UserError(f"methods: {' and '.join(owners)} cannot be combined, both define {hook}(); keep one")
        for method in sorted(methods.values(), key=lambda m: type(m).adapt is Method.adapt):
            method.bind(net, num_classes)
        self._names = tuple(methods)
        self._parts: tuple[Method, ...] = tuple(methods.values())
        self.views: tuple[View, ...] = tuple(dict.fromkeys((*net.views, *(v for m in self._parts for v in m.views))))

    def remember(self, tags: Tensor) -> None:
        """Make the memories for the training images, whose tags are [N K] of 0/1; before training only."""
        self.net.remember(tags)
        for method in self._parts:
            method.remember(tags)

    def look(self, images: Tensor) -> CamOutput:
        """One forward pass over one view [B 3 H W]; the output is float32."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            features = self.net.encode(images)
            for method in self._parts:
                features = method.adapt(features)
            return self.net.classify(features, images).float()

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """All losses of one step, named "net/..." and "<method>/..."."""
        outs = {view: self.look(view(batch.images)) for view in self.views}
        losses = {f"net/{name}": loss for name, loss in self.net.losses(batch, outs, progress).items()}
        for key, method in zip(self._names, self._parts, strict=True):
            losses |= {f"{key}/{name}": loss for name, loss in method.losses(batch, outs, progress).items()}
        return losses

    def on_epoch_start(self, epoch: int) -> None:
        """Slow updates of every method."""
        for method in self._parts:
            method.on_epoch_start(epoch)

    def after_step(self) -> None:
        """Fast updates of the baseline, then of every method."""
        self.net.after_step()
        for method in self._parts:
            method.after_step(self.net)

    @torch.no_grad()
    def infer(self, images: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
        """(map to export [B K h w], logits [B K]) of one view."""
        out = self.look(images)
        exported = self.net.export(out, tags)
        for method in self._parts:
            if type(method).cams is not Method.cams:
                exported = method.cams(out, tags)
        return exported, out.logits
