"""Tags from index masks: an image has the classes that its mask shows. Such tags know more than a person's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from tag2mask import progress
from tag2mask.data.images import Undecodable, decode, indices, mask_remedy, wrong_values
from tag2mask.data.source import IGNORE
from tag2mask.data.tags import Row, TagTable
from tag2mask.errors import UserError


def looks_like_mask(path: Path, num_classes: int | None) -> bool:
    """Whether a picture is an index mask: values 0..num_classes and 255 only; without a number, a palette or few."""
    try:
        picture = decode(path.read_bytes())
        values = np.unique(indices(picture))
    except (OSError, Undecodable):
        return False
    if num_classes is not None:
        return not wrong_values(values.tolist(), num_classes)
    return picture.mode in ("1", "P") or bool((values[values != IGNORE] < 32).all())


def mask_tags(files: Mapping[str, Path], classes: Sequence[str] | None, where: Path) -> TagTable:
    """One row for each mask (by name): its classes, 255 and background left out. Every file is decoded.

    The table says that it is derived from masks. Raises UserError without `classes`.
    """
    if classes is None:
        raise UserError(f"{where}: holds index masks. Name their classes 1, 2, ... in order (`classes`, --classes).")
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # decoding releases the interpreter lock
    try:
        looked = pool.map(partial(_row, classes), files, files.values())
        rows = tuple(progress.track(looked, "tags from masks", len(files), show=len(files) > 1000))
    finally:
        pool.shutdown(cancel_futures=True)
    return TagTable((), rows, tuple(classes), "masks", ("tags are derived from masks",), derived="masks")


def _row(classes: Sequence[str], name: str, path: Path) -> Row:
    try:
        values = np.unique(indices(decode(path.read_bytes()))).tolist()
        wrong = wrong_values(values, len(classes))
    except (OSError, Undecodable) as reason:
        values, wrong = [], str(reason)
    tags = tuple(classes[value - 1] for value in values if 0 < value <= len(classes))
    problem = (("mask", f"{wrong}; {mask_remedy(len(classes))}"),) if wrong else ()
    return Row(name, tags, path.name, problem)
