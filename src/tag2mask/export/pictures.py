"""Masks as index PNGs with the PASCAL VOC palette, and pictures of them over their images.

masks/<name>.png       0 background, 1..K classes, 255 ignored
overlays/<name>.png    the image with its classes painted over it; ignored pixels are pale yellow
classes.json           name, mask value and colour of the background and every class
"""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image

from tag2mask.data.index_png import voc_palette, write_mask
from tag2mask.errors import UserError
from tag2mask.export.folders import new_folder, write_text
from tag2mask.export.mask_set import MaskSet
from tag2mask.export.palette import overlay


def export_pictures(masks: MaskSet, out: Path, *, overlays: bool = True, overwrite: bool = False) -> Path:
    """Writes masks, overlays (unless they are not wanted) and classes.json, and returns `out`.

    Raises UserError if `out` holds something else, or an export and not `overwrite`.
    """
    with new_folder(out, "palette", overwrite) as folder:
        for item, mask in masks.read("palette"):
            write_mask(folder / "masks" / f"{item.name}.png", mask)
            if not overlays:
                continue
            image = item.image()
            if image.shape[:2] != mask.shape:
                raise UserError(f"{item.mask_file}: has another size than its image; resize the mask")
            path = folder / "overlays" / f"{item.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(overlay(image, mask)).save(path)
        rows = [
            {"name": name, "value": value, "colour": colour}
            for value, (name, colour) in enumerate(
                zip(("background", *masks.classes), voc_palette().tolist(), strict=False)
            )
        ]
        write_text(folder / "classes.json", json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    return out
