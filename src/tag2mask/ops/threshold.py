"""A background score from soft maps alone: how far above its mean the best map has to rise.

    b_i(x) = max_k maps_i[k, x]              the strength of the best tagged class at pixel x of image i
    m, s   = mean, standard deviation of b   over all pixels; every image counts the same, whatever its size
    t      = m + spread * s

A constant score means something else for every kind of map: where a method lifts whole maps, m and t rise with it.
Masks that a CRF has refined cover less or more than the seeds of the same score. Their score is the one at which they
cover as much as the seeds at t: see `crossing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from tag2mask.ops.cams import best_class

SPREAD = 0.75  # measured, see docs/threshold.md


def moments(maps: Tensor) -> tuple[float, float]:
    """Mean of b_i and of its square for the maps [P h w] in 0..1 of one image, P >= 1.

    Raises ValueError if there are no maps.
    """
    if len(maps) == 0:
        raise ValueError("an image without tags says nothing about the score")
    best = best_class(maps.double())[1]
    return float(best.mean()), float(best.square().mean())


def spread_score(images: Sequence[tuple[float, float]], spread: float = SPREAD) -> float:
    """t of images with these `moments`; never above 0.99. Raises ValueError if there are none."""
    if not images:
        raise ValueError("no image with tags, so there is no score")
    mean, square = (math.fsum(values) / len(images) for values in zip(*images, strict=True))
    return min(0.99, mean + spread * math.sqrt(max(0.0, square - mean**2)))


def crossing(function: Callable[[float], float], target: float, *, steps: int = 100) -> float:
    """The first of 1/steps, 2/steps, ..., (steps - 1)/steps at which a falling function is no larger than `target`.

    The last of them if it stays above. By bisection, about log2(steps) calls.
    """
    low, high = 0, steps - 1
    while high - low > 1:
        middle = (low + high) // 2
        if function(middle / steps) > target:
            low = middle
        else:
            high = middle
    return high / steps
