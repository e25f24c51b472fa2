"""MCTformer.

Xu, Ouyang, Bennamoun, Boussaid, Xu: Multi-class Token Transformer for Weakly Supervised Semantic Segmentation, CVPR
2022, arXiv:2203.02891 (V1, V2).
Xu, Bennamoun, Boussaid, Laga, Ouyang, Xu: MCTformer+, TPAMI 2024, arXiv:2308.03005 (Plus).

    s_c  = mean over the channels of class token c                  p_c = mean over the patches of M_c
    L    = BCE(s) + BCE(p) + lambda L_token
    F_c  = A_c * ReLU(M_c)                                          R_c(i) = sum_j P(i, j) F_c(j)

    symbol    here                 meaning
    A         class_attention      what class tokens attend to: mean over the heads of the last layers, [B K h w]; times
                                   the number of patches, so that it is 1 where a token attends to all alike
    P         patch_attention      what patches attend to: mean over the heads of all layers, rows (i) of [B hw h w]
    M         CamOutput.cams       a 3x3 convolution of the patch tokens, [B K h w]; A itself in V1
    F, R      CamOutput.refined    fused, then spread by affinity; the map to export is R, stretched to 0..1
    s         CamOutput.logits     tag scores, [B K]
    L_token   "token"              of the class tokens after each layer, each must be most like itself: cross-entropy of
                                   the cosines of every two of them, over all layers, images and classes

The three versions differ in these arguments, beside what the recipe says of training (Plus: crops of 448 pixels):

    argument    V1          V2          Plus
    maps        attention   fused       root: the square root of F is spread
    positions   released    released    exact
    repeat      1           1           2, with weights for crops of 224 pixels
    decay       -           1           0.996: p_c weighs the r-th largest score of a class with 0.996^r
    token       0           0           1

A and P send no gradient through F and R. A method works on the patch tokens and M: CPAL takes z from the one and its
maps from the other, the attention trains with the tags alone. V1 has no M, and no features that make one.

Where this differs from the released code: attention is a mean, times the number of patches, where V1 and V2 have a sum,
which no stretched map shows; images are resized to whole patches, nothing beyond the last one is dropped (`border`);
the map of every look (scale, mirror image) is stretched to 0..1 and their sum divided by its maximum, where only the
sum is stretched. RandAugment and random erasing are not there.
Where the papers leave something open: tokens are compared by cosine, without a temperature, and those of all classes;
the weights of the ranks are divided by their sum; the tag scores that are evaluated are s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.backbones import BackboneSettings
from tag2mask.backbones.class_tokens import ClassTokenViT
from tag2mask.core import FULL, Baseline, Batch, CamOutput, Features, Losses, Progress, View
from tag2mask.errors import UserError
from tag2mask.ops.cams import min_max_norm, pool


@dataclass(kw_only=True)
class TokenOutput(CamOutput):
    """A CamOutput with the scores of the patches [B K], None in V1, and the class tokens of all layers [B L K D]."""

    patch_logits: Tensor | None
    class_tokens: Tensor

    def float(self) -> TokenOutput:
        """The same in float32."""
        out = super().float()
        assert isinstance(out, TokenOutput)
        patch_logits = None if self.patch_logits is None else self.patch_logits.float()
        return replace(out, patch_logits=patch_logits, class_tokens=self.class_tokens.float())


class MCTformer(Baseline):
    """A transformer with a token for every class, whose attention tells where the class is.

    backbone: see BackboneSettings; the name is that of a ViT or DeiT of timm, output_stride its patch (from scratch any
    is). maps, positions, repeat, decay: see the table above. token: lambda. layers: the last ones whose attention is A.
    refine: false exports F instead of R. drop_path: share of the residual branches that are dropped in training
    (published: 0.1). border: what is done with images that are no whole patches, "resize" or, as released, "drop".

    Raises UserError for a value out of range, or a backbone that is no such transformer.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: BackboneSettings,
        maps: Literal["attention", "fused", "root"] = "fused",
        layers: int = 3,
        refine: bool = True,
        decay: float = 1.0,
        token: float = 0.0,
        positions: Literal["exact", "released"] = "released",
        repeat: int = 1,
        drop_path: float = 0.0,
        border: Literal["resize", "drop"] = "resize",
    ) -> None:
        super().__init__()
        if not 0 < decay <= 1 or not 0 <= drop_path < 1 or not token >= 0 or repeat < 1:
            raise UserError(
                "mctformer: decay must be above 0 and at most 1, drop_path in 0..1 and below 1, token not negative, "
                "repeat at least 1"
            )
        self.backbone = ClassTokenViT(
            backbone, num_classes,
            layers=layers, drop_path=drop_path, positions=positions, repeat=repeat, border=border,
        )  # fmt: skip
        self.maps, self.refine, self.decay, self.token = maps, refine, decay, token
        self.dims = dict(self.backbone.dims)
        self.classifier: nn.Module = nn.Identity()
        if maps == "attention":
            del self.dims["last"]  # no map is made of it, so there is nothing that a method could work on
        else:
            self.classifier = _convolution(self.dims["last"], num_classes)

    def widen(self, channels: int) -> None:
        """Make the 3x3 convolution, new, read `channels` more of the tap "last", or fewer."""
        old = self.classifier
        assert isinstance(old, nn.Conv2d), "without the tap last there is nothing to be widened"
        self.classifier = _convolution(old.in_channels + channels, old.out_channels)
        self.dims = self.dims | {"last": self.dims["last"] + channels}
        self.widened += channels

    def encode(self, images: Tensor) -> Features:
        """All taps of the transformer, its class tokens and its attention."""
        features: Features = self.backbone(images)
        return features

    def classify(self, features: Features, images: Tensor) -> TokenOutput:
        """Scores of the class tokens and of the patches, maps, and the fused and spread ones."""
        tokens, attention = features["class_tokens"], features["class_attention"]
        attention = attention * attention[0, 0].numel()
        taps = {tap: x for tap, x in features.items() if not tap.endswith(("_tokens", "_attention"))}
        patch_logits = None
        if self.maps == "attention":
            cams = fused = attention
        else:
            cams = self.classifier(features["last"])
            patch_logits = rank_pool(cams, self.decay)
            fused = attention.detach() * cams.relu()
        if self.maps == "root":
            fused = torch.where(fused > 0, fused, 1).sqrt() * (fused > 0)  # the root of 0 would have no gradient
        refined = spread(fused, features["patch_attention"].detach()) if self.refine else fused
        return TokenOutput(
            tokens[:, -1].mean(dim=2), cams, taps, refined, patch_logits=patch_logits, class_tokens=tokens
        )  # fmt: skip

    @torch.no_grad()
    def export(self, out: CamOutput, tags: Tensor) -> Tensor:
        """The exported map in 0..1: every place has something of what all attend to, the least of it is taken away."""
        return min_max_norm(out.best)

    def losses(self, batch: Batch, outs: dict[View, CamOutput], progress: Progress) -> Losses:
        """Classification by class tokens and, if there is a map of them, by patches; the contrast of class tokens."""
        out = outs[FULL]
        assert isinstance(out, TokenOutput)
        losses = {"cls": F.multilabel_soft_margin_loss(out.logits, batch.tags)}
        if out.patch_logits is not None:
            losses["patch"] = F.multilabel_soft_margin_loss(out.patch_logits, batch.tags)
        if self.token:
            losses["token"] = self.token * token_contrast(out.class_tokens)
        return losses


