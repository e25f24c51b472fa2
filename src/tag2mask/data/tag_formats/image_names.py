"""Tags that stand in the names of images: "x[1 0 0 1].png", or a sub-folder per tag."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tag2mask.data.tags import Row, TagTable, folder_tags
from tag2mask.errors import UserError

PARTS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})  # of a data set
_BRACKETS = re.compile(r"\[([01](?:[\s,_]*[01])*)\]$")


def name_tags(names: Iterable[str], classes: Sequence[str] | None, where: str) -> TagTable:
    """Tags of images from their names without ending: from brackets if most names have them, else from folders.

    Brackets hold 0 or 1 for each of `classes` in order, with spaces or commas between or nothing ("[1 0 0 1]",
    "[1001]"). Raises UserError where there are brackets and no classes, where there are neither brackets nor folders,
    and where the folders are the parts of a data set; `where` begins that message.
    """
    listed = sorted(names)
    if have_brackets(listed):
        found = [(name, match[1]) for name in listed if (match := _BRACKETS.search(name))]
        return _bracketed(found, classes, where)
    if not any("/" in name for name in listed):
        raise UserError(f"{where}: no tags. Give a tag file (`tags`), or sort the images into a sub-folder per tag.")
    folders = sorted({name.partition("/")[0] for name in listed if "/" in name})
    if {folder.casefold() for folder in folders} <= PARTS:
        raise UserError(
            f"{where}: its sub-folders ({', '.join(folders)}) are parts of a data set, not tags. Give the one to train "
            f"on, such as {where}/{folders[-1]}, or a tag file (`tags`)."
        )
    return folder_tags(listed)


def have_brackets(names: Sequence[str]) -> bool:
    """Whether most names end with brackets of 0 and 1."""
    return 2 * sum(_BRACKETS.search(name) is not None for name in names) > len(names)


def _bracketed(found: Sequence[tuple[str, str]], classes: Sequence[str] | None, where: str) -> TagTable:
    if classes is None:
        digits = _digits(found[0][1])
        raise UserError(
            f"{where}: tags stand in the names of the images, as in {found[0][0]}. Name the {len(digits)} classes in "
            "that order (`classes`, --classes)."
        )
    rows = []
    for name, text in found:
        digits = _digits(text)
        wrong = f"[{text}] has {len(digits)} digits, but there are {len(classes)} classes"
        fits = len(digits) == len(classes)
        tags = tuple(c for c, digit in zip(classes, digits, strict=False) if digit == "1") if fits else ()
        rows.append(Row(name, tags, "its name", () if fits else (("brackets", wrong),)))
    return TagTable((), tuple(rows), tuple(classes), "names with brackets")


def _digits(text: str) -> list[str]:
    return [character for character in text if character in "01"]
