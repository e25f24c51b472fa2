"""Stages: a network that classifies every pixel, learnt from what is sure in soft maps (AMN), and its own soft maps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tag2mask.data.augment import Augment
from tag2mask.data.images import read_mask
from tag2mask.data.maps import Maps, map_path, map_size, write_maps
from tag2mask.data.source import Source
from tag2mask.engine import Training
from tag2mask.ops.seed import seed_of
from tag2mask.pipeline import Stage, read_json
from tag2mask.refine import irn as boundaries
from tag2mask.schema import Input, OneOf, Settings, make
from tag2mask.segment.amn import AMN, AMNObjective, check_smoothing, on_grid, shares, soft_maps
from tag2mask.stages.affinity import label_path, train_on_sure_labels
from tag2mask.stages.classify import MODEL, WEIGHTS, without_weights
from tag2mask.stages.context import BatchSize, Context, Scales, images_to_do

NETS = {"amn": AMN}


def amn(
    ctx: Context,
    *,
    of: Annotated[Path, Input(("cams", "clip_es", "pacam", "attention"))],
    net: Annotated[Settings, OneOf(NETS)],
    train: Training,
    augment: Augment = Augment(),  # noqa: B008  (frozen)
    foreground: float = 0.3,
    background: float = 0.05,
    smoothing: float = 0.4,
    bf16: bool = False,
) -> None:
    """Train AMN on what is sure in the soft maps; its folder keeps that as labels/*.png.

    of: the soft maps. net: the network. train, augment: as in classify. foreground, background: of the confident
    labels, as in irn. smoothing: what of a pixel's label is shared among all other labels. bf16: forward passes in
    bfloat16, losses in float32.
    """
    train_on_sure_labels(
        ctx, "amn", of, net, train, augment,
        label=partial(boundaries.confident_labels, foreground=foreground, background=background),
        build=partial(make, NETS[net["name"]], net, num_classes=len(ctx.source.classes)),
        objective=partial(AMNObjective, smoothing=smoothing, bf16=bf16),
    )  # fmt: skip


def check_amn(source: Source, stage: Stage) -> None:
    """Build the network once, before anything runs. Raises UserError if that or the labels or the loss cannot work."""
    settings, classes = stage.settings, len(source.classes)
    boundaries.check_scores(settings["foreground"], settings["background"])
    check_smoothing(settings["smoothing"], classes)
    make(NETS[settings["net"]["name"]], settings["net"], num_classes=classes)


def amn_maps(
    ctx: Context,
    *,
    of: Annotated[Path, Input(("amn",))],
    scales: Scales = (0.5, 1.0, 1.5, 2.0),
    flip: bool = True,
    dropout: bool = False,
    batch: BatchSize = 4,
) -> None:
    """Soft maps of every train image by AMN, of its tagged classes only; they are stored like those of the cams stage.

    Scores are averaged over scales and mirror images. A map is the class's probability, stretched to 0..1 wherever the
    confident labels that AMN was trained on do not say background.

    of: the trained AMN. scales, flip: as in cams. dropout: leave it on, as released. batch: images of the same size
    that go through the network together.
    """
    samples = ctx.source.split("train")
    outputs = [map_path(ctx.out, name) for name in samples.names]
    net = load_amn(of).to(ctx.devices.device)
    net.dropout.train(dropout)
    unknown = np.full(len(ctx.source.classes), np.nan, np.float32)  # it scores pixels, not tags
    for indices, images in images_to_do(
        "AMN's maps", samples.image, outputs, ctx.devices, workers=ctx.workers, batch=batch
    ):
        if dropout:
            torch.manual_seed(seed_of(indices[0]))  # so that a run that was killed ends alike
        size = int(images.shape[-2]), int(images.shape[-1])
        tags = torch.from_numpy(samples.tags[indices]).to(images.device, torch.float32)
        found = shares(net, images, tags, scales=scales, flip=flip, size=map_size(size))
        for index, own in zip(indices, found, strict=True):
            classes = np.flatnonzero(samples.tags[index]).astype(np.int64)
            chosen = own[1:][torch.from_numpy(classes).to(own.device)].cpu()
            maps = soft_maps(chosen, _labels(of, samples.names[index], len(ctx.source.classes), map_size(size)))
            write_maps(outputs[index], Maps(classes, maps.half().numpy(), size, unknown))


def load_amn(folder: Path) -> AMN:
    """The trained network of an amn stage, in evaluation mode on the CPU."""
    model = read_json(folder / MODEL)
    net: AMN = make(NETS[model["net"]["name"]], without_weights(model["net"]), num_classes=len(model["classes"]))
    net.load_state_dict(load_file(folder / WEIGHTS))
    return net.eval()


def _labels(folder: Path, name: str, num_classes: int, size: tuple[int, int]) -> Tensor:
    """The confident labels [h w] of an image."""
    return on_grid(torch.from_numpy(read_mask(label_path(folder, name), num_classes))[None], size)[0]
