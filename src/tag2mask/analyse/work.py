"""A run that is looked at again: its record, its data, its trained classifier."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tag2mask import schema
from tag2mask.collect import find_record
from tag2mask.core import Objective
from tag2mask.data.source import CheckedSource, Samples, Split
from tag2mask.engine import Devices
from tag2mask.errors import UserError
from tag2mask.pipeline import MANIFEST, make_folder, read_json
from tag2mask.recipe import SOURCES
from tag2mask.stages.classify import load_classifier

CLASSIFIERS = ("classify", "integrate")
SPLITS: tuple[Split, ...] = ("train", "score", "test")


@dataclass(frozen=True)
class Work:
    """A run in the work folder `path`: its record (see runner.remember) and its data set."""

    path: Path
    record: dict[str, Any]
    source: CheckedSource

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes."""
        return tuple(self.source.classes)

    def folder(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.path / str(self.record["stages"][stage]["folder"])

    def manifest(self, stage: str) -> dict[str, Any]:
        """The manifest of a finished stage; empty if it is not finished."""
        path = self.folder(stage) / MANIFEST
        found: dict[str, Any] = read_json(path) if path.exists() else {}
        return found

    def pick(self, kinds: Sequence[str], stage: str | None) -> str:
        """The stage called `stage`, or the last finished one of these kinds. Raises UserError if there is none."""
        there = [name for name, entry in self.record["stages"].items() if entry["kind"] in kinds]
        if stage is not None and stage not in there:
            raise UserError(f"--stage {stage}: no {' or '.join(kinds)} stage of this run; {_choice(there)}")
        finished = [name for name in there if self.manifest(name) and stage in (None, name)]
        if not finished:
            raise UserError(
                f"{self.path}: no finished {' or '.join(kinds)} stage of run {self.record['name']!r}; run it first"
            )
        return str(finished[-1])

    def classifier(self, stage: str | None, devices: Devices) -> tuple[str, Objective]:
        """(name, trained objective on the device) of the classifier called `stage`, or of the last one."""
        name = self.pick(CLASSIFIERS, stage)
        return name, load_classifier(self.folder(name)).to(devices.device)

    def readers(self, stage: str, kind: str) -> list[str]:
        """The finished stages of a kind that read `stage`, in the order of the recipe."""
        return [
            name
            for name, entry in self.record["stages"].items()
            if entry["kind"] == kind and entry["inputs"].get("of") == stage and self.manifest(name)
        ]

    def find_image(self, name: str) -> tuple[Samples, int]:
        """(split, position) of an image. Raises UserError if no split has it."""
        for split in SPLITS:
            samples = self.source.split(split)
            if name in samples.names:
                return samples, list(samples.names).index(name)
        known = [other for split in SPLITS for other in self.source.split(split).names]
        close = difflib.get_close_matches(name, known, n=1) or known[:1]
        raise UserError(f"--image {name}: no image of this run is called so; names look like {', '.join(close)}")


def open_work(path: Path, name: str | None = None) -> Work:
    """The newest run in a work folder, or that of recipe `name`.

    Raises UserError if there is none, or if the data are no longer those of its finished stages.
    """
    record = find_record(path, name)
    source = schema.make(SOURCES[record["data"]["name"]], record["data"])
    source.check(path / "checked-images.json", show=False)
    found = Work(path, record, source)
    made_from = {found.manifest(stage).get("data", source.fingerprint) for stage in record["stages"]}
    if made_from - {source.fingerprint}:
        raise UserError(f"{path}: the data have changed since run {record['name']!r}; run the recipe again")
    return found


def out_folder(work: Path, out: Path | None) -> Path:
    """`out`, else `work`/analysis; made if it is not there. Raises UserError where that cannot be done."""
    folder = work / "analysis" if out is None else out
    make_folder(folder, "--out")
    return folder


def _choice(there: Sequence[str]) -> str:
    return f"there is {', '.join(there)}" if there else "it has none"
