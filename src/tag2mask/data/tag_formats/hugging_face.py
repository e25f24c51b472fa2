"""Tags from a Hugging Face imagefolder: `metadata.csv` or `metadata.jsonl` with `file_name` and `label` or `labels`."""

from __future__ import annotations

import ast
import csv
import io
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tag2mask.data.names import read_text
from tag2mask.data.tag_formats.spelling import beside
from tag2mask.data.tags import IMAGE_COLUMNS, TAG_COLUMNS, Row, TagTable, read_tags
from tag2mask.errors import UserError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FORM = "Hugging Face metadata"


def read_imagefolder(root: Path, files: Sequence[Path], classes: Sequence[str] | None) -> TagTable:
    """The rows of all metadata files below a folder (one per split), their images relative to the file they are in."""
    tables = {path.relative_to(root).as_posix(): read_metadata(path, classes) for path in files}
    columns = {table.columns for table in tables.values()}
    if len(columns) > 1:
        raise UserError(f"{root}: its metadata files have different columns. Give one of them.")
    rows = [
        replace(row, image=beside(place, row.image), place=f"{place} {row.place}")
        for place, table in tables.items()
        for row in table.rows
    ]
    return TagTable(columns.pop(), tuple(rows), (), FORM)


def read_metadata(path: Path, classes: Sequence[str] | None) -> TagTable:
    """One metadata file, or any .jsonl of objects with an image and labels.

    A label is a name, a list of names, or, if `classes` are given, their numbers from 0. A CSV without such a column
    is a table with a column per class (see `read_tags`). Parquet is not read.
    """
    if path.suffix.lower() == ".parquet":
        raise UserError(f"{path}: parquet is not read. Save it as metadata.jsonl or metadata.csv, as imagefolder does.")
    if path.suffix.lower() == ".jsonl":
        return _table(path, _lines(path), classes)
    text = read_text(path)
    records = list(csv.DictReader(io.StringIO(text, newline="")))
    header = list(records[0]) if records else []
    if "file_name" not in header or not any(_key(name) in TAG_COLUMNS for name in header if name):
        return read_tags(path)
    cells = [{k: _cell(value) if _key(k) in TAG_COLUMNS else value for k, value in r.items() if k} for r in records]
    return _table(path, [(f"row {number}", record) for number, record in enumerate(cells, start=2)], classes)


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as reason:
            raise UserError(f"{path}: line {number} is not valid JSON: {reason}.") from None
        if not isinstance(record, dict):
            raise UserError(f'{path}: line {number} is not of the form {{"file_name": "a.jpg", "label": "cat"}}.')
        found.append((f"line {number}", record))
    return found


def _table(path: Path, records: Sequence[tuple[str, dict[str, Any]]], classes: Sequence[str] | None) -> TagTable:
    rows = []
    for place, record in records:
        fields = {_key(key): value for key, value in record.items()}
        images = [fields[key] for key in ("file_name", *IMAGE_COLUMNS) if isinstance(fields.get(key), str)]
        labels = [fields[key] for key in TAG_COLUMNS if key in fields]
        if not images or not labels:
            raise UserError(f"{path}: {place} has no file_name or no label. Each needs both, label or labels.")
        listed = labels[0] if isinstance(labels[0], list) else [] if labels[0] in (None, "") else [labels[0]]
        if classes is None and any(_is_number(label) for label in listed):
            raise UserError(
                f"{path}: {place} has a number for a label. Give the names in order (`classes`, --classes)."
            )
        names, wrong = [], []
        for label in listed:
            number = int(label) if _is_number(label) else None
            if number is not None and classes is not None and 0 <= number < len(classes):
                names.append(classes[number])
            elif isinstance(label, str) and number is None and label.strip():
                names.append(unicodedata.normalize("NFC", label.strip()))
            else:
                wrong.append(("labels", repr(label)))
        rows.append(Row(images[0].strip(), tuple(dict.fromkeys(names)), place, tuple(wrong)))
    if not rows:
        raise UserError(f"{path}: holds no row. Add one for each image.")
    return TagTable((), tuple(rows), (), FORM)


def _cell(value: Any) -> Any:
    """A cell of a CSV: a list as Python or JSON writes it, names separated by ; or |, or one name."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            return list(ast.literal_eval(text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return text
    return [name for name in text.replace("|", ";").split(";") if name.strip()]


def _is_number(label: Any) -> bool:
    return type(label) is int or (isinstance(label, str) and label.strip().isdecimal())


def _key(text: str) -> str:
    return text.strip().casefold().replace(" ", "_").replace("-", "_")
