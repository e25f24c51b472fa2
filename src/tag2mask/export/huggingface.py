"""A folder that `datasets.load_dataset("imagefolder", data_dir=...)` loads: columns image, mask, classes.

    {train,validation}/images/<name>.png or .jpg
    {train,validation}/masks/<name>.png          grey PNG: 0 background, 1..K classes, 255 ignored
    {train,validation}/metadata.jsonl            file_name, mask_file_name, and the classes of the mask as "cat;dog"
    id2label.json                                mask value -> name, as the transformers library takes it

The classes are one text, for a split of empty lists would have another type than one of names, which is refused.
255 stays in the masks; it is what the transformers library ignores in a loss (`ignore_index`) if it is told so.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np

from tag2mask.data.source import IGNORE
from tag2mask.export.folders import as_json, copied_ending, new_folder, place_image, write_grey, write_text
from tag2mask.export.mask_set import MaskSet

LABELS = "id2label.json"


def export_huggingface(masks: MaskSet, out: Path, *, val: Collection[str] = (), overwrite: bool = False) -> Path:
    """Writes images, masks and metadata, and returns `out`.

    val: names of the images for the split "validation"; all others are in "train".
    Raises UserError if `out` holds something else, or an export and not `overwrite`.
    """
    names = ("background", *masks.classes)
    with new_folder(out, "huggingface", overwrite) as folder:
        for item, mask in masks.read("huggingface"):
            split = folder / ("validation" if item.name in val else "train")
            image = place_image(item, split / "images" / item.name, copied_ending(item.file))
            write_grey(split / "masks" / f"{item.name}.png", mask)
            row = {
                "file_name": image.relative_to(split).as_posix(),
                "mask_file_name": f"masks/{item.name}.png",
                "classes": ";".join(names[value] for value in np.unique(mask).tolist() if value not in (0, IGNORE)),
            }
            with (split / "metadata.jsonl").open("a", encoding="utf-8", newline="\n") as file:
                file.write(as_json(row) + "\n")
        labels = {str(value): name for value, name in enumerate(names)}
        write_text(folder / LABELS, json.dumps(labels, ensure_ascii=False, indent=1) + "\n")
    return out
