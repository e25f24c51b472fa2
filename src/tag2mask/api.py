"""What `import tag2mask` offers: the commands as functions. Paths in, paths and plain values out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tag2mask import collect, progress, runner
from tag2mask.backbones import patch_of
from tag2mask.budget import run_few_masks
from tag2mask.data.images import read_mask
from tag2mask.data.names import scan
from tag2mask.errors import UserError
from tag2mask.exporting import export_masks
from tag2mask.findings import COUNTS
from tag2mask.metrics import Confusion
from tag2mask.predicting import Prediction, export_onnx, find_model, load_segmenter, predict
from tag2mask.recipe import Recipe, load, written, written_stages
from tag2mask.report import render, write_csv
from tag2mask.runner import Options, Run, prepare

__all__ = [
    "Options", "Prediction", "Recipe", "Run", "evaluate", "export_masks", "export_onnx", "few_masks", "find_model",
    "folder_recipe", "load", "load_segmenter", "predict", "prepare", "run", "write_report",
]  # fmt: skip


def run(recipe: str | Path | Recipe, overrides: Sequence[str] = (), *, work: str | Path = "work",
        options: Options = Options()) -> Run:  # noqa: B008  # fmt: skip
    """Carry out a recipe (a built-in name, a YAML path, or a loaded one) with "key=value" overrides in `work`.

    Finished stages are skipped and partial ones resumed. Raises UserError before anything expensive if something is
    wrong with the recipe or the data.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load(recipe, overrides)
    return runner.run(loaded, Path(work), options)


def folder_recipe(
    images: str | Path, data: Mapping[str, Any], overrides: Sequence[str] = (), *, recipe: str = "folder"
) -> Recipe:
    """A recipe on a folder of images; `data` are further arguments of `data.folder.Folder` (tags, masks, ...).

    What the recipe says of another kind of data (voc12, scenes, ...) is dropped.
    """
    own = written(recipe).get("data")
    of_folders = isinstance(own, dict) and own.get("name") == "folder"
    given = {"images": str(images)} | {key: value for key, value in data.items() if value is not None}
    as_yaml = [f"data.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
    return load(recipe, [*([] if of_folders else ["data={name: folder}"]), *as_yaml, *overrides])


def network_overrides(
    recipe: str, *, backbone: str | None = None, weights: str | None = None, epochs: float | None = None
) -> list[str]:
    """Overrides: one backbone, one source of weights ("none": from scratch) for all networks; classifiers' epochs.

    With a ViT comes its only stride, the width of its patches.
    """
    stages = written_stages(recipe)
    nets = {name: stage.get("net") for name, stage in stages.items()}
    networks = [name for name, net in nets.items() if isinstance(net, dict) and "backbone" in net]
    classifiers = [name for name, stage in stages.items() if stage.get("do") == "classify"]
    found = [f"{name}.net.backbone.name={json.dumps(backbone)}" for name in networks if backbone is not None]
    stride = None if backbone is None else patch_of(backbone)
    found += [f"{name}.net.backbone.output_stride={stride}" for name in networks if stride is not None]
    chosen = None if weights == "none" else weights
    found += [f"{name}.net.backbone.weights={json.dumps(chosen)}" for name in networks if weights is not None]
    return found + [f"{name}.train.epochs={epochs}" for name in classifiers if epochs is not None]


def is_main_process() -> bool:
    """True on the process that talks to the user (the only one, unless several were launched together)."""
    return int(os.environ.get("RANK", "0")) == 0


def write_report(work: str | Path, name: str | None = None, *, beside: Sequence[str | Path] = ()) -> Path:
    """Write the page of a run (the newest in `work`, or the one of recipe `name`) and return its path.

    beside: further work folders; runs in them that differ in the seed alone, or have no methods, stand beside this one.
    Tags in doubt are listed in <recipe>-suspicions.csv beside the page. Raises UserError for a folder without a run.
    """
    folder, others = Path(work), [Path(other) for other in beside]
    for other in others:
        if not other.is_dir():
            raise UserError(f"--with {other}: no such folder; give one that was used as --work")
    record = collect.find_record(folder, name)
    summary = collect.summarise(folder, record, others)
    if summary.tags is not None:
        write_csv(folder / summary.tags.file, summary.tags.suspects)
    path = folder / f"{record['name']}-report.html"
    render(summary, path)
    return path


def few_masks(
    work: str | Path, counts: Sequence[int] = COUNTS, name: str | None = None, *,
    options: Options = Options(),  # noqa: B008
) -> Path:  # fmt: skip
    """Train the segmenter of a run on a few true masks (`counts`), measure it, and write the run's page with the curve.

    Returns the path of the page. Raises UserError if the run has no measured segmenter or there are not enough masks.
    """
    _, name = run_few_masks(Path(work), name, counts, options)
    return write_report(work, name)


def evaluate(predicted: str | Path, truth: str | Path, classes: Sequence[str]) -> dict[str, Any]:
    """Scores of a folder of index masks against another, for every mask in `truth`.

    Raises UserError if a mask is missing, has another size, or holds values that are no class.
    """
    wanted, _ = scan(Path(truth), (".png",))
    given, _ = scan(Path(predicted), (".png",))
    missing = [name for name in wanted if name not in given]
    if not wanted:
        raise UserError(f"{truth}: no masks (.png) here")
    if missing:
        raise UserError(
            f"{predicted}: {len(missing)} of {len(wanted)} masks are missing, the first is {missing[0]}.png"
        )
    total = Confusion(len(classes))
    for name in progress.track(sorted(wanted), "evaluate", len(wanted)):
        pair = [read_mask(folder[name][0], len(classes)) for folder in (given, wanted)]
        if pair[0].shape != pair[1].shape:
            raise UserError(f"{given[name][0]}: {pair[0].shape} pixels, but the truth has {pair[1].shape}")
        total.update(*pair)
    return {"images": len(wanted)} | total.scores().to_dict(classes)
