"""Draws the README's picture from a finished demo: image, CAM, mask made from the tags, segmenter, truth.

tag2mask demo --work work && python benchmarks/picture.py work docs/demo.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from tag2mask import schema
from tag2mask.api import find_model
from tag2mask.collect import find_record
from tag2mask.data.augment import normalise
from tag2mask.data.images import read_mask
from tag2mask.data.maps import map_path, read_maps
from tag2mask.export import heatmap, overlay
from tag2mask.ops.cams import best_class
from tag2mask.recipe import SOURCES
from tag2mask.segment import predict
from tag2mask.stages.labels import mask_path
from tag2mask.stages.segment import load_segmenter

HEAD, GAP = 30, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[11, 2, 32, 27], help="which training scenes")
    parser.add_argument("--side", type=int, default=196, help="pixels of one picture")
    options = parser.parse_args()

    record = find_record(options.work, None)
    folders = {stage["kind"]: options.work / stage["folder"] for stage in record["stages"].values()}
    source = schema.make(SOURCES[record["data"]["name"]], record["data"])
    samples, model = source.split("train"), load_segmenter(find_model(options.work))
    columns = ("image, its tags", "CAM", "mask from tags", "segmenter", "truth")
    side = options.side
    sheet = Image.new(
        "RGB", (len(columns) * (side + GAP) - GAP, HEAD + len(options.images) * (side + GAP) - GAP), "white"
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for column, title in enumerate(columns):
        pen.text((column * (side + GAP) + 2, 6), title, fill=(40, 40, 40), font=font)
    for row, index in enumerate(options.images):
        image, name = samples.image(index), samples.names[index]
        maps = read_maps(map_path(folders["cams"], name)).full()
        batch = normalise(torch.from_numpy(image).permute(2, 0, 1)[None])
        scores = predict(model.net, batch, scales=model.scales, flip=model.flip)
        segmented = scores.argmax(dim=1)[0].to(torch.uint8).numpy()
        assert samples.mask is not None
        pictures = (
            image,
            heatmap(image, best_class(maps)[1].numpy()),
            overlay(image, read_mask(mask_path(folders["crf"], name), len(source.classes))),
            overlay(image, segmented),
            overlay(image, samples.mask(index)),
        )
        for column, picture in enumerate(pictures):
            shown = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(shown, (column * (side + GAP), HEAD + row * (side + GAP)))
        tags = ", ".join(source.classes[k] for k in np.flatnonzero(samples.tags[index]))
        corner = (4, HEAD + row * (side + GAP) + side - 22)
        pen.rectangle((*corner, corner[0] + pen.textlength(tags, font=font) + 8, corner[1] + 19), fill=(0, 0, 0))
        pen.text((corner[0] + 4, corner[1] + 1), tags, fill="white", font=font)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(192, method=Image.Quantize.MEDIANCUT).save(options.out, optimize=True)
    print(options.out, options.out.stat().st_size // 1024, "kB")


if __name__ == "__main__":
    main()
