"""Stages: the attention that a network accumulated in training as soft maps, and a second network that learns them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from tag2mask import progress
from tag2mask.baselines import BASELINES
from tag2mask.baselines.integral import TARGET, IntegralObjective
from tag2mask.core import Baseline
from tag2mask.data.augment import Augment, Crops, collate
from tag2mask.data.map_crops import MapCrops
from tag2mask.data.maps import Maps, map_path, map_size, write_maps
from tag2mask.data.same_size import ahead
from tag2mask.data.source import Source
from tag2mask.engine import Training, fit
from tag2mask.errors import UserError
from tag2mask.ops.cams import min_max_norm
from tag2mask.ops.seed import seed_of
from tag2mask.pipeline import Stage, write_json
from tag2mask.schema import Input, OneOf, Settings
from tag2mask.stages.classify import MEMORY, MODEL, WEIGHTS, build_objective, save_weights
from tag2mask.stages.context import Context

NETS = {name: BASELINES[name] for name in ("cam", "oaa")}  # those whose maps are all that there is to train


def attention(ctx: Context, *, of: Annotated[Path, Input(("classify",))]) -> None:
    """What the classifier attended to over its whole training, as maps of every train image like those of `cams`.

    of: a classifier with net oaa. Its maps are resized (bicubic), then stretched to 0..1 (OAA's recipe).
    """
    if not (of / MEMORY).exists():
        raise UserError(f"{of}: this network accumulated no attention; train one with net.name: oaa")
    memory = load_file(of / MEMORY)
    samples = ctx.source.split("train")
    mine = ctx.devices.share(len(samples))
    outputs = [map_path(ctx.out, name) for name in samples.names]
    missing = [index for index in mine if not outputs[index].exists()]
    unknown = np.full(len(ctx.source.classes), np.nan, np.float32)  # it is not one look that they come from

    def one(index: int) -> tuple[int, Maps]:
        height, width = samples.image(index).shape[:2]
        classes, maps = accumulated(memory["maps"], memory["slot"][index], (height, width))
        return index, Maps(classes, maps, (height, width), unknown)

    made = ahead(one, missing, ctx.workers)
    for index, maps in progress.track(made, "attention", len(mine), len(mine) - len(missing), show=ctx.devices.main):
        write_maps(outputs[index], maps)


def accumulated(maps: Tensor, slot: Tensor, size: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
    """(classes [P], maps [P h w] in 0..1) of an image of `size` (H, W), given all maps [S g g] and its slots [K]."""
    classes = (slot >= 0).nonzero().flatten()
    own = maps[slot[classes].long()].float()
    if len(own):
        own = F.interpolate(own[None], size=map_size(size), mode="bicubic", align_corners=False)[0]
    else:
        own = own.new_zeros(0, *map_size(size))
    return classes.numpy(), min_max_norm(own).half().numpy()


def check_attention(source: Source, stage: Stage) -> None:
    """Look whether the classifier will have accumulated anything. Raises UserError if not."""
    classifier = stage.inputs["of"]
    name = classifier.settings["net"]["name"]
    if BASELINES[name].export_memory is Baseline.export_memory:
        raise UserError(
            f"of: {classifier.name} trains {name}, which accumulates no attention; set {classifier.name}.net.name: oaa"
        )


def integrate(
    ctx: Context,
    *,
    of: Annotated[Path, Input(("attention",))],
    net: Annotated[Settings, OneOf(NETS)],
    train: Training,
    augment: Augment = Augment(),  # noqa: B008  (frozen)
    bf16: bool = False,
) -> None:
    """Train a network whose every pixel says what was attended to (OAA+); its folder can be read like a classifier's.

    of: the accumulated attention. net: the network, as in classify; what it accumulates or drops itself plays no role.
    train, augment, bf16: as in classify.
    """
    weights = ctx.out / WEIGHTS
    if not weights.exists():
        torch.manual_seed(seed_of(train.seed))
        model = build_objective(net, {}, len(ctx.source.classes), bf16)
        objective = IntegralObjective(model)
        crops = Crops(ctx.source.split("train"), augment, seed=train.seed)
        data = MapCrops(
            crops, of, side=TARGET, num_classes=len(ctx.source.classes), grid=objective.grid(augment.crop)
        )  # fmt: skip
        fit(
            objective, data, collate, train, ctx.out, ctx.devices,
            label="integrate", workers=ctx.workers, save_every=ctx.save_every, log_every=ctx.log_every,
        )  # fmt: skip
        if ctx.devices.main:
            description = {"net": net, "methods": {}, "classes": list(ctx.source.classes), "bf16": bf16}
            write_json(ctx.out / MODEL, description)
            save_weights(model, weights)
    ctx.devices.wait()
    if ctx.devices.main:
        (ctx.out / "last.ckpt").unlink(missing_ok=True)


def check_integrate(source: Source, stage: Stage) -> None:
    """Build the network once, before anything runs. Raises UserError if it cannot be built."""
    build_objective(stage.settings["net"], {}, len(source.classes), stage.settings["bf16"])
