"""The outline of an object as one polygon, exact to the pixel, holes included.

The outline runs along the edges of pixels with the object on its right. Where two parts touch at a corner it crosses
over, so that 8 neighbours are one object. A hole is reached by a cut straight up to whatever lies above it: the line
runs there and back, so that by the even-odd rule the cut has no area.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Point: TypeAlias = tuple[int, int]  # x, y
Edge: TypeAlias = tuple[int, int, int]  # x and y of its start, and its direction
Corners: TypeAlias = Literal["edges", "centres"]

_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # right, down, left, up: each is the one before turned to the right
_INSIDE = ((0, 0), (-1, 0), (-1, -1), (0, -1))  # from the start of an edge to the pixel on its right, by direction
_RIGHT, _LEFT = 0, 2  # an object lies below an edge to the right and above an edge to the left


def polygon(pixels: NDArray[np.bool_], corners: Corners) -> list[Point]:
    """The outline of one connected object (8 neighbours), pixels [H W] bool, as corners (x, y) of a closed polygon.

    corners: "edges" of pixels, integers 0..W, where pixel x lies between x and x + 1, as COCO counts; or "centres" of
    the outermost pixels, 0..W-1, for tools that paint the line as well (a single pixel is a single point then).
    """
    outer, holes = _rings(pixels)
    cuts: dict[Edge, list[Point]] = {}  # by the edge at whose start a cut ends: the way through it, round, and back
    # A hole is cut to what lies above it. The lowest come first, so that those cut to this one are known already.
    for hole in sorted(holes, key=lambda ring: ring[-1][1], reverse=True):
        x, y, _ = hole[-1]  # its uppermost edge, from (x, y) to (x - 1, y)
        outside = np.flatnonzero(~pixels[:y, x - 1])
        above = (x - 1, int(outside[-1]) + 1 if len(outside) else 0, _RIGHT)
        turn = (x - 1, y) if corners == "edges" else (x - 1, y - 1)
        cuts[above] = [turn, *_points(hole, cuts, corners), turn, _point(above, corners)]
    return _straight(_points(outer, cuts, corners))


def _points(ring: Iterable[Edge], cuts: Mapping[Edge, Sequence[Point]], corners: Corners) -> list[Point]:
    """The corners of a ring, with the ways through the cuts that end at it."""
    found: list[Point] = []
    for edge in ring:
        found.append(_point(edge, corners))
        found.extend(cuts.get(edge, ()))
    return found


def _point(edge: Edge, corners: Corners) -> Point:
    x, y, direction = edge
    dx, dy = _INSIDE[direction] if corners == "centres" else (0, 0)
    return x + dx, y + dy


def _rings(pixels: NDArray[np.bool_]) -> tuple[list[Edge], list[list[Edge]]]:
    """The outer ring and those round the holes, each beginning after an uppermost edge and ending with it."""
    leaving = _leaving(pixels)
    outer: list[Edge] = []
    holes: list[list[Edge]] = []
    seen: set[Edge] = set()
    for (x, y), directions in leaving.items():
        for direction in directions:
            if (x, y, direction) in seen:
                continue
            ring = _follow((x, y, direction), leaving)
            seen.update(ring)
            flat = [index for index, edge in enumerate(ring) if edge[2] in (_RIGHT, _LEFT)]
            top = min(flat, key=lambda index: ring[index][1])
            ring = ring[top + 1 :] + ring[: top + 1]
            if ring[-1][2] == _RIGHT:
                outer = ring
            else:
                holes.append(ring)
    return outer, holes


def _leaving(pixels: NDArray[np.bool_]) -> dict[Point, list[int]]:
    """The directions of the edges that leave each corner of a pixel: one, or two where parts touch at it."""
    framed = np.pad(pixels, 1)
    above_left, above_right = framed[:-1, :-1], framed[:-1, 1:]
    below_left, below_right = framed[1:, :-1], framed[1:, 1:]
    sides = ((below_right, above_right), (below_left, below_right), (above_left, below_left), (above_right, above_left))
    found: dict[Point, list[int]] = {}
    for direction, (inside, outside) in enumerate(sides):
        for y, x in np.argwhere(inside & ~outside).tolist():
            found.setdefault((x, y), []).append(direction)
    return found


def _follow(start: Edge, leaving: Mapping[Point, Sequence[int]]) -> list[Edge]:
    """The ring that an edge belongs to, from this edge on."""
    ring = [start]
    x, y, direction = start
    while True:
        dx, dy = _STEPS[direction]
        x, y = x + dx, y + dy
        choices = leaving[x, y]
        direction = choices[0] if len(choices) == 1 else (direction + 3) % 4  # left: over to the part that touches
        if (x, y, direction) == start:
            return ring
        ring.append((x, y, direction))


def _straight(points: Sequence[Point]) -> list[Point]:
    """Without repeated points and those in the middle of a straight line; a line that turns back has none."""
    path = np.array(
        [p for p, before in zip(points, [points[-1], *points[:-1]], strict=True) if p != before] or points[:1]
    )
    ways = np.sign(np.roll(path, -1, axis=0) - path)  # all lines are level, upright or at 45 degrees
    kept = (ways != np.roll(ways, 1, axis=0)).any(axis=1)
    return [(int(x), int(y)) for x, y in (path[kept] if kept.any() else path[:1])]
