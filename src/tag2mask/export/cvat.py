"""CVAT's "Segmentation mask 1.1": a zip of painted masks that a task with the same images imports.

    labelmap.txt                         label:r,g,b:: of the background and every class
    ImageSets/Segmentation/default.txt   names of the images, without ending
    SegmentationClass/<name>.png         RGB, the colour of the class
    SegmentationObject/<name>.png        RGB, another colour for each object of the image

Objects are the connected parts of a class. An image has at most 254 (the form has no more colours): the largest, and
one for the rest of each class. Ignored pixels (255) are painted as background: CVAT refuses colours without a label.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from tag2mask.data.index_png import voc_palette
from tag2mask.data.source import IGNORE
from tag2mask.errors import UserError
from tag2mask.export.folders import copy_beside, new_folder
from tag2mask.export.mask_set import MaskSet
from tag2mask.export.objects import numbered_objects

FILE = "cvat.zip"
MOST = 254  # colours of the VOC palette but for background and void


def export_cvat(masks: MaskSet, out: Path, *, copy_images: bool = False, overwrite: bool = False) -> Path:
    """Writes `out`/cvat.zip and returns its path; with `copy_images` the images too, in `out`/images.

    The same masks give the same bytes. Raises UserError for a class whose name the label map cannot hold, or if `out`
    holds something else, or an export and not `overwrite`.
    """
    for name in masks.classes:
        if ":" in name or name.startswith("#") or name != name.strip():
            raise UserError(
                f"classes: {name!r} cannot stand in CVAT's label map; use no ':', no '#' in front, no blanks"
            )
    colours = voc_palette()
    with new_folder(out, "cvat", overwrite) as folder, zipfile.ZipFile(folder / FILE, "w") as archive:
        labels = ["# label:color_rgb:parts:actions"]
        labels += [
            f"{name}:{red},{green},{blue}::"
            for name, (red, green, blue) in zip(("background", *masks.classes), colours.tolist(), strict=False)
        ]
        _add(archive, "labelmap.txt", ("\n".join(labels) + "\n").encode())
        names = "".join(f"{item.name}\n" for item in masks.items)
        _add(archive, "ImageSets/Segmentation/default.txt", names.encode())
        for item, mask in masks.read("cvat"):
            labelled = np.where(mask == IGNORE, np.uint8(0), mask)
            _add(archive, f"SegmentationClass/{item.name}.png", _png(colours[labelled]))
            _add(archive, f"SegmentationObject/{item.name}.png", _png(colours[numbered_objects(mask, MOST)]))
            if copy_images:
                copy_beside(item, folder)
    return out / FILE


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """An entry without a date."""
    archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


def _png(painted: NDArray[np.uint8]) -> bytes:
    encoded = io.BytesIO()
    PIL.Image.fromarray(painted).save(encoded, format="PNG")
    return encoded.getvalue()
