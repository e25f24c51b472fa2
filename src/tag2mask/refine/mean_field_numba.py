"""Mean field of a dense CRF on one image, compiled by numba: one pass over the pixels per iteration.

A pass slices the messages of all kernels, adds the unaries, takes the softmax, and splats the result for the next
iteration; marginals are never stored but at the end. What is the same for all labels is done once: the square root of
a kernel's weight and its normalisation are in the weights of the lattice, both ways, and so is the factor that turns
the exponential into a power of two. Labels lie side by side (`lanes`), so that a pixel's softmax and every row of a
lattice are a few SIMD registers.

The number of lanes is part of the code's type, and each number is compiled once: 4, 8, 16, 24, 32, then multiples
of 32. Pixels are in the order of `lattice_numba`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from tag2mask.refine.lanes import (
    add,
    divide,
    group_largest,
    group_sum,
    larger,
    load,
    multiply_add,
    power_of_two,
    spread,
    store,
    subtract,
)
from tag2mask.refine.lattice_numba import STRIP, Floats, Integers, Lattice, compiled, lattice

LOG2_E = np.float32(1 / math.log(2))
NEVER = np.float32(-1e30)  # the score of a label that takes no part
EIGHT, SIXTEEN = (0,) * 8, (0,) * 16
Kernel = tuple[Integers, Floats, Integers, tuple[int, ...]]  # a lattice's arrays, a tuple with an entry per corner


class Filters:
    """The lattices of the kernels of one image, for any number of `marginals`.

    image [H W C]; each kernel: (standard deviations along the columns, the rows and the channels, weight).
    """

    def __init__(self, image: Floats, kernels: Sequence[tuple[tuple[float, ...], float]]) -> None:
        self.height, self.width = image.shape[:2]
        self.kernels: list[Kernel] = []
        self.rows = 0
        for sigmas, weight in kernels:
            if len(sigmas) == 2 and not self.kernels:
                made = _spatial(self.height, self.width, sigmas, weight)
            else:
                made = _normalised(lattice(image, sigmas, self.rows), weight)
            corners, weights = made.corners.ravel(), made.weights.ravel()
            self.kernels.append((corners, weights, made.chains, (0,) * made.corners.shape[1]))
            self.rows = made.rows
        nothing = (np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32), ())
        self.kernels += [nothing] * (2 - len(kernels))

    def marginals(self, unary: Floats, counts: Floats, steps: int) -> Floats:
        """Marginals [L H W] of energies [L H W]; label l stands for counts[l] labels that are alike."""
        like = (0,) * lanes(len(unary))
        span = len(like)
        part, vector, group = (like, SIXTEEN, like) if span == 4 else (EIGHT, EIGHT, EIGHT)
        times = np.zeros((len(vector) // len(group), span), np.float32)
        times[:, : len(counts)] = counts
        scores, block = _aligned(self.height * self.width * span), _aligned(STRIP * span + 16)
        tables = _aligned(2 * self.rows * span).reshape(2, -1)
        found = np.empty(unary.shape, np.float32)
        _run(unary, times.ravel(), *self.kernels, scores, tables, block, found, steps, like, part, vector, group)
        return found


def lanes(labels: int) -> int:
    """The number of lanes that are compiled for so many labels."""
    return next((count for count in (4, 8, 16, 24, 32) if labels <= count), -(-labels // 32) * 32)


@lru_cache(maxsize=8)
def _spatial(height: int, width: int, sigmas: tuple[float, ...], weight: float) -> Lattice:
    """The lattice of a kernel that looks at places only: the same for all images of a size."""
    return _normalised(lattice(np.empty((height, width, 0), np.float32), sigmas, 0), weight)


def _normalised(made: Lattice, weight: float) -> Lattice:
    _normalise(made.corners, made.weights, made.chains, made.first, made.rows, np.float32(weight) * LOG2_E)
    return made


def _aligned(count: int) -> Floats:
    """Numbers that start where a line of the cache does."""
    numbers = np.empty(count + 16, np.float32)
    start = -numbers.ctypes.data // 4 % 16
    return numbers[start : start + count]


@compiled
def _normalise(corners, weights, chains, first, rows, strength):
    """Multiply the weights of every pixel by sqrt(strength / what the kernel makes of ones)."""
    size = corners.shape[1]
    table = np.zeros(rows, np.float32)
    for n in range(len(corners)):
        for k in range(size):
            table[corners[n, k] // 4] += weights[n, k]
    _blur(table, chains, 1, (0,))
    for n in range(len(corners)):
        total = np.float32(1e-20)
        for k in range(size):
            total += weights[n, k] * table[corners[n, k] // 4]
        factor = np.float32(math.sqrt(strength / total))
        for k in range(size):
            weights[n, k] *= factor


@compiled
def _run(unary, times, one, two, scores, tables, block, found, steps, like, part, vector, group):
    """All steps of mean field: energies [L H W] to marginals, found [L H W]; scores, tables and block are scratch."""
    span = len(like)
    _pack(unary, times, scores, span)
    _clear(tables[0])  # before the first step there are no messages
    for step in range(steps):
        following = tables[(step + 1) % 2]
        _clear(following)
        _next(scores, times, one, two, tables[step % 2], following, block, like, vector, group)
        _blur(following, one[2], span, part)
        _blur(following, two[2], span, part)
    _last(scores, times, one, two, tables[steps % 2], found, block, like, vector, group)


@compiled
def _clear(numbers):
    for n in range(len(numbers)):
        numbers[n] = np.float32(0)


@compiled
def _pack(unary, times, scores, span):
    """Energies [L H W] as scores of the lanes, pixel by pixel, in powers of two."""
    labels, height, full = unary.shape
    pixel = 0
    for left in range(0, full, STRIP):
        width = min(STRIP, full - left)
        for row in range(height):
            for label in range(span):
                if label < labels and times[label] > 0:
                    for x in range(width):
                        scores[(pixel + x) * span + label] = -unary[label, row, left + x] * LOG2_E
                else:
                    for x in range(width):
                        scores[(pixel + x) * span + label] = NEVER
            pixel += width


@compiled
def _next(scores, times, one, two, table, following, block, like, vector, group):
    """Splat the softmax of scores and messages, the latter from `table`, into `following`."""
    span = len(like)
    pixels = len(scores) // span
    for start in range(0, pixels, STRIP):
        count = min(STRIP, pixels - start)
        _slice(start, count, scores, start * span, one, table, block, like)
        _slice(start, count, block, 0, two, table, block, like)
        _softmax(block, count * span, span, times, vector, group)
        _splat(start, count, one, following, block, like)
        _splat(start, count, two, following, block, like)


@compiled
def _last(scores, times, one, two, table, found, block, like, vector, group):
    """Write the softmax of scores and messages to found [L H W]."""
    span = len(like)
    labels, height, full = found.shape
    start = 0
    for left in range(0, full, STRIP):
        count = min(STRIP, full - left)
        for row in range(height):
            _slice(start, count, scores, start * span, one, table, block, like)
            _slice(start, count, block, 0, two, table, block, like)
            _softmax(block, count * span, span, times, vector, group)
            for label in range(labels):
                for n in range(count):
                    found[label, row, left + n] = block[n * span + label]
            start += count


@compiled
def _slice(start, count, scores, offset, kernel, table, block, like):
    """block <- the scores from `offset` on + the messages of a kernel, for `count` pixels."""
    corners, weights, _, each = kernel
    span, size = len(like), len(each)
    for n in range(count):
        x = load(scores, offset + n * span, like)
        for k in range(size):
            at = (start + n) * size + k
            row = np.int64(corners[at]) * (span // 4)
            x = multiply_add(load(table, row, like), spread(weights[at], like), x)
        store(block, n * span, x)


@compiled
def _splat(start, count, kernel, table, block, like):
    """Add block, of `count` pixels, to the rows of a kernel's lattice."""
    corners, weights, _, each = kernel
    span, size = len(like), len(each)
    for n in range(count):
        x = load(block, n * span, like)
        for k in range(size):
            at = (start + n) * size + k
            row = np.int64(corners[at]) * (span // 4)
            store(table, row, multiply_add(x, spread(weights[at], like), load(table, row, like)))


@compiled
def _softmax(block, numbers, span, times, vector, group):
    """Softmax in powers of two over every `span` numbers of block; lane i counts times[i] times.

    A vector holds several groups of 4 lanes, or a part of the lanes of one pixel. May write up to 15 numbers too many.
    """
    part = len(vector)
    step = max(span, part)
    zero, one = spread(np.float32(0), vector), spread(np.float32(1), vector)
    for n in range(0, numbers, step):
        top = load(block, n, vector)
        for k in range(n + part, n + span, part):
            top = larger(top, load(block, k, vector))
        top = group_largest(top, group)
        for k in range(n, n + step, part):
            store(block, k, subtract(load(block, k, vector), top))
    for n in range(0, numbers, 16):
        store(block, n, power_of_two(load(block, n, SIXTEEN)))
    for n in range(0, numbers, step):
        total = zero
        for k in range(0, step, part):
            total = multiply_add(load(block, n + k, vector), load(times, k, vector), total)
        factor = divide(one, group_sum(total, group))
        for k in range(n, n + step, part):
            store(block, k, multiply_add(load(block, k, vector), factor, zero))


@compiled
def _blur(table, chains, span, like):
    """Blur the rows of `span` numbers of a table in place, len(like) numbers at a time."""
    half, zero = spread(np.float32(0.5), like), spread(np.float32(0), like)
    for part in range(0, span, len(like)):
        before, here, row = zero, zero, np.int64(-1)
        for link in range(len(chains)):
            following = np.int64(chains[link])
            if following < 0:
                store(table, row, multiply_add(before, half, here))
                row = following
            elif row < 0:
                row = following * span + part
                before, here = zero, load(table, row, like)
            else:
                following = following * span + part
                there = load(table, following, like)
                store(table, row, multiply_add(add(before, there), half, here))
                before, here, row = here, there, following
