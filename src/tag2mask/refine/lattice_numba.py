"""The permutohedral lattice of one image, compiled by numba: what `ops.permutohedral` says, a pixel at a time.

Pixels are numbered strip by strip, `STRIP` columns wide, row by row within a strip: neighbours in the image are then
neighbours in memory, and what a stretch of pixels needs of the lattice stays in the cache. All that is looked up for a
pixel is its simplex, by one key made of the keys of its corners; corners are looked up when a simplex is new.

Functions that run in the inner loops grow no arrays: a variable that numba sees assigned in a loop costs it an atomic
count of references each time round.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from tag2mask.ops.permutohedral import coefficients, scales

STRIP = 64  # columns
CHUNK = 256  # pixels that are embedded together
GOLDEN = np.int64(-7046029254386353131)  # 2^64 over the golden ratio, odd, signed

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]


def compiled(function: Callable[..., Any]) -> Any:
    """Machine code that runs without the interpreter's lock, kept on disk if there is a folder to keep it in."""
    try:
        return numba.njit(function, cache=True, nogil=True, error_model="numpy")
    except RuntimeError:  # nowhere to write: a read-only installation without a home
        return numba.njit(function, nogil=True, error_model="numpy")


@dataclass(frozen=True)
class Lattice:
    """The lattice of the pixels of an image in d dimensions; its points are rows `first`.. of a table.

    corners [N d+1]: 4 x the row of each corner of each pixel's simplex. weights [N d+1]: of these corners. chains: rows
    of points that are neighbours along a direction, one after the other, -1 after each chain, direction by direction;
    points without a neighbour are in none. rows: one more than the last row.
    """

    corners: Integers
    weights: Floats
    chains: Integers
    first: int
    rows: int


