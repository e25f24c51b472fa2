"""A data set in folders: images, a tag file or tag folders, and, where there are any, masks and saliency maps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tag2mask.data.audit import (
    audit_agreement,
    audit_cells,
    audit_counts,
    audit_images,
    audit_masks,
    audit_names,
    rows_of_images,
)
from tag2mask.data.faults import Faults, Kind
from tag2mask.data.images import read_grey, read_image, read_mask
from tag2mask.data.layout import lay_out
from tag2mask.data.source import IGNORE, Image, Mask, Samples, Split
from tag2mask.data.tag_formats import name_tags, read_any
from tag2mask.data.verify import Facts, File, Role, verify
from tag2mask.errors import UserError


class Folder:
    """Somebody's own images with tags.

    images    folder of images, with sub-folders or without. An image's name is its path in there without ending.
    tags      tag file, or folder of such, in any form that `data.tag_formats.read_any` knows. It may write names with
              ending or without, with the folders in front or without, as long as each means one image only. None: the
              first sub-folder is the tag; one that is called "background" holds images without any; or the names end
              with 0 or 1 for each of `classes`, "x[1 0 0 1].png".
    masks     folder of index masks (0 background, 1..K classes in order, 255 ignore) under the names of the images.
    list      text file, one name a line: train on these. Then only images on lists need tags, and rows of other
              images do not matter. None: all images but those in `test`.
    score     text file: measure maps and pseudo-masks on these. None: the training images that have a mask, or all
              training images if none has.
    test      text file: measure the segmenter on these. Either each has a row of tags, or none has and their tags are
              taken from their masks. None: the test split is empty, and there will be no test numbers.
    classes   names of the classes in the order of their mask values 1..K; tags must not use others. None: the columns
              of a one-hot table in their order, otherwise all tags sorted.
    saliency  folder of grey maps under the names of the images; each training image needs one.

    Making a Folder lists files and reads tags, no image. `check` looks for every fault there is and decodes each file
    once. `split`, `summary` and `fingerprint` rely on that and run it themselves, silently, if nobody has: call
    `check` first to see its progress and to give it a cache.
    A split has masks or saliency maps if every one of its images has one.
    Raises UserError where a folder or a file is missing or is no such thing.
    """

    def __init__(
        self,
        *,
        images: str,
        tags: str | None = None,
        masks: str | None = None,
        list: str | None = None,
        score: str | None = None,
        test: str | None = None,
        classes: list[str] | None = None,
        saliency: str | None = None,
    ) -> None:
        self._where = f"{images} with {tags}" if tags else images
        self._faults = Faults()
        self._facts: Mapping[File, Facts] | None = None
        self._layout = lay_out(images, masks, saliency, list, score, test, self._faults)
        names = sorted(self._layout.finder.names)
        given = None if classes is None else _checked(classes)
        table = read_any(Path(tags).expanduser(), given) if tags else name_tags(names, given, images)
        used = self._layout.used
        self._rows = rows_of_images(table, self._layout.finder, used, strict=list is None, faults=self._faults)
        table = replace(table, rows=tuple(self._rows.values()))
        self.classes = given or table.classes
        self._notes, self._derived = table.notes, table.derived
        if len(self.classes) >= IGNORE:
            raise UserError(f"{self._where}: {len(self.classes)} classes, but a mask has room for {IGNORE - 1}.")

        tested = self._layout.splits["test"]
        self._test_from_masks = masks is not None and not any(name in self._rows for name in tested)
        excused = set(tested) if self._test_from_masks else set()
        missing = [name for name in used if name not in self._rows and name not in excused]
        self._faults.add(Kind.NO_TAGS if tags else Kind.NO_FOLDER, missing)
        reported = audit_cells(table, self._faults) | audit_names(table, classes, self._faults)
        train = [self._rows[name] for name in self._layout.splits["train"] if name in self._rows]
        if train:
            audit_counts(train, self.classes, reported, self._faults)

    def check(self, cache: Path | None = None, show: bool = True) -> None:
        """Looks for all faults and raises one UserError that lists them by kind, or returns.

        Every image, mask and map is decoded, several at a time; `show` a progress bar. What is found is kept in the
        JSON file `cache`, and a file whose size and modification time are still those in there is not opened again.
        """
        facts, broken = verify(self._layout.files, cache, show)
        faults = self._faults.copy()
        audit_images(self._layout, facts, broken, faults)
        audit_masks(self._layout, len(self.classes), facts, broken, faults)
        if not faults.has(Kind.UNKNOWN_CLASS, Kind.MISSPELT, Kind.BACKGROUND, Kind.BAD_CELL, Kind.BAD_TAGS):
            audit_agreement(self._layout, self.classes, self._rows, facts, faults)
        faults.stop(self._where)
        self._facts = facts

    @cached_property
    def fingerprint(self) -> str:
        """Hash of classes, splits, names, tags and the bytes of all files; not of where they lie."""
        layout, facts = self._layout, self._checked_facts()
        roles: tuple[tuple[Role, Mapping[str, Path]], ...] = (
            ("image", layout.images),
            ("mask", layout.masks),
            ("map", layout.maps),
        )
        content = {
            "classes": self.classes,
            "splits": {
                split: [*zip(names, self._tags(split).tolist(), strict=True)] for split, names in layout.splits.items()
            },
            "files": {
                role: {name: facts[(role, path)].digest for name, path in files.items()} for role, files in roles
            },
        }
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def split(self, name: Split) -> Samples:
        """The images of a split in the order of their list, or by name if there is none."""
        layout, facts = self._layout, self._checked_facts()
        names = layout.splits[name]
        images = tuple(layout.images[name] for name in names)
        mask = None
        side: dict[str, Callable[[int], NDArray[np.float32]]] = {}
        if layout.all_in(name, layout.masks):
            mask = partial(_mask, tuple(layout.masks[name] for name in names), len(self.classes))
        if layout.all_in(name, layout.maps):
            sizes = tuple((facts[("image", path)].height, facts[("image", path)].width) for path in images)
            side["saliency"] = partial(_map, tuple(layout.maps[name] for name in names), sizes)
        return Samples(names, self._tags(name), partial(_image, images), mask, side, images)

    def summary(self) -> dict[str, Any]:
        """What is in the data set, as plain numbers for JSON: images, positives by class and split, images without
        any tag, masks, the spread of image sizes in pixels, and, where there are any, files in the folder that are no
        image to us, by ending, notes on how the tags were read, and what the tags were derived from.
        """
        layout, facts = self._layout, self._checked_facts()
        tags = {split: self._tags(split) for split in layout.splits}
        pictures = [facts[("image", path)] for path in layout.images.values()]
        more: dict[str, Any] = {"files_not_read": dict(layout.unread)} if layout.unread else {}
        more |= {"notes": "; ".join(self._notes)} if self._notes else {}
        more |= {"tags_derived_from": self._derived} if self._derived else {}
        return {
            "images": len(pictures),
            "splits": {split: len(names) for split, names in layout.splits.items()},
            "classes": {
                name: {split: int(column[:, k].sum()) for split, column in tags.items()}
                for k, name in enumerate(self.classes)
            },
            "negatives": {split: int((column.sum(axis=1) == 0).sum()) for split, column in tags.items()},
            "masks": {split: sum(name in layout.masks for name in names) for split, names in layout.splits.items()},
            "width": _spread([picture.width for picture in pictures]),
            "height": _spread([picture.height for picture in pictures]),
            **more,
        }

    def _checked_facts(self) -> Mapping[File, Facts]:
        if self._facts is None:
            self.check(show=False)
        assert self._facts is not None
        return self._facts

    def _tags(self, split: Split) -> NDArray[np.uint8]:
        """[N K] of 0/1, after the check."""
        names = self._layout.splits[split]
        tags = np.zeros((len(names), len(self.classes)), dtype=np.uint8)
        for i, name in enumerate(names):
            if split == "test" and self._test_from_masks:
                present = self._checked_facts()[("mask", self._layout.masks[name])].values
                tags[i, [value - 1 for value in present if 0 < value < IGNORE]] = 1
            else:
                tags[i, [self.classes.index(tag) for tag in self._rows[name].tags]] = 1
        return tags


def _checked(classes: Sequence[str]) -> tuple[str, ...]:
    """The user's own list of classes."""
    names = tuple(name.strip() for name in classes)
    if not names or "" in names or len(set(names)) < len(names):
        raise UserError(f"classes: {list(names)} must name each class once, and at least one.")
    return names


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


# Readers of a split are functions of the module, so that they can be sent to the worker processes of a loader.


def _image(paths: Sequence[Path], index: int) -> Image:
    return read_image(paths[index])


def _mask(paths: Sequence[Path], num_classes: int, index: int) -> Mask:
    return read_mask(paths[index], num_classes)


def _map(paths: Sequence[Path], sizes: Sequence[tuple[int, int]], index: int) -> NDArray[np.float32]:
    return read_grey(paths[index], *sizes[index])
