"""What `import tag2mask` offers: the commands as functions. Paths in, paths and plain values out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from tag2mask import collect, progress, runner
from tag2mask.backbones import patch_of
from tag2mask.data.images import ENDINGS, read_image, read_mask
from tag2mask.data.names import scan
from tag2mask.engine import Device, Devices
from tag2mask.errors import UserError
from tag2mask.export import overlay as overlay_mask
from tag2mask.metrics import Confusion
from tag2mask.pipeline import MANIFEST, make_folder, read_json
from tag2mask.recipe import Recipe, load, written, written_stages
from tag2mask.report import render
from tag2mask.runner import Options, Run, prepare
from tag2mask.stages.classify import MODEL
from tag2mask.stages.crf import Preset
from tag2mask.stages.segment import load_segmenter, predict_masks

__all__ = ["Options", "Recipe", "Run", "evaluate", "folder_recipe", "load", "predict", "prepare", "run", "write_report"]


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


def write_report(work: str | Path, name: str | None = None) -> Path:
    """Write the page of a run (the newest in `work`, or the one of recipe `name`) and return its path."""
    record = collect.find_record(Path(work), name)
    path = Path(work) / f"{record['name']}-report.html"
    render(collect.summarise(Path(work), record), path)
    return path


def find_model(path: str | Path) -> Path:
    """The folder of a trained segmenter: `path` itself, or the newest finished one inside a work folder."""
    folder = Path(path)
    if (folder / MODEL).exists():
        return folder
    finished = [m.parent for m in folder.glob(f"segment-*/{MANIFEST}") if (m.parent / MODEL).exists()]
    if not finished:
        raise UserError(f"{folder}: no trained segmenter here; give a work folder or one of its segment-... folders")
    return max(finished, key=lambda found: str(read_json(found / MANIFEST)["finished"]))


def predict(
    model: str | Path, images: str | Path, out: str | Path, *, overlays: bool = False, device: Device = "auto",
    workers: int = 2, batch: int = 4, crf: Preset | None = None,
) -> int:  # fmt: skip
    """Masks of untagged images by a trained segmenter: `out`/masks/<name>.png, with overlays in `out`/overlays.

    crf: the preset of a dense CRF that goes over the segmenter's probabilities, such as "deeplab".
    Images that have a mask already are skipped. Returns the number of images. Raises UserError if the model or the
    images cannot be read.
    """
    devices = Devices(device)
    segmenter = load_segmenter(find_model(model))
    root, target = Path(images), Path(out)
    found, _ = scan(root, ENDINGS, skip=[target])
    if not found:
        raise UserError(f"{root}: no images here (endings {', '.join(ENDINGS)})")
    names = sorted(found)
    twice = [name for name in names if len(found[name]) > 1]
    if twice:
        raise UserError(f"{root}: {twice[0]} exists with several endings, their masks would overwrite each other")
    paths = [found[name][0] for name in names]
    outputs = [target / "masks" / f"{name}.png" for name in names]
    make_folder(target, "--out")
    predict_masks(segmenter, partial(_nth, paths), outputs, devices, workers=workers, batch=batch, crf=crf)
    if overlays and devices.main:
        for path, mask in zip(paths, outputs, strict=True):
            picture = overlay_mask(read_image(path), read_mask(mask, len(segmenter.classes)))
            beside = target / "overlays" / mask.relative_to(target / "masks")
            beside.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(picture).save(beside)
    return len(names)


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


def _nth(paths: Sequence[Path], index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return read_image(paths[index])
