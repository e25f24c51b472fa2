"""Stage: soft maps of the tagged classes by CLIP and the words for them; nothing is trained (CLIP-ES)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from tag2mask import progress
from tag2mask.backbones.clip import CLIPSettings, load_clip
from tag2mask.baselines.clip_es import BACKGROUND, CLIPES, TEMPLATES, codes
from tag2mask.data.augment import pixels_of
from tag2mask.data.maps import Maps, map_path, map_size, write_maps
from tag2mask.data.source import Source
from tag2mask.errors import UserError
from tag2mask.ops.cams import resize
from tag2mask.pipeline import Stage
from tag2mask.schema import make, meant
from tag2mask.stages.context import BatchSize, Context, images_to_do

Texts = Annotated[tuple[str, ...], Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]


def clip_es(
    ctx: Context,
    *,
    clip: CLIPSettings = CLIPSettings(),  # noqa: B008  (frozen)
    names: dict[str, str] | None = None,
    templates: Texts = TEMPLATES,
    background: Texts = BACKGROUND,
    blocks: Positive = 8,
    box: Annotated[float, Field(ge=0, lt=1)] = 0.4,
    longest: Positive | None = 640,
    batch: BatchSize = 4,
) -> None:
    """Maps like those of `cams`, by CLIP, which was trained on images and their texts and is not trained any further.

    clip: the network. names: other words than its name for a class, {class: words}. templates: sentences around them,
    with {}. background: words for what is no class; they decide much, choose them for your images. blocks: how many of
    the last blocks' attention is averaged. box: share of a map's maximum above which a place gets into a box. longest:
    larger images are made smaller, to this many pixels on the longer side; null keeps them. batch: images of the same
    size that go through the network together.
    """
    samples = ctx.source.split("train")
    if ctx.devices.main and (unknown := codes(words_for(ctx.source.classes, names))):
        progress.say(
            f"warning: CLIP cannot know what is meant by {', '.join(unknown)}; give words that describe them as names"
        )
    net = CLIPES(
        load_clip(clip), words_for(ctx.source.classes, names), templates=templates, background=background,
        blocks=blocks, box=box, longest=longest,
    ).to(ctx.devices.device)  # fmt: skip
    outputs = [map_path(ctx.out, name) for name in samples.names]
    tags = torch.from_numpy(samples.tags)
    for indices, images in images_to_do("clip", samples.image, outputs, ctx.devices, workers=ctx.workers, batch=batch):
        maps, logits = net(pixels_of(images).movedim(-1, 1) / 255, tags[indices])
        size = int(images.shape[-2]), int(images.shape[-1])
        fitted = resize(maps[:, None], map_size(size))[:, 0] if len(maps) else maps.new_zeros(0, *map_size(size))
        own = fitted.half().cpu().split(tags[indices].sum(dim=1).tolist())
        for index, found, scores in zip(indices, own, logits.cpu().numpy(), strict=True):
            classes = np.flatnonzero(samples.tags[index]).astype(np.int64)
            write_maps(outputs[index], Maps(classes, found.numpy(), size, scores))


def check_clip_es(source: Source, stage: Stage) -> None:
    """Load the network and read the words once, before anything runs. Raises UserError if one of them cannot be had."""
    given = stage.settings
    CLIPES(
        load_clip(make(CLIPSettings, given["clip"])), words_for(source.classes, given["names"]),
        templates=given["templates"], background=given["background"], blocks=given["blocks"],
    )  # fmt: skip


def words_for(classes: Sequence[str], names: Mapping[str, str] | None) -> list[str]:
    """The words for every class: those of `names`, else its name. Raises UserError for a class that is not there."""
    given = names or {}
    for name in given:
        if name not in classes:
            raise UserError(f"names: the data has no class {name!r}; {meant(name, dict.fromkeys(classes))}")
    return [given.get(name, name.replace("_", " ")) for name in classes]
