"""What turns features into class scores in a DeepLab: features [B D h w] -> scores [B outputs h w].

LargeFOV    Chen, Papandreou, Kokkinos, Murphy, Yuille: Semantic Image Segmentation with Deep Convolutional Nets and
            Fully Connected CRFs, ICLR 2015, arXiv:1412.7062 (section 3.1: one 3x3 convolution with a large dilation).
ASPPSum     The same: DeepLab, IEEE TPAMI 40(4), 2018, arXiv:1606.00915 (DeepLab-v2 on ResNet101: the sum of four
            classifiers with different dilations).
ASPPConcat  After Chen, Papandreou, Schroff, Adam: Rethinking Atrous Convolution, arXiv:1706.05587 (DeepLab-v3:
            branches are concatenated, one of them is the mean of the image).

The weakly supervised field says "DeepLab-ASPP" and "DeepLab-v2" to both of the latter: the code that PPC and HSC train
with has ASPPConcat, with the dilations of v2 and without v3's branch of a 1x1 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tag2mask.errors import UserError


class LargeFOV(nn.Module):
    """Dilated 3x3 convolution to `width` channels, 1x1 convolution, classifier; batch norm and ReLU in between.

    The batch norms follow the code that the weakly supervised field trains with; the paper has none.
    """

    def __init__(self, channels: int, outputs: int, *, width: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_block(channels, width, 3, dilation),
            *_block(width, width, 1),
            nn.Dropout(dropout),
            nn.Conv2d(width, outputs, kernel_size=1),
        )
        _kaiming(self)

    def forward(self, features: Tensor) -> Tensor:
        """[B D h w] -> [B outputs h w]."""
        scores: Tensor = self.layers(features)
        return scores


class ASPPSum(nn.Module):
    """The sum of 3x3 classifiers with the given dilations; nothing else, no batch norm."""

    def __init__(self, channels: int, outputs: int, *, dilations: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(channels, outputs, 3, padding=d, dilation=d) for d in dilations)
        for branch in self.branches:
            assert isinstance(branch, nn.Conv2d) and branch.bias is not None
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B D h w] -> [B outputs h w]."""
        return torch.stack([branch(features) for branch in self.branches]).sum(dim=0)


class ASPPConcat(nn.Module):
    """3x3 convolutions with the given dilations and the mean of the image, each to `width` channels; then mixed.

    dropout: before the classifier, twice in a row, as released.
    """

    def __init__(self, channels: int, outputs: int, *, width: int, dilations: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*_block(channels, width, 3, d)) for d in dilations)
        self.whole = nn.Sequential(*_block(channels, width, 1))
        self.mix = nn.Sequential(*_block((len(dilations) + 1) * width, width, 1), nn.Dropout(dropout))
        self.classify = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(width, outputs, kernel_size=1))
        _kaiming(self)

    def forward(self, features: Tensor) -> Tensor:
        """[B D h w] -> [B outputs h w]. Raises UserError for a single image in training: it has no batch statistics."""
        if self.training and len(features) == 1 and isinstance(self.whole[1], nn.BatchNorm2d):
            raise UserError("train.batch: this head takes statistics over images; give each process 2 or more")
        whole = self.whole(features.mean(dim=(2, 3), keepdim=True))
        parts = [*(branch(features) for branch in self.branches), whole.expand(-1, -1, *features.shape[2:])]
        scores: Tensor = self.classify(self.mix(torch.cat(parts, dim=1)))
        return scores


def _block(channels: int, out: int, size: int, dilation: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out, size, padding=dilation * (size // 2), dilation=dilation, bias=False)
    return [convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def _kaiming(head: nn.Module) -> None:
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
