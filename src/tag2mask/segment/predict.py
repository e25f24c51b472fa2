"""Masks of images by a segmenter, over several scales and their mirror images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tag2mask.segment.deeplab import DeepLab


@torch.no_grad()
def predict(net: DeepLab, images: Tensor, *, scales: Sequence[float], flip: bool) -> Tensor:
    """Class probabilities [B K+1 H W] of normalised images [B 3 H W]: softmax of the mean of resized scores."""
    height, width = images.shape[-2:]
    total: Tensor | None = None
    for scale in scales:
        size = max(32, round(height * scale)), max(32, round(width * scale))
        scaled = images
        if size != (height, width):
            scaled = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        scores = net(torch.cat([scaled, scaled.flip(-1)]) if flip else scaled).float()
        if flip:
            plain, mirrored = scores.chunk(2)
            scores = (plain + mirrored.flip(-1)) / 2
        scores = F.interpolate(scores, size=(height, width), mode="bilinear", align_corners=net.align_corners)
        total = scores if total is None else total + scores
    if total is None:
        raise ValueError("scales must not be empty")
    return (total / len(scales)).softmax(dim=1)
