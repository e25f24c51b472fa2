"""Draws a miniature VOCdevkit (with SBD) and a miniature COCO 2014: a dozen pictures each, in the official layouts.

    python tests/miniature.py FOLDER      draws both, in FOLDER/voc and FOLDER/coco

Coloured polygons on noisy ground; what is drawn where is known exactly. The same arguments give the same bytes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import scipy.io

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# COCO's categories: their ids have gaps.
COCO_CATEGORIES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip

SIZES = ((48, 64), (64, 48), (56, 56))  # height, width


@dataclass(frozen=True)
class Thing:
    """One object: its class, its outline [(x, y), ...], and whether VOC would call it difficult, or COCO a crowd."""

    label: str
    outline: tuple[tuple[int, int], ...]
    special: bool = False

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Smallest and largest x and y."""
        xs, ys = zip(*self.outline, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


@dataclass
class Drawn:
    """What was drawn: the folder, the names of each list, and each image's objects and tags."""

    root: Path
    lists: dict[str, list[str]] = field(default_factory=dict)
    things: dict[str, list[Thing]] = field(default_factory=dict)

    def tags(self, name: str) -> set[str]:
        """The classes of an image."""
        return {thing.label for thing in self.things[name]}


def draw_voc(root: Path) -> Drawn:
    """VOCdevkit/VOC2012, benchmark_RELEASE/dataset (SBD) and saliency/ below `root`; returns what is in there.

    12 annotated images - train 5, val 3, and 4 that only SBD has masks of, so that train_aug has 9 - and 2 of `test`
    without annotations. On the list train_aug the names have folders and endings, on the others they have not.
    The objects of the last image of SBD are all marked difficult. A person has a head, which is no object.
    """
    home, sbd = root / "VOCdevkit/VOC2012", root / "benchmark_RELEASE/dataset"
    names = [f"2007_{number:06d}" for number in range(1, 15)]
    lists = {"train": names[:5], "val": names[5:8], "test": names[12:]}
    extra, found = names[8:12], Drawn(root)
    for number, name in enumerate(names):
        labels = [VOC_CLASSES[(number + k) % 3 * 7 + k] for k in range(1 + number % 2)] + ["person"] * (number % 3 == 0)
        size, things = SIZES[number % 3], _things(number, SIZES[number % 3], labels, special=name == extra[-1])
        image, saliency = _picture(number, size, things), _saliency(size, things)
        _save(home / f"JPEGImages/{name}.jpg", image, quality=95)
        _save(root / f"saliency/{name}.png", saliency)
        found.things[name] = [] if name in lists["test"] else things
        if name in lists["test"]:
            continue
        (home / "Annotations").mkdir(exist_ok=True)
        (home / f"Annotations/{name}.xml").write_text(_xml(name, size, things))
        mask = _mask(size, things, border=name not in extra)
        if name not in extra:
            _save_mask(home / f"SegmentationClass/{name}.png", mask)
        if name in extra or number % 2:  # SBD has most of VOC's own images, too
            (sbd / "cls").mkdir(parents=True, exist_ok=True)
            classes = np.where(mask == 255, 0, mask).astype(np.uint8)
            scipy.io.savemat(str(sbd / f"cls/{name}.mat"), {"GTcls": {"Segmentation": classes}})
    theirs = sorted(path.stem for path in (sbd / "cls").iterdir())
    for half, part in (("train", theirs[::2]), ("val", theirs[1::2])):
        (sbd / f"{half}.txt").write_text("".join(f"{name}\n" for name in part))
    train_aug = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in [*lists["train"], *extra]]
    (home / "ImageSets/Segmentation").mkdir(parents=True)
    for name, lines in {**lists, "train_aug": train_aug}.items():
        (home / f"ImageSets/Segmentation/{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    found.lists = {**lists, "train_aug": [*lists["train"], *extra]}
    return found


def draw_coco(root: Path) -> Drawn:
    """train2014, val2014, annotations and saliency/ below `root`; returns what is in there.

    8 images to train on and 4 to test on, and one in each half without any object. One object is a crowd, stored as
    run lengths; objects overlap; one image is grey.
    """
    labels = ("person", "cat", "toothbrush", "stop sign", "pizza")
    ids = {name: k for k, name in COCO_CATEGORIES.items()}
    found = Drawn(root)
    for half, numbers in (("train2014", range(9, 18)), ("val2014", range(581921, 581926))):
        content: dict[str, list[dict[str, object]]] = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": k, "name": name} for k, name in reversed(COCO_CATEGORIES.items())]
        for place, number in enumerate(numbers):
            name, size = f"COCO_{half}_{number:012d}", SIZES[number % 3]
            wanted = [labels[(place + k) % len(labels)] for k in range(1 + place % 3)] if place else []
            things = _things(number, size, wanted)
            if place == 3:
                things[-1] = Thing(things[-1].label, things[-1].outline, special=True)
            image = _picture(number, size, things)
            _save(root / half / f"{name}.jpg", image[..., 0] if place == 2 else image, quality=95)
            _save(root / f"saliency/{name}.png", _saliency(size, things))
            record = {"id": number, "file_name": f"{name}.jpg", "height": size[0], "width": size[1]}
            content["images"].append(record)
            for thing in things:
                count = len(content["annotations"])
                content["annotations"].append(_annotation(count + 1, number, ids[thing.label], thing, size))
            found.things[name] = things
            found.lists.setdefault(half, []).append(name)
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{half}.json").write_text(json.dumps(content))
    return found


def _things(seed: int, size: tuple[int, int], labels: list[str], special: bool = False) -> list[Thing]:
    """One polygon of 4 to 7 corners for each label, at random places."""
    rng = np.random.default_rng(seed)
    things = []
    for label in labels:
        radius = rng.integers(8, 14)
        centre = [int(rng.integers(radius, side - radius)) for side in (size[1], size[0])]
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(4, 8))) + np.pi / 8
        corners = [(int(centre[0] + radius * np.cos(a)), int(centre[1] + radius * np.sin(a))) for a in angles]
        left, top = centre[0] - 4, centre[1] - 4  # a core that is there whatever the angles are
        corners += [(left, top), (left + 8, top), (left + 8, top + 8), (left, top + 8)]
        around = sorted(corners, key=lambda c: np.arctan2(c[1] - centre[1], c[0] - centre[0]))
        things.append(Thing(label, tuple(around), special))
    return things


