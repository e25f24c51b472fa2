"""Stages as values: what to do, from what, into a folder named by the hash of both. Standard library only.

A folder with a manifest is finished and is never touched again; one without is partial and is resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tag2mask.errors import UserError

MANIFEST = "manifest.json"


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Stage:
    """One step of a recipe, ready to run.

    name: what the recipe calls it; kind: what it does; version: raised by hand when the meaning of its output
    changes; settings: JSON-able, everything that can change the numbers; inputs: parameter -> stage;
    data: fingerprint of the data set; files: contents it depends on, path -> digest.
    """

    name: str
    kind: str
    version: int
    settings: dict[str, Any]
    inputs: Mapping[str, Stage]
    data: str
    files: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Same kind, version, settings, inputs and data: same key, whatever the stage is called."""
        inputs = {parameter: stage.key for parameter, stage in self.inputs.items()}
        return digest([self.kind, self.version, self.settings, inputs, self.data, sorted(self.files.values())])

    def folder(self, work: Path) -> Path:
        """Where its output lives."""
        return work / f"{self.kind}-{self.key[:10]}"

    def state(self, work: Path) -> str:
        """ "done", "partial" (was stopped, will be resumed) or "to do"."""
        folder = self.folder(work)
        if (folder / MANIFEST).exists():
            return "done"
        return "partial" if folder.exists() else "to do"


# Does the work of a stage: (stage, its folder, folders of its inputs) -> facts for the manifest (device, memory).
Runner = Callable[[Stage, Path, Mapping[str, Path]], Mapping[str, Any]]


def execute(
    stages: Sequence[Stage],
    work: Path,
    run: Runner,
    *,
    say: Callable[[str], None] = print,
    main: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Run what is missing, in the order given (inputs come before those who read them).

    Of several processes only the `main` one writes manifests; `wait` is their barrier.
    """
    for stage in stages:
        wait()
        folder = stage.folder(work)
        state = stage.state(work)
        wait()  # nobody may seal the folder before everybody has looked
        if state == "done":
            say(f"{stage.name}: already done ({folder.name})")
            continue
        say(f"{stage.name}: {'resuming' if state == 'partial' else 'start'} ({folder.name})")
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder, f"{folder}: another run is working on this stage; wait for it or stop it", main):
            start = time.monotonic()
            facts = run(stage, folder, {parameter: i.folder(work) for parameter, i in stage.inputs.items()})
            wait()
            if main:
                _seal(stage, folder, time.monotonic() - start, facts)


def _seal(stage: Stage, folder: Path, seconds: float, facts: Mapping[str, Any]) -> None:
    """The manifest is written last and atomically: it is the claim that the stage is complete."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    write_json(
        folder / MANIFEST,
        {
            "stage": stage.name, "kind": stage.kind, "version": stage.version, "key": stage.key,
            "settings": stage.settings, "inputs": {parameter: i.key for parameter, i in stage.inputs.items()},
            "data": stage.data, "files": len(files), "bytes": sum(path.stat().st_size for path in files),
            "seconds": round(seconds, 2), "finished": datetime.now(UTC).isoformat(timespec="seconds"), **facts,
        },
    )  # fmt: skip


def make_folder(path: Path, option: str) -> None:
    """Make a folder, with those above it. Raises UserError naming the option where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot make this folder ({error.strerror}); give another one") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


LOCK = ".lock"


@contextmanager
def only_one(folder: Path, taken: str, main: bool = True) -> Iterator[None]:
    """Two processes that write into one folder would disturb each other. The lock dies with its process.

    Raises UserError with the line `taken` where another one holds it. Only the `main` process of a run locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows: no such lock; the atomic manifest still keeps finished work whole
        fcntl = None  # type: ignore[assignment]
    if fcntl is None or not main:
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(taken) from None
        yield
