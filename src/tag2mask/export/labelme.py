"""labelme: one JSON file per image, a polygon per object.

Objects are the connected parts of a class. Ignored pixels (255) are in no polygon. The corners of a polygon are the
centres of pixels: labelme fills a polygon and paints its line, which gives the pixels of the mask again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tag2mask.data.source import Mask
from tag2mask.errors import UserError
from tag2mask.export.folders import as_json, copied_ending, new_folder, place_image, write_text
from tag2mask.export.mask_set import MaskSet
from tag2mask.export.objects import Component, components
from tag2mask.export.polygons import polygon

VERSION = "5.5.0"  # of labelme, whose form this is


def export_labelme(masks: MaskSet, out: Path, *, copy_images: bool = False, overwrite: bool = False) -> Path:
    """Writes `out`/<name>.json for every image and returns `out`.

    `imagePath` leads from there to the file of the image, so that both must be moved together; with `copy_images`, or
    where an image has no file, the image is written beside its JSON.
    Raises UserError if `out` holds something else, or an export and not `overwrite`.
    """
    with new_folder(out, "labelme", overwrite) as folder:
        for item, mask in masks.read("labelme"):
            path = folder / f"{item.name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            if copy_images or item.file is None:
                image = place_image(item, folder / item.name, copied_ending(item.file)).name
            else:
                final = Path(os.path.realpath(out)) / path.relative_to(folder)
                image = _way(Path(os.path.realpath(item.file.parent), item.file.name), final.parent)
            write_text(path, as_json(described(mask, masks.classes, image)) + "\n")
    return out


def described(mask: Mask, classes: tuple[str, ...], image: str) -> dict[str, Any]:
    """What labelme knows of an image with a mask [H W]; image: the path from the JSON file to it."""
    return {
        "version": VERSION,
        "flags": {},
        "shapes": [_shape(one, classes[one.label - 1]) for one in components(mask)],
        "imagePath": image,
        "imageData": None,
        "imageHeight": mask.shape[0],
        "imageWidth": mask.shape[1],
    }


def _shape(one: Component, label: str) -> dict[str, Any]:
    x, y = one.corner
    points = [[x + px, y + py] for px, py in polygon(one.pixels, "centres")]
    points += [points[-1]] * (3 - len(points))  # labelme wants three, even for a single pixel
    return {
        "label": label,
        "points": points,
        "group_id": None,
        "description": "",
        "shape_type": "polygon",
        "flags": {},
    }


def _way(file: Path, folder: Path) -> str:
    """The relative path from a folder to a file, with "/"."""
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:  # another drive of a Windows machine
        raise UserError(f"--out {folder}: no relative path leads to {file}; use --copy-images") from None
