"""What COCO's instances_*.json says, in the words used here: tags and index masks with classes 1..K."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tag2mask import progress
from tag2mask.data.index_png import write_mask
from tag2mask.data.source import Mask
from tag2mask.errors import UserError
from tag2mask.pipeline import write_json

VERSION = 1  # of the index and of the masks beside it; a change of either needs a new one
INDEX = "index.json"


@dataclass(frozen=True)
class Picture:
    """One image: its id and size, and its classes as places 0..K-1 in the list of classes."""

    id: int
    height: int
    width: int
    tags: tuple[int, ...]


@dataclass(frozen=True)
class Annotations:
    """One instances_*.json in short. `folder` keeps what was made from it and is named after its content."""

    file: Path
    folder: Path
    classes: tuple[str, ...]
    pictures: Mapping[str, Picture]

    def mask_path(self, name: str) -> Path:
        """Where the index mask of an image is, or will be."""
        return self.folder / f"{name}.png"


def read_annotations(file: Path, cache: Path, remedy: str) -> Annotations:
    """Classes, images and tags of an instances_*.json; the file is read whole only once, then an index in `cache`.

    COCO's category ids 1..90 have gaps: class k is the category with the k-th smallest id. A tag is given by any
    object, a crowd included. Raises UserError with one line for a file that is missing or no such JSON, or a cache
    that cannot be written.
    """
    try:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as reason:
        raise UserError(f"{file}: cannot be read ({reason.strerror or reason}); {remedy}") from None
    folder = cache / f"{file.stem}-{VERSION}-{digest[:10]}"
    if (kept := _kept(folder / INDEX)) is None:
        progress.say(f"{file.name}: reading annotations, once")
        try:
            kept = _index(_load(file, remedy))
        except (KeyError, TypeError) as reason:
            raise UserError(f"{file}: is no instances file of COCO ({reason!r}); {remedy}") from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            images = {name: asdict(picture) for name, picture in kept[1].items()}
            write_json(folder / INDEX, {"classes": kept[0], "images": images})
        except OSError as reason:
            raise UserError(
                f"{folder}: cannot be written ({reason.strerror}); give data.cache, a folder for index and masks"
            ) from None
    return Annotations(file, folder, *kept)


def render_masks(annotations: Annotations, names: Iterable[str], remedy: str, *, show: bool = True) -> None:
    """Write the index mask of each of these images that has none yet; see `index_mask`."""
    todo = [name for name in names if not annotations.mask_path(name).is_file()]
    if not todo:
        return
    content = _load(annotations.file, remedy)
    place = _places(content)
    wanted = {annotations.pictures[name].id for name in todo}
    drawn: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for thing in content["annotations"]:
        if thing["image_id"] in wanted:
            drawn[thing["image_id"]].append(thing)

    del content

    def one(name: str) -> None:
        picture = annotations.pictures[name]
        things = drawn[picture.id]
        labels = [place[thing["category_id"]] + 1 for thing in things]
        write_mask(annotations.mask_path(name), index_mask(things, labels, picture.height, picture.width))

    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # compressing the files releases the interpreter lock
    try:
        for _ in progress.track(pool.map(one, todo), f"masks of {annotations.file.stem}", len(todo), show=show):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def index_mask(things: Sequence[Mapping[str, Any]], labels: Sequence[int], height: int, width: int) -> Mask:
    """[H W] uint8 of the objects of one image: `labels` where they are, 0 elsewhere.

    Where objects overlap the one with the smaller `area` is seen, and of two equal ones the first. A crowd is painted
    as its class, like any object. These are the rules by which the masks that the field shares were made (coco2voc).
    """
    from pycocotools import mask as coco

    painted = np.zeros((height, width), np.uint8)
    order = sorted(range(len(things)), key=lambda i: things[i]["area"])
    for i in reversed(order):
        shape = things[i]["segmentation"]
        if isinstance(shape, list):
            polygons = [polygon for polygon in shape if len(polygon) >= 6]  # fewer corners have no inside
            code = coco.merge(coco.frPyObjects(polygons, height, width)) if polygons else None
        else:
            code = coco.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape
        if code is not None:
            painted[coco.decode(code).astype(bool)] = labels[i]
    return painted


def _load(file: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
        if not {"images", "annotations", "categories"} <= content.keys():
            raise ValueError("no images, annotations and categories in it")
    except (OSError, ValueError, AttributeError) as reason:
        raise UserError(f"{file}: is no instances file of COCO ({reason}); {remedy}") from None
    return content  # type: ignore[no-any-return]


def _places(content: Mapping[str, Any]) -> dict[int, int]:
    """Category id -> place of the class, 0..K-1."""
    return {k: place for place, k in enumerate(sorted(category["id"] for category in content["categories"]))}


def _index(content: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Picture]]:
    place = _places(content)
    tags: dict[int, set[int]] = defaultdict(set)
    for thing in content["annotations"]:
        tags[thing["image_id"]].add(place[thing["category_id"]])
    named = {category["id"]: category["name"] for category in content["categories"]}
    pictures = {
        Path(image["file_name"]).stem: Picture(
            image["id"], image["height"], image["width"], tuple(sorted(tags[image["id"]]))
        )
        for image in sorted(content["images"], key=lambda image: image["id"])
    }
    return tuple(named[k] for k in place), pictures


def _kept(path: Path) -> tuple[tuple[str, ...], dict[str, Picture]] | None:
    try:
        content = json.loads(path.read_bytes())
        pictures = {name: Picture(**(e | {"tags": tuple(e["tags"])})) for name, e in content["images"].items()}
        return tuple(content["classes"]), pictures
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # none yet, or damaged: it is made again
