"""Reads tags: a table with a column per class, a table or JSON of class names, or one sub-folder per tag."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tag2mask.data.names import read_text
from tag2mask.errors import UserError

IMAGE_COLUMNS = ("image", "image_id", "file", "file_name", "filename", "id", "name", "path")
TAG_COLUMNS = ("tags", "tag", "labels", "label", "classes", "class")
BACKGROUND = "background"  # as a sub-folder: images with no tag; as a class: a mistake


@dataclass(frozen=True)
class Row:
    """The tags of one image, as written. No tags and no problems: a negative image, which is fine."""

    image: str
    tags: tuple[str, ...]
    place: str  # where to look in the file, e.g. "row 12"
    problems: tuple[tuple[str, str], ...] = ()  # (column, cell) of what could not be read
    spellings: tuple[str, ...] = ()  # what the image may be called instead of `image`, in the order to be tried


@dataclass(frozen=True)
class TagTable:
    """`columns` are the class columns of a one-hot table in their order, else empty.

    order    the classes as the tool that wrote the tags has them in order, else empty
    form     whose form it is, such as "labelme"; empty for our own
    notes    what a reader must know of how the tags were taken
    derived  what the tags were made from, if not by a person: "masks"
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    order: tuple[str, ...] = ()
    form: str = ""
    notes: tuple[str, ...] = ()
    derived: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """The columns' order if there are columns, or the tool's, else all tags sorted."""
        return self.columns or self.order or tuple(sorted({tag for row in self.rows for tag in row.tags}))


def read_tags(path: Path) -> TagTable:
    """Reads a tag file by its ending.

    .csv, .tsv, .txt: a header, then one row per image, separated by commas, semicolons or tabs (found out from the
    header). The first column is called one of IMAGE_COLUMNS. Either each further column is a class with cells 0 and 1
    (also 0.0, 1.0, false, true), or one of them is called one of TAG_COLUMNS and holds class names separated by ";"
    or "|"; columns beside that one are ignored.
    .json: {"a.jpg": ["cat", "dog"], "b.jpg": "cat", "c.jpg": []}, or a list of {"image": "a.jpg", "tags": ["cat"]}.

    An unnamed first column of row numbers, a BOM, any line ends and spaces around names are fine. Cells or tags that
    make no sense become `problems` of their row. Raises UserError where the file has no such form at all.
    """
    ending = path.suffix.lower()
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a tag file. Leave `tags` out if its sub-folders are the tags.")
    if ending in (".csv", ".tsv", ".txt"):
        table = _read_csv(path)
    elif ending == ".json":
        table = _read_json(path)
    else:
        raise UserError(f"{path}: tags are read from .csv and .json. Save or export the file as CSV.")
    if not table.rows:
        raise UserError(f"{path}: holds no row. Add one for each image.")
    return table


def folder_tags(names: Iterable[str]) -> TagTable:
    """Tags from names such as "cat/001": the first folder is the tag, and "background" stands for no tag.

    Images outside any folder get no row.
    """
    split = [(name, name.partition("/")) for name in names]
    return TagTable(
        (),
        tuple(
            Row(name, () if folder.casefold() == BACKGROUND else (unicodedata.normalize("NFC", folder),), folder)
            for name, (folder, slash, _) in split
            if slash
        ),
    )


def misspelt(counts: Counter[str]) -> dict[str, str]:
    """Class names that are probably another one: {misspelt: meant}.

    Two names that differ only in case, spaces, "-" and "_" are one class: the rarer is misspelt. And so is a name that
    occurs once and resembles one that occurs more often (difflib ratio of at least 0.85), unless they differ in digits.
    """
    found: dict[str, str] = {}
    by_frequency = sorted(counts, key=lambda name: (-counts[name], name))
    for place, name in enumerate(by_frequency):
        for better in by_frequency[:place]:
            if better in found:
                continue
            resembles = counts[name] == 1 < counts[better] and _alike(name, better) and _digits(name) == _digits(better)
            if _bare(name) == _bare(better) or resembles:
                found[name] = better
                break
    return found


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """ ": did you mean ...?", or nothing if no known name is near."""
    bare = {_bare(other): other for other in known}
    near = difflib.get_close_matches(_bare(name), bare, n=1)
    return f": did you mean '{bare[near[0]]}'?" if near else ""


