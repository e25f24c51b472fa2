"""A finished run on built-in scenes whose maps are blurred truth, so that nothing has to be trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tag2mask import schema
from tag2mask.data.maps import Maps, map_path, map_size, write_maps
from tag2mask.engine import Devices
from tag2mask.ops.cams import resize
from tag2mask.pipeline import execute
from tag2mask.recipe import load
from tag2mask.runner import Run, remember
from tag2mask.stages import STAGES, Context

RECIPE = """
title: Scenes to review
data: {name: scenes, images: 12, test: 2, size: 48}
stages:
  classify:
    do: classify
    net: {name: cam, backbone: {name: test_resnet, weights: null, output_stride: 16}}
    train: {epochs: 1, batch: 4, optimizer: adamw, lr: 0.001, lr_new: 1}
    augment: {crop: 32, long: [32, 48]}
  cams: {do: cams, of: classify, scales: [1.0]}
  plain: {do: labels, of: cams, background: {score: 0.5}}
  masks: {do: crf, of: cams, background: {score: 0.3}, preset: deeplab, steps: 2}
"""


def make_work(root: Path) -> Path:
    """The work folder: the classifier is left out, the maps are drawn, the masks are made by their stages."""
    recipe = root / "scenes.yaml"
    recipe.write_text(RECIPE)
    loaded = load(recipe)
    source, work = loaded.source(), root / "work"
    run = Run(loaded, source, loaded.plan(source.fingerprint), work)

    def one(stage, folder, inputs):
        if stage.kind == "cams":
            draw_maps(source.split("train"), folder)
        elif stage.kind != "classify":
            context = Context(folder, source, Devices("cpu"), workers=0)
            schema.make(STAGES[stage.kind].function, stage.settings, ctx=context, **inputs)
        return {"device": "cpu", "peak_mb": 0.0, "versions": {}}

    execute(run.stages, work, one, say=lambda text: None)
    remember(run)
    return work


def draw_maps(samples, folder: Path) -> None:
    """Maps in 0..1 of the tagged classes: the truth, coarse and uneven."""
    for index, name in enumerate(samples.names):
        noise = np.random.default_rng(index)
        mask, classes = samples.mask(index), np.flatnonzero(samples.tags[index])
        size = map_size(mask.shape)
        truth = torch.tensor(np.stack([mask == k + 1 for k in classes]) if len(classes) else np.zeros((0, *mask.shape)))
        maps = resize(truth.float()[None], size)[0] if len(classes) else torch.zeros(0, *size)
        uneven = (maps * 0.8 + 0.2 * torch.from_numpy(noise.random(maps.shape)).float()).clamp(0, 1)
        logits = noise.normal(2, 1, samples.tags.shape[1]).astype(np.float32)
        write_maps(map_path(folder, name), Maps(classes, uneven.half().numpy(), mask.shape, logits))
