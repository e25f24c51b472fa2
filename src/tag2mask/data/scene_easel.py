"""Drawing one figure of the built-in scenes: signed distances, coats, soft edges, light.

A figure is painted part by part on a small square of its own. Its coordinates run from -REACH to REACH, x to the right
and y down, the figure facing right; signed distances are in the same unit, negative inside.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import numpy as np

from tag2mask.data.scene_textures import Field, noise, rgb, smoothstep

REACH = 1.25  # half a figure's window, in units of the figure's scale


class Coat(NamedTuple):
    """How a surface looks: two colours [3 1 1] in 0..1, and how strong (0..1) its spots, stripes and curls are."""

    colour: Field
    second: Field
    spots: float = 0.0
    stripes: float = 0.0
    curls: float = 0.0


def coat(colour: str, second: str, spots: float = 0.0, stripes: float = 0.0, curls: float = 0.0) -> Coat:
    """A coat from two hex colours."""
    return Coat(rgb(colour), rgb(second), spots, stripes, curls)


def mix_coats(a: Coat, b: Coat, t: float) -> Coat:
    """The coat a fraction `t` of the way from `a` to `b`."""
    return Coat(
        a.colour + (b.colour - a.colour) * t,
        a.second + (b.second - a.second) * t,
        a.spots + (b.spots - a.spots) * t,
        a.stripes + (b.stripes - a.stripes) * t,
        a.curls + (b.curls - a.curls) * t,
    )


class Pose(NamedTuple):
    """Where a figure stands: centre, scale (half its length) as fractions of the image, tilt in radians, facing +-1."""

    x: float
    y: float
    scale: float
    tilt: float
    facing: float


class Easel:
    """The canvas of one figure: `rgb` [3 n n], `cover`, `cue` and `relief` [n n], and where it lies in the image.

    `cover` is how much of a pixel the figure covers, `cue` how much of it shows the part that tells the class.
    `top`, `left` are the window's corner in the image; it may lie outside.
    """

    def __init__(self, pose: Pose, size: int, rng: np.random.Generator) -> None:
        half = int(np.ceil(REACH * pose.scale * size))
        n = 2 * half
        self.left, self.top = round(pose.x * size) - half, round(pose.y * size) - half
        u = (self.left + np.arange(n)[None, :] + 0.5) / size - pose.x
        v = (self.top + np.arange(n)[:, None] + 0.5) / size - pose.y
        cos, sin = np.cos(pose.tilt), np.sin(pose.tilt)
        self._cos, self._sin, self._facing = cos, sin, pose.facing
        x = (u * cos + v * sin) / pose.scale * pose.facing
        y = (v * cos - u * sin) / pose.scale
        # A slow warp of the plane: no two figures have the same outline.
        a, b, c, d = rng.uniform(0.0, 2.0 * np.pi, 4)
        self.x = x + 0.035 * np.sin(3.1 * y + a) + 0.012 * np.sin(7.0 * y + b)
        self.y = y + 0.035 * np.sin(2.7 * x + c) + 0.012 * np.sin(6.0 * x + d)
        self.pixel = 1.0 / (size * pose.scale)
        self.rgb = np.zeros((3, n, n))
        self.shown, self.relief = np.zeros((2, n, n)), np.zeros((n, n))
        self.fur, self.cloud, self.curl = noise(rng, n, 26), noise(rng, n, 9), noise(rng, n, 13)

    @property
    def cover(self) -> Field:
        """How much of each pixel the figure covers [n n], 0..1."""
        return np.asarray(self.shown[0])

    @property
    def cue(self) -> Field:
        """How much of each pixel shows the part that tells the class [n n], 0..1."""
        return np.asarray(self.shown[1])

    def near(self, x: float, y: float, radius: float) -> Easel:
        """A window on this canvas around (x, y), for small parts: painting there is quicker and shows here too."""
        turn, flip = np.array([[self._cos, -self._sin], [self._sin, self._cos]]), np.array([x * self._facing, y])
        middle = turn @ flip / self.pixel + len(self.x) / 2
        low = np.maximum(np.floor(middle - 1.2 * radius / self.pixel), 0).astype(int)
        high = np.maximum(np.ceil(middle + 1.2 * radius / self.pixel), 0).astype(int)
        rows, cols = slice(low[1], high[1]), slice(low[0], high[0])
        part = copy(self)
        for name in ("x", "y", "rgb", "shown", "relief", "fur", "cloud", "curl"):
            setattr(part, name, getattr(self, name)[..., rows, cols])
        return part

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> Field:
        """Distance to an ellipse (first order: exact on the outline)."""
        p, q = (self.x - x) / rx, (self.y - y) / ry
        radius = np.sqrt(p * p + q * q)
        slope = np.sqrt((p / rx) ** 2 + (q / ry) ** 2)
        return np.asarray(radius * (radius - 1.0) / np.maximum(slope, 1e-9))

    def limb(self, start: tuple[float, float], end: tuple[float, float], r0: float, r1: float) -> Field:
        """Distance to a rod from `start` (radius r0) to `end` (radius r1)."""
        px, py = self.x - start[0], self.y - start[1]
        dx, dy = end[0] - start[0], end[1] - start[1]
        t = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0.0, 1.0)
        return np.asarray(np.sqrt((px - dx * t) ** 2 + (py - dy * t) ** 2) - (r0 + (r1 - r0) * t))

    def polygon(self, *corners: tuple[float, float], bulge: float = 0.0) -> Field:
        """Distance to a convex polygon, corners in clockwise order as seen; `bulge` > 0 rounds its corners."""
        result = np.full(self.x.shape, -np.inf)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            length = float(np.hypot(x1 - x0, y1 - y0))
            side = ((self.x - x0) * (y1 - y0) - (self.y - y0) * (x1 - x0)) / length
            result = join(result, side, -bulge) if bulge and np.isfinite(result).all() else np.maximum(result, side)
        return result

    def paint(self, distance: Field, look: Coat | Field, *, depth: float = 0.25, shade: float = 1.0,
              cue: bool = False) -> None:  # fmt: skip
        """Paint one part over what is there: a coat, or a plain colour [3 1 1]. `depth` is how wide
        its rounded rim is, 0 for a mark on the surface."""
        rows, cols = _box(distance < self.pixel)
        inside = distance[rows, cols]
        alpha = np.clip(0.5 - inside / self.pixel, 0.0, 1.0)
        colour = self._coat(look, rows, cols) if isinstance(look, Coat) else look
        under = self.rgb[:, rows, cols]
        under += alpha * (colour * shade - under)
        shown = self.shown[:, rows, cols]
        shown += alpha * (np.array([1.0, float(cue)]).reshape(2, 1, 1) - shown)
        if depth > 0.0:
            rim, relief = np.clip(1.0 + inside / depth, 0.0, 1.0), self.relief[rows, cols]
            relief += alpha * (depth * (1.0 - rim * rim) - relief)

    def _coat(self, look: Coat, rows: slice, cols: slice) -> Field:
        tone = 1.0 + 0.05 * self.fur[rows, cols]
        if look.curls > 0.0:
            tone += look.curls * (0.12 * np.abs(self.curl[rows, cols]) - 0.10)
        if look.spots <= 0.0 and look.stripes <= 0.0:
            return np.asarray(look.colour * tone)
        cloud = self.cloud[rows, cols]
        bands = np.sin(15.0 * self.x[rows, cols] + 4.0 * self.y[rows, cols] + 0.5 * cloud)
        marks = look.spots * smoothstep(cloud, 0.35, 0.6) + look.stripes * smoothstep(bands, 0.1, 0.5)
        return np.asarray((look.colour + (look.second - look.colour) * np.minimum(marks, 1.0)) * tone)

    def lit(self, light: float) -> Field:
        """The painted figure [3 n n] in light from direction `light` (radians, image frame)."""
        down, across = np.gradient(self.relief)
        lean = -(across * np.cos(light) + down * np.sin(light)) / self.pixel
        return np.asarray(self.rgb * (1.0 + 0.28 * np.clip(lean, -1.6, 1.6)))


def union(*distances: Field) -> Field:
    """Distance to several parts at once."""
    return np.asarray(np.minimum.reduce(distances))


def join(a: Field, b: Field, k: float) -> Field:
    """Smooth union of two distances (polynomial minimum of width `k`); a negative `k` gives the smooth intersection."""
    if k < 0.0:
        return -join(-a, -b, -k)
    h = np.maximum(k - np.abs(a - b), 0.0) / k
    return np.asarray(np.minimum(a, b) - 0.25 * k * h * h)


def _box(inside: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> tuple[slice, slice]:
    """The smallest window that holds all true pixels."""
    rows, cols = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)
