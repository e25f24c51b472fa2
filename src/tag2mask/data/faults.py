"""Collects what is wrong with a data set and says it all at once, by kind, each with its remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import Enum

from tag2mask.errors import UserError

SHOWN = 5  # offenders named per kind


class Kind(Enum):
    """A kind of fault: its title and its remedy. Reported in this order."""

    UNREADABLE = "images that cannot be read", "replace these files, or remove them with their tags"
    SAME_NAME = (
        "files that differ only in their ending",
        "rename or remove all but one: results are named after the image without its ending and would collide",
    )
    UNLISTED = "listed names without an image", "correct the list, or add the image"
    LEAK = "images in both the training list and the test list", "take them off one: such a test would flatter"
    NOT_TRAINED = (
        "scored images that are not in the training list",
        "add them to the list, or take them off: masks are made from tags for the training images, and scored there; "
        "held-out images go into `test`",
    )
    NO_TAGS = (
        "images without tags",
        "add a row for each; an image that shows none of the classes gets a row with no tag (all cells 0). Or leave "
        "them out: --list names the images to train on, and `tag2mask predict` needs no tags",
    )
    NO_FOLDER = (
        "images outside the tag folders",
        "move each into the sub-folder of its tag; images that show none of the classes go into one named 'background'",
    )
    NO_IMAGE = "tag rows without an image", "correct the name, add the image, or delete the row"
    REPEATED = "images with more than one row", "keep one row for each, with all its tags"
    BAD_CELL = (
        "cells that are not 0 or 1",
        "write 0 or 1 into every cell (an empty cell is not taken for 0) and remove columns that are no class; "
        "a column that holds class names is called 'tags'",
    )
    BAD_TAGS = "tags that cannot be read", "write the names of the classes, separated by ';', or nothing"
    BACKGROUND = (
        "'background' named as a class",
        "remove it: background is whatever no class claims, and needs no tag; an image of nothing but background "
        "gets a row with no tag (all cells 0)",
    )
    UNKNOWN_CLASS = "class names that are not in `classes`", "correct the name, or add it to `classes`"
    MISSPELT = (
        "class names that look misspelt",
        "write each class in one way; where two different classes are meant, list all of them in `classes`",
    )
    RARE = (
        "classes with fewer than two training images",
        "tag more images with the class, or remove its tag everywhere",
    )
    EVERYWHERE = (
        "classes present in every training image",
        "add images without the class (images with no tag at all are fine): "
        "without any, nothing tells the class from its surroundings",
    )
    DARK = (
        "16-bit images that use 12 bits or fewer",
        "save them with 8 bits, all on the same scale (for 12 bits: value / 16); as they are, they would be nearly "
        "black, for 16-bit values are divided by 257",
    )
    NO_MASK = (
        "images of a measured split without a mask",
        "add the mask under the same name as its image, as .png, .tif or .bmp, or take the image off the list",
    )
    MASK_SIZE = (
        "masks of another size than their image",
        "save the mask in the size of its image as viewers show it, that is, after the EXIF rotation of the photo",
    )
    BAD_MASK = "masks that cannot be used", ""
    NO_CLASS_IN_MASKS = (
        "masks that hold nothing but 0 and 255, all of them",
        "write the foreground as 1 (2, 3, ... for further classes): 255 means 'ignore this pixel'",
    )
    CONTRADICTION = "masks that show none of the classes that their image is tagged with", ""
    NO_MAP = "training images without a saliency map", "add the map under the same name as its image"
    BAD_MAP = "saliency maps that cannot be read", "replace these files"

    def __init__(self, title: str, remedy: str) -> None:
        self.title = title
        self.remedy = remedy


class Faults:
    """What was found so far. `add` a fault; `stop` raises all of them as one UserError, or returns if there is none."""

    def __init__(self) -> None:
        self._found: dict[Kind, list[str]] = {}
        self._counts: Counter[Kind] = Counter()
        self._remedies: dict[Kind, str] = {}

    def add(self, kind: Kind, offenders: str | Iterable[str], count: int | None = None, remedy: str = "") -> None:
        """One offender or several; `count` if they stand for more than themselves; `remedy` instead of the kind's."""
        listed = [offenders] if isinstance(offenders, str) else list(offenders)
        if listed:
            self._found.setdefault(kind, []).extend(listed)
            self._counts[kind] += len(listed) if count is None else count
            self._remedies[kind] = remedy or self._remedies.get(kind, kind.remedy)

    def has(self, *kinds: Kind) -> bool:
        """Whether a fault of any of these kinds was found."""
        return any(kind in self._found for kind in kinds)

    def copy(self) -> Faults:
        """The same faults, to add others to."""
        other = Faults()
        other._found = {kind: list(offenders) for kind, offenders in self._found.items()}
        other._counts = self._counts.copy()
        other._remedies = dict(self._remedies)
        return other

    def stop(self, where: str) -> None:
        """Raises UserError with the whole report: a first line to skim, then offenders and remedy by kind."""
        kinds = [kind for kind in Kind if kind in self._found]
        if not kinds:
            return
        counted = ", ".join(f"{kind.title} ({self._counts[kind]})" for kind in kinds)
        lines = [f"{len(kinds)} kind{'s' * (len(kinds) > 1)} of fault in {where}: {counted}"]
        for kind in kinds:
            offenders = self._found[kind]
            lines += ["", f"{kind.title} ({self._counts[kind]})"]
            lines += [f"    {offender}" for offender in offenders[:SHOWN]]
            if len(offenders) > SHOWN:
                lines.append(f"    ... and {len(offenders) - SHOWN} more")
            lines.append(f"  Remedy: {self._remedies[kind]}.")
        raise UserError("\n".join(lines))
