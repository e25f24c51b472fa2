"""OAA+: the integral attention model.

Jiang, Hou, Cao, Cheng, Wei, Xiong: Integral Object Mining via Online Attention Accumulation, ICCV 2019.

    L = mean over N+ of  -T log sigma(x)  +  mean over N- of  -log(1 - sigma(x))
    N+ = {T > 0.001}, N- the rest, over all pixels of all K classes of an image

    symbol   here       meaning
    x        cams       maps before the pooling, each pixel a score of its own, [B K h w]
    T        target     the accumulated attention of the image (stage `attention`) where the crop shows it; 0 for absent
                        classes

A second network learns at every pixel what the first one attended to at any time; its own maps are the result. A pixel
that was attended to a little is a weak example of the class, and none of the background.

Where the paper leaves something open: each image has its own N+ and N-, as in the released code, whose batches are
single images; the batch has the mean over images; padding is in neither set; an image without tags has no N+. The
released code adds 1e-8 inside the second logarithm, which matters for scores above 15 only; here it is exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.core import Batch, Losses, Objective, Progress
from tag2mask.ops.contrast import valid_on_grid

TARGET = "attention"  # the side map of a batch that is learned, [B K h w]
FLOOR = 1e-3


class IntegralObjective(nn.Module):
    """Trains a baseline's maps themselves; what its own losses are plays no role.

    The batch needs the side map `TARGET`, on the grid of the maps.
    """

    def __init__(self, model: Objective) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """The loss of one step."""
        cams = self.model.look(batch.images).cams
        valid = valid_on_grid(batch.valid, (cams.shape[-2], cams.shape[-1]))
        return {"integral": integral_loss(cams, batch.side[TARGET], valid)}

    @torch.no_grad()
    def grid(self, crop: int) -> tuple[int, int]:
        """Height and width of the maps of a square crop."""
        was = self.training
        self.eval()
        device = next(self.parameters()).device
        height, width = self.model.look(torch.zeros(1, 3, crop, crop, device=device)).cams.shape[-2:]
        self.train(was)
        return height, width

    def on_epoch_start(self, epoch: int) -> None:
        """Nothing changes slowly."""

    def after_step(self) -> None:
        """Nothing follows the weights."""


def integral_loss(cams: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """L of scores [B K h w], attention [B K h w] in 0..1, valid bool [B h w]."""
    positive = (target > FLOOR) & valid[:, None]
    negative = ~positive & valid[:, None]
    attended = _mean(-target * F.logsigmoid(cams), positive)
    return (attended + _mean(F.softplus(cams), negative)).mean()


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """The mean of every image [B ...] over a set of its values, 0 if there is none: [B]."""
    total = (values * where).flatten(1).sum(dim=1)
    return total / where.flatten(1).sum(dim=1).clamp(min=1)
