"""Tags ready to be written or counted: read, brought to the names of the images, and without a fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tag2mask.data.audit import audit_cells, rows_of_images
from tag2mask.data.faults import Faults, Kind
from tag2mask.data.images import ENDINGS
from tag2mask.data.names import Finder, scan
from tag2mask.data.tag_formats.legacy_npy import read_legacy_npy
from tag2mask.data.tag_formats.reading import read_any
from tag2mask.data.tags import Row, TagTable, did_you_mean
from tag2mask.errors import UserError


def read_converted(
    path: Path,
    classes: Sequence[str] | None = None,
    images: Path | None = None,
    *,
    shapes: bool = False,
    legacy_npy: bool = False,
) -> TagTable:
    """The table in `path` (see `read_any`; `legacy_npy`: a pickled dictionary), each image once.

    `images`: each row gets the name of the image that it means, with its folders and its ending. `classes`: no other
    may occur, and they are in this order. Raises one UserError with every fault: cells that cannot be read, images
    that are named twice or that are not there, unknown classes.
    """
    if classes is not None and (not all(classes) or len(set(classes)) < len(classes)):
        raise UserError(f"--classes: {', '.join(classes)} must name each class once.")
    if legacy_npy:
        if classes is None:
            raise UserError(f"{path}: has no names of classes. Give them in order (--classes).")
        table = read_legacy_npy(path, classes)
    else:
        table = read_any(path, classes, shapes=shapes)
    faults = Faults()
    if images is None:
        rows = _once(table, faults)
    else:
        if not images.is_dir():
            raise UserError(f"--images: {images} is no folder.")
        found, others = scan(images, ENDINGS)
        by_name = rows_of_images(table, Finder(found, others), found, strict=True, faults=faults)
        rows = [
            replace(row, image=found[name][0].relative_to(images).as_posix(), spellings=())
            for name, row in by_name.items()
        ]
        if left := len(found) - len(rows):
            table = replace(table, notes=(*table.notes, f"{left} images of {images} have no tags"))
    audit_cells(table, faults)
    if classes is not None:
        unknown = sorted({tag for row in rows for tag in row.tags} - set(classes))
        faults.add(Kind.UNKNOWN_CLASS, [f"'{name}'{did_you_mean(name, classes)}" for name in unknown])
    faults.stop(str(path))
    ordered = replace(table, rows=tuple(rows))
    return ordered if classes is None else replace(ordered, columns=(), order=tuple(classes))


def _once(table: TagTable, faults: Faults) -> list[Row]:
    rows: dict[str, Row] = {}
    for row in table.rows:
        if row.image in rows:
            faults.add(Kind.REPEATED, f"{row.image}: {rows[row.image].place} and {row.place}")
        rows.setdefault(row.image, row)
    return list(rows.values())
