"""Backgrounds of the built-in scenes: value noise at several octaves, backdrops, and the ground under an object.

Everything is drawn from the generator that is passed in and in unit coordinates: a scene looks the same at every size.
Colours are floats in 0..1, channels first ([3 H W], which numpy is quickest with). Arrays are float64, so that small
differences between platforms vanish when colours are rounded to 8 bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Field: TypeAlias = NDArray[np.float64]

# What may lie under an object. The first three belong to a class each, the others to none.
GROUNDS = ("waves", "meadow", "leaves", "sand", "gravel")

_PALETTES = (  # pairs of colours that a backdrop runs between
    ("c9b893", "94855f"),
    ("93a5b8", "5c6f86"),
    ("b3a9a3", "73655f"),
    ("cdb9bd", "97808c"),
    ("9fa37e", "686f4e"),
    ("c99a78", "84583f"),
    ("a3bab4", "6b867f"),
    ("dccfae", "ab9a78"),
    ("b9a5c4", "776685"),
)


def rgb(code: str) -> Field:
    """Colour [3 1 1] in 0..1 from six hex digits."""
    return np.array([int(code[k : k + 2], 16) for k in (0, 2, 4)], dtype=np.float64).reshape(3, 1, 1) / 255.0


def grid(size: int) -> tuple[Field, Field]:
    """Pixel centres in 0..1: x [1 size], y [size 1]."""
    line = (np.arange(size) + 0.5) / size
    return line[None, :], line[:, None]


def smoothstep(values: Field, low: float, high: float) -> Field:
    """0 below `low`, 1 above `high`, a smooth ramp between."""
    t = np.clip((values - low) / (high - low), 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t))


@lru_cache(maxsize=1024)
def _spline(size: int, cells: int) -> Field:
    """Weights [size cells+3] of the uniform cubic B-spline through `cells` cells."""
    position = (np.arange(size) + 0.5) / size * cells
    first = np.floor(position).astype(int)
    t = position - first
    weights = np.zeros((size, cells + 3))
    parts = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    for k, part in enumerate(parts):
        weights[np.arange(size), first + k] = part / 6.0
    return weights


def noise(rng: np.random.Generator, size: int, across: int, down: int | None = None) -> Field:
    """Smooth noise [size size] of about zero mean and unit deviation, `across` x `down` cells over the square."""
    down = across if down is None else down
    values = rng.standard_normal((down + 3, across + 3))
    return np.asarray(_spline(size, down) @ values @ _spline(size, across).T / 0.48)


def octaves(rng: np.random.Generator, size: int, cells: int, count: int) -> Field:
    """Sum of `count` noises, each twice as fine and 0.6 times as strong as the one before."""
    return np.asarray(sum(noise(rng, size, cells * 2**k) * 0.6**k for k in range(count)))


def backdrop(rng: np.random.Generator, size: int) -> Field:
    """Background [3 size size] of one of five kinds: grain, planks, blotches, slope, speckle. Knows no class."""
    kind = rng.integers(5)
    light, dark = (rgb(code) for code in _PALETTES[rng.integers(len(_PALETTES))])
    x, y = grid(size)
    angle = rng.uniform(0.0, 2.0 * np.pi)
    slope = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
    soft = octaves(rng, size, 3, 4)
    if kind == 0:  # grain: cloudy, with fine fibres
        tone = 0.5 + 0.20 * soft + 0.10 * noise(rng, size, 48, 12)
    elif kind == 1:  # planks: warped stripes with dark seams
        count = rng.integers(4, 8)
        phase = (slope + 0.01 * soft) * count
        offset = phase - np.floor(phase)
        seam = 1.0 - smoothstep(np.minimum(offset, 1.0 - offset), 0.0, 0.08)
        tone = 0.45 + 0.15 * np.sin(12.9 * np.floor(phase)) + 0.13 * np.sin(22.0 * phase + 2.0 * soft) + 0.55 * seam
    elif kind == 2:  # blotches: plaster that has come off in places
        tone = 0.30 + 0.55 * smoothstep(soft, 0.0, 0.5) + 0.08 * noise(rng, size, 40)
    elif kind == 3:  # slope: a wall in falling light
        tone = 0.5 + 0.8 * slope + 0.10 * soft
    else:  # speckle: terrazzo
        chips = noise(rng, size, 34)
        tone = 0.45 + 0.45 * smoothstep(chips, 0.9, 1.4) - 0.4 * smoothstep(-chips, 1.1, 1.5) + 0.08 * soft
    return np.asarray(light + (dark - light) * np.clip(tone, -0.2, 1.2))


def ground(kind: str, rng: np.random.Generator, size: int) -> Field:
    """Texture [3 size size] of one of `GROUNDS`, over the whole square."""
    _, y = grid(size)
    soft = octaves(rng, size, 4, 3)
    if kind == "waves":
        swell = np.sin(2.0 * np.pi * (13.0 * y + 0.55 * soft))
        colour = _blend("2f6f93", "5fa9bd", 0.5 + 0.5 * swell)
        return _over(colour, "e4f1f0", 0.85 * smoothstep(swell + 0.25 * soft, 0.75, 1.1))
    if kind == "meadow":
        blades = noise(rng, size, 44, 13)
        colour = _blend("4e8a34", "8fbf4d", 0.5 + 0.22 * blades + 0.15 * soft)
        flowers = noise(rng, size, 26)
        colour = _over(colour, "f6f2e4", smoothstep(flowers, 1.45, 1.75))
        return _over(colour, "f0c63c", smoothstep(-flowers, 1.6, 1.9))
    if kind == "leaves":
        colour = _blend("5a3a22", "8a5a2c", 0.5 + 0.3 * soft)
        for code in ("b8702a", "c99a3d", "93402a"):
            colour = _over(colour, code, 0.9 * smoothstep(noise(rng, size, 17), 0.5, 0.75))
        return np.asarray(colour * (1.0 + 0.10 * noise(rng, size, 40)))
    if kind == "sand":
        ripple = np.sin(2.0 * np.pi * (16.0 * y + 0.9 * soft))
        return _blend("c9b184", "e3d2a9", 0.5 + 0.22 * ripple + 0.12 * noise(rng, size, 48))
    pebbles = noise(rng, size, 42)
    colour = _blend("7d7974", "a39d95", 0.5 + 0.3 * soft + 0.15 * noise(rng, size, 56))
    colour = _over(colour, "d3cdc3", 0.8 * smoothstep(pebbles, 0.5, 0.9))
    return _over(colour, "4f4b49", 0.8 * smoothstep(-pebbles, 0.6, 1.0))


def patch(rng: np.random.Generator, size: int, x: float, y: float, width: float, height: float) -> Field:
    """Coverage [size size] in 0..1 of an uneven patch around (x, y); half-axes `width`, `height`, all in 0..1."""
    across, down = grid(size)
    distance = np.sqrt(((across - x) / width) ** 2 + ((down - y) / height) ** 2)
    return 1.0 - smoothstep(distance + 0.13 * octaves(rng, size, 5, 3), 0.70, 1.15)


def _blend(low: str, high: str, tone: Field) -> Field:
    a, b = rgb(low), rgb(high)
    return np.asarray(a + (b - a) * np.clip(tone, -0.3, 1.3))


def _over(colour: Field, code: str, cover: Field) -> Field:
    return np.asarray(colour + (rgb(code) - colour) * cover)
