"""What SBD adds to PASCAL VOC 2012: the train_aug list, and masks for it.

Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011: 11,355 images of VOC 2011 with masks.
train_aug is VOC's train list and all of SBD, without the images of VOC's val list: 10,582 names.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tag2mask import progress
from tag2mask.data.images import read_mask
from tag2mask.data.index_png import write_mask
from tag2mask.data.source import Mask
from tag2mask.data.voc12 import CLASSES, LISTS, list_file
from tag2mask.errors import UserError

HOME = "benchmark_RELEASE/dataset"  # where the official archive puts everything
MASKS = "SegmentationClassAug"


def train_aug(voc: Path, sbd: Path) -> list[str]:
    """The names of train_aug, sorted. Raises UserError with one line if one of the four lists is missing."""
    ours = {name: _list(list_file(voc, name), voc / LISTS / f"{name}.txt") for name in ("train", "val")}
    theirs = {name: _list(sbd / f"{name}.txt", sbd / f"{name}.txt") for name in ("train", "val")}
    return sorted((ours["train"] | theirs["train"] | theirs["val"]) - ours["val"])


def write_train_aug(voc: Path, sbd: Path, *, show: bool = True) -> int:
    """Write ImageSets/Segmentation/train_aug.txt and the masks SegmentationClassAug into VOC's folder.

    Images of VOC's train list keep VOC's own masks, which are finer and have a border to ignore; the others get
    SBD's. Masks and a list that are there already are left alone. Returns the number of images.
    """
    names = train_aug(voc, sbd)
    for name in progress.track(names, MASKS, len(names), show=show):
        target = voc / MASKS / f"{name}.png"
        if not target.is_file():
            own = voc / "SegmentationClass" / f"{name}.png"
            write_mask(target, read_mask(own, len(CLASSES)) if own.is_file() else read_sbd(sbd / "cls" / f"{name}.mat"))
    if list_file(voc, "train_aug") is None:
        part = voc / LISTS / "train_aug.txt.part"
        part.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        part.replace(part.with_suffix(""))
    return len(names)


def read_sbd(path: Path) -> Mask:
    """The classes [H W] of one file of SBD, in VOC's numbers, without 255. Raises UserError if it is broken."""
    from scipy.io import loadmat  # MATLAB's own format, in which nothing can be executed

    try:
        mask = np.asarray(loadmat(str(path))["GTcls"]["Segmentation"][0, 0])
        if mask.ndim != 2 or mask.dtype != np.uint8 or mask.max() > len(CLASSES):
            raise ValueError(f"{mask.shape} {mask.dtype}")
    except Exception as reason:  # on damaged bytes the reader raises whatever it stumbles over
        raise UserError(f"{path}: is no mask of SBD ({reason}); delete it and prepare sbd again") from reason
    return mask


def _list(path: Path | None, called: Path) -> set[str]:
    if path is None or not path.is_file():
        raise UserError(f"{called}: no such list; unpack the archive again")
    return set(path.read_text(encoding="utf-8").split())
