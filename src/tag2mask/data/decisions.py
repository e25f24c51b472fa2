"""What a person decided on each mask: WORK/review/decisions.jsonl, one JSON object a line, only ever appended to.

A line is {"image": name, "decision": one of DECISIONS, "scores": {class: background score}, "time": ISO 8601}. The last
line of an image counts. `scores` is there where the person's own thresholds make the mask; that mask then lies in
WORK/review/masks/<name>.png. Without it the mask is the one that the run made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tag2mask.errors import UserError

DECISIONS = ("accepted", "rejected", "flagged", "undecided")


@dataclass(frozen=True)
class Decision:
    """One of DECISIONS, and the background score in 0..1 of each tagged class if the mask was made with own ones."""

    decision: str = "undecided"
    scores: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.decision not in DECISIONS:
            raise ValueError(f"{self.decision!r} is none of {', '.join(DECISIONS)}")
        for name, score in self.scores.items():
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score < 1:
                raise ValueError(f"the score of {name!r} is no number in 0..1")


def review_folder(work: Path) -> Path:
    """Where the decisions of a work folder live."""
    return work / "review"


def decisions_path(work: Path) -> Path:
    """The file of the decisions."""
    return review_folder(work) / "decisions.jsonl"


def reviewed_mask(work: Path, name: str) -> Path:
    """The mask of an image whose decision has scores; like all masks an index PNG with a palette."""
    return review_folder(work) / "masks" / f"{name}.png"


def about_path(work: Path) -> Path:
    """What the decisions are about: a JSON object whose "masks" names the folder of the stage that made the masks."""
    return review_folder(work) / "review.json"


def read_decisions(path: Path) -> dict[str, Decision]:
    """The last decision of every image named in the file, in the order of these last lines; {} if there is no file.

    A last line that a kill tore does not count. Raises UserError for any other line that is no decision.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None
    found: dict[str, Decision] = {}
    *lines, torn = text.split(b"\n")
    whole = [*lines, torn] if _is_whole(torn) else lines
    for number, line in enumerate(whole, start=1):
        if not line.strip():
            continue
        try:
            name, decision = _parse(line)
        except (ValueError, TypeError, KeyError) as fault:
            raise UserError(f"{path}: line {number} is no decision ({fault}); mend or remove that line") from None
        found.pop(name, None)
        found[name] = decision
    return found


def append_decision(path: Path, name: str, decision: Decision) -> None:
    """Add a line; when this returns, it is on the disk. A line that cannot be written whole is taken back."""
    value = {
        "image": name, "decision": decision.decision, "scores": dict(decision.scores),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(f"{path}: the disk is full")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def mend(path: Path) -> None:
    """Cut off a last line that a kill tore, so that the next one does not grow together with it."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        text = file.read()
        whole, newline, torn = text.rpartition(b"\n")
        if not torn:
            return
        if _is_whole(torn):
            file.write(b"\n")
        else:
            file.truncate(len(whole) + len(newline))


def _is_whole(line: bytes) -> bool:
    try:
        _parse(line)
    except (ValueError, TypeError, KeyError):
        return False
    return True


def _parse(line: bytes) -> tuple[str, Decision]:
    value: Any = json.loads(line)
    if not isinstance(value, dict) or not isinstance(value.get("image"), str):
        raise ValueError("it names no image")
    scores = value.get("scores") or {}
    if not isinstance(scores, dict):
        raise ValueError("scores is no object")
    return value["image"], Decision(str(value.get("decision")), scores)
