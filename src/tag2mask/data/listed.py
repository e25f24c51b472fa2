"""A data set whose splits are lists of names: what the views of VOC and COCO have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tag2mask.data.images import mask_remedy, read_grey, read_image, read_mask, wrong_values
from tag2mask.data.source import Image, Mask, Samples, Split
from tag2mask.data.verify import Facts, File, Role, verify
from tag2mask.errors import UserError


class Listed:
    """Lists of names with the files and tags behind them.

    where     what to call the data set in a message, such as its folder
    remedy    what to do if a file is missing or damaged, as half a sentence
    classes   names of the K classes; a mask holds their places 1..K
    splits    the names of each split, in order
    tags      name -> the classes of the image, counted from 0
    images    name -> file, for every name of every split
    masks     name -> file; a split has masks if each of its images has one
    saliency  name -> file; as masks

    Nothing is decoded before `check`; `split`, `summary` and `fingerprint` run it silently if nobody has.
    """

    def __init__(
        self,
        *,
        where: str,
        remedy: str,
        classes: tuple[str, ...],
        splits: Mapping[Split, Sequence[str]],
        tags: Mapping[str, Sequence[int]],
        images: Mapping[str, Path],
        masks: Mapping[str, Path],
        saliency: Mapping[str, Path],
    ) -> None:
        self._where, self._remedy = where, remedy
        self.classes = classes
        self._splits, self._tags = splits, tags
        self._images, self._masks, self._saliency = images, masks, saliency
        self._facts: Mapping[File, Facts] | None = None
        if not splits["train"]:
            raise UserError(f"{where}: the list to train on is empty; give one with names in it")
        trained = set(splits["train"])
        strangers = [name for name in splits["score"] if name not in trained]
        if strangers:
            raise UserError(
                f"{where}: {_of(strangers, splits['score'])} images of the score list are not in the train list, the "
                f"first is {strangers[0]}; masks are made from tags for the train list only, so score on a part of it"
            )
        leaked = [name for name in splits["test"] if name in trained]
        if leaked:
            raise UserError(
                f"{where}: {_of(leaked, splits['test'])} images of the test list are in the train list too, the first "
                f"is {leaked[0]}; take them off one, such a test would flatter"
            )

    def check(self, cache: Path | None = None, show: bool = True) -> None:
        """Decode every file once; see `data.verify`. Raises UserError with one line that names the first fault."""
        facts, broken = verify(self._files, cache, show)
        if broken:
            (_, path), reason = next(iter(broken.items()))
            raise UserError(
                f"{self._where}: {_of(broken, self._files)} files cannot be read, the first is {path}: {reason}; "
                f"{self._remedy}"
            )
        for name, path in self._masks.items():
            mask, image = facts["mask", path], facts["image", self._images[name]]
            if wrong := wrong_values(mask.values, len(self.classes)):
                raise UserError(f"{path}: {wrong}; {mask_remedy(len(self.classes))}")
            if (mask.height, mask.width) != (image.height, image.width):
                sizes = f"{mask.width} x {mask.height} pixels, but its image has {image.width} x {image.height}"
                raise UserError(f"{path}: has {sizes}; {self._remedy}")
        self._facts = facts

    @cached_property
    def fingerprint(self) -> str:
        """Hash of classes, splits, names, tags and the bytes of all files; not of where they lie."""
        facts = self._checked()
        roles: tuple[tuple[Role, Mapping[str, Path]], ...] = (
            ("image", self._images),
            ("mask", self._masks),
            ("map", self._saliency),
        )
        content = {
            "classes": self.classes,
            "splits": {split: list(names) for split, names in self._splits.items()},
            "tags": {name: list(self._tags[name]) for name in self._images},
            "files": {role: {n: facts[role, path].digest for n, path in files.items()} for role, files in roles},
        }
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def split(self, name: Split) -> Samples:
        """The images of a split in the order of its list."""
        facts, names = self._checked(), self._splits[name]
        images = tuple(self._images[name] for name in names)
        mask = None
        side: dict[str, Callable[[int], NDArray[np.float32]]] = {}
        if _all_in(names, self._masks):
            mask = partial(_mask, tuple(self._masks[name] for name in names), len(self.classes))
        if _all_in(names, self._saliency):
            sizes = tuple((facts["image", path].height, facts["image", path].width) for path in images)
            side["saliency"] = partial(_map, tuple(self._saliency[name] for name in names), sizes)
        return Samples(tuple(names), self._one_hot(names), partial(_image, images), mask, side, images)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON: images, positives by class and split, images without a tag, masks, image sizes."""
        facts = self._checked()
        tags = {split: self._one_hot(names) for split, names in self._splits.items()}
        pictures = [facts["image", path] for path in self._images.values()]
        return {
            "images": len(pictures),
            "splits": {split: len(names) for split, names in self._splits.items()},
            "classes": {
                name: {split: int(column[:, k].sum()) for split, column in tags.items()}
                for k, name in enumerate(self.classes)
            },
            "negatives": {split: int((column.sum(axis=1) == 0).sum()) for split, column in tags.items()},
            "masks": {split: sum(name in self._masks for name in names) for split, names in self._splits.items()},
            "width": _spread([picture.width for picture in pictures]),
            "height": _spread([picture.height for picture in pictures]),
        }

    @property
    def _files(self) -> list[File]:
        return (
            [("image", path) for path in self._images.values()]
            + [("mask", path) for path in self._masks.values()]
            + [("map", path) for path in self._saliency.values()]
        )

    def _checked(self) -> Mapping[File, Facts]:
        if self._facts is None:
            self.check(show=False)
        assert self._facts is not None
        return self._facts

    def _one_hot(self, names: Sequence[str]) -> NDArray[np.uint8]:
        """[N K] of 0/1."""
        tags = np.zeros((len(names), len(self.classes)), dtype=np.uint8)
        for row, name in zip(tags, names, strict=True):
            row[list(self._tags[name])] = 1
        return tags


def _all_in(names: Sequence[str], files: Mapping[str, Path]) -> bool:
    """Whether each name has a file. Not so for an empty split."""
    return bool(names) and all(name in files for name in names)


def _of(some: Sequence[Any] | Mapping[Any, Any], all_: Sequence[Any]) -> str:
    return f"{len(some):,} of {len(all_):,}"


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


# Readers of a split are functions of the module, so that they can be sent to the worker processes of a loader.


def _image(paths: Sequence[Path], index: int) -> Image:
    return read_image(paths[index])


def _mask(paths: Sequence[Path], num_classes: int, index: int) -> Mask:
    return read_mask(paths[index], num_classes)


def _map(paths: Sequence[Path], sizes: Sequence[tuple[int, int]], index: int) -> NDArray[np.float32]:
    return read_grey(paths[index], *sizes[index])
