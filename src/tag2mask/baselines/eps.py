"""EPS.

Lee, Lee, Lee, Shim: Railroad is not a Train: Saliency as Pseudo-pixel Supervision for Weakly Supervised Semantic
Segmentation, CVPR 2021, arXiv:2105.08965.

    L = L_cls + L_sal        L_sal = mean (M_s - Mhat_s)^2        Mhat_s = lambda M_fg + (1 - lambda) (1 - M_bg)
    M_fg = sum of M_c over tagged c with O_c > tau               M_bg = M_bkg + sum of M_c over the other tagged c
    O_c  = |B_c and B_s| / |B_c|,  B: where a map exceeds 1/2

    symbol   here                     meaning
    M_c      softmax of CamOutput.cams and CamOutput.background over the K + 1 channels, at each pixel
    M_bkg    the background's share   its logit map is CamOutput.background, [B 1 h w]
    M_s      side["saliency"]         the given saliency on the grid of the CAM, nearest pixel
    O        overlap                  a tagged class that lies outside what is salient counts as background
    L_cls    "cls"                    multi-label soft margin of the pooled maps of the K classes and the tags
    L_sal    "sal"                    saliency supervises each pixel

Which map is which: `cams` and `background` hold raw values, from which the losses are made; what is exported is the
softmax of the classes (`export`); `refined` exists with a PCM alone and is what contrastive methods read in training.

With `pcm`, EPS is what PPC and HSC build on: a second view, a pixel correlation module (ops/pcm.py) and SEAM's losses
on the feature grid (ops/equivariance.py), every other term averaged over both views:

    L = L_cls + L_sal + L_sal(refined) + L_ER + L_ECR + L_rvmin

No paper describes this; it is their released code but for two slips, off by default: `refined_softmax` and
`released_one_hot`. Padding counts as not salient, and is not masked otherwise.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.backbones import BackboneSettings, build_backbone
from tag2mask.core import FULL, Baseline, Batch, CamOutput, Features, Losses, Progress, View
from tag2mask.ops.cams import pool
from tag2mask.ops.equivariance import equivariance
from tag2mask.ops.pcm import PCM, PCMOutput


class EPS(Baseline):
    """Classes and background share each pixel, and a saliency map says which pixels are background.

    backbone: see BackboneSettings; with pcm it must have the taps "c4" and "c5". dropout: share of feature channels
    dropped before the classifier, in training (released: 0). overlap: above which a tagged class is foreground (tau:
    0.4). foreground: weight of the foreground's estimate of saliency, against the background's (lambda: VOC 0.5, COCO
    0.9).

    pcm: add a pixel correlation module and SEAM's losses. The rest only matters with it. size: side of the second view
    in pixels (128). refined_softmax: L_sal takes a softmax of the refined maps, which are shares already; a slip of the
    code released with PPC and HSC. released_one_hot: another, see ops.equivariance.target.
    """

    needs = frozenset({"saliency"})

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: BackboneSettings,
        dropout: float = 0.0,
        overlap: float = 0.4,
        foreground: float = 0.5,
        pcm: bool = False,
        size: int = 128,
        refined_softmax: bool = False,
        released_one_hot: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone)
        self.dims = self.backbone.dims
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(self.dims["last"], num_classes + 1, kernel_size=1, bias=False)  # background last
        nn.init.xavier_uniform_(self.classifier.weight)
        self.pcm = PCM(self.dims) if pcm else None
        self.views = (FULL, View(size=size, align_corners=True)) if pcm else (FULL,)
        self.overlap, self.foreground = overlap, foreground
        self.refined_softmax, self.released_one_hot = refined_softmax, released_one_hot

    def encode(self, images: Tensor) -> Features:
        """All taps of the backbone."""
        features: Features = self.backbone(images)
        return features

    def classify(self, features: Features, images: Tensor) -> CamOutput:
        """Maps of classes and background by the classifier at every place, logits by pooling the classes' maps."""
        maps = self.classifier(self.dropout(features["last"]))
        cams, background = maps[:, :-1], maps[:, -1:]
        if self.pcm is None:
            return CamOutput(pool(cams), cams, features, background=background)
        refined, rest = self.pcm(cams, features, images)
        return PCMOutput(pool(cams), cams, features, refined=refined, background=background, refined_background=rest)

    def losses(self, batch: Batch, outs: dict[View, CamOutput], progress: Progress) -> Losses:
        """Classification and saliency; with a PCM also saliency of the refined maps and SEAM's terms."""
        looks = [outs[view] for view in self.views]
        salient = [view(batch.side["saliency"]) for view in self.views]
        cls = [F.multilabel_soft_margin_loss(out.logits, batch.tags) for out in looks]
        sal = [self._saliency_loss(_shares(out), s, batch.tags) for out, s in zip(looks, salient, strict=True)]
        losses: Losses = {"cls": torch.stack(cls).mean(), "sal": torch.stack(sal).mean()}
        if self.pcm is None:
            return losses
        refined = [cast(PCMOutput, out) for out in looks]
        sal = [self._saliency_loss(self._parts(out), s, batch.tags) for out, s in zip(refined, salient, strict=True)]
        sizes = [(out.cams.shape[-2], out.cams.shape[-1]) for out in looks]
        agreement = equivariance(refined, sizes, batch.tags, released_one_hot=self.released_one_hot)
        return losses | {"sal_refined": torch.stack(sal).mean()} | agreement

    def export(self, out: CamOutput, tags: Tensor) -> Tensor:
        """The softmax over the K classes and the background, without the background: [B K h w] in 0..1."""
        return _shares(out)[:, :-1]

    def _saliency_loss(self, shares: Tensor, saliency: Tensor, tags: Tensor) -> Tensor:
        return saliency_loss(
            shares[:, :-1], shares[:, -1:], saliency, tags, overlap=self.overlap, foreground=self.foreground
        )

    def _parts(self, out: PCMOutput) -> Tensor:
        parts = torch.cat([out.refined, out.refined_background], dim=1)
        return parts.softmax(dim=1) if self.refined_softmax else parts


def _shares(out: CamOutput) -> Tensor:
    """[B K+1 h w]: what each class, and LAST the background, has of every pixel."""
    assert out.background is not None
    return torch.cat([out.cams, out.background], dim=1).softmax(dim=1)


def saliency_loss(
    classes: Tensor, background: Tensor, saliency: Tensor, tags: Tensor, *, overlap: float, foreground: float
) -> Tensor:
    """L_sal for shares of classes [B K h w] and background [B 1 h w], given saliency [B 1 H W] in 0..1, tags [B K].

    overlap: tau. foreground: lambda.
    """
    saliency = F.interpolate(saliency, size=classes.shape[-2:], mode="nearest")
    present = tags[:, :, None, None]
    salient = present * inside(classes, saliency, overlap)
    estimate = foreground * (classes * salient).sum(dim=1, keepdim=True)
    rest = background + (classes * (present - salient)).sum(dim=1, keepdim=True)
    return F.mse_loss(estimate + (1 - foreground) * (1 - rest), saliency)


@torch.no_grad()
def inside(classes: Tensor, saliency: Tensor, overlap: float) -> Tensor:
    """1 where more than `overlap` of a class's area is salient, else 0; [B K h w] and [B 1 h w] -> [B K 1 1].

    The area is where a class has more than half of the pixel. A ten-thousandth of the grid is added to it, which lets a
    class without area be outside.
    """
    area = (classes > 0.5).float()
    common = (area * (saliency > 0.5)).sum(dim=(2, 3), keepdim=True)
    return (common / (area + 1e-4).sum(dim=(2, 3), keepdim=True) > overlap).float()
