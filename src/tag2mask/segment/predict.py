"""Masks of images by a segmenter, over several scales and their mirror images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tag2mask.segment.deeplab import DeepLab


def predict(net: DeepLab, images: Tensor, *, scales: Sequence[float], flip: bool) -> Tensor:
    """Class probabilities [B K+1 H W] of normalised images [B 3 H W]: softmax of the mean of resized scores."""
    size = images.shape[-2], images.shape[-1]
    found = mean_scores(net, images, scales=scales, flip=flip, size=size, align_corners=net.align_corners)
    return found.softmax(dim=1)


@torch.no_grad()
def mean_scores(
    look: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    scales: Sequence[float],
    flip: bool,
    size: tuple[int, int],
    align_corners: bool = False,
) -> Tensor:
    """The mean of scores over scales and mirror images, all resized to `size`: images [B 3 H W] -> [B C h w].

    look: scores of images; with `flip` it is given the mirror images behind the others, as one batch.
    """
    height, width = images.shape[-2:]
    total: Tensor | None = None
    for scale in scales:
        inner = max(32, round(height * scale)), max(32, round(width * scale))
        scaled = images
        if inner != (height, width):
            scaled = F.interpolate(images, size=inner, mode="bilinear", align_corners=False)
        scores = look(torch.cat([scaled, scaled.flip(-1)]) if flip else scaled).float()
        if flip:
            plain, mirrored = scores.chunk(2)
            scores = (plain + mirrored.flip(-1)) / 2
        scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=align_corners)
        total = scores if total is None else total + scores
    if total is None:
        raise ValueError("scales must not be empty")
    return total / len(scales)
