"""SEAM.

Wang, Zhang, Kan, Shan, Chen: Self-supervised Equivariant Attention Mechanism for Weakly Supervised Semantic
Segmentation, CVPR 2020, arXiv:2004.04581.

    L = (L_cls1 + L_cls2) / 2 + L_ER + L_ECR + L_rvmin

    symbol    here                 meaning
    1, 2      SEAM.views           the image, and the same image made smaller
    yhat      CamOutput.cams       class activation maps, [B K h w]
    y         CamOutput.refined    what the pixel correlation module makes of them (ops/pcm.py); also the map to export
    L_cls     "cls"                multi-label soft margin of the pooled CAM and the tags
    L_ER      "er"                 the CAMs of both views agree (ops/equivariance.py, as the next two)
    L_ECR     "ecr"                the refined map of each view agrees with the CAM of the other, where they differ most
    L_rvmin   "rvmin"              the refined map is 0 on at least a quarter of the image

The module reads the trunk without gradient: L_ECR and L_rvmin train its three convolutions, L_cls and L_ER the rest.
A background channel of the classifier would receive no gradient from any term, so there is none.

Where the paper is silent this is the released code: L_rvmin itself; maps are brought to image size before they are
pooled, normalised and compared (`resolution`); every resizing aligns corners; the module sees all classes; padding is
not masked.
"""

from __future__ import annotations

from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.backbones import BackboneSettings, build_backbone
from tag2mask.core import FULL, Baseline, Batch, CamOutput, Features, Losses, Progress, View
from tag2mask.ops.cams import pool
from tag2mask.ops.equivariance import Size, equivariance, pool_resized
from tag2mask.ops.pcm import PCM, PCMOutput


class SEAM(Baseline):
    """Two views of an image, and maps that must agree.

    backbone: see BackboneSettings; it must have the taps "c4" and "c5". scale: of the second view (paper: 0.3). size:
    side of the second view in pixels, instead of scale (128 where PPC is added). dropout: share of feature channels
    dropped before the classifier, in training (released: 0.5). er, ecr, rvmin: weights of the three terms (1 each; the
    paper's ablation drops er and ecr, and does not mention rvmin). hard: share of the entries that L_ECR counts (paper:
    0.2; 1 is all of them). resolution: "full" brings maps to image size first, as published; "grid" stays on the
    feature grid, which is faster and what is done where SEAM's losses are put on EPS.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: BackboneSettings,
        scale: float = 0.3,
        size: int | None = None,
        dropout: float = 0.5,
        er: float = 1.0,
        ecr: float = 1.0,
        rvmin: float = 1.0,
        hard: float = 0.2,
        resolution: Literal["full", "grid"] = "full",
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone)
        self.dims = self.backbone.dims
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(self.dims["last"], num_classes, kernel_size=1, bias=False)
        nn.init.xavier_uniform_(self.classifier.weight)
        self.pcm = PCM(self.dims)
        self.views = (FULL, View(size=size, scale=1.0 if size else scale, align_corners=True))
        self.weights = {"cls": 1.0, "er": er, "ecr": ecr, "rvmin": rvmin}
        self.hard = hard
        self.full = resolution == "full"

    def encode(self, images: Tensor) -> Features:
        """All taps of the backbone."""
        features: Features = self.backbone(images)
        return features

    def classify(self, features: Features, images: Tensor) -> PCMOutput:
        """Maps by the classifier at every place, refined by the module; logits by pooling the maps."""
        cams = self.classifier(self.dropout(features["last"]))
        refined, background = self.pcm(cams, features, images)
        logits = pool_resized(cams, _size(images)) if self.full else pool(cams)
        return PCMOutput(logits, cams, features, refined=refined, refined_background=background)

    def losses(self, batch: Batch, outs: dict[View, CamOutput], progress: Progress) -> Losses:
        """Classification, equivariant maps, equivariance across the module, background suppression."""
        looks = [cast(PCMOutput, outs[view]) for view in self.views]
        sizes = [_size(view(batch.valid) if self.full else outs[view].cams) for view in self.views]
        one, two = (F.multilabel_soft_margin_loss(out.logits, batch.tags) for out in looks)
        losses = {"cls": (one + two) / 2} | equivariance(looks, sizes, batch.tags, hard=self.hard)
        return {name: self.weights[name] * loss for name, loss in losses.items()}


def _size(maps: Tensor) -> Size:
    return maps.shape[-2], maps.shape[-1]
