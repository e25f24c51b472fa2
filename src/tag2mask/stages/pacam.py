"""Stage: the maps of CLIP-ES made better by context prototypes of CLIP's own features; nothing is trained (CPAL)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from tag2mask.backbones.clip import CLIP, CLIPSettings, load_clip
from tag2mask.data.augment import pixels_of
from tag2mask.data.maps import Maps, map_path, read_maps, write_maps
from tag2mask.data.source import Samples, Source
from tag2mask.pipeline import MANIFEST, Stage, read_json
from tag2mask.refine.pacam import ContextPrototypes, cluster, fuse, in_the_bank, instances
from tag2mask.refine.pacam import pacam as prototype_aware
from tag2mask.schema import Input, make
from tag2mask.stages.classify import save_tensors
from tag2mask.stages.context import BatchSize, Context, images_to_do

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
BANK, INSTANCES = "contexts.safetensors", "instances"


def pacam(
    ctx: Context,
    *,
    of: Annotated[Path, Input(("clip_es",))],
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.1,
    bank: Positive = 1000,
    prototypes: Positive = 50,
    neighbours: Positive = 20,
    gamma: Annotated[float, Field(gt=0)] | None = None,
    share: Share = 0.5,
    batch: BatchSize = 4,
) -> None:
    """Maps of CLIP-ES, fused with maps of where CLIP sees what it sees in other images of the tag (CPAL, untrained).

    of: maps of clip_es; its network is used. threshold: of a map, above which a place shows the class. bank: images per
    class whose prototypes are clustered. prototypes: clusters per class. neighbours: of these, how many are compared
    with an image. gamma: how alike their weights are; null takes what suits the features. share: of the new map in the
    mean; 0 keeps the old one, 1 the new one. batch: images of the same size that go through the network together.
    """
    given = read_json(of / MANIFEST)["settings"]
    net = load_clip(make(CLIPSettings, given["clip"])).to(ctx.devices.device)
    samples = ctx.source.split("train")
    file = ctx.out / BANK
    if not file.exists():
        chosen = in_the_bank(samples.tags, bank)
        _write_instances(ctx, net, given["longest"], samples, chosen, of=of, threshold=threshold, batch=batch)
        ctx.devices.wait()
        if ctx.devices.main:
            made = _cluster(ctx.out, samples, chosen, prototypes)
            save_tensors(vars(made), file)
    ctx.devices.wait()
    if ctx.devices.main:
        shutil.rmtree(ctx.out / INSTANCES, ignore_errors=True)  # the bank is all that is needed of them
    known = ContextPrototypes(**{name: x.to(ctx.devices.device) for name, x in load_file(file).items()})

    outputs = [map_path(ctx.out, name) for name in samples.names]
    for indices, images in images_to_do("pacam", samples.image, outputs, ctx.devices, workers=ctx.workers, batch=batch):
        stored = [read_maps(map_path(of, samples.names[index])) for index in indices]
        maps = _dense(stored, len(ctx.source.classes)).to(images.device)
        features = patch_features(net, images, given["longest"])
        aware, part = prototype_aware(features, maps, known, threshold=threshold, neighbours=neighbours, gamma=gamma)
        for index, old, new in zip(indices, stored, fuse(maps, aware, part, share).half().cpu().numpy(), strict=True):
            write_maps(outputs[index], Maps(old.classes, new[old.classes], old.size, old.logits))


def check_pacam(source: Source, stage: Stage) -> None:
    """Load the network of the maps, before anything runs. Raises UserError if it cannot be had."""
    load_clip(make(CLIPSettings, stage.inputs["of"].settings["clip"]))


@torch.no_grad()
def patch_features(net: CLIP, images: Tensor, longest: int | None) -> Tensor:
    """What the patches of normalised images [B 3 H W] say, in the space of the texts: [B D h w]."""
    grid = net.grid((images.shape[-2], images.shape[-1]), longest)
    entering, _ = net.before_last(net.tokens(pixels_of(images).movedim(-1, 1) / 255, grid), keep=0)
    patches = net.patches(net.last(entering, net.enter(entering))[0])
    return patches.mT.reshape(len(images), -1, *grid)


def _write_instances(
    ctx: Context, net: CLIP, longest: int | None, samples: Samples, chosen: NDArray[np.bool_], *,
    of: Path, threshold: float, batch: int,
) -> None:  # fmt: skip
    """One file with the instance prototypes of each image that is in the bank."""
    places = np.flatnonzero(chosen.any(axis=1)).tolist()
    names = [samples.names[place] for place in places]
    outputs = [_instance_path(ctx.out, name) for name in names]
    for numbers, images in images_to_do(
        "prototypes", lambda number: samples.image(places[number]), outputs, ctx.devices,
        workers=ctx.workers, batch=batch,
    ):  # fmt: skip
        stored = [read_maps(map_path(of, names[number])) for number in numbers]
        maps = _dense(stored, len(ctx.source.classes)).to(images.device)
        found = instances(patch_features(net, images, longest), maps, threshold)
        for number, own, rows, exist, mean in zip(numbers, stored, *(x.cpu() for x in found), strict=True):
            outputs[number].parent.mkdir(parents=True, exist_ok=True)
            save_tensors({"rows": rows[own.classes], "exist": exist[own.classes], "mean": mean}, outputs[number])


def _cluster(out: Path, samples: Samples, chosen: NDArray[np.bool_], prototypes: int) -> ContextPrototypes:
    """The context prototypes of what `_write_instances` wrote."""
    rows: list[list[Tensor]] = [[] for _ in range(chosen.shape[1])]
    means = []
    for place in np.flatnonzero(chosen.any(axis=1)).tolist():
        own = load_file(_instance_path(out, samples.names[place]))
        means.append(own["mean"])
        for number, n in enumerate(np.flatnonzero(samples.tags[place]).tolist()):
            if chosen[place, n] and own["exist"][number]:
                rows[n].append(own["rows"][number])
    mean = torch.stack(means).mean(dim=0)
    points = torch.zeros(len(rows), max(map(len, rows)), len(mean))
    present = torch.zeros(points.shape[:2], dtype=torch.bool)
    for n, given in enumerate(rows):
        present[n, : len(given)] = True
        points[n, : len(given)] = torch.stack(given) if given else 0
    return cluster(points, present, mean, prototypes)


def _instance_path(out: Path, name: str) -> Path:
    return out / INSTANCES / f"{name}.safetensors"


def _dense(stored: list[Maps], classes: int) -> Tensor:
    """Maps [B K h w] of images of one size, zero where a class is not tagged."""
    height, width = stored[0].maps.shape[-2:]
    maps = torch.zeros(len(stored), classes, height, width)
    for own, given in zip(maps, stored, strict=True):
        own[torch.from_numpy(given.classes)] = torch.from_numpy(given.maps).float()
    return maps