def _convolution(channels: int, num_classes: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, num_classes, kernel_size=3, padding=1)
    nn.init.xavier_uniform_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution


def rank_pool(cams: Tensor, decay: float) -> Tensor:
    """sum_r decay^r s_r / sum_r decay^r of the scores s_0 >= s_1 >= ... of a map, [B K h w] -> [B K]; 1 is the mean."""
    if decay == 1:
        return pool(cams)
    kind = torch.promote_types(cams.dtype, torch.float32)
    scores = cams.to(kind).flatten(2).sort(dim=2, descending=True).values
    weights = decay ** torch.arange(scores.shape[2], device=scores.device, dtype=kind)
    return (scores * weights).sum(dim=2) / weights.sum()


def spread(maps: Tensor, attention: Tensor) -> Tensor:
    """Every place takes from where it attends to: maps [B K h w], attention [B hw h w] of each place -> [B K h w].

    In float32 at least: where all attend to the same the map is nearly flat, and what is left is what counts.
    """
    with torch.autocast(maps.device.type, enabled=False):
        kind = torch.promote_types(maps.dtype, torch.float32)
        return torch.einsum("bphw,bkhw->bkp", attention.to(kind), maps.to(kind)).view(maps.shape)


def token_contrast(tokens: Tensor) -> Tensor:
    """L_token of class tokens [B L K D]: the mean of -log softmax_k cos(t_j, t_k) at k = j."""
    unit = F.normalize(tokens, dim=3)
    cosines = unit @ unit.mT
    return -cosines.log_softmax(dim=3).diagonal(dim1=2, dim2=3).mean()
