"""Tags from Label Studio: the choices of an export as JSON, JSON-MIN, CSV or TSV."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tag2mask.data.images import ENDINGS
from tag2mask.data.tag_formats.spelling import spellings, upload
from tag2mask.data.tags import TAG_COLUMNS, Row, TagTable
from tag2mask.errors import UserError

Record: TypeAlias = Mapping[str, Any]
OF_THE_TOOL = ("id", "annotation_id", "annotator", "created_at", "updated_at", "lead_time")
CHOICES = ("choice", "choices", *TAG_COLUMNS)


def is_tasks(content: Any) -> bool:
    """Whether parsed JSON is Label Studio's full export: tasks with `data` and `annotations`."""
    first = content[0] if isinstance(content, list) and content else None
    return isinstance(first, dict) and "data" in first and ("annotations" in first or "completions" in first)


def is_minimal(fields: Sequence[str]) -> bool:
    """Whether these are the fields of a record of JSON-MIN or the columns of the CSV."""
    return {"annotation_id", "lead_time"} <= set(fields) or {"annotation_id", "annotator"} <= set(fields)


def read_tasks(path: Path, content: list[Any], shapes: bool) -> TagTable:
    """One row for each annotated task: its choices. `shapes`: the labels of its regions, too.

    Skipped annotations do not count. Of several, one marked as ground truth does; otherwise they must agree. An
    annotation without a choice is an image without a tag; a task without annotation gets no row.
    """
    rows, regions, controls, open_tasks = [], 0, dict[str, None](), 0
    for number, task in enumerate(content, start=1):
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise UserError(f"{path}: entry {number} is no task of Label Studio (no `data`).")
        place = f"task {task.get('id', number)}"
        given = [entry for entry in _list(task, "annotations", "completions") if isinstance(entry, dict)]
        given = [entry for entry in given if not entry.get("was_cancelled")]
        given = [entry for entry in given if entry.get("ground_truth")] or given
        if not given:
            open_tasks += 1
            continue
        said = []
        for entry in given:
            tags: dict[str, None] = {}
            for result in _list(entry, "result"):
                chosen, drawn = _values(result)
                regions += bool(drawn)
                controls |= dict.fromkeys([str(result.get("from_name"))] if chosen else [])
                tags |= dict.fromkeys([*chosen, *(drawn if shapes else [])])
            said.append(tuple(tags))
        wrong = () if len({frozenset(tags) for tags in said}) == 1 else (("choices", _disagreement(given, said)),)
        names = _names(task["data"], task.get("file_upload"))
        if not names:
            raise UserError(f"{path}: {place} names no image; its data is {json.dumps(task['data'])[:80]}.")
        rows.append(Row(names[-1], said[0], place, wrong, names))
    if regions and not controls and not shapes:
        raise UserError(f"{path}: has no choices, only regions. `tag2mask tags convert --shapes` takes their labels.")
    if not rows:
        raise UserError(f"{path}: no task has an annotation.")
    notes = [f"{open_tasks} tasks without annotation are left out"] if open_tasks else []
    notes += [f"choices of {' and '.join(controls)} are all taken for tags"] if len(controls) > 1 else []
    return TagTable((), tuple(rows), (), "Label Studio", tuple(notes))


def read_records(path: Path, records: Sequence[Record], word: str, first: int) -> TagTable:
    """One row for each record of JSON-MIN or line of the CSV, called `word` and counted from `first`.

    A choice is text, or several are {"choices": [...]}, in the CSV as JSON in a cell. Records of one task that say the
    same are one row.
    """
    parsed = [{key: _cell(value) for key, value in record.items() if key} for record in records]
    column = _column(path, parsed)
    rows: dict[tuple[Any, ...], Row] = {}
    for number, record in enumerate(parsed, start=first):
        names = _names({key: value for key, value in record.items() if key != column}, None)
        if not names:
            raise UserError(f"{path}: {word} {number} names no image.")
        chosen = record.get(column)
        tags = _texts(chosen["choices"]) if isinstance(chosen, dict) else _texts([chosen])
        key = (record.get("id"), names, frozenset(tags))
        rows.setdefault(key, Row(names[-1], tuple(dict.fromkeys(tags)), f"{word} {number}", (), names))
    return TagTable((), tuple(rows.values()), (), "Label Studio")


def _column(path: Path, records: Sequence[Record]) -> str:
    """The field that holds choices; Label Studio calls it as the labelling configuration does."""
    fields = dict.fromkeys(key for record in records for key in record if key not in OF_THE_TOOL)
    sure = [f for f in fields if any(isinstance(r.get(f), dict) and "choices" in r[f] for r in records)]
    texts = [
        f for f in fields
        if all(isinstance(r.get(f), str | None) for r in records) and not any(_is_image(r.get(f)) for r in records)
    ]  # fmt: skip
    named = [field for field in texts if field.casefold() in CHOICES]
    for found in (sure, named, texts):
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise UserError(
        f"{path}: nobody knows which of {', '.join(fields) or 'no fields'} holds the choices. Export as JSON instead."
    )


def _names(data: Record, uploaded: Any) -> tuple[str, ...]:
    """The spellings of the image of a task: of what ends like an image, rather in `image`, else of the upload."""
    texts = {key: value for key, value in data.items() if isinstance(value, str) and value.strip()}
    for key in sorted(texts, key=lambda key: key != "image"):
        if _is_image(texts[key]):
            return spellings(texts[key])
    if isinstance(uploaded, str) and uploaded.strip():
        return upload(uploaded)
    return spellings(texts["image"]) if "image" in texts else ()


def _is_image(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and spellings(value)[-1].lower().endswith(ENDINGS)


def _values(result: Any) -> tuple[list[str], list[str]]:
    """The choices and the labels of regions of one result. A choice about a region is about a region."""
    value = result.get("value") if isinstance(result, dict) else None
    if not isinstance(value, dict):
        return [], []
    labels = [text for key, texts in value.items() if key.endswith("labels") for text in _texts(texts)]
    chosen = _texts(value.get("choices"))
    return ([], labels) if "x" in value or "points" in value or "rle" in value else (chosen, labels)


def _disagreement(given: Sequence[Record], said: Sequence[Sequence[str]]) -> str:
    each = (f"annotation {a.get('id', '?')} says {', '.join(t) or 'nothing'}" for a, t in zip(given, said, strict=True))
    return f"{'; '.join(each)}: mark one as ground truth"


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _list(record: Record, *keys: str) -> list[Any]:
    return next((record[key] for key in keys if isinstance(record.get(key), list)), [])


def _texts(values: Any) -> list[str]:
    listed = values if isinstance(values, list) else []
    return [unicodedata.normalize("NFC", text.strip()) for text in listed if isinstance(text, str) and text.strip()]
