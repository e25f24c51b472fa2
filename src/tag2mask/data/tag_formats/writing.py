"""Writes tags in our own forms, never over a file that is there, and never so that they read back differently."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Literal, TypeAlias

from tag2mask.data.tags import TagTable, read_tags
from tag2mask.errors import UserError

Form: TypeAlias = Literal["one-hot", "names", "json"]


def check_target(out: Path, form: Form | None) -> Form:
    """The form that a file will have: the asked one, else JSON for .json and a column per class for .csv.

    Raises UserError for a file that exists, a missing folder, or an ending that does not fit.
    """
    ending = out.suffix.lower()
    chosen: Form = form or ("json" if ending == ".json" else "one-hot")
    fits = ".json" if chosen == "json" else ".csv"
    if ending != fits:
        raise UserError(f"{out}: {chosen} tags are written to a {fits} file. Give it that ending.")
    if out.exists():
        raise UserError(f"{out}: exists, and nothing is written over it. Give another name or move it away.")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}. Make it first.")
    return chosen


def write_tags(table: TagTable, out: Path, form: Form | None = None) -> None:
    """Write a table: one-hot CSV (`image,cat,dog` and 0 or 1), a CSV of names (`image,tags`), or JSON.

    What was written is read again before it gets its name. Raises UserError as `check_target` does, and for names that
    the form cannot hold (such as "a;b" in a list of names).
    """
    chosen = check_target(out, form)
    text = {"one-hot": _one_hot, "names": _names, "json": _json}[chosen](table)
    temporary = out.with_name(f".{out.stem}.{os.getpid()}.part{out.suffix}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        if not _same(table, temporary, chosen):
            raise UserError(f"{out}: names of images or classes do not survive in this form. Write .json instead.")
        check_target(out, form)  # again: making the table may have taken its time
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _one_hot(table: TagTable) -> str:
    rows = [["image", *table.classes]]
    rows += [[row.image, *("1" if name in row.tags else "0" for name in table.classes)] for row in table.rows]
    return _csv(rows)


def _names(table: TagTable) -> str:
    return _csv([["image", "tags"], *([row.image, ";".join(row.tags)] for row in table.rows)])


def _json(table: TagTable) -> str:
    lines = (
        f"  {json.dumps(r.image, ensure_ascii=False)}: {json.dumps(r.tags, ensure_ascii=False)}" for r in table.rows
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _csv(rows: list[list[str]]) -> str:
    written = io.StringIO(newline="")
    csv.writer(written, lineterminator="\n").writerows(rows)
    return written.getvalue()


def _same(table: TagTable, path: Path, form: Form) -> bool:
    try:
        again = read_tags(path)
    except UserError:
        return False
    if form == "one-hot" and again.columns != table.classes:
        return False
    told = [(row.image, set(row.tags)) for row in table.rows]
    return told == [(row.image, set(row.tags)) for row in again.rows] and not any(row.problems for row in again.rows)
