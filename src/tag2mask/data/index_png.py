"""Index masks as pictures: the PASCAL VOC palette and palette-indexed PNG."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def voc_palette() -> NDArray[np.uint8]:
    """The [256 3] RGB colours of PASCAL VOC.

    The bits of the index i are dealt out to red, green, blue in turn, each filling its byte from the top:
    red = bits 0, 3, 6 of i, green = bits 1, 4, 7, blue = bits 2, 5.
    """
    index = np.arange(256)[:, None, None]  # [256 1 1]
    channel = np.arange(3)[None, :, None]
    place = np.arange(3)[None, None, :]
    bits = index >> (3 * place + channel) & 1  # [256 3 3]
    palette: NDArray[np.uint8] = (bits << (7 - place)).sum(axis=2).astype(np.uint8)
    return palette


def encode_mask(mask: NDArray[np.uint8]) -> bytes:
    """An index mask [H W] uint8 as the bytes of a palette PNG (mode P): values stay, viewers show colours."""
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"expected a [H W] uint8 mask, got {mask.shape} {mask.dtype}")
    picture = Image.fromarray(mask)
    picture.putpalette(voc_palette().tobytes())
    encoded = BytesIO()
    picture.save(encoded, format="PNG")
    return encoded.getvalue()


def write_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Writes an index mask [H W] uint8 as a palette PNG; see `encode_mask`.

    The file appears whole or not at all; missing folders are made.
    """
    encoded = encode_mask(mask)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(encoded)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
