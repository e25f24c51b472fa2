"""Stage: train a network on tags. Also how its folder is read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tag2mask.baselines import BASELINES
from tag2mask.core import Baseline, Method, Objective, inference_state, load_inference_state
from tag2mask.data.augment import Augment, Crops, collate
from tag2mask.data.source import Source
from tag2mask.engine import Training, fit
from tag2mask.errors import UserError
from tag2mask.methods import METHODS
from tag2mask.ops.seed import seed_of
from tag2mask.pipeline import Stage, read_json, write_json
from tag2mask.schema import ManyOf, OneOf, Settings, make
from tag2mask.stages.context import Context

MODEL, WEIGHTS, MEMORY = "model.json", "model.safetensors", "memory.safetensors"


def classify(
    ctx: Context,
    *,
    net: Annotated[Settings, OneOf(BASELINES)],
    train: Training,
    methods: Annotated[Settings | None, ManyOf(METHODS)] = None,
    augment: Augment = Augment(),  # noqa: B008  (frozen)
    bf16: bool = False,
) -> None:
    """Train a baseline with any methods on the tags of the train split.

    net: the baseline and its settings. methods: what is added to it. train: how long and how fast. augment: what is
    done to the images. bf16: forward passes in bfloat16, losses in float32.
    """
    weights = ctx.out / WEIGHTS
    if not weights.exists():
        torch.manual_seed(seed_of(train.seed))
        objective = build_objective(net, methods or {}, len(ctx.source.classes), bf16)
        samples = ctx.source.split("train")
        objective.remember(torch.from_numpy(samples.tags))
        crops = Crops(samples, augment, seed=train.seed, side=objective.net.needs)
        fit(
            objective, crops, collate, train, ctx.out, ctx.devices,
            label="classify", workers=ctx.workers, save_every=ctx.save_every, log_every=ctx.log_every,
        )  # fmt: skip
        if ctx.devices.main:
            description = {"net": net, "methods": methods or {}, "classes": list(ctx.source.classes), "bf16": bf16}
            write_json(ctx.out / MODEL, description)
            if memory := objective.net.export_memory():
                save_tensors(memory, ctx.out / MEMORY)
            save_weights(objective, weights)
    ctx.devices.wait()
    if ctx.devices.main:
        (ctx.out / "last.ckpt").unlink(missing_ok=True)


def check_classifier(source: Source, stage: Stage) -> None:
    """Build the network once, before anything runs. Raises UserError if it cannot be built or lacks a side input."""
    net = stage.settings["net"]
    objective = build_objective(net, stage.settings["methods"], len(source.classes), stage.settings["bf16"])
    missing = sorted(objective.net.needs - source.split("train").side.keys())
    if missing:
        raise UserError(f"net: {net['name']} needs {', '.join(missing)} maps; give data.{missing[0]}")


def load_classifier(folder: Path) -> Objective:
    """The trained objective of a classify stage, in evaluation mode on the CPU."""
    model = read_json(folder / MODEL)
    objective = build_objective(without_weights(model["net"]), model["methods"], len(model["classes"]), model["bf16"])
    load_inference_state(objective, load_file(folder / WEIGHTS))
    return objective.eval()


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write the parameters and buffers that inference needs as safetensors, whole or not at all."""
    save_tensors(inference_state(model), path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, whole or not at all."""
    part = path.with_suffix(".part")
    save_file({name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}, part)
    part.replace(path)


def without_weights(settings: Settings) -> Settings:
    """Settings of a network whose weights will be read from a checkpoint: nothing is downloaded again."""
    return settings | {"backbone": settings["backbone"] | {"weights": None}}


def build_objective(net: Settings, methods: Settings, num_classes: int, bf16: bool) -> Objective:
    """The baseline and the methods of checked settings, with initial weights."""
    baseline: Baseline = make(BASELINES[net["name"]], net, num_classes=num_classes)
    parts: dict[str, Method] = {name: make(METHODS[name], settings) for name, settings in methods.items()}
    return Objective(baseline, parts, num_classes=num_classes, bf16=bf16)
