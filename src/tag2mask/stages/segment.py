"""Stages: train a segmenter on pseudo-masks; masks of images by that segmenter."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tag2mask.data.augment import Augment, Crops, collate
from tag2mask.data.images import read_mask
from tag2mask.data.source import Mask, Samples, Source, Split
from tag2mask.engine import Devices, Training, fit
from tag2mask.export import write_mask
from tag2mask.ops.seed import seed_of
from tag2mask.pipeline import Stage, write_json
from tag2mask.schema import Input, OneOf, Settings, make
from tag2mask.segment import SEGMENTERS, SegmentObjective
from tag2mask.stages.classify import MODEL, WEIGHTS, save_weights
from tag2mask.stages.context import BatchSize, Context, Scales, images_to_do
from tag2mask.stages.crf import Preset
from tag2mask.stages.labels import MASKS, mask_path
from tag2mask.stages.segmenter import ImageSegmenter, Segmenter, load_segmenter

__all__ = [
    "Segmenter", "check_segmenter", "load_segmenter", "predict", "predict_masks", "segment", "train_segmenter",
    "write_scores",
]  # fmt: skip


def segment(
    ctx: Context,
    *,
    of: Annotated[Path, Input(MASKS)],
    net: Annotated[Settings, OneOf(SEGMENTERS)],
    train: Training,
    augment: Augment = Augment(),  # noqa: B008  (frozen)
    scales: Scales = (0.75, 1.0, 1.25),
    flip: bool = True,
    bf16: bool = False,
) -> None:
    """Train a segmenter on the train split's images and their pseudo-masks.

    of: the pseudo-masks. net: the segmenter and its settings. train, augment: as in classify. scales, flip: how the
    trained model is to be applied, remembered with it. bf16: forward passes in bfloat16.
    """
    samples = ctx.source.split("train")
    target = partial(_pseudo_mask, [mask_path(of, name) for name in samples.names], len(ctx.source.classes))
    train_segmenter(ctx, samples, target, net=net, train=train, augment=augment, scales=scales, flip=flip, bf16=bf16)


def train_segmenter(
    ctx: Context,
    samples: Samples,
    target: Callable[[int], Mask],
    *,
    net: Settings,
    train: Training,
    augment: Augment,
    scales: Scales,
    flip: bool,
    bf16: bool,
) -> None:
    """Train a segmenter on `samples`, whose masks are `target(i)`, into the stage's folder; see `segment`."""
    weights = ctx.out / WEIGHTS
    if not weights.exists():
        torch.manual_seed(seed_of(train.seed))
        model = make(SEGMENTERS[net["name"]], net, num_classes=len(ctx.source.classes))
        crops = Crops(samples, augment, seed=train.seed, target=target)
        fit(
            SegmentObjective(model, bf16=bf16), crops, collate, train, ctx.out, ctx.devices,
            label="segment", workers=ctx.workers, save_every=ctx.save_every, log_every=ctx.log_every,
        )  # fmt: skip
        if ctx.devices.main:
            description = {"net": net, "classes": list(ctx.source.classes), "scales": list(scales), "flip": flip}
            write_json(ctx.out / MODEL, description)
            save_weights(model, weights)
    ctx.devices.wait()
    if ctx.devices.main:
        (ctx.out / "last.ckpt").unlink(missing_ok=True)


def check_segmenter(source: Source, stage: Stage) -> None:
    """Build the network once, before anything runs. Raises UserError if it cannot be built."""
    net = stage.settings["net"]
    make(SEGMENTERS[net["name"]], net, num_classes=len(source.classes))


def predict(
    ctx: Context,
    *,
    of: Annotated[Path, Input(("segment", "few_masks"))],
    split: Split = "test",
    crf: Preset | None = None,
    batch: BatchSize = 4,
) -> None:
    """Masks of one split by the segmenter; tags are not used.

    of: the segmenter. split: train, score or test. crf: the preset of a dense CRF that goes over its probabilities; the
    field takes "deeplab". batch: images of the same size that go through together.
    """
    samples = ctx.source.split(split)
    outputs = [mask_path(ctx.out, name) for name in samples.names]
    model = load_segmenter(of)
    predict_masks(model, samples.image, outputs, ctx.devices, workers=ctx.workers, batch=batch, crf=crf)


def predict_masks(
    model: ImageSegmenter,
    image: Callable[[int], NDArray[np.uint8]],
    outputs: Sequence[Path],
    devices: Devices,
    *,
    workers: int,
    batch: int,
    crf: Preset | None = None,
    soft: Sequence[Path] | None = None,
) -> None:
    """Write the mask of every image that has none yet; crf: see `predict`.

    soft: where the probabilities are to go, too (see `write_scores`); an image without them is then done again.
    """
    model.to(devices.device)
    missing = outputs if soft is None else [_missing(*pair) for pair in zip(outputs, soft, strict=True)]
    for indices, images in images_to_do("predict", image, missing, devices, workers=workers, batch=batch):
        scores = model.refined(images, crf)
        for index, mask in zip(indices, scores.argmax(dim=1).to(torch.uint8).cpu().numpy(), strict=True):
            write_mask(outputs[index], mask)
        if soft is not None:
            for index, own in zip(indices, scores, strict=True):
                write_scores(soft[index], own, model.classes)


def write_scores(path: Path, scores: Tensor, classes: Sequence[str]) -> None:
    """Write probabilities [1+K H W] as a compressed .npz, whole or not at all.

    It holds `scores` float16 [1+K H W], background first, and `classes`, the 1+K names.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with part.open("wb") as file:
            np.savez_compressed(file, scores=scores.half().cpu().numpy(), classes=np.array(["background", *classes]))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _missing(mask: Path, scores: Path) -> Path:
    return scores if mask.exists() else mask


def _pseudo_mask(paths: list[Path], num_classes: int, index: int) -> Mask:
    return read_mask(paths[index], num_classes)
