"""Label Studio: tasks with predictions as brush labels, and the labelling config that fits them.

A brush paints a class, not an object: each class of an image is one region. Ignored pixels (255) are in no region.

The brush's code of a picture is that of the packer "rle-pack": a string of bits with the number of bytes (32 bits),
the bits of a byte less one (5), and four numbers of bits less one (4 each); then runs until all bytes are there. A run
begins with a bit that is 1 if its bytes are all the same, and 2 bits that choose one of the four numbers; so many bits
hold its length less one. The byte follows, or all bytes if they differ. The bytes are those of an RGBA picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from tag2mask.data.index_png import voc_palette
from tag2mask.data.source import IGNORE, Mask
from tag2mask.export.folders import as_json, copy_beside, new_folder, write_text
from tag2mask.export.mask_set import MaskSet

TASKS, CONFIG = "tasks.json", "config.xml"
LOCAL = "/data/local-files/?d="  # Label Studio's own server of local files
LENGTH_BITS = (3, 4, 8, 16)


def export_label_studio(
    masks: MaskSet,
    out: Path,
    *,
    image_prefix: str = LOCAL,
    from_name: str = "tag",
    to_name: str = "image",
    copy_images: bool = False,
    overwrite: bool = False,
) -> Path:
    """Writes `out`/tasks.json and `out`/config.xml and returns the path of the tasks.

    image_prefix: what stands in front of an image's path below the folder of the images; a URL, or a bucket such as
    s3://masks/. from_name, to_name: names of the labels and of the image in the project's config. With `copy_images`
    the images too, in `out`/images.
    Raises UserError if `out` holds something else, or an export and not `overwrite`.
    """
    with new_folder(out, "label-studio", overwrite) as folder:
        write_text(folder / CONFIG, labelling_config(masks.classes, from_name, to_name))
        with (folder / TASKS).open("w", encoding="utf-8", newline="\n") as file:
            for number, (item, mask) in enumerate(masks.read("label-studio")):
                name = copy_beside(item, folder) if copy_images else item.file_name
                regions = list(_regions(mask, masks.classes, from_name, to_name))
                task = {
                    "data": {"image": image_prefix + (quote(name) if _is_url(image_prefix) else name)},
                    "predictions": [{"model_version": "tag2mask", "result": regions}],
                }
                file.write((",\n" if number else "[\n") + as_json(task))
            file.write("\n]\n")
    return out / TASKS


def labelling_config(classes: tuple[str, ...], from_name: str = "tag", to_name: str = "image") -> str:
    """The labelling interface: an image and one brush per class, in the colours of our masks."""
    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in voc_palette()[1 : len(classes) + 1].tolist()]
    labels = [
        f"    <Label value={quoteattr(name)} background={quoteattr(colour)}/>"
        for name, colour in zip(classes, colours, strict=True)
    ]
    return "\n".join(
        [
            "<View>",
            f'  <Image name={quoteattr(to_name)} value="$image" zoom="true"/>',
            f"  <BrushLabels name={quoteattr(from_name)} toName={quoteattr(to_name)}>",
            *labels,
            "  </BrushLabels>",
            "</View>",
            "",
        ]
    )


def _regions(mask: Mask, classes: tuple[str, ...], from_name: str, to_name: str) -> Iterator[dict[str, Any]]:
    height, width = mask.shape
    for label in np.unique(mask).tolist():
        if label in (0, IGNORE):
            continue
        yield {
            "id": f"class-{label}",
            "type": "brushlabels",
            "from_name": from_name,
            "to_name": to_name,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {"format": "rle", "rle": brush_code(mask == label), "brushlabels": [classes[label - 1]]},
        }


def brush_code(pixels: NDArray[np.bool_]) -> list[int]:
    """The brush's code of painted pixels [H W] bool, as bytes: all four channels are 255 where painted, else 0."""
    flat = np.asarray(pixels).ravel()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1])
    lengths = 4 * np.diff(np.concatenate([starts, [flat.size]]))
    bits = [f"{4 * flat.size:032b}", f"{8 - 1:05b}", *(f"{size - 1:04b}" for size in LENGTH_BITS)]
    longest = 2 ** LENGTH_BITS[-1]
    for painted, length in zip(flat[starts].tolist(), lengths.tolist(), strict=True):
        left = length
        while left:
            run = min(left, longest)
            choice = next(index for index, size in enumerate(LENGTH_BITS) if run <= 2**size)
            bits.append(f"1{choice:02b}{run - 1:0{LENGTH_BITS[choice]}b}{'1' * 8 if painted else '0' * 8}")
            left -= run
    joined = "".join(bits)
    code: list[int] = np.packbits(np.frombuffer(joined.encode(), dtype=np.uint8) - ord("0")).tolist()
    return code


def _is_url(prefix: str) -> bool:
    """Whether blanks and the like must be escaped: not in the keys of a bucket, s3://, gs://, azure-blob://."""
    return prefix.startswith(("/", "http://", "https://"))
