"""Stages: train a segmenter on pseudo-masks; masks of images by that segmenter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from tag2mask.data.augment import Augment, Crops, collate, pixels_of
from tag2mask.data.images import read_mask
from tag2mask.data.source import Mask, Source, Split
from tag2mask.engine import Devices, Training, fit
from tag2mask.errors import UserError
from tag2mask.export import write_mask
from tag2mask.ops.seed import seed_of
from tag2mask.pipeline import Stage, read_json, write_json
from tag2mask.refine.crf import PRESETS, dense_crf
from tag2mask.schema import Input, OneOf, Settings, make
from tag2mask.segment import SEGMENTERS, DeepLab, SegmentObjective
from tag2mask.segment import predict as probabilities
from tag2mask.stages.classify import MODEL, WEIGHTS, save_weights, without_weights
from tag2mask.stages.context import BatchSize, Context, Scales, images_to_do
from tag2mask.stages.crf import Preset
from tag2mask.stages.labels import MASKS, mask_path

LEAST = 1e-5  # what a probability counts at least in a CRF


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
    weights = ctx.out / WEIGHTS
    if not weights.exists():
        torch.manual_seed(seed_of(train.seed))
        samples = ctx.source.split("train")
        model = make(SEGMENTERS[net["name"]], net, num_classes=len(ctx.source.classes))
        target = partial(_pseudo_mask, [mask_path(of, name) for name in samples.names], len(ctx.source.classes))
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
    of: Annotated[Path, Input(("segment",))],
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


class Segmenter:
    """A trained segmenter with what is needed to apply it: classes, scales, flip."""

    def __init__(self, net: DeepLab, classes: tuple[str, ...], scales: Sequence[float], flip: bool) -> None:
        self.net, self.classes, self.scales, self.flip = net, classes, tuple(scales), flip


def load_segmenter(folder: Path) -> Segmenter:
    """Read the folder of a segment stage. Raises UserError if it is not one."""
    try:
        model: dict[str, Any] = read_json(folder / MODEL)
        net = make(SEGMENTERS[model["net"]["name"]], without_weights(model["net"]), num_classes=len(model["classes"]))
        net.load_state_dict(load_file(folder / WEIGHTS))
        return Segmenter(net.eval(), tuple(model["classes"]), model["scales"], model["flip"])
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{folder}: not the folder of a trained segmenter, or a damaged one ({reason})") from None


def predict_masks(
    model: Segmenter,
    image: Callable[[int], NDArray[np.uint8]],
    outputs: Sequence[Path],
    devices: Devices,
    *,
    workers: int,
    batch: int,
    crf: Preset | None = None,
) -> None:
    """Write the mask of every image that has none yet; crf: see `predict`."""
    model.net.to(devices.device)
    for indices, images in images_to_do("predict", image, outputs, devices, workers=workers, batch=batch):
        scores = probabilities(model.net, images, scales=model.scales, flip=model.flip)
        if crf is not None:
            scores = dense_crf(pixels_of(images), -scores.clamp(min=LEAST).log(), **PRESETS[crf])
        for index, mask in zip(indices, scores.argmax(dim=1).to(torch.uint8).cpu().numpy(), strict=True):
            write_mask(outputs[index], mask)


def _pseudo_mask(paths: list[Path], num_classes: int, index: int) -> Mask:
    return read_mask(paths[index], num_classes)
