"""A trained segmenter on somebody's images: masks, pictures and probabilities into a folder, and what is in them."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from tag2mask import progress
from tag2mask.data.augment import normalise
from tag2mask.data.images import read_image, read_mask
from tag2mask.data.inputs import find_images
from tag2mask.data.verify import verify
from tag2mask.engine import Device, Devices
from tag2mask.errors import UserError
from tag2mask.export import overlay
from tag2mask.pipeline import MANIFEST, make_folder, only_one, read_json, write_json
from tag2mask.segment import predict as probabilities
from tag2mask.segment.onnx_graph import onnx_graph
from tag2mask.segment.onnx_model import OnnxModel
from tag2mask.stages.classify import MODEL, WEIGHTS
from tag2mask.stages.crf import Preset
from tag2mask.stages.segment import predict_masks
from tag2mask.stages.segmenter import ImageSegmenter, OnnxSegmenter, Segmenter
from tag2mask.stages.segmenter import load_segmenter as read_segmenter

ONNX = ".onnx"
RECORD = "predict.json"  # what the masks in a folder were made with
CHECK_SIZES = ((97, 131), (160, 120))
TOLERANCE = 1e-4  # of probabilities in onnxruntime


@dataclass(frozen=True)
class Prediction:
    """What was predicted.

    images: in all; made: of them in this run, the others had their mask. seconds: of this run, without what was checked
    before. images_per_second: None if nothing was made. device: in words. classes: of each class, background first,
    {"class", "pixels": its share of all pixels of the masks, "images": how many show it}. masks, overlays, scores: the
    folders, None where nothing was asked for.
    """

    images: int
    made: int
    seconds: float
    images_per_second: float | None
    device: str
    classes: list[dict[str, Any]]
    masks: str
    overlays: str | None
    scores: str | None


def find_model(path: str | Path) -> Path:
    """The folder of a trained segmenter: `path` itself, or the newest finished one inside a work folder."""
    folder = Path(path)
    if (folder / MODEL).exists():
        return folder
    finished = [m.parent for m in folder.glob(f"segment-*/{MANIFEST}") if (m.parent / MODEL).exists()]
    if not finished:
        raise UserError(f"{folder}: no trained segmenter here; give a work folder or one of its segment-... folders")
    return max(finished, key=lambda found: str(read_json(found / MANIFEST)["finished"]))


def load_segmenter(model: str | Path, *, device: Device = "auto") -> ImageSegmenter:
    """A trained segmenter as a function: `mask = segmenter(photo)`; see `ImageSegmenter`.

    model: a work folder, one of its segment-... folders, or an .onnx file, which computes on the CPU.
    Raises UserError if there is none.
    """
    return _load(Path(model), device)[0]


def predict(
    model: str | Path, images: str | Path | Sequence[str | Path], out: str | Path, *, overlays: bool = False,
    soft: bool = False, device: Device = "auto", workers: int = 2, batch: int = 4, crf: Preset | None = None,
) -> Prediction:  # fmt: skip
    """Masks of untagged images by a trained segmenter: `out`/masks/<name>.png.

    model: see `load_segmenter`. images: a folder, a file, a pattern such as "in/*.jpg", or several of these; for the
    names see `data.inputs.find_images`. overlays: pictures of the masks over the images, too, in `out`/overlays.
    soft: the probabilities, too, in `out`/scores (see `stages.segment.write_scores`). crf: the preset of a dense CRF
    that goes over the probabilities, such as "deeplab". What is there already is kept.
    Raises UserError if the model or an image cannot be read, before anything is written, or if `out` holds the masks of
    another model.
    """
    segmenter, devices, files = _load(Path(model), device)
    target = Path(out)
    found = find_images([images] if isinstance(images, str | Path) else images, skip=[target])
    paths = list(found.values())
    kinds = {"masks": ".png", "overlays": ".png", "scores": ".npz"}
    places = {kind: [target / kind / f"{name}{ending}" for name in found] for kind, ending in kinds.items()}
    make_folder(target, "--out")
    with only_one(target, f"{target}: another run writes masks here; wait for it or give another --out", devices.main):
        if devices.main:
            _same_model(target, places["masks"], {"model": _digest(files), "crf": crf}, segmenter.classes)
            _sound(paths, target)
        devices.wait()
        wanted = [places["masks"], *([places["scores"]] if soft else [])]
        missing = sum(not all(path.exists() for path in each) for each in zip(*wanted, strict=True))
        start = time.monotonic()
        predict_masks(
            segmenter, partial(_nth, paths), places["masks"], devices, workers=workers, batch=batch, crf=crf,
            soft=places["scores"] if soft else None,
        )  # fmt: skip
        devices.wait()
        seconds = time.monotonic() - start
        if overlays and devices.main:
            _draw(paths, places["masks"], places["overlays"], len(segmenter.classes))
        shares = _shares(places["masks"], segmenter.classes, show=devices.main) if devices.main else []
    return Prediction(
        len(paths), missing, round(seconds, 3), missing / seconds if missing else None, devices.name, shares,
        str(target / "masks"), str(target / "overlays") if overlays else None, str(target / "scores") if soft else None,
    )  # fmt: skip


def export_onnx(
    model: str | Path, out: str | Path, *, scales: Sequence[float] = (1.0,), flip: bool = False
) -> dict[str, Any]:
    """Write a trained segmenter as an ONNX file, after a comparison in onnxruntime; see `segment.onnx_graph`.

    scales, flip: built into the graph; by default one look at the image as it is, whatever the segmenter was stored
    with. Returns {"path", "bytes", "classes", "scales", "flip", "difference"}: the last is the largest difference of a
    probability to PyTorch's on images of two sizes.
    Raises UserError if `out` exists, the extra [onnx] is missing, or the network cannot be exported.
    """
    path = Path(out)
    if path.exists():
        raise UserError(f"--out {path}: exists and is kept; give another name")
    if path.suffix != ONNX:
        raise UserError(f"--out {path}: must end in {ONNX}")
    if not scales or min(scales) <= 0:
        raise UserError(f"--scales: {', '.join(map(str, scales)) or 'none'}; give numbers above 0, such as 0.75,1,1.25")
    segmenter = read_segmenter(find_model(model))
    make_folder(path.parent, "--out")
    progress.say("export: writing the graph")
    content = onnx_graph(segmenter.net, segmenter.classes, scales=scales, flip=flip, version=_version())
    progress.say("export: comparing with onnxruntime")
    difference = _difference(segmenter, OnnxModel(path, content), scales, flip)
    if not difference <= TOLERANCE:
        raise UserError(
            f"export onnx: onnxruntime computes other probabilities (by up to {difference:.1g}); nothing was written"
        )
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return {
        "path": str(path), "bytes": len(content), "classes": list(segmenter.classes), "scales": list(scales),
        "flip": flip, "difference": difference,
    }  # fmt: skip


def _load(model: Path, device: Device) -> tuple[ImageSegmenter, Devices, list[Path]]:
    """The segmenter, where it computes, and its files."""
    if model.suffix == ONNX:
        if device not in ("auto", "cpu"):
            raise UserError(f"--device {device}: an ONNX model computes on the CPU here; give the work folder instead")
        return OnnxSegmenter(OnnxModel(model)), Devices("cpu"), [model]
    devices, folder = Devices(device), find_model(model)
    segmenter = read_segmenter(folder)
    segmenter.to(devices.device)
    return segmenter, devices, [folder / MODEL, folder / WEIGHTS]


def _same_model(target: Path, masks: Sequence[Path], made_with: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Raises UserError if there are masks by another model or CRF; they would be taken for this one's."""
    record = target / RECORD
    if not record.exists():
        if (there := next((path for path in masks if path.exists()), None)) is not None:
            raise UserError(f"{there}: exists, and nothing says which model made it; give another --out")
    else:
        try:
            before = read_json(record)
            differs = [key for key in made_with if before[key] != made_with[key]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{record}: is damaged; give another --out") from None
        if differs:
            own = f"with --crf {before['crf']}" if before["crf"] else "without --crf"
            what = "by another model" if "model" in differs else own
            raise UserError(f"--out {target}: holds masks made {what}; give another folder")
        return
    write_json(record, {**made_with, "classes": list(classes), "tag2mask": _version()})


def _sound(paths: Sequence[Path], target: Path) -> None:
    """Decodes every image once. Raises UserError if some cannot be read."""
    _, broken = verify([("image", path) for path in paths], target / "checked-images.json", show=len(paths) > 1)
    if broken:
        (_, first), reason = next(iter(broken.items()))
        more = f", and {len(broken) - 1:,} more of {len(paths):,} images that cannot be read" if len(broken) > 1 else ""
        raise UserError(f"{first}: {reason}. Replace or remove it{more}.")


def _draw(paths: Sequence[Path], masks: Sequence[Path], pictures: Sequence[Path], num_classes: int) -> None:
    """The pictures that are missing."""
    todo = [index for index, path in enumerate(pictures) if not path.exists()]
    for index in progress.track(todo, "overlays", len(pictures), len(pictures) - len(todo)):
        picture = overlay(read_image(paths[index]), read_mask(masks[index], num_classes))
        path = pictures[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            PIL.Image.fromarray(picture).save(part, format="PNG")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _shares(masks: Sequence[Path], classes: Sequence[str], *, show: bool) -> list[dict[str, Any]]:
    """Share of pixels and number of images of each class, background first."""
    pixels, images = np.zeros(len(classes) + 1, np.int64), np.zeros(len(classes) + 1, np.int64)
    for path in progress.track(masks, "counting", len(masks), show=show and len(masks) > 1000):
        own = np.bincount(read_mask(path, len(classes)).ravel(), minlength=len(classes) + 1)[: len(classes) + 1]
        pixels += own
        images += own > 0
    names = ("background", *classes)
    return [
        {"class": name, "pixels": int(share) / max(int(pixels.sum()), 1), "images": int(count)}
        for name, share, count in zip(names, pixels, images, strict=True)
    ]


def _difference(segmenter: Segmenter, written: OnnxModel, scales: Sequence[float], flip: bool) -> float:
    """The largest difference of a probability between PyTorch and onnxruntime."""
    found = []
    for seed, size in enumerate(CHECK_SIZES):
        pixels = np.random.default_rng(seed).integers(0, 256, (1, 3, *size), dtype=np.uint8)
        own = probabilities(segmenter.net, normalise(torch.from_numpy(pixels)), scales=scales, flip=flip)
        found.append(np.abs(own.numpy() - written.scores(pixels)).max())
    return float(np.max(found))  # not a number if one of them is none


def _digest(files: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _version() -> str:
    try:
        return version("tag2mask")
    except PackageNotFoundError:
        return "unknown"


def _nth(paths: Sequence[Path], index: int) -> NDArray[np.uint8]:
    return read_image(paths[index])