def _colour(label: str) -> tuple[int, ...]:
    place = (*VOC_CLASSES, *COCO_CATEGORIES.values()).index(label)
    return tuple(60 + 195 * (place * step % 11) // 10 for step in (3, 5, 7))


def _picture(seed: int, size: tuple[int, int], things: list[Thing]) -> np.ndarray:
    ground = PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 60, (*size, 3), dtype=np.uint8))
    pen = PIL.ImageDraw.Draw(ground)
    for thing in things:
        pen.polygon(thing.outline, fill=_colour(thing.label))
    return np.asarray(ground)


def _mask(size: tuple[int, int], things: list[Thing], border: bool) -> np.ndarray:
    mask = PIL.Image.new("L", size[::-1])
    pen = PIL.ImageDraw.Draw(mask)
    for thing in things:
        pen.polygon(thing.outline, fill=VOC_CLASSES.index(thing.label) + 1, outline=255 if border else None)
    return np.asarray(mask)


def _saliency(size: tuple[int, int], things: list[Thing]) -> np.ndarray:
    grey = PIL.Image.new("L", size[::-1], 20)
    pen = PIL.ImageDraw.Draw(grey)
    for thing in things:
        pen.polygon(thing.outline, fill=220)
    return np.asarray(grey)


def _xml(name: str, size: tuple[int, int], things: list[Thing]) -> str:
    objects = ""
    for thing in things:
        x0, y0, x1, y1 = thing.box
        box = f"<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
        part = f"<part><name>head</name>{box}</part>" if thing.label == "person" else ""
        objects += (
            f"<object><name>{thing.label}</name><difficult>{int(thing.special)}</difficult>{box}{part}</object>\n"
        )
    shape = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}.jpg</filename>{shape}\n{objects}</annotation>\n"


def _annotation(count: int, image: int, category: int, thing: Thing, size: tuple[int, int]) -> dict[str, object]:
    canvas = PIL.Image.new("L", size[::-1])
    PIL.ImageDraw.Draw(canvas).polygon(thing.outline, fill=1)
    inside = np.asarray(canvas)
    x0, y0, x1, y1 = thing.box
    shape: object = [[float(value) for corner in thing.outline for value in corner]]
    if thing.special:
        shape = {"counts": run_lengths(inside), "size": list(size)}
    return {
        "id": count, "image_id": image, "category_id": category, "iscrowd": int(thing.special),
        "area": float(inside.sum()), "bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": shape,
    }  # fmt: skip


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed code of a mask [H W] of 0/1: lengths of runs down the columns, zeros first."""
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def _save(path: Path, picture: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(picture).save(path, **options)


def _save_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = PIL.Image.fromarray(mask)
    picture.putpalette([value for k in range(256) for value in (k, 255 - k, k * 7 % 256)])  # as in VOC: read by index
    picture.save(path)


if __name__ == "__main__":
    draw_voc(Path(sys.argv[1]) / "voc")
    draw_coco(Path(sys.argv[1]) / "coco")
