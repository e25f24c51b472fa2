"""Times the one-pass threshold curve against one pass per threshold, on synthetic maps: `python benchmarks/curve.py`.

Both get the same soft maps and truth and must return the same integers; the ratio is of one run on one machine.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from numpy.typing import NDArray

from tag2mask.metrics import ThresholdCurve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--thresholds", type=int, default=100)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--width", type=int, default=500)
    args = parser.parse_args()

    thresholds = [i / args.thresholds for i in range(args.thresholds)]
    curve = ThresholdCurve(args.classes, thresholds)
    plain = np.zeros((args.thresholds, args.classes + 1, args.classes + 1), dtype=np.int64)
    rng = np.random.default_rng(0)
    seconds_curve = seconds_plain = 0.0
    for _ in range(args.images):
        maps, truth = synthetic_image(rng, args.classes, args.height, args.width)
        start = time.perf_counter()
        curve.update(maps.argmax(axis=0).astype(np.uint8), maps.max(axis=0), truth)
        middle = time.perf_counter()
        one_pass_per_threshold(plain, maps, truth, thresholds)
        seconds_plain += time.perf_counter() - middle
        seconds_curve += middle - start
    start = time.perf_counter()
    counts = curve.counts()
    seconds_curve += time.perf_counter() - start
    if not np.array_equal(counts[:, :, :-1], plain):
        raise SystemExit("the two evaluations differ")
    print(f"{args.images} images {args.height}x{args.width}, {args.classes} classes, {args.thresholds} thresholds")
    print(f"one pass per threshold  {1e3 * seconds_plain / args.images:9.1f} ms per image")
    print(f"one pass for all        {1e3 * seconds_curve / args.images:9.1f} ms per image")
    print(f"ratio                   {seconds_plain / seconds_curve:9.1f} x, same integers")


def synthetic_image(
    rng: np.random.Generator, classes: int, height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Soft maps [K H W] in 0..1, zero but for three tagged classes, and a truth mask [H W] with some 255."""
    tagged = rng.choice(classes, size=min(3, classes), replace=False)
    maps = np.zeros((classes, height, width), dtype=np.float32)
    maps[tagged] = rng.random((len(tagged), height, width), dtype=np.float32)
    truth = rng.choice(np.concatenate([[0, 255], tagged + 1]), size=(height, width)).astype(np.uint8)
    return maps, truth


def one_pass_per_threshold(
    counts: NDArray[np.int64], maps: NDArray[np.float32], truth: NDArray[np.uint8], thresholds: list[float]
) -> None:
    """For each threshold: put it in front as a constant background map, take the argmax, count. Adds to [T K+1 K+1]."""
    size = len(maps) + 1
    stacked = np.concatenate([np.zeros_like(maps[:1]), maps])
    kept = truth != 255
    kept_truth = truth[kept].astype(np.intp)
    for index, threshold in enumerate(thresholds):
        stacked[0] = threshold
        pred = stacked.argmax(axis=0)
        pairs = kept_truth * size + pred[kept]
        counts[index] += np.bincount(pairs, minlength=size * size).reshape(size, size)


if __name__ == "__main__":
    main()
