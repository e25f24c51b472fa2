"""Runs a recipe: checks everything that can be checked first, then stage after stage, and remembers what was run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tag2mask import progress, schema
from tag2mask.data.source import CheckedSource
from tag2mask.engine import Device, Devices
from tag2mask.errors import UserError
from tag2mask.pipeline import Stage, execute, make_folder, write_json
from tag2mask.recipe import Recipe
from tag2mask.stages import STAGES, Context


@dataclass(frozen=True)
class Options:
    """What cannot change the numbers: device, loader processes, steps between checkpoints."""

    device: Device = "auto"
    workers: int = 2
    save_every: int = 200


@dataclass(frozen=True)
class Run:
    """A recipe that was carried out: its stages and where their folders are."""

    recipe: Recipe
    source: CheckedSource
    stages: list[Stage]
    work: Path

    def folder(self, name: str) -> Path:
        """The folder of the stage that the recipe calls `name`."""
        return next(stage for stage in self.stages if stage.name == name).folder(self.work)

    def folders(self, kind: str) -> list[Path]:
        """The folders of all stages of a kind, in order."""
        return [stage.folder(self.work) for stage in self.stages if stage.kind == kind]


def prepare(recipe: Recipe, work: Path, devices: Devices | None = None) -> Run:
    """Check the data and plan the stages. Raises UserError with all faults of the data in one report."""
    source = recipe.source()
    cache = work / "checked-images.json"
    make_folder(work, "--work")
    if devices is None or devices.main:
        source.check(cache)
    if devices is not None and devices.world > 1:
        devices.wait()
        source.check(cache, show=False)  # the other processes find everything in the cache
    return Run(recipe, source, recipe.plan(source.fingerprint), work)


def run(recipe: Recipe, work: Path, options: Options = Options()) -> Run:
    """Carry out a recipe in `work`: finished stages are skipped, partial ones go on, changed ones get a new folder.

    Raises UserError before anything expensive starts if the data or a setting is wrong, Interrupted after SIGTERM.
    """
    devices = Devices(options.device)
    prepared = prepare(recipe, work, devices)
    for stage in prepared.stages:
        if stage.state(work) != "done":
            _preflight(stage, prepared.source, devices)
    if devices.main:
        remember(prepared)

    def one(stage: Stage, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
        devices.start_counting_memory()
        context = Context(folder, prepared.source, devices, workers=options.workers, save_every=options.save_every)
        schema.make(STAGES[stage.kind].function, stage.settings, ctx=context, **inputs)
        return {"device": devices.name, "peak_mb": round(devices.peak_mb(), 1), "versions": versions()}

    tell = partial(progress.say) if devices.main else lambda text: None
    execute(prepared.stages, work, one, say=tell, main=devices.main, wait=devices.wait)
    return prepared


def _preflight(stage: Stage, source: CheckedSource, devices: Devices) -> None:
    """What would fail after hours of earlier stages must fail now, with the name of the stage."""
    batch = stage.settings.get("train", {}).get("batch", devices.world)
    if batch % devices.world:
        raise UserError(f"{stage.name}.train.batch: {batch} does not divide over {devices.world} processes")
    check = STAGES[stage.kind].preflight
    if check is not None:
        try:
            check(source, stage)
        except (UserError, ValueError) as fault:  # ValueError: a number that a layer of torch does not accept
            raise UserError(f"{stage.name}: {fault}") from None


def remember(prepared: Run) -> None:
    """Write down, in the work folder, which stages belong to this recipe: `status` and `report` read it."""
    write_json(
        record_path(prepared.work, prepared.recipe.name),
        {
            "name": prepared.recipe.name,
            "title": prepared.recipe.title,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "data": prepared.recipe.data,
            "supervision": list(prepared.recipe.supervision),
            "summary": prepared.source.summary(),
            "stages": {
                stage.name: {
                    "kind": stage.kind,
                    "folder": stage.folder(prepared.work).name,
                    "inputs": {parameter: i.name for parameter, i in stage.inputs.items()},
                }
                for stage in prepared.stages
            },
        },
    )
    (prepared.work / f"{prepared.recipe.name}.recipe.yaml").write_text(prepared.recipe.as_yaml(), encoding="utf-8")


def record_path(work: Path, name: str) -> Path:
    """Where a run is remembered."""
    return work / f"{name}.run.json"


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": sys.version.split()[0]}
    for package in ("tag2mask", "torch", "torchvision", "timm", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
