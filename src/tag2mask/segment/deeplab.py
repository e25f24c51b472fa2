"""DeepLabs on any backbone, and how they are trained on pseudo-masks.

The outputs have K + 1 channels in the order of index masks: 0 is background, k + 1 is class k. Papers: see heads.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tag2mask.backbones import BackboneSettings, build_backbone
from tag2mask.core import Batch, Losses, Progress
from tag2mask.data.source import IGNORE
from tag2mask.ops.gather import mean_over_processes, processes
from tag2mask.segment.heads import ASPPConcat, ASPPSum, LargeFOV

Count = Annotated[int, Field(ge=1)]
Dilations = Annotated[tuple[Count, ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class HeadNorm:
    """How the batch norms of a head learn.

    affine: whether scale and shift do (in the code that PPC and HSC train with, they are in no group of the optimiser,
    and those of the backbone neither: `backbone.freeze_norm: affine`). momentum: what a step adds to the running
    statistics (there: 0.0003).
    """

    affine: bool = True
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.1


class DeepLab(nn.Module):
    """A backbone with a head on its tap "last": images [B 3 H W] -> scores [B K+1 h w] at the backbone's stride.

    align_corners: how scores are resized to the image, in training and prediction alike.
    """

    def __init__(self, backbone: BackboneSettings, norm: HeadNorm, align_corners: bool) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone)
        self.norm, self.align_corners = norm, align_corners
        self.head: nn.Module

    def set_head(self, head: nn.Module) -> None:
        """Take this head, with its batch norms as the settings say."""
        for layer in head.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = self.norm.momentum
                layer.requires_grad_(self.norm.affine)
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Scores, not yet normalised."""
        scores: Tensor = self.head(self.backbone(images)["last"])
        return scores


class DeepLabLargeFOV(DeepLab):
    """DeepLab-LargeFOV ("DeepLab-v1").

    backbone: see BackboneSettings. width: channels of the head. dilation: of its 3x3 convolution, 12 at stride 8.
    dropout: before the classifier. norm: of its batch norms: affine, whether scale and shift learn, and momentum of the
    statistics (released: false and 0.0003). align_corners: of the resizing of scores (released: true).
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: BackboneSettings,
        width: Count = 512,
        dilation: Count = 12,
        dropout: float = 0.5,
        norm: HeadNorm = HeadNorm(),
        align_corners: bool = False,
    ) -> None:
        super().__init__(backbone, norm, align_corners)
        channels = self.backbone.dims["last"]
        self.set_head(LargeFOV(channels, num_classes + 1, width=width, dilation=dilation, dropout=dropout))


class DeepLabV2(DeepLab):
    """DeepLab-v2: atrous spatial pyramid pooling as the sum of classifiers.

    backbone: see BackboneSettings. dilations: of the classifiers. align_corners: of the resizing of scores.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: BackboneSettings,
        dilations: Dilations = (6, 12, 18, 24),
        align_corners: bool = False,
    ) -> None:
        super().__init__(backbone, HeadNorm(), align_corners)
        self.set_head(ASPPSum(self.backbone.dims["last"], num_classes + 1, dilations=dilations))


class DeepLabV3Like(DeepLab):
    """What PPC and HSC call DeepLab-ASPP or DeepLab-v2 in their code: a head like DeepLab-v3's.

    backbone: see BackboneSettings. width: channels of each branch. dilations: of the branches. dropout: before the
    classifier, applied twice. norm: of its batch norms: affine, whether scale and shift learn, and momentum of the
    statistics (released: false and 0.0003). align_corners: of the resizing of scores (released: true).
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: BackboneSettings,
        width: Count = 256,
        dilations: Dilations = (6, 12, 18, 24),
        dropout: float = 0.5,
        norm: HeadNorm = HeadNorm(),
        align_corners: bool = False,
    ) -> None:
        super().__init__(backbone, norm, align_corners)
        channels = self.backbone.dims["last"]
        self.set_head(ASPPConcat(channels, num_classes + 1, width=width, dilations=dilations, dropout=dropout))


class SegmentObjective(nn.Module):
    """Cross-entropy of a segmenter on index masks; pixels marked 255 are left out."""

    def __init__(self, net: DeepLab, *, bf16: bool = False) -> None:
        super().__init__()
        self.net = net
        self.bf16 = bf16

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """{"ce": mean over the pixels that have a label, 0 if none has}; scores are resized to the masks."""
        if batch.target is None:
            raise ValueError("a segmenter is trained on batches with a target")
        with torch.autocast(batch.images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            scores = self.net(batch.images)
        size, align = batch.target.shape[-2:], self.net.align_corners
        scores = F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=align)
        # Over all processes, so that a pixel weighs the same wherever it lands. It may be 0: a crop can be all ignored.
        labelled = mean_over_processes((batch.target != IGNORE).sum().float()).clamp(min=1 / processes())
        return {"ce": F.cross_entropy(scores, batch.target, ignore_index=IGNORE, reduction="sum") / labelled}

    def on_epoch_start(self, epoch: int) -> None:
        """Nothing to do."""

    def after_step(self) -> None:
        """Nothing to do."""
