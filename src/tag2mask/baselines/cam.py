"""Plain CAM.

Zhou, Khosla, Lapedriza, Oliva, Torralba: Learning Deep Features for Discriminative Localization, CVPR 2016,
arXiv:1512.04150.

    M_c(x, y) = sum_k w_ck f_k(x, y)        (eq. 2)        S_c = mean over (x, y) of M_c        (eq. 1)

    symbol   here                    meaning
    f        features["last"]        last feature map, [B D h w]
    w        classifier.weight       1x1 convolution without bias, as in PSA and IRN: the map is the logit's only source
    M        CamOutput.cams          class activation maps, [B K h w]
    S        CamOutput.logits        tag scores, [B K]

Loss: multi-label soft margin, the mean over classes and images of the binary cross-entropy of sigmoid(S) and the tags.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.backbones import BackboneSettings, build_backbone
from tag2mask.core import FULL, Baseline, Batch, CamOutput, Features, Losses, Progress, View
from tag2mask.ops.cams import pool


class CAM(Baseline):
    """A classifier whose class activation maps are its seeds.

    backbone: see BackboneSettings. dropout: share of feature channels dropped before the classifier, in training.
    """

    def __init__(self, num_classes: int, *, backbone: BackboneSettings, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone)
        self.dims = self.backbone.dims
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(self.dims["last"], num_classes, kernel_size=1, bias=False)
        nn.init.xavier_uniform_(self.classifier.weight)

    def encode(self, images: Tensor) -> Features:
        """All taps of the backbone."""
        features: Features = self.backbone(images)
        return features

    def classify(self, features: Features, images: Tensor) -> CamOutput:
        """Maps by the classifier at every place, logits by pooling them."""
        cams = self.classifier(self.dropout(features["last"]))
        return CamOutput(logits=pool(cams), cams=cams, features=features)

    def losses(self, batch: Batch, outs: dict[View, CamOutput], progress: Progress) -> Losses:
        """The classification loss."""
        return {"cls": F.multilabel_soft_margin_loss(outs[FULL].logits, batch.tags)}
