"""COCO instances JSON: one annotation per object, as run lengths (RLE) or as polygons.

Objects are the connected parts of a class, for tags do not count. Ignored pixels (255) are in no annotation: COCO has
no word for them without a class. Categories are 1..K in the order of the classes, as in the masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from pycocotools import mask as run_lengths

from tag2mask.data.source import Mask
from tag2mask.export.folders import as_json, copy_beside, new_folder
from tag2mask.export.mask_set import MaskSet
from tag2mask.export.objects import Component, components
from tag2mask.export.polygons import polygon

Shapes: TypeAlias = Literal["rle", "polygons"]
FILE = "annotations.json"


def export_coco(
    masks: MaskSet, out: Path, *, shapes: Shapes = "rle", copy_images: bool = False, overwrite: bool = False
) -> Path:
    """Writes `out`/annotations.json and returns its path; with `copy_images` the images too, in `out`/images.

    `file_name` is the path of an image below the folder of the images. A polygon follows the edges of pixels, and holes
    are reached by a cut, so that pycocotools gives the same pixels from both shapes.
    Raises UserError if `out` holds something else, or an export and not `overwrite`.
    """
    images = []
    count = 0
    with (
        new_folder(out, "coco", overwrite) as folder,
        (folder / FILE).open("w", encoding="utf-8", newline="\n") as file,
    ):
        categories = [{"id": k, "name": name, "supercategory": ""} for k, name in enumerate(masks.classes, start=1)]
        file.write('{"info": {"description": "masks made from image-level tags by tag2mask"},\n"licenses": [],\n')
        file.write(f'"categories": {as_json(categories)},\n"annotations": [')
        for number, (item, mask) in enumerate(masks.read("coco"), start=1):
            name = copy_beside(item, folder) if copy_images else item.file_name
            height, width = mask.shape
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            for one in components(mask):
                file.write(",\n" if count else "\n")
                count += 1
                file.write(as_json({"id": count, "image_id": number} | annotation(one, mask, shapes)))
        file.write(f'],\n"images": {as_json(images)}}}\n')
    return out / FILE


def annotation(one: Component, mask: Mask, shapes: Shapes) -> dict[str, Any]:
    """The annotation of an object of a mask [H W]: category, segmentation, area in pixels, box [x y width height]."""
    (x, y), (height, width) = one.corner, one.pixels.shape
    if shapes == "polygons":
        outline = polygon(one.pixels, "edges")
        segmentation: Any = [[place for px, py in outline for place in (x + px, y + py)]]
    else:
        whole = np.zeros(mask.shape, dtype=np.uint8, order="F")
        whole[y : y + height, x : x + width] = one.pixels
        code = run_lengths.encode(whole)
        segmentation = {"size": list(mask.shape), "counts": code["counts"].decode("ascii")}
    return {
        "category_id": one.label,
        "segmentation": segmentation,
        "area": int(one.pixels.sum()),
        "bbox": [x, y, width, height],
        "iscrowd": 0,
    }
