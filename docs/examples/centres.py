"""Centres: what shows a class keeps close to the class's running mean.

    L = 1/|T| sum_{(i, k) in T} 1 - cos(f_ik, c_k)    f_ik = sum_x m_ik(x) z_i(x) / sum_x m_ik(x)      (1)
    c_k <- gamma c_k + (1 - gamma) mean_i f_ik, after each step                                       (2)

    symbol   here       meaning
    z        project    projected features, [B D h w]
    m        maps       positive part of the best map of each tagged class, [B K h w], no gradient
    c        centres    one per class, [K D]

T has the pairs of an image and one of its tags, once there is a centre of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.core import FULL, Baseline, Batch, CamOutput, Losses, Method, Progress, View
from tag2mask.ops.gather import processes, sum_over_processes


class Centres(Method):
    """Regions of a class are pulled to the class's running mean.

    weight: of the loss. dim: of the projected features. momentum: gamma.
    """

    def __init__(self, *, weight: float = 0.1, dim: int = 32, momentum: float = 0.9) -> None:
        super().__init__()
        self.weight, self.dim, self.momentum = weight, dim, momentum

    def bind(self, net: Baseline, num_classes: int) -> None:
        """Create the projection and the centres."""
        self.project = nn.Conv2d(net.dims["last"], self.dim, kernel_size=1)
        self.centres: Tensor
        self.found: Tensor
        self.register_buffer("centres", torch.zeros(num_classes, self.dim))
        self.register_buffer("found", torch.zeros(num_classes))

    def losses(self, batch: Batch, outs: dict[View, CamOutput], progress: Progress) -> Losses:
        """Eq. 1, over the pairs of all processes."""
        out = outs[FULL]
        maps = out.best.detach().relu() * batch.tags[..., None, None]
        z = F.interpolate(self.project(out.features["last"]), size=maps.shape[-2:], mode="bilinear")
        means = torch.einsum("bkhw,bdhw->bkd", maps, z) / maps.sum(dim=(2, 3))[..., None].clamp(min=1e-5)
        self._sums = torch.einsum("bk,bkd->kd", batch.tags, means.detach())
        self._counts = batch.tags.sum(dim=0)
        pairs = batch.tags * self.found
        loss = ((1 - F.cosine_similarity(means, self.centres, dim=2)) * pairs).sum()
        return {"centres": self.weight * loss * processes() / sum_over_processes(pairs.sum()).clamp(min=1)}

    @torch.no_grad()
    def after_step(self, net: Baseline) -> None:
        """Eq. 2; the first value is taken as it is."""
        sums, counts = sum_over_processes(self._sums), sum_over_processes(self._counts)
        keep = torch.where(counts > 0, self.momentum * self.found, 1.0)[:, None]
        self.centres.copy_(keep * self.centres + (1 - keep) * sums / counts.clamp(min=1)[:, None])
        self.found.copy_(torch.maximum(self.found, (counts > 0).float()))
