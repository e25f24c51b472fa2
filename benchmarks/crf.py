"""The dense CRF against pydensecrf2: agreement and time. `python benchmarks/crf.py --rival pydensecrf2`.

Images are drawn scenes of 500 x 375 pixels, and photos of yours if you name a folder (`--photos`), brought to that
size. Maps are coarse and noisy: of the true mask of a scene, and for a photo of smooth noise. Both get the same
energies.

Times are CPU seconds of the calling thread, both in turn, the best of `--repeats` for each image, then the mean over
images; the ratio is of these means, with the least and the largest of a single image. The last lines are wall time:
images one after the other and one on each core, which is only right while nothing else runs.

The rival needs Python 3.12 or older and a C++ compiler: pip install 'tag2mask[parity]'. Without it (`--rival none`)
only our own times are printed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from tag2mask.data.scenes import Scenes
from tag2mask.ops.mean_field import refine_labels
from tag2mask.refine.crf import PRESETS, DenseCRF, Kernels, compile_for, unary_from_labels, unary_from_softmax

WIDTH, HEIGHT, STEPS = 500, 375, 10
CASES = {"3 labels": (3, 3), "21 labels": (21, 21), "3 of 21": (3, 21), "3 of 81": (3, 81)}  # present, all
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Rival = Callable[[Bytes, Floats, Kernels], Floats]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rival", choices=["pydensecrf2", "none"], default="none")
    parser.add_argument("--photos", type=Path, help="a folder of JPEG photos")
    parser.add_argument("--images", type=int, default=5, help="of each kind")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rival = pydensecrf() if args.rival == "pydensecrf2" else None

    images = {"drawn": list(drawn(args.images))}
    if args.photos is not None:
        images["photo"] = list(photos(args.photos, args.images))
    compile_for([3, 4, 21])
    print(f"{WIDTH} x {HEIGHT}, {STEPS} steps; " + ", ".join(f"{len(x)} {kind}" for kind, x in images.items()))
    for preset, kernels in PRESETS.items():
        for case, (present, count) in CASES.items():
            one_case(f"{preset}, {case}", images, kernels, present, count, rival, args.repeats)
    small_maps(images["drawn"], rival, args.repeats)
    over_images(images["drawn"], args.repeats)


def pydensecrf() -> Rival:
    densecrf = importlib.import_module("pydensecrf.densecrf")

    def run(image: Bytes, unary: Floats, kernels: Kernels) -> Floats:
        labels, height, width = unary.shape
        crf: Any = densecrf.DenseCRF2D(width, height, labels)
        crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(labels, -1)))
        near, alike = kernels["gaussian"], kernels["bilateral"]
        assert near is not None and alike is not None
        crf.addPairwiseGaussian(sxy=near.sxy, compat=near.compat)
        crf.addPairwiseBilateral(sxy=alike.sxy, srgb=alike.srgb, rgbim=image, compat=alike.compat)
        return np.asarray(crf.inference(STEPS), np.float32).reshape(unary.shape)

    return run


def ours(image: Bytes, unary: Floats, kernels: Kernels) -> Floats:
    return DenseCRF(image, **kernels).from_unary(unary, steps=STEPS)


def drawn(count: int) -> Iterator[tuple[Bytes, Bytes]]:
    """(image, mask) of scenes."""
    samples = Scenes(images=max(8, count), test=1, size=WIDTH).split("train")
    for index in range(count):
        mask = samples.mask(index)
        assert mask is not None
        yield np.ascontiguousarray(samples.image(index)[:HEIGHT]), mask[:HEIGHT]


def photos(folder: Path, count: int) -> Iterator[tuple[Bytes, None]]:
    """Photos evenly taken from a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise SystemExit(f"{folder}: no JPEG files")
    for path in paths[:: max(1, len(paths) // count)][:count]:
        yield np.array(Image.open(path).convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)), None


def energies(mask: Bytes | None, present: int, count: int, seed: int) -> Floats:
    """Unaries [count H W] of coarse, noisy maps, alike for the labels after the first `present`."""
    generator = torch.Generator().manual_seed(seed)
    size = (HEIGHT // 16 + 1, WIDTH // 16 + 1)
    maps = torch.rand(present, *size, generator=generator) * 0.4
    if mask is None:
        smooth = F.avg_pool2d(torch.rand(1, present, *size, generator=generator), 5, 1, 2)[0]
        maps += (smooth - smooth.amin()) / (smooth.amax() - smooth.amin())
    else:
        found = np.unique(mask)
        for row in range(present):
            where = torch.from_numpy(mask == found[row % len(found)])[None, None].float()
            maps[row] += 0.6 * F.adaptive_avg_pool2d(where, size)[0, 0] / (1 + row // len(found))
    maps = F.interpolate(maps[None], (HEIGHT, WIDTH), mode="bilinear")[0]
    scores = torch.zeros(count, HEIGHT, WIDTH)
    scores[:present] = maps / maps.sum(dim=0, keepdim=True)
    return unary_from_softmax(scores.numpy())


def one_case(
    name: str,
    images: dict[str, list[tuple[Bytes, Any]]],
    kernels: Kernels,
    present: int,
    count: int,
    rival: Rival | None,
    repeats: int,
) -> None:
    mine, theirs, ratios = [], [], []
    for kind, group in images.items():
        same, apart = [], []
        for index, (image, mask) in enumerate(group):
            unary = energies(mask, present, count, seed=index)
            best, (first, second) = in_turn(image, unary, kernels, rival, repeats)
            mine.append(best[0])
            if rival is not None:
                theirs.append(best[1])
                ratios.append(best[1] / best[0])
                same.append(float((first.argmax(axis=0) == second.argmax(axis=0)).mean()))
                apart.append(float(np.abs(first - second).max()))
        if rival is not None:
            print(
                f"{name}, {kind}: argmax agrees at {100 * np.mean(same):.4f} % of pixels (worst image "
                f"{100 * min(same):.4f} %), marginals differ by at most {max(apart):.1e}"
            )
    line = f"{name}: ours {1000 * np.mean(mine):.0f} ms"
    if rival is not None:
        line += f", pydensecrf2 {1000 * np.mean(theirs):.0f} ms, {np.mean(theirs) / np.mean(mine):.1f} x"
        line += f" ({min(ratios):.1f} to {max(ratios):.1f})"
    print(line, flush=True)


def in_turn(
    image: Bytes, unary: Floats, kernels: Kernels, rival: Rival | None, repeats: int
) -> tuple[list[float], tuple[Floats, Floats]]:
    """Least CPU seconds of ours and the rival's, and both results."""
    best, found = [np.inf, np.inf], [unary, unary]
    for _ in range(repeats):
        for place, work in enumerate((ours, rival) if rival else (ours,)):
            start = time.thread_time()
            found[place] = work(image, unary, kernels)
            best[place] = min(best[place], time.thread_time() - start)
    return best, (found[0], found[1])


def small_maps(scenes: list[tuple[Bytes, Any]], rival: Rival | None, repeats: int) -> None:
    """Labels of 16 maps of 16 x 16 pixels with 21 classes, as HSC refines them in every step."""
    kernels, side, count = PRESETS["irn"], 16, 21
    cases = []
    for index in range(16):
        image, mask = scenes[index % len(scenes)]
        small = np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
        labels = np.asarray(Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST))
        cases.append((small, np.roll(labels, index, axis=1)))

    def mine() -> list[Floats]:
        return [DenseCRF(image, **kernels).from_labels(labels, count, steps=STEPS) for image, labels in cases]

    def theirs() -> list[Floats]:
        assert rival is not None
        return [rival(image, unary_from_labels(labels, count), kernels) for image, labels in cases]

    colours = torch.stack([torch.from_numpy(image) for image, _ in cases]).movedim(-1, 1).float()
    labels = torch.stack([torch.from_numpy(labels) for _, labels in cases]).long()

    def in_step() -> torch.Tensor:
        return refine_labels(labels, colours, count, iterations=STEPS)

    works: list[Callable[[], Any]] = [mine, in_step, *([theirs] if rival else [])]
    best = [np.inf] * 3
    found = [work() for work in works]
    for _ in range(10 * repeats):
        for place, work in enumerate(works):
            start = time.thread_time()
            work()
            best[place] = min(best[place], time.thread_time() - start)
    line = f"16 maps of {side} x {side}, {count} labels, irn: numba {1000 * best[0]:.1f} ms, "
    line += f"torch without waiting for the device, as in HSC's step, {1000 * best[1]:.1f} ms"
    if rival is not None:
        pairs = list(zip(found[0], found[2], strict=True))
        same = np.mean([(a.argmax(axis=0) == b.argmax(axis=0)).mean() for a, b in pairs])
        line += f", pydensecrf2 {1000 * best[2]:.1f} ms, {best[2] / best[0]:.1f} x numba, "
        line += f"argmax agrees at {100 * same:.2f} %"
    print(line)


def over_images(scenes: list[tuple[Bytes, Any]], repeats: int) -> None:
    """Wall time of several images on one core and on all of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for preset in ("psa", "irn"):
        work = [(image, energies(mask, 3, 3, seed), PRESETS[preset]) for seed, (image, mask) in enumerate(scenes)]
        work *= max(1, 4 * cores // len(work))
        best = [np.inf, np.inf]
        for _ in range(repeats):
            for place, threads in enumerate((1, cores)):
                with ThreadPoolExecutor(threads) as pool:
                    start = time.perf_counter()
                    list(pool.map(lambda args: ours(*args), work))
                    best[place] = min(best[place], time.perf_counter() - start)
        print(f"{preset}, 3 labels, {len(work)} images: {cores} cores {best[0] / best[1]:.2f} x one core (wall)")


if __name__ == "__main__":
    main()
