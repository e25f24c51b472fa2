"""AffinityNet (PSA): learns from the sure parts of CAMs which nearby pixels belong together.

Ahn and Kwak: Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised Semantic
Segmentation, CVPR 2018, arXiv:1803.10464.

    M_bg = (1 - max_c M_c)^alpha                                                                          (section 3.1)
    a_ij = exp(-mean_d |f_i - f_j|)                                                       (section 3.2; refine/pairs.py)
    L    = bg / 4 + fg / 4 + neg / 2                                                      (section 3.2; refine/pairs.py)

    symbol   here                    meaning
    f        AffinityNet(images)     features, one vector for each cell of 8 x 8 pixels
    M_c      maps                    CAMs of the tagged classes
    alpha    low, high               a low one makes much background: what is a class then is one surely; a high one
                                     makes little: what is background then is background surely
    labels   confident_labels        from the CRF of both; all other pixels are unlabelled (255)

Three levels of the backbone are reduced to 64, 128 and 256 channels, brought onto one grid and mixed by a 1x1
convolution. Gradients flow into the backbone. What the trained network is for: refine/walk.py.

Where the released code differs: it averages CRF scores over a cell where here the labels of its pixels vote; its crops
are padded with black where ours are with the mean colour (both unlabelled); `border="psa"` leaves out the pairs that it
leaves out; images are not rescaled in training (take `augment.long` as the common long side).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tag2mask.backbones import BackboneSettings, build_backbone
from tag2mask.core import Batch, Losses, Progress
from tag2mask.data.source import IGNORE
from tag2mask.errors import UserError
from tag2mask.ops.cams import power_background
from tag2mask.refine.crf import PRESETS, DenseCRF
from tag2mask.refine.grid import grid_size, labels_on_grid, pad_to_multiple
from tag2mask.refine.pairs import Border, affinity_losses, alikeness, pairs_of

WIDTHS = (64, 128, 256)  # channels taken from each of three levels


class AffinityNet(nn.Module):
    """Features whose distance tells whether two cells belong together: images [B 3 H W] -> [B 448 h w] at stride 8.

    backbone: see BackboneSettings; resnet38 as published, or another, best with output stride 8. radius: of the pairs,
    in cells of 8 pixels, in training and in the walk. border: "all" pairs, or in both only those of the released code
    (see refine.pairs.pairs_of).
    Raises UserError for a radius under 2.
    """

    stride = 8

    def __init__(self, *, backbone: BackboneSettings, radius: int = 5, border: Border = "all") -> None:
        super().__init__()
        pairs_of((1, 1), radius)  # says what is wrong with the radius
        self.backbone = build_backbone(backbone)
        self.multiple = math.lcm(backbone.output_stride, self.stride)  # taps may have any stride, those of a ViT do
        self.radius, self.border = radius, border
        widths, dims = dict(zip(self.backbone.affinity, WIDTHS, strict=True)), self.backbone.dims
        self.reduce = nn.ModuleDict({tap: nn.Conv2d(dims[tap], width, 1, bias=False) for tap, width in widths.items()})
        total = sum(WIDTHS)
        self.mix = nn.Conv2d(total, total, 1, bias=False)
        for conv in self.reduce.values():
            nn.init.kaiming_normal_(conv.weight)  # type: ignore[arg-type]
        nn.init.xavier_uniform_(self.mix.weight, gain=4)

    def forward(self, images: Tensor) -> Tensor:
        """Features of every cell, also of those that the image covers in part."""
        height, width = grid_size(images, self.stride)
        padded = pad_to_multiple(images, self.multiple)
        taps, size = self.backbone(padded), grid_size(padded, self.stride)
        levels = []
        for tap, conv in self.reduce.items():
            reduced = conv(taps[tap])
            if reduced.shape[-2:] != size:
                reduced = F.interpolate(reduced, size=size, mode="bilinear", align_corners=False)
            levels.append(F.elu(reduced))
        return F.elu(self.mix(torch.cat(levels, dim=1)))[..., :height, :width]


class AffinityObjective(nn.Module):
    """The three losses of an AffinityNet on confident labels (the batch's target)."""

    def __init__(self, net: AffinityNet, *, bf16: bool = False) -> None:
        super().__init__()
        self.net = net
        self.bf16 = bf16

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """{"background", "foreground", "different"}; see `affinity_losses`."""
        if batch.target is None:
            raise ValueError("AffinityNet is trained on batches with a target")
        with torch.autocast(batch.images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            features = self.net(batch.images)
        features = features.float().contiguous(memory_format=torch.channels_last)
        size = features.shape[2], features.shape[3]
        labels = labels_on_grid(batch.target, size, self.net.stride, batch.tags.shape[1])
        pairs = pairs_of(size, self.net.radius, self.net.border)
        return affinity_losses(lambda each: alikeness(features, each), labels, pairs)

    def on_epoch_start(self, epoch: int) -> None:
        """Nothing to do."""

    def after_step(self) -> None:
        """Nothing to do."""


def check_alphas(low: float, high: float) -> None:
    """Raises UserError unless 0 < low < high."""
    if not 0 < low < high < float("inf"):
        raise UserError(f"alpha_low {low}, alpha_high {high}: both must be positive and the low one lower; PSA: 4, 32")


def confident_labels(
    image: NDArray[np.uint8], maps: Tensor, classes: Tensor, *, low: float = 4.0, high: float = 32.0, steps: int = 10
) -> NDArray[np.uint8]:
    """The sure pixels of an image [H W 3], as an index mask [H W]: 0 background, class index + 1, 255 not sure.

    maps [P H W] in 0..1 of the P tagged classes, classes [P] their indices. A class where the CRF with alpha `low` says
    so, unless with `high` it says background; background where with `high` it says so. No class: all background.
    """
    check_alphas(low, high)
    if len(maps) == 0:
        return np.zeros(image.shape[:2], np.uint8)
    crf = DenseCRF(image, **PRESETS["psa"])
    names = np.concatenate([[0], classes.numpy() + 1]).astype(np.uint8)

    def labels(alpha: float) -> NDArray[np.uint8]:
        scores = torch.cat([power_background(maps, alpha)[None], maps])
        found: NDArray[np.uint8] = names[np.asarray(crf(scores.numpy(), steps=steps)).argmax(axis=0)]
        return found

    surely_a_class, surely_background = labels(low), labels(high) == 0
    sure = np.where(surely_a_class == 0, IGNORE, surely_a_class)
    return np.where(surely_background, 0, sure).astype(np.uint8)
