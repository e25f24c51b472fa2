"""Soft maps on disk: one .npz per image with the maps of its tagged classes, in half precision at stride 4."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tag2mask.errors import UserError
from tag2mask.ops.cams import resize

STRIDE = 4


@dataclass(frozen=True)
class Maps:
    """The maps of one image: classes [P] indices in 0..K-1, maps [P h w] float16 in 0..1, size (H, W) of the image.

    `logits` [K] are the classifier's on the unscaled image; NaN if the maps do not come from looking at it once.
    """

    classes: NDArray[np.int64]
    maps: NDArray[np.float16]
    size: tuple[int, int]
    logits: NDArray[np.float32]

    def full(self) -> Tensor:
        """The maps at the size of the image, float32 [P H W]."""
        maps = torch.from_numpy(self.maps).float()
        return resize(maps[None], self.size)[0] if len(maps) else maps.new_zeros((0, *self.size))


def map_size(size: tuple[int, int]) -> tuple[int, int]:
    """Size of the stored maps of an image of size (H, W)."""
    return -(-size[0] // STRIDE), -(-size[1] // STRIDE)


def map_path(folder: Path, name: str) -> Path:
    """The file of the maps of an image."""
    return folder / "maps" / f"{name}.npz"


def write_maps(path: Path, maps: Maps) -> None:
    """Write atomically: a file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez(file, classes=maps.classes, maps=maps.maps, size=np.array(maps.size), logits=maps.logits)
    os.replace(part, path)


def read_maps(path: Path) -> Maps:
    """Read one file. Raises UserError if it is missing or broken."""
    with _opened(path) as file:
        height, width = (int(n) for n in file["size"])
        return Maps(file["classes"], file["maps"], (height, width), file["logits"])


def read_logits(path: Path) -> NDArray[np.float32]:
    """The logits [K] of one file alone, which is quicker. Raises UserError if it is missing or broken."""
    with _opened(path) as file:
        found: NDArray[np.float32] = file["logits"]
        return found


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no maps of this image; is it in the list that the maps were made for?") from None
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a file of soft maps ({error}); delete it and run the recipe again") from None
