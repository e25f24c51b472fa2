"""Stage: the segmenter that a few true masks buy, to set beside the one that was trained on tags alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tag2mask.data.augment import Augment
from tag2mask.data.source import Image, Mask, Samples, Source
from tag2mask.engine import Training
from tag2mask.errors import UserError
from tag2mask.pipeline import Stage
from tag2mask.schema import OneOf, Settings
from tag2mask.segment import SEGMENTERS
from tag2mask.stages.context import Context, Scales
from tag2mask.stages.segment import check_segmenter, train_segmenter


def few_masks(
    ctx: Context,
    *,
    count: Annotated[int, Field(ge=1)],
    net: Annotated[Settings, OneOf(SEGMENTERS)],
    train: Training,
    augment: Augment = Augment(),  # noqa: B008  (frozen)
    scales: Scales = (0.75, 1.0, 1.25),
    flip: bool = True,
    bf16: bool = False,
) -> None:
    """Train a segmenter on `count` true masks of the score split; nothing else is learnt from, no tag and no soft map.

    count: how many masks; a larger count keeps the images of a smaller one. The rest is as in segment, and the number
    of steps is that of segment, too: epochs count passes over the train split, not over the few images.
    """
    samples = ctx.source.split("score")
    assert samples.mask is not None
    few = chosen(samples.tags, count, train.seed)
    steps = train.total_steps(len(ctx.source.split("train")))
    part = Samples(
        names=[samples.names[i] for i in few], tags=samples.tags[few], image=partial(_image, samples.image, few)
    )
    target = partial(_mask, samples.mask, few)
    train_segmenter(
        ctx, part, target, net=net, train=replace(train, epochs=None, steps=steps), augment=augment, scales=scales,
        flip=flip, bf16=bf16,
    )  # fmt: skip


def check_few_masks(source: Source, stage: Stage) -> None:
    """As for segment; and there must be enough masks. Raises UserError if not."""
    check_segmenter(source, stage)
    samples, count = source.split("score"), stage.settings["count"]
    if samples.mask is None:
        raise UserError("few_masks needs true masks of the score split; give data.masks")
    if count > len(samples):
        raise UserError(f"count: {count}, but the score split has {len(samples)} images with a mask; ask for fewer")
    both = set(samples.names) & set(source.split("test").names)
    if both:
        raise UserError(f"few_masks would train on {min(both)}, which is tested on; correct data.score or data.test")


def chosen(tags: NDArray[np.uint8], count: int, seed: int) -> list[int]:
    """Places of `count` images that a person might draw masks of: at random, the class with the fewest so far next.

    tags [N K] of 0/1. Images without a tag come last. `chosen(tags, n + 1, seed)` starts with `chosen(tags, n, seed)`.
    """
    left = np.random.default_rng(seed).permutation(len(tags)).tolist()
    found: list[int] = []
    while len(found) < min(count, len(tags)):
        had = tags[found].sum(axis=0)
        there = tags[left].any(axis=0)
        place = left[0]
        if there.any():
            wanted = int(np.argmin(np.where(there, had, len(tags) + 1)))
            place = next(i for i in left if tags[i, wanted])
        left.remove(place)
        found.append(place)
    return found


# Functions of the module, so that they can be sent to the worker processes of a loader.


def _image(image: Callable[[int], Image], few: list[int], index: int) -> Image:
    return image(few[index])


def _mask(mask: Callable[[int], Mask], few: list[int], index: int) -> Mask:
    return mask(few[index])
