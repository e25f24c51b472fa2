"""Maps of CLIP-ES and MCTformer in batches, against image by image (and, for CLIP-ES, class by class).

Both sides use the same network with random weights, ViT-B/16 and DeiT-S as published unless told otherwise, and make
the same maps; how far they are apart is printed. What is gained is the share of the machine that one image leaves
idle: much on a GPU, little on a CPU. Class by class, the last block of CLIP runs once for every tag of an image.

    python benchmarks/map_extraction.py --images 8 --size 224 --tags 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import open_clip
import torch
from torch import Tensor

from tag2mask.backbones import BackboneSettings
from tag2mask.backbones.clip import CLIP
from tag2mask.baselines import MCTformer
from tag2mask.baselines.clip_es import CLIPES, affinity, boxes, refine, softmax_grad_cam
from tag2mask.core import Objective
from tag2mask.data.augment import normalise
from tag2mask.stages.cams import multi_scale

CLASSES = [f"thing number {k}" for k in range(20)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--tags", type=int, default=2, help="of each image")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--clip", default="ViT-B-16-quickgelu")
    parser.add_argument("--vit", default="deit_small_patch16_224")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.rand(options.images, 3, options.size, options.size)
    tags = torch.zeros(options.images, len(CLASSES), dtype=torch.uint8)
    tags = tags.scatter(1, torch.rand(tags.shape).argsort(dim=1)[:, : options.tags], 1)
    print(
        f"{options.images} images of {options.size} px with {options.tags} tags, batches of {options.batch}, ", end=""
    )
    print(f"{options.device}, {torch.get_num_threads()} threads, median of {options.repeats}")

    model = open_clip.create_model(options.clip).eval().requires_grad_(False)
    net = CLIPES(CLIP(model, open_clip.get_tokenizer(options.clip)), CLASSES).to(options.device)
    pixels = images.to(options.device)
    clip_es = {
        "class by class": lambda: torch.cat([by_class(net, pixels[i : i + 1], tags[i]) for i in range(len(tags))]),
        "image by image": lambda: torch.cat([maps for maps, _ in map(net, pixels.split(1), tags.split(1))]),
        "batches": lambda: torch.cat(
            [maps for maps, _ in map(net, pixels.split(options.batch), tags.split(options.batch))]
        ),
    }
    compare("CLIP-ES", clip_es, options.repeats)

    backbone = BackboneSettings(name=options.vit, weights=None, output_stride=16)
    objective = Objective(MCTformer(len(CLASSES), backbone=backbone), num_classes=len(CLASSES))
    objective = objective.to(options.device).eval()
    normal = normalise((255 * images).to(torch.uint8)).to(options.device)

    def mctformer(batch: int) -> Tensor:
        parts = zip(normal.split(batch), tags.split(batch), strict=True)
        return torch.cat([m for x, t in parts for m in multi_scale(objective, x, t, scales=(1.0,), flip=True)[0]])

    compare(
        "MCTformer", {"image by image": lambda: mctformer(1), "batches": lambda: mctformer(options.batch)},
        options.repeats,
    )  # fmt: skip


@torch.no_grad()
def by_class(net: CLIPES, pixels: Tensor, tags: Tensor) -> Tensor:
    """The maps [P h w] of one image [1 3 H W], whose last block is run anew for every tag."""
    grid = net.clip.grid((pixels.shape[-2], pixels.shape[-1]))
    entering, attention = net.clip.before_last(net.clip.tokens(pixels, grid), keep=net.blocks - 1)
    _, own = net.clip.last(entering, net.clip.enter(entering))
    alike = affinity(((attention + own) / net.blocks)[:, 1:, 1:])
    image, among, found = torch.zeros(1, dtype=torch.long), tags[None] > 0, []
    for k in tags.nonzero():
        pair = (entering, image.to(pixels.device), k.to(pixels.device), among.to(pixels.device))
        cam = softmax_grad_cam(net.clip, *pair, net.texts, net.others)
        inside = boxes(cam.view(1, *grid), net.box)
        found.append(refine(cam, inside.flatten(1), alike, pair[1]).view(1, *grid))
    return torch.cat(found)


def compare(name: str, ways: dict[str, Callable[[], Tensor]], repeats: int) -> None:
    """Time all in turns, so that a busy machine slows all, and print seconds, ratios and differences."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    maps = {way: work().float().cpu() for way, work in ways.items()}  # and warm up
    for _ in range(repeats):
        for way, work in ways.items():
            start = time.perf_counter()
            work().cpu()  # waits for the device
            seconds[way].append(time.perf_counter() - start)
    best = median(seconds["batches"])
    for way, times in seconds.items():
        apart = (maps[way] - maps["batches"]).abs().max()
        print(f"{name}, {way}: {median(times):.2f} s, {median(times) / best:.2f} x, maps apart by {apart:.1e} at most")


if __name__ == "__main__":
    main()
