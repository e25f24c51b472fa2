"""The command line in a process of its own, settings that make it quick, and folders of images to run it on."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from tag2mask.data.scenes import Scenes

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
TAG2MASK = [sys.executable, "-m", "tag2mask.cli"]

EACH = [
    "net.backbone.name=test_resnet", "net.backbone.weights=null", "net.backbone.output_stride=16",
    "train.epochs=1", "train.batch=16", "augment.crop=32", "augment.long=[32,48]",
]  # fmt: skip
NETS = [f"{stage}.{setting}" for stage in ("classify", "segment") for setting in EACH]
NETS += ["segment.net.width=16", "segment.net.dilation=2"]
SCENES = ["data.images=24", "data.test=8", "data.size=48"]


def settings(*values: str) -> list[str]:
    """["a.b=1"] -> ["-s", "a.b=1"]."""
    return [word for value in values for word in ("-s", value)]


DEMO = ["demo", "--device", "cpu", "--workers", "0", *settings(*NETS, *SCENES)]


@dataclass
class Outcome:
    """What a command said and left with."""

    code: int
    out: str
    err: str


def shell(*arguments: object, timeout: float = 240) -> Outcome:
    """Run `tag2mask ...` in a process of its own."""
    words = [*TAG2MASK, *map(str, arguments)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    return Outcome(done.returncode, done.stdout, done.stderr)


@dataclass
class Drawn:
    """A folder of images that were drawn, with tags, masks and lists beside it."""

    root: Path
    names: list[str]
    tested: list[str]
    classes: tuple[str, ...]
    tags: dict[str, list[str]]

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def csv(self) -> Path:
        return self.root / "tags.csv"


def draw(root: Path, *, images: int = 12, test: int = 4, size: int = 48) -> Drawn:
    """Scenes saved as somebody would have them: images/, masks/, saliency/, tags.csv and test.txt."""
    source = Scenes(images=images, test=test, size=size)
    found = Drawn(root, [], [], source.classes, {})
    for split in ("train", "test"):
        samples = source.split(split)
        for index, path in enumerate(samples.names):
            name = path.replace("/", "_")
            found.names.append(name)
            found.tested += [name] if split == "test" else []
            found.tags[name] = [source.classes[k] for k in np.flatnonzero(samples.tags[index])]
            saliency = (samples.side["saliency"](index) * 255).astype(np.uint8)
            for kind, picture in (
                ("images", samples.image(index)),
                ("masks", samples.mask(index)),
                ("saliency", saliency),
            ):
                (root / kind).mkdir(parents=True, exist_ok=True)
                PIL.Image.fromarray(picture).save(root / kind / f"{name}.png")
    write_tags(found)
    (root / "test.txt").write_text("".join(f"{name}\n" for name in found.tested))
    return found


def write_tags(drawn: Drawn) -> None:
    """tags.csv, one column a class."""
    with drawn.csv.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", *drawn.classes])
        for name in drawn.names:
            rows.writerow([name, *(int(c in drawn.tags[name]) for c in drawn.classes)])
