"""Masks and soft maps as pictures: overlays, heat maps."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tag2mask.data.index_png import voc_palette

Bytes: TypeAlias = NDArray[np.uint8]

# Dark violet to pale yellow with rising lightness, so that the order survives greyscale print and colour blindness.
_HEAT_STOPS = np.array(
    [(24, 15, 72), (104, 28, 122), (190, 55, 98), (240, 125, 50), (252, 236, 120)],
    dtype=np.float32,
)


def colourise(mask: Bytes) -> Bytes:
    """The palette colours [H W 3] of an index mask [H W]."""
    return voc_palette()[mask]


def overlay(image: Bytes, mask: Bytes, alpha: float = 0.6) -> Bytes:
    """The image [H W 3] with each class painted over it in its palette colour; background stays as it is.

    `alpha` in 0..1 is the opacity of the paint. Ignored pixels (255) get the palette's pale yellow.
    """
    _check_image(image)
    if mask.shape != image.shape[:2]:
        raise ValueError(f"mask {mask.shape} does not fit image {image.shape}")
    opacity = np.where(mask > 0, np.float32(alpha), np.float32(0))[..., None]
    return _blend(image, colourise(mask), opacity)


def heatmap(image: Bytes, score: NDArray[np.floating], alpha: float = 0.8) -> Bytes:
    """The image [H W 3] in grey with a score map [h w] in 0..1 painted over it; [H W 3] uint8.

    The map is resized bilinearly to the image. Colour and opacity both grow with the score, so that the image shows
    through where nothing was found. `alpha` in 0..1 is the opacity at score 1.
    """
    _check_image(image)
    height, width = image.shape[:2]
    # np.array, not asarray: Pillow 'F' images and the clip below need a float32 array of their own.
    resized = Image.fromarray(np.array(score, dtype=np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    strength = np.clip(np.asarray(resized), 0, 1)[..., None]
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None].repeat(3, axis=2)
    return _blend(grey, heat_colours(strength[..., 0]), np.float32(alpha) * np.sqrt(strength))


def heat_colours(score: NDArray[np.floating]) -> Bytes:
    """Colours [... 3] of scores [...] in 0..1: dark violet (0) over red and orange to pale yellow (1)."""
    stops = np.linspace(0, 1, len(_HEAT_STOPS))
    channels = [np.interp(score, stops, _HEAT_STOPS[:, c]) for c in range(3)]
    colours: Bytes = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return colours


def _blend(under: Bytes, over: Bytes, opacity: NDArray[np.float32]) -> Bytes:
    mixed: Bytes = np.rint(under * (1 - opacity) + over * opacity).astype(np.uint8)
    return mixed


def _check_image(image: Bytes) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a [H W 3] uint8 image, got {image.shape} {image.dtype}")
