"""What every data set looks like from inside: classes, splits of named images, tags, optional masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Image: TypeAlias = NDArray[np.uint8]  # [H W 3] RGB, EXIF rotation applied
Mask: TypeAlias = NDArray[np.uint8]  # [H W] 0 background, 1..K classes, 255 ignore
Split: TypeAlias = Literal["train", "score", "test"]

IGNORE = 255


@dataclass(frozen=True)
class Samples:
    """One split of a data set. Nothing is read before `image(i)` or `mask(i)` is called.

    `names` are unique relative paths without ending ("a/0001"): output files are called after them.
    `tags` is [N K] of 0/1. `image(i)` gives [H W 3] RGB uint8. `mask(i)` gives [H W] uint8 with values
    0 (background), 1..K in class order and 255 (ignore); it exists only where `has_masks`.
    `side` holds further maps by name (e.g. "saliency"), each `f(i)` giving [H W] float32 in 0..1.
    `files` are the files of the images; None where they are drawn.
    """

    names: Sequence[str]
    tags: NDArray[np.uint8]
    image: Callable[[int], Image]
    mask: Callable[[int], Mask] | None = None
    side: dict[str, Callable[[int], NDArray[np.float32]]] = field(default_factory=dict)
    files: Sequence[Path] | None = None

    @property
    def has_masks(self) -> bool:
        """Whether there is truth to compare with."""
        return self.mask is not None

    def __len__(self) -> int:
        return len(self.names)


class Source(Protocol):
    """A data set: the built-in scenes, a folder with tags, VOC, COCO.

    Splits: "train" is trained on; "score" is where maps and masks made from tags are measured (often a
    part of train with careful masks); "test" is where the segmenter is measured. `fingerprint` changes
    whenever an image, a mask or a tag does, and is part of every stage's key.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K foreground classes, in the order of every class axis."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever an image, a mask, a tag or a split does; part of every stage's key."""
        ...

    def split(self, name: Split) -> Samples:
        """The samples of one split, in a fixed order."""
        ...


class CheckedSource(Source, Protocol):
    """A source that can look itself over before any training."""

    def check(self, cache: Path | None = None, show: bool = True) -> None:
        """Raises UserError with all faults of the data in one report. `cache` remembers what was verified."""
        ...

    def summary(self) -> dict[str, Any]:
        """What there is, JSON-able: images, positives per class, splits, sizes."""
        ...
