"""Objects of a mask: the connected parts of each class.

Tags say nothing of how many there are. Two sheep that touch are one object, one sheep behind a fence is several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tag2mask.data.source import IGNORE, Mask


@dataclass(frozen=True)
class Component:
    """One object: its class 1..K, its pixels [h w] bool, and where their corner lies in the image (x, y)."""

    label: int
    pixels: NDArray[np.bool_]
    corner: tuple[int, int]


def components(mask: Mask) -> Iterator[Component]:
    """The connected parts (8 neighbours) of every class of a mask [H W], by class and from the top.

    Background (0) and ignored pixels (255) belong to no object.
    """
    for label in np.unique(mask).tolist():
        if label in (0, IGNORE):
            continue
        numbered, _ = ndimage.label(mask == label, structure=np.ones((3, 3), dtype=int))
        for number, box in enumerate(ndimage.find_objects(numbered), start=1):
            yield Component(label, numbered[box] == number, (box[1].start, box[0].start))


def numbered_objects(mask: Mask, most: int) -> NDArray[np.intp]:
    """[H W] of 1, 2, ... for the objects of a mask, 0 where there is none.

    A mask of more than `most` objects has too many numbers for some formats: the largest keep their own, and the rest
    of each class shares one. `most` must be at least the number of classes in the mask.
    """
    found = list(components(mask))
    own = set(range(len(found)))
    if len(found) > most:
        classes = len({one.label for one in found})
        by_size = sorted(own, key=lambda index: int(found[index].pixels.sum()), reverse=True)
        own = set(by_size[: most - classes])
    numbers = np.zeros(mask.shape, dtype=np.intp)
    shared: dict[int, int] = {}
    count = 0
    for index, one in enumerate(found):
        if index in own or one.label not in shared:
            count += 1
        number = count if index in own else shared.setdefault(one.label, count)
        (x, y), (height, width) = one.corner, one.pixels.shape
        numbers[y : y + height, x : x + width][one.pixels] = number
    return numbers
