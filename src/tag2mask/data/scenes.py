"""The built-in data set: small drawn scenes with exact masks, and one knob for each trouble of weak supervision.

Foxes, cats, sheep, boats and mushrooms on textured ground, drawn on the fly from (seed, split, index).
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tag2mask.data.scene_drawing import Setup, draw
from tag2mask.data.scene_figures import CLASSES, Knobs
from tag2mask.data.source import Image, Mask, Samples, Split
from tag2mask.errors import UserError

VERSION = 1  # raise it whenever a drawing changes: it is part of the fingerprint


class Scenes:
    """Source of drawn scenes; see `CLASSES`.

    images, test: how many training and test scenes. size: height and width in pixels.
    part: 0, the whole body tells the class; 1, only a small head, sail or cap does, and all bodies look the same.
    context: 0, the ground under an object is independent of its class; 1, boats come with waves, sheep with a meadow,
        mushrooms with fallen leaves, and nothing else does.
    variety: 0, one look per class; 1, three sub-types that differ in hue, pattern and shape.
    alike: 0, fox and cat are easy to tell apart; 1, only a subtle cue tells them apart.

    A scene depends on (size, seed, knobs, split, index) only: more images keep the first ones as they are, and turning
    a knob changes looks but not who stands where. Split "score" is "train": every mask is exact.
    Raises UserError for an argument out of range.
    """

    classes: tuple[str, ...] = CLASSES

    def __init__(
        self,
        *,
        images: int = 300,
        test: int = 100,
        size: int = 112,
        seed: int = 0,
        part: float = 0.6,
        context: float = 0.6,
        variety: float = 0.5,
        alike: float = 0.5,
    ) -> None:
        for key, count, least in (("images", images, 8), ("test", test, 1), ("size", size, 32), ("seed", seed, 0)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise UserError(f"data.{key}: {count!r} does not work; give a whole number of {least} or more")
        knobs = {"part": part, "context": context, "variety": variety, "alike": alike}
        for key, value in knobs.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                raise UserError(f"data.{key}: {value!r} does not work; give a number from 0 to 1")
        self.images, self.test, self.size = images, test, size
        self.setup = Setup(size, seed, Knobs(**{key: float(value) for key, value in knobs.items()}))
        content = json.dumps([VERSION, images, test, self.setup])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]

    def split(self, name: Split) -> Samples:
        """The scenes of a split. Tags are read off the masks, so each scene is drawn once here (under 10 ms each)."""
        part: Split = "test" if name == "test" else "train"
        count = self.test if part == "test" else self.images
        seen = [np.unique(draw(self.setup, part, index).mask) for index in range(count)]
        tags = np.array([np.isin(np.arange(1, len(CLASSES) + 1), values) for values in seen], dtype=np.uint8)
        return Samples(
            names=[f"{part}/{index:04d}" for index in range(count)],
            tags=tags,
            image=partial(_image, self.setup, part),
            mask=partial(_mask, self.setup, part),
            side={"saliency": partial(_saliency, self.setup, part)},
        )

    def check(self, cache: Path | None = None, show: bool = True) -> None:
        """Nothing can be missing or broken here: the arguments were checked when the object was made."""

    def summary(self) -> dict[str, Any]:
        """Counts for the report: images per split, images per class and split, image sizes, images without a class."""
        tags = {name: self.split(name).tags for name in ("train", "test")}
        return {
            "images": self.images + self.test,
            "splits": {"train": self.images, "score": self.images, "test": self.test},
            "classes": {
                label: {name: int(column[:, k].sum()) for name, column in tags.items()}
                for k, label in enumerate(CLASSES)
            },
            "negatives": {name: int((column.sum(axis=1) == 0).sum()) for name, column in tags.items()},
            "sizes": [[self.size, self.size]],
        }


def _image(setup: Setup, split: Split, index: int) -> Image:
    return draw(setup, split, index).image.copy()


def _mask(setup: Setup, split: Split, index: int) -> Mask:
    return draw(setup, split, index).mask.copy()


def _saliency(setup: Setup, split: Split, index: int) -> NDArray[np.float32]:
    return draw(setup, split, index).saliency.astype(np.float32) / np.float32(255.0)
