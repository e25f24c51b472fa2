"""AMN: an activation manipulation network, which classifies every pixel and knows the image's tags.

Lee, Kim, Shim: Threshold Matters in WSSS: Manipulating the Activation for the Robust and Accurate Segmentation Model
Against Thresholds, CVPR 2022, arXiv:2203.16045.

    q = head(dropout(f * (A y + b)))                                   label conditioning
    L = (mean over bg pixels of l + mean over fg pixels of l) / 2      balanced, over the whole batch
    l = -sum_c t_c log softmax(q)_c,   t = 1 - eps for the label of the pixel, eps / K for each of the K others

    symbol   here                    meaning
    f        backbone(...)["last"]   last feature map, [B D h w]
    y        tags                    0/1, [B K]
    A, b     AMN.condition           a linear layer: a factor for every channel, not bounded
    q        AMN(images, tags)       scores [B K+1 h w]; 0 is background, k + 1 is class k
    eps      smoothing               0.4
    label    batch.target            IRN's confident labels (refine/irn.py); 255, not sure, is left out
    map      soft_maps               what goes on to seeds and to IRN

The head is the sum of four dilated classifiers (ASPPSum). Unlike the classifier that gives the labels, the whole trunk
learns but for a frozen stem. CAMs have single bright places and a threshold for all of them; here every pixel of a
class is to be equally bright, and smoothing keeps it from being sure of itself.

Where the released code differs: a loss without pixels of background or without pixels of classes is not a number there,
here the empty set counts 0; dropout stays on where maps are made (an option of the stage `amn_maps`). Labels go to the
grid by the pixel under the centre of a cell, as there. What is stretched is the mean map at stride 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tag2mask.backbones import BackboneSettings, build_backbone
from tag2mask.core import Batch, Losses, Progress
from tag2mask.data.source import IGNORE
from tag2mask.errors import UserError
from tag2mask.ops.cams import min_max_norm
from tag2mask.ops.gather import mean_over_processes, processes
from tag2mask.segment.deeplab import Dilations
from tag2mask.segment.heads import ASPPSum
from tag2mask.segment.predict import mean_scores

Size = tuple[int, int]


class AMN(nn.Module):
    """Scores of every pixel given the tags: images [B 3 H W], tags [B K] -> [B K+1 h w] at the backbone's stride.

    backbone: see BackboneSettings; resnet50 with output stride 16 and dilate: false as published, freeze: c1. dropout:
    share of the conditioned features. dilations: of the classifiers whose sum is the head.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: BackboneSettings,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        dilations: Dilations = (6, 12, 18, 24),
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone)
        channels = self.backbone.dims["last"]
        self.condition = nn.Linear(num_classes, channels)
        self.dropout = nn.Dropout(dropout)
        self.head = ASPPSum(channels, num_classes + 1, dilations=dilations)

    def forward(self, images: Tensor, tags: Tensor) -> Tensor:
        """Scores, not yet normalised."""
        factors = self.condition(tags)[:, :, None, None]
        scores: Tensor = self.head(self.dropout(self.backbone(images)["last"] * factors))
        return scores


class AMNObjective(nn.Module):
    """The loss of an AMN on confident labels (the batch's target)."""

    def __init__(self, net: AMN, *, smoothing: float = 0.4, bf16: bool = False) -> None:
        super().__init__()
        self.net = net
        self.smoothing, self.bf16 = smoothing, bf16

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """{"background", "foreground"}: the two halves of L."""
        if batch.target is None:
            raise ValueError("AMN is trained on batches with a target")
        with torch.autocast(batch.images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            scores = self.net(batch.images, batch.tags)
        labels = on_grid(batch.target, (scores.shape[-2], scores.shape[-1]))
        return balanced_losses(scores.float(), labels, self.smoothing)

    def on_epoch_start(self, epoch: int) -> None:
        """Nothing to do."""

    def after_step(self) -> None:
        """Nothing to do."""


def check_smoothing(smoothing: float, num_classes: int) -> None:
    """Raises UserError unless the label of a pixel keeps more than what each other label gets."""
    if not 0 <= smoothing < num_classes / (num_classes + 1):
        raise UserError(
            f"smoothing: {smoothing} must be from 0 to less than {num_classes / (num_classes + 1):.3g}, "
            f"the share at which all {num_classes + 1} labels are alike; AMN takes 0.4"
        )


def on_grid(labels: Tensor, size: Size) -> Tensor:
    """Index masks [B H W] -> [B h w]: the pixel under the centre of each cell."""
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()


def balanced_losses(scores: Tensor, labels: Tensor, smoothing: float) -> Losses:
    """{"background", "foreground"}, whose sum is L, of scores [B K+1 h w] on labels [B h w].

    Both are means over the pixels of the global batch, 0 where there is none: a crop can be all unsure.
    """
    log, others = scores.log_softmax(dim=1), scores.shape[1] - 1
    known = torch.where(labels == IGNORE, 0, labels)
    own = log.gather(1, known[:, None])[:, 0]
    costs = -(1 - smoothing) * own - smoothing / others * (log.sum(dim=1) - own)
    sets = torch.stack([labels == 0, (labels > 0) & (labels != IGNORE)]).to(costs.dtype)
    counts = mean_over_processes(sets.sum(dim=(1, 2, 3))).clamp(min=1 / processes())
    background, foreground = ((sets * costs).sum(dim=(1, 2, 3)) / counts / 2).unbind()
    return {"background": background, "foreground": foreground}


def shares(net: AMN, images: Tensor, tags: Tensor, *, scales: Sequence[float], flip: bool, size: Size) -> Tensor:
    """Probabilities [B K+1 h w] of `size`, of images [B 3 H W] with tags [B K]: softmax of the mean of resized scores.

    All classes take part, also those that an image has no tag of.
    """

    def look(views: Tensor) -> Tensor:
        scores: Tensor = net(views, tags.repeat(len(views) // len(tags), 1))
        return scores

    return mean_scores(look, images, scales=scales, flip=flip, size=size).softmax(dim=1)


def soft_maps(shares: Tensor, labels: Tensor) -> Tensor:
    """The maps [P h w] in 0..1 of an image: its classes' probabilities [P h w] where the confident labels [h w] say
    background, elsewhere (a class, or 255: not sure) the same stretched to 0..1 over the image, class by class.
    """
    return torch.where(labels == 0, shares, min_max_norm(shares))
