"""Where a crop lies in its image: maps go from one to the other and back.

A place [2 3] is an affine map of coordinates, A = [R | t]: what is at u in the image is at R u + t in the crop. Both
have coordinates (x, y) from -1 to 1, left to right and top to bottom, from border to border (torch's `affine_grid` with
corners not aligned). The image is the whole one, in its own proportions; resizing it changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def onto_image(maps: Tensor, place: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Maps of crops [B K h w], brought to a grid of `size` over their images.

    place [B 2 3]. Bilinear; at the border of the crop its outermost value goes on, as when an image is resized. Returns
    (maps [B K H W], 0 outside the crop; bool [B 1 H W], True inside).
    """
    return _warp(maps, place, size)


def into_crop(maps: Tensor, place: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Maps of images [B K h w], brought to a grid of `size` over their crops.

    place [B 2 3]. The reverse of `onto_image`: 0 and False where a crop is padded.
    """
    return _warp(maps, inverse(place), size)


def inverse(place: Tensor) -> Tensor:
    """[B 2 3] -> [B 2 3], from the crop to the image: u = R^-1 (v - t). By hand, since a solver waits for a GPU."""
    a, b, c, d = place[:, 0, 0], place[:, 0, 1], place[:, 1, 0], place[:, 1, 1]
    back = torch.stack([d, -b, -c, a], dim=1).view(-1, 2, 2) / (a * d - b * c)[:, None, None]
    return torch.cat([back, -back @ place[:, :, 2:]], dim=2)


def whole(images: Tensor) -> Tensor:
    """The place of images [B ...] that were not cropped, or merely resized: [B 2 3]."""
    return torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)


def _warp(maps: Tensor, affine: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    grid = F.affine_grid(affine.to(maps.dtype), [len(maps), 1, *size], align_corners=False)
    inside = (grid.abs() <= 1).all(dim=-1)[:, None]
    values = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return values * inside, inside