def _read_csv(path: Path) -> TagTable:
    text = read_text(path)
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
        rows = [[cell.strip() for cell in row] for row in lines]
    except csv.Error as reason:
        raise UserError(f"{path}: is no readable CSV ({reason}).") from None
    numbered = [(number, row) for number, row in enumerate(rows, start=1) if any(row)]
    if not numbered:
        raise UserError(f"{path}: is empty. It needs a header such as 'image,cat,dog' and a row for each image.")
    header = numbered[0][1]
    if header[0] == "" and len(header) > 1:  # row numbers, as pandas writes them
        header, numbered = header[1:], [(number, row[1:]) for number, row in numbered]
    if _key(header[0]) not in IMAGE_COLUMNS or len(header) < 2:
        raise UserError(
            f"{path}: its first line must name the columns, beginning with 'image', such as 'image,cat,dog' (cells 0 "
            f"and 1) or 'image,tags' (names separated by ';'). It is '{','.join(header)[:80]}'."
        )
    body = [(f"row {number}", row) for number, row in numbered[1:] if row and any(row)]
    for column, name in enumerate(header):
        if _key(name) in TAG_COLUMNS:
            return TagTable((), tuple(_row_of_names(place, row, column, len(header)) for place, row in body))
    return _one_hot(path, header, body)


def _one_hot(path: Path, header: list[str], body: list[tuple[str, list[str]]]) -> TagTable:
    width = len(header)
    while not header[width - 1] and not any(cell for _, row in body for cell in row[width - 1 : width]):
        width -= 1  # a separator at the end of every line
    columns = tuple(unicodedata.normalize("NFC", name) for name in header[1:width])
    if "" in columns:
        raise UserError(f"{path}: column {columns.index('') + 2} has no name. Name it after its class, or remove it.")
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise UserError(f"{path}: two columns are called '{twice[0]}'. Merge or rename them.")
    rows = []
    for place, row in body:
        cells = [_CELLS.get(cell.lower()) for cell in row[1:width]]
        problems = [(name, repr(row[1 + i])) for i, name in enumerate(columns[: len(cells)]) if cells[i] is None]
        problems += [(name, "no cell") for name in columns[len(cells) :]]
        problems += [("without a name", repr(cell)) for cell in row[width:] if cell]
        tags = tuple(name for name, cell in zip(columns, cells, strict=False) if cell)
        rows.append(Row(row[0], tags, place, tuple(problems)))
    return TagTable(columns, tuple(rows))


def _row_of_names(place: str, row: list[str], column: int, width: int) -> Row:
    # Cells beyond the header are further tags: "a.jpg,cat,dog" under "image,tags".
    cells = row[column : column + 1] + row[width:]
    tags = [tag for cell in cells for tag in _split(cell)]
    wrong = tuple(("tags", repr(tag)) for tag in tags if "," in tag)
    return Row(row[0], _tidy(tag for tag in tags if "," not in tag), place, wrong)


def _read_json(path: Path) -> TagTable:
    try:
        content = json.loads(read_text(path), object_pairs_hook=_Pairs)
    except (json.JSONDecodeError, RecursionError) as reason:
        raise UserError(f"{path}: is not valid JSON: {reason}.") from None
    if isinstance(content, _Pairs):
        return TagTable((), tuple(_row_of_json(str(n), name, tags) for n, (name, tags) in enumerate(content, start=1)))
    rows = []
    for number, record in enumerate(content if isinstance(content, list) else [], start=1):
        fields = {_key(key): value for key, value in record} if isinstance(record, _Pairs) else {}
        images = [fields[key] for key in IMAGE_COLUMNS if isinstance(fields.get(key), str)]
        tags = [fields[key] for key in TAG_COLUMNS if key in fields]
        if not images or not tags:
            raise UserError(f'{path}: record {number} is not of the form {{"image": "a.jpg", "tags": ["cat"]}}.')
        rows.append(_row_of_json(str(number), images[0], tags[0]))
    if not isinstance(content, list):
        raise UserError(f'{path}: must hold {{"a.jpg": ["cat"], ...}} or a list of {{"image": ..., "tags": ...}}.')
    return TagTable((), tuple(rows))


def _row_of_json(place: str, image: str, value: Any) -> Row:
    if isinstance(value, str):
        return Row(image, _tidy(_split(value)), f"entry {place}")
    if isinstance(value, list) and not isinstance(value, _Pairs) and all(isinstance(tag, str) for tag in value):
        return Row(image, _tidy(value), f"entry {place}")
    return Row(image, (), f"entry {place}", (("tags", json.dumps(value)[:60]),))


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with all its entries, so that an image that is named twice is seen."""


_CELLS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


def _delimiter(text: str) -> str:
    first = next((line for line in text.splitlines() if line.strip()), "")
    return max(",;\t", key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))


def _split(cell: str) -> list[str]:
    return re.split(r"[;|]", cell)


def _tidy(tags: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(unicodedata.normalize("NFC", tag.strip()) for tag in tags if tag.strip()))


def _key(text: str) -> str:
    return re.sub(r"[\s-]+", "_", text.strip().casefold())


def _bare(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.casefold())


def _digits(name: str) -> str:
    return "".join(character for character in name if character.isdigit())


def _alike(name: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, _bare(name), _bare(other)).ratio() >= 0.85
