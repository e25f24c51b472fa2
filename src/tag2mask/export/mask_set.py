"""What is to be exported: images with their masks and the names of the classes. Nothing is read before it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tag2mask import progress
from tag2mask.data.images import read_mask
from tag2mask.data.source import IGNORE, Image, Mask
from tag2mask.errors import UserError


@dataclass(frozen=True)
class Item:
    """An image with its mask.

    name       path of the image without ending, "a/0001"; no two images have the same
    mask_file  an index mask: 0 background, 1..K classes, 255 ignore
    image      reads the image, [H W 3] uint8, upright
    file       of the image; None if it is drawn
    """

    name: str
    mask_file: Path
    image: Callable[[], Image]
    file: Path | None = None

    @property
    def file_name(self) -> str:
        """The image as lists and annotations call it: its path below the folder of the images, with its ending."""
        if self.file is None:
            return f"{self.name}.png"
        return PurePosixPath(*self.file.parts[-len(PurePosixPath(self.name).parts) :]).as_posix()


@dataclass(frozen=True)
class MaskSet:
    """Images with their masks; `classes` are the names of the mask values 1..K."""

    classes: tuple[str, ...]
    items: Sequence[Item]

    def __post_init__(self) -> None:
        for name in self.classes:
            if not name.strip() or name.splitlines() != [name]:
                raise UserError(f"classes: {name!r} is no name of a class; give each a name of one line")
            if self.classes.count(name) > 1:
                raise UserError(f"classes: {name} is given twice; each class needs a name of its own")
            if name.casefold() == "background":
                raise UserError(f"classes: {name} is no class, it is the value 0 of every mask; leave it out")
        if len(self.classes) >= IGNORE:
            raise UserError(f"classes: there are {len(self.classes)}, but a mask has room for {IGNORE - 1}")
        if not self.items:
            raise UserError("export: no image is left to export; look at --only, --decisions and --accepted-only")

    def __len__(self) -> int:
        return len(self.items)

    def read(self, label: str) -> Iterator[tuple[Item, Mask]]:
        """Every image with its mask [H W], one in memory at a time, with a progress bar."""
        for item in progress.track(self.items, label, len(self.items)):
            yield item, read_mask(item.mask_file, len(self.classes))