def lattice(image: Floats, sigmas: tuple[float, ...], first: int) -> Lattice:
    """The lattice of column / sigmas[0], row / sigmas[1], and every channel c / sigmas[2 + c] of image [H W C]."""
    pixels, dims = image.shape[0] * image.shape[1], len(sigmas)
    size = dims + 1
    factors, hashing = _constants(sigmas)
    corners, weights = np.empty((pixels, size), np.int32), np.empty((pixels, size), np.float32)
    simplices, points = _Keys(max(CHUNK, pixels // 16)), _Keys(max(size * CHUNK, pixels // 16))
    members = np.empty((len(simplices.keys), size), np.int32)
    scratch, bases, order = np.empty((3 * size + 1, CHUNK)), np.empty(CHUNK, np.int64), np.empty(size, np.int64)
    state = np.zeros(5, np.int64)
    while not _fill(
        image, factors, hashing, first, corners, weights, simplices.slots, simplices.keys, members, points.slots,
        points.keys, scratch, bases, order, state,
    ):  # fmt: skip
        simplices.make_room(int(state[3]), CHUNK)
        points.make_room(int(state[4]), size * CHUNK)
        members = np.resize(members, (len(simplices.keys), size))
    count = int(state[4])
    chains, after, inside = (
        np.empty(2 * size * count, np.int32),
        np.empty(count, np.int32),
        np.empty(count + 1, np.bool_),
    )
    end = _chain(first, hashing, points.slots, points.keys, chains, after, inside)
    return Lattice(corners, weights, chains[:end].copy(), first, first + count)


@lru_cache
def _constants(sigmas: tuple[float, ...]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Factors of the features, coefficients of the keys."""
    factors = [scale / sigma for scale, sigma in zip(scales(len(sigmas)), sigmas, strict=True)]
    return np.array(factors), np.array(coefficients(len(sigmas) + 1))


class _Keys:
    """Keys in the order in which they came; slots hold their places, -1 where empty, and at least three in four are."""

    def __init__(self, room: int) -> None:
        room = 1 << (room - 1).bit_length()
        self.keys, self.slots = np.empty(room, np.int64), np.full(4 * room, -1, np.int32)

    def make_room(self, count: int, more: int) -> None:
        """Room for `more` keys beyond the `count` that there are."""
        if count + more > len(self.keys):
            self.keys = np.concatenate([self.keys, np.empty_like(self.keys)])
            self.slots = np.full(4 * len(self.keys), -1, np.int32)
            _rehash(self.slots, self.keys, count)


@compiled
def _fill(
    image, factors, hashing, first, corners, weights, simplices, codes, members, points, keys, scratch, bases, order,
    state,
):  # fmt: skip
    """Embed the pixels chunk by chunk; False if there is no room for another chunk.

    state: column and row of the next chunk, number of its first pixel, simplices and lattice points so far.
    """
    height, full = image.shape[:2]
    size = len(hashing)
    rests, ranks, features = scratch[:size], scratch[size : 2 * size], scratch[2 * size : 3 * size - 1]
    sums, ups = scratch[3 * size - 1], scratch[3 * size]
    while state[0] < full:
        if state[3] + CHUNK > len(codes) or state[4] + size * CHUNK > len(keys):
            return False
        left, top, pixel = state[0], state[1], state[2]
        width = min(STRIP, full - left)
        lines = min(CHUNK // width, height - top)
        count = lines * width
        _features(image, top, lines, left, width, factors, features)
        _embed(features, count, hashing, rests, ranks, bases, sums, ups)
        for n in range(count):
            weights[pixel + n, 0] = ups[n]
            for k in range(1, size):
                weights[pixel + n, k] = rests[size - 1 - k, n]
        _enter(count, sums, bases, ranks, hashing, order, first, simplices, codes, members, points, keys, state)
        for n in range(count):
            simplex = np.int64(sums[n])
            for k in range(size):
                corners[pixel + n, k] = members[simplex, k]
        state[1] += lines
        state[2] += count
        if state[1] == height:
            state[0] += width
            state[1] = 0
    return True


@compiled
def _features(image, top, lines, left, width, factors, features):
    """features [d n] of `width` columns from `left` and `lines` rows from `top`."""
    for line in range(lines):
        at = line * width
        for x in range(width):
            features[0, at + x] = (left + x) * factors[0]
            features[1, at + x] = (top + line) * factors[1]
        for c in range(len(factors) - 2):
            for x in range(width):
                features[c + 2, at + x] = image[top + line, left + x, c] * factors[c + 2]


@compiled
def _embed(features, count, hashing, rests, ranks, bases, sums, ups):
    """`ops.permutohedral.embed` of features [d n], in loops that can run in parallel.

    Out: bases [n] keys of the corners of remainder 0; ranks [d+1 n] of the coordinates; sums [n] a number that tells
    simplices with the same base apart; rests [d n] weights of the corners d, d-1, .., 1; ups [n] of the corner 0.
    """
    dims = len(features)
    size = dims + 1.0
    for n in range(count):
        sums[n], ups[n], bases[n] = 0.0, 0.0, 0
    for k in range(dims, -1, -1):
        rest, feature, factor = rests[k], features[max(k - 1, 0)], hashing[k] * (dims + 1)
        for n in range(count):
            own = feature[n] if k else 0.0
            high = sums[n] - k * own
            sums[n] += own
            cell = math.floor(high / size)
            rest[n] = high - cell * size
            ups[n] -= cell
            bases[n] += factor * np.int64(cell)
    for k in range(dims + 1):
        rank = ranks[k]
        for n in range(count):
            rank[n] = -ups[n]
    for i in range(dims + 1):
        for j in range(i + 1, dims + 1):
            one, two, rank_one, rank_two = rests[i], rests[j], ranks[i], ranks[j]
            for n in range(count):
                less = one[n] < two[n]
                rank_one[n] += np.float64(less)
                rank_two[n] += 1.0 - less
    for n in range(count):
        sums[n] = 0.0
    for k in range(dims + 1):
        rest, rank, factor = rests[k], ranks[k], hashing[k] * (dims + 1)
        for n in range(count):
            wrapped = rank[n] < 0
            rank[n] += size * wrapped
            rest[n] -= size * wrapped
            bases[n] += factor * np.int64(wrapped)
            sums[n] = sums[n] * size + rank[n]
    for i in range(dims + 1):  # a sorting network: largest first
        for j in range(i + 1, dims + 1):
            one, two = rests[i], rests[j]
            for n in range(count):
                high, low = one[n], two[n]
                swap = high < low
                one[n] = low if swap else high
                two[n] = high if swap else low
    one, two = rests[0], rests[dims]
    for n in range(count):
        ups[n] = 1.0 - (one[n] - two[n]) / size
    for k in range(dims):
        one, two = rests[k], rests[k + 1]
        for n in range(count):
            one[n] = (one[n] - two[n]) / size


@compiled
def _enter(count, sums, bases, ranks, hashing, order, first, simplices, codes, members, points, keys, state):
    """Find or make the simplex of every pixel of a chunk; its number replaces what `sums` says about the pixel."""
    size = len(hashing)
    step = hashing.sum()
    simplex_count, point_count = state[3], state[4]
    for n in range(count):
        code = bases[n] + np.int64(sums[n]) * GOLDEN
        slot = _slot(code, simplices, codes)
        simplex = np.int64(simplices[slot])
        if simplex < 0:
            simplex = simplex_count
            simplices[slot] = simplex
            codes[simplex] = code
            simplex_count += 1
            for k in range(size):
                order[np.int64(ranks[k, n])] = k
            key = bases[n]
            for k in range(size):
                slot = _slot(key, points, keys)
                if points[slot] < 0:
                    points[slot] = point_count
                    keys[point_count] = key
                    point_count += 1
                members[simplex, k] = 4 * (first + points[slot])
                key += step - size * hashing[order[size - 1 - k]]
        sums[n] = simplex
    state[3], state[4] = simplex_count, point_count


@compiled
def _chain(first, hashing, points, keys, chains, after, inside):
    """Write `Lattice.chains`: points that are neighbours along each direction; returns the length."""
    size = len(hashing)
    end = 0
    for k in range(size):
        step = hashing.sum() - size * hashing[k]
        for point in range(len(after)):
            inside[point] = False
        for point in range(len(after)):
            after[point] = points[_slot(keys[point] + step, points, keys)]
            inside[after[point]] = True  # -1 is the last place, which is nobody's
        for point in range(len(after)):
            if after[point] >= 0 and not inside[point]:
                link = np.int64(point)
                while link >= 0:
                    chains[end] = first + link
                    end += 1
                    link = np.int64(after[link])
                chains[end] = -1
                end += 1
    return end


@compiled
def _slot(key, slots, keys):
    """Where in slots the index of `key` in keys stands, or belongs: slots hold indices, -1 if empty."""
    mask = len(slots) - 1
    place = ((key * GOLDEN) >> 30) & mask
    while slots[place] >= 0 and keys[slots[place]] != key:
        place = (place + 1) & mask
    return place


@compiled
def _rehash(slots, keys, count):
    """Enter the first `count` keys into empty slots."""
    for index in range(count):
        slots[_slot(keys[index], slots, keys)] = index
