"""From pixels to the cells of a grid: image sizes that divide, and index masks on cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tag2mask.data.source import IGNORE

Size = tuple[int, int]


def grid_size(pixels: Tensor, stride: int) -> Size:
    """Cells of `stride` pixels that cover [... H W], the last ones perhaps in part."""
    return -(-pixels.shape[-2] // stride), -(-pixels.shape[-1] // stride)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Normalised images [B 3 H W] with zeros, the mean colour, to the right and below; sides are then multiples."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


def labels_on_grid(labels: Tensor, size: Size, stride: int, num_classes: int) -> Tensor:
    """Index masks [B H W] -> [B h w]: what most pixels of a cell have, where 255 counts as a label.

    Cell (y, x) is the square of `stride` pixels from (stride y, stride x). Of equally many, 255 wins, then the lowest.
    """
    batch, height, width = labels.shape
    rows = (torch.arange(height, device=labels.device) // stride).clamp(max=size[0] - 1)
    columns = (torch.arange(width, device=labels.device) // stride).clamp(max=size[1] - 1)
    cells = (rows[:, None] * size[1] + columns).expand(batch, -1, -1).flatten(1)
    rank = torch.where(labels == IGNORE, 0, labels + 1).flatten(1)  # 0: unlabelled, 1: background, 2..: classes
    kinds, count = num_classes + 2, size[0] * size[1]
    votes = labels.new_zeros(batch, kinds * count)
    votes = votes.scatter_add_(1, rank * count + cells, torch.ones_like(rank)).view(batch, kinds, *size)
    order = torch.arange(kinds, device=labels.device).view(-1, 1, 1)
    winner = (votes * kinds - order).argmax(dim=1)
    return torch.where(winner == 0, IGNORE, winner - 1)
