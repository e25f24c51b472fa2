"""Stage: soft maps of the tagged classes, over several scales and mirror images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tag2mask.core import Objective
from tag2mask.data.maps import Maps, map_path, map_size, write_maps
from tag2mask.ops.cams import max_norm, resize
from tag2mask.schema import Input
from tag2mask.stages.classify import load_classifier
from tag2mask.stages.context import BatchSize, Context, Scales, images_to_do


def cams(
    ctx: Context,
    *,
    of: Annotated[Path, Input(("classify", "integrate"))],
    scales: Scales = (0.5, 1.0, 1.5, 2.0),
    flip: bool = True,
    batch: BatchSize = 4,
) -> None:
    """Maps of every train image, of its tagged classes only: half precision, a quarter of the size, values 0..1.

    of: the classifier. scales: factors on the image's size. flip: also look at the mirror image. batch: images of the
    same size that go through the network together.
    """
    samples = ctx.source.split("train")
    objective = load_classifier(of).to(ctx.devices.device)
    outputs = [map_path(ctx.out, name) for name in samples.names]
    tags = torch.from_numpy(samples.tags)
    for indices, images in images_to_do("cams", samples.image, outputs, ctx.devices, workers=ctx.workers, batch=batch):
        maps, logits = multi_scale(objective, images, tags[indices], scales=scales, flip=flip)
        size = int(images.shape[-2]), int(images.shape[-1])
        for index, own, scores in zip(indices, maps, logits.cpu().numpy(), strict=True):
            classes = np.flatnonzero(samples.tags[index]).astype(np.int64)
            write_maps(outputs[index], Maps(classes, own.numpy(), size, scores))


@torch.no_grad()
def multi_scale(
    objective: Objective, images: Tensor, tags: Tensor, *, scales: Sequence[float], flip: bool
) -> tuple[list[Tensor], Tensor]:
    """Maps of the tagged classes of images of one size, and their logits at scale 1 (or the scale nearest to it).

    images [B 3 H W] on the device; tags [B K] on the CPU. Per scale: ReLU, mirror images averaged, resized to the
    map size; then summed over scales and divided by the maximum of each map (IRN's recipe). Everything is
    accumulated on the device for the tagged (image, class) pairs alone and leaves it once, as float16.
    Returns ([P_b h w] for each image, logits [B K]).
    """
    count, (height, width) = len(images), images.shape[-2:]
    image_of, class_of = tags.nonzero(as_tuple=True)  # on the CPU: no sync
    on_device = tags.to(images.device, torch.float32)
    target = map_size((height, width))
    total = images.new_zeros((len(image_of), 1, *target))
    logits, nearest = images.new_zeros(tags.shape), min(scales, key=lambda s: abs(s - 1))
    for scale in scales:
        size = max(32, round(height * scale)), max(32, round(width * scale))
        scaled = images
        if size != (height, width):
            scaled = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        if flip:
            scaled = torch.cat([scaled, scaled.flip(-1)])
        found, scores = objective.infer(scaled, on_device.repeat(1 + flip, 1))
        pairs = found[image_of, class_of].relu()
        if flip:
            pairs = (pairs + found[image_of + count, class_of].flip(-1).relu()) / 2
        total += resize(pairs[:, None], target)
        if scale == nearest:
            logits = scores.view(1 + flip, count, -1).mean(dim=0)
    halves = max_norm(total[:, 0]).half().cpu()
    return list(halves.split(tags.sum(dim=1).tolist())), logits
