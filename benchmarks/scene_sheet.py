"""Write a contact sheet of the built-in scenes: image beside mask overlay, and a legend.

python benchmarks/scene_sheet.py sheet.png --part 1 --context 0
"""

from __future__ import annotations

import argparse

import numpy as np
from PIL import Image, ImageDraw

from tag2mask.data.scenes import Scenes
from tag2mask.data.source import Split

COLOURS = np.array([(0, 0, 0), (230, 110, 20), (60, 120, 230), (240, 230, 90), (220, 40, 60), (170, 60, 210)], np.uint8)


def sheet(source: Scenes, count: int, columns: int, zoom: int, split: Split) -> Image.Image:
    samples = source.split(split)
    assert samples.mask is not None
    cell, gap, foot = source.size * zoom, 6, 26
    rows = -(-count // columns)
    page = Image.new("RGB", (columns * (2 * cell + 2 * gap), rows * (cell + gap) + foot), "white")
    for k in range(count):
        image, mask = samples.image(k), samples.mask(k)
        shown = np.where(mask[..., None] > 0, 0.35 * image + 0.65 * COLOURS[mask], 0.55 * image).astype(np.uint8)
        x, y = k % columns * (2 * cell + 2 * gap), k // columns * (cell + gap)
        for picture in (image, shown):
            page.paste(Image.fromarray(picture).resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
            x += cell + 1
    pen = ImageDraw.Draw(page)
    for k, name in enumerate(source.classes):
        x, y = 8 + 120 * k, rows * (cell + gap) + 4
        pen.rectangle((x, y, x + 16, y + 16), fill=tuple(int(v) for v in COLOURS[k + 1]))
        pen.text((x + 22, y + 3), name, fill="black")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--zoom", type=int, default=2)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "score", "test"), default="train")
    for knob, value in (("part", 0.6), ("context", 0.6), ("variety", 0.5), ("alike", 0.5)):
        parser.add_argument(f"--{knob}", type=float, default=value)
    args = parser.parse_args()
    knobs = {knob: getattr(args, knob) for knob in ("part", "context", "variety", "alike")}
    source = Scenes(images=max(args.count, 8), test=max(args.count, 8), size=args.size, seed=args.seed, **knobs)
    sheet(source, args.count, args.columns, args.zoom, args.split).save(args.output)


if __name__ == "__main__":
    main()
