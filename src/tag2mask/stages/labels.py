"""Stage: soft maps -> index masks, by a background score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch

from tag2mask import progress
from tag2mask.data.maps import map_path, read_maps
from tag2mask.export import write_mask
from tag2mask.ops.cams import to_mask
from tag2mask.schema import Input
from tag2mask.stages.background import Background, settled
from tag2mask.stages.context import Context

MASKS = ("labels", "crf")  # the kinds of stages that make masks of the train images


def labels(
    ctx: Context,
    *,
    of: Annotated[Path, Input(("cams", "clip_es", "pacam", "attention", "amn_maps", "walk"))],
    background: Background,
) -> None:
    """Pseudo-masks: at every pixel the largest of the background score and the maps of the tagged classes.

    of: the soft maps. background: the background score, or how it is chosen.
    """
    background = settled(ctx, of, background)
    samples = ctx.source.split("train")
    mine = ctx.devices.share(len(samples))
    for index in progress.track(mine, "labels", len(mine), show=ctx.devices.main):
        path = mask_path(ctx.out, samples.names[index])
        if not path.exists():
            stored = read_maps(map_path(of, samples.names[index]))
            maps = stored.full()
            write_mask(path, to_mask(maps, torch.from_numpy(stored.classes), background(maps)).numpy())


def mask_path(folder: Path, name: str) -> Path:
    """The file of the mask of an image."""
    return folder / "masks" / f"{name}.png"
