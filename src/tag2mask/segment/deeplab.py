"""DeepLab-LargeFOV on any backbone, and how it is trained on pseudo-masks.

Chen, Papandreou, Kokkinos, Murphy, Yuille: Semantic Image Segmentation with Deep Convolutional Nets and Fully
Connected CRFs, ICLR 2015, arXiv:1412.7062 (section 3.1 and table 2: one 3x3 convolution with a large dilation).

The outputs have K + 1 channels in the order of index masks: 0 is background, k + 1 is class k.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tag2mask.backbones import BackboneSettings, TimmCNN
from tag2mask.core import Batch, Losses, Progress
from tag2mask.data.source import IGNORE
from tag2mask.ops.gather import mean_over_processes, processes


class LargeFOV(nn.Module):
    """Dilated 3x3 convolution to `width` channels, 1x1 convolution, classifier; batch norm and ReLU in between.

    The batch norms follow the code that the weakly supervised field trains with; the paper has none.
    """

    def __init__(self, channels: int, outputs: int, *, width: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, kernel_size=3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel_size=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Conv2d(width, outputs, kernel_size=1),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        """[B D h w] -> [B outputs h w]."""
        scores: Tensor = self.layers(features)
        return scores


class DeepLab(nn.Module):
    """A backbone with a LargeFOV head: images [B 3 H W] -> scores [B K+1 h w] at the backbone's stride.

    backbone: see BackboneSettings. width: channels of the head. dilation: of its 3x3 convolution, 12 at stride 8.
    dropout: before the classifier.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: BackboneSettings,
        width: Annotated[int, Field(ge=1)] = 512,
        dilation: Annotated[int, Field(ge=1)] = 12,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.backbone = TimmCNN(backbone)
        self.head = LargeFOV(
            self.backbone.dims["last"], num_classes + 1, width=width, dilation=dilation, dropout=dropout
        )

    def forward(self, images: Tensor) -> Tensor:
        """Scores, not yet normalised."""
        scores: Tensor = self.head(self.backbone(images)["last"])
        return scores


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
        scores = F.interpolate(scores.float(), size=batch.target.shape[-2:], mode="bilinear", align_corners=False)
        # Over all processes, so that a pixel weighs the same wherever it lands. It may be 0: a crop can be all ignored.
        labelled = mean_over_processes((batch.target != IGNORE).sum().float()).clamp(min=1 / processes())
        return {"ce": F.cross_entropy(scores, batch.target, ignore_index=IGNORE, reduction="sum") / labelled}

    def on_epoch_start(self, epoch: int) -> None:
        """Nothing to do."""

    def after_step(self) -> None:
        """Nothing to do."""
