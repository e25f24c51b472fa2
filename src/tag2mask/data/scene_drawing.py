"""Composing one built-in scene: who stands where, on what ground, in what light, and what of it can be seen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tag2mask.data.scene_easel import Easel, Pose
from tag2mask.data.scene_figures import CLASSES, Knobs, clutter, figure
from tag2mask.data.scene_textures import GROUNDS, Field, backdrop, grid, ground, noise, patch, smoothstep
from tag2mask.data.source import Image, Mask, Split

OWN_GROUND = {"boat": "waves", "sheep": "meadow", "mushroom": "leaves"}
_MIN_VISIBLE = 0.015  # an object that shows less than this share of the image is left out
_BLOCK = 20  # classes are dealt out evenly within every 20 images
_COUNTS = (0, *(1,) * 8, *(2,) * 7, *(3,) * 4)  # classes in the images of a block


class Setup(NamedTuple):
    """All that one scene depends on besides its split and index."""

    size: int
    seed: int
    knobs: Knobs


@dataclass(frozen=True)
class Scene:
    """One drawn scene. `cue` [H W] is true where a part shows that tells the class; `saliency` is 0..255.

    `grounds` names the texture under each visible object: pairs of (class, ground or "").
    """

    image: Image
    mask: Mask
    cue: NDArray[np.bool_]
    saliency: NDArray[np.uint8]
    grounds: tuple[tuple[str, str], ...]


class _Thing(NamedTuple):
    name: str  # a class, or "" for clutter
    pose: Pose
    ground: str
    easel: Easel
    salient: float


@lru_cache(maxsize=512)
def draw(setup: Setup, split: Split, index: int) -> Scene:
    """One scene. The arrays are shared with later calls: copy before you write."""
    size = setup.size
    root = np.random.SeedSequence((setup.seed, int(split == "test"), index))
    layout, back, light, finish, *seeds = root.spawn(24)
    things = _things(setup, _names(setup.seed, split, index), np.random.default_rng(layout), seeds)
    things, label = _visible(things, size)
    canvas = backdrop(np.random.default_rng(back), size)
    rng = np.random.default_rng(light)
    angle, gain, warmth, fade = -np.pi * rng.uniform(0.15, 0.85), rng.uniform(0.85, 1.15), *rng.uniform(-1.0, 1.0, 2)
    _lay_grounds(canvas, things, (setup.seed, int(split == "test"), index))
    x, y = grid(size)
    for thing in things:
        _shadow(canvas, thing.pose, -np.cos(angle))
        at, within = _overlap(thing.easel, size)
        under = canvas[:, at[0], at[1]]
        under += thing.easel.cover[within] * (thing.easel.lit(angle)[:, within[0], within[1]] - under)
    canvas *= gain * (1.0 + 0.05 * warmth * np.array([1.0, 0.1, -1.0]).reshape(3, 1, 1))
    canvas *= 1.0 + 0.16 * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)) * (1.0 + fade)
    rng = np.random.default_rng(finish)
    salient = _salient(things, rng, size)
    canvas += rng.normal(0.0, 0.02, (size, size))
    codes = np.array([CLASSES.index(thing.name) + 1 if thing.name else 0 for thing in things] + [0], dtype=np.uint8)
    return Scene(
        image=_bytes(np.ascontiguousarray(canvas.transpose(1, 2, 0))),
        mask=codes[label],
        cue=_cue(things, label, size),
        saliency=_bytes(salient),
        grounds=tuple((thing.name, thing.ground) for thing in things if thing.name),
    )


@lru_cache(maxsize=64)
def _block(seed: int, split: Split, block: int) -> tuple[tuple[str, ...], ...]:
    """The classes of 20 images in a row: the least used come first, so that all are about equally frequent."""
    rng = np.random.default_rng((seed, int(split == "test"), block, 1))
    used = np.zeros(len(CLASSES))
    block_classes = []
    for count in rng.permutation(_COUNTS):
        chosen = np.argsort(used + rng.uniform(0.0, 1.5, len(CLASSES)))[:count]
        used[chosen] += 1
        block_classes.append(tuple(CLASSES[k] for k in chosen))
    return tuple(block_classes)


def _names(seed: int, split: Split, index: int) -> tuple[str, ...]:
    return _block(seed, split, index // _BLOCK)[index % _BLOCK]


def _things(
    setup: Setup, names: tuple[str, ...], rng: np.random.Generator, seeds: list[np.random.SeedSequence]
) -> list[_Thing]:
    """Everything in the scene, far to near, each painted on its easel."""
    twice = rng.uniform(size=3) < (0.4 if len(names) == 1 else 0.15)
    cast = [name for name, two in zip(names, twice, strict=False) for _ in range(1 + int(two))]
    crowd = (1.0, 1.0, 0.86, 0.76, 0.70, 0.66, 0.62)[len(cast)]
    cast += [""] * int(rng.integers(1, 4))
    things: list[_Thing] = []
    for name, seed in zip(cast, seeds, strict=False):
        scale = rng.uniform(0.25, 0.38) * crowd if name else rng.uniform(0.06, 0.12)
        spots = rng.uniform(0.06 + 0.62 * scale, 0.94 - 0.62 * scale, (8, 2))
        room = [min([_gap(spot, thing.pose, scale) for thing in things], default=0.0) for spot in spots]
        best = spots[int(np.argmax(room))] if name else spots[0]
        pose = Pose(best[0], best[1], scale, rng.uniform(-0.16, 0.16), 1.0 if rng.uniform() < 0.5 else -1.0)
        ground_name = _ground_of(name, setup.knobs.context, *rng.uniform(size=3))
        stream = np.random.default_rng(seed)
        easel = Easel(pose, setup.size, stream)
        figure(name, easel, stream, setup.knobs) if name else clutter(easel, stream)
        noticed, strength = rng.uniform(size=2)
        salient = (0.7 + 0.3 * strength) * (noticed >= 0.1) if name else (0.3 + 0.4 * strength) * (noticed < 0.35)
        things.append(_Thing(name, pose, ground_name if name else "", easel, float(salient)))
    return sorted(things, key=lambda thing: thing.pose.y + 0.6 * thing.pose.scale)


def _gap(spot: NDArray[np.float64], pose: Pose, scale: float) -> float:
    return float(np.sqrt((spot[0] - pose.x) ** 2 + (spot[1] - pose.y) ** 2) / (scale + pose.scale))


def _lay_grounds(canvas: Field, things: list[_Thing], key: tuple[int, int, int]) -> None:
    """Paint a patch of its ground under each thing onto the canvas [3 H W]. Equal grounds are one texture."""
    size = canvas.shape[-1]
    for k, kind in enumerate(GROUNDS):
        poses = [thing.pose for thing in things if thing.ground == kind]
        if poses:
            rng = np.random.default_rng((*key, 2 + k))
            texture = ground(kind, rng, size)
            for x, y, scale, *_ in poses:
                canvas += patch(rng, size, x, y + 0.45 * scale, 1.6 * scale, 1.05 * scale) * (texture - canvas)


def _shadow(canvas: Field, pose: Pose, side: float) -> None:
    """Darken the canvas [3 H W] in a soft ellipse at a figure's feet, a little to one side (-1..1)."""
    size = canvas.shape[-1]
    x, y = pose.x + 0.2 * side * pose.scale, pose.y + 0.62 * pose.scale
    rx, ry = 0.85 * pose.scale, 0.2 * pose.scale
    cols = slice(max(0, int((x - 1.2 * rx) * size)), max(0, int((x + 1.2 * rx) * size) + 1))
    rows = slice(max(0, int((y - 1.2 * ry) * size)), max(0, int((y + 1.2 * ry) * size) + 1))
    across, down = grid(size)
    distance = ((across[:, cols] - x) / rx) ** 2 + ((down[rows] - y) / ry) ** 2
    canvas[:, rows, cols] *= 0.62 + 0.38 * smoothstep(distance, 0.2, 1.3)


def _ground_of(name: str, context: float, bare: float, bound: float, pick: float) -> str:
    """Ground under an object, from three uniform numbers: its own with probability `context`, else any of them."""
    if bare < 0.12:
        return ""
    if bound >= context:
        return GROUNDS[int(pick * len(GROUNDS))]
    neutral = [kind for kind in GROUNDS if kind not in OWN_GROUND.values()]
    return OWN_GROUND.get(name, neutral[int(pick * len(neutral))])


def _visible(things: list[_Thing], size: int) -> tuple[list[_Thing], NDArray[np.intp]]:
    """Drop objects that show too little, the least visible first; and the index [H W] of who is seen (-1: nobody)."""
    while True:
        label = np.full((size, size), -1, dtype=np.intp)
        for k, thing in enumerate(things):
            at, within = _overlap(thing.easel, size)
            label[at][thing.easel.cover[within] > 0.5] = k
        area = np.bincount(label.ravel() + 1, minlength=len(things) + 1)[1:]
        hidden = [k for k, thing in enumerate(things) if thing.name and area[k] < _MIN_VISIBLE * size * size]
        if not hidden:
            return things, label
        least = min(hidden, key=lambda k: int(area[k]))
        things = things[:least] + things[least + 1 :]


def _overlap(easel: Easel, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a figure's window meets the image: as slices of the image, and as slices of the window."""
    n = len(easel.cover)
    at, within = [], []
    for start in (easel.top, easel.left):
        low, high = max(start, 0), min(start + n, size)
        at.append(slice(low, max(high, low)))
        within.append(slice(low - start, max(high, low) - start))
    return (at[0], at[1]), (within[0], within[1])


def _cue(things: list[_Thing], label: NDArray[np.intp], size: int) -> NDArray[np.bool_]:
    cue = np.zeros((size, size), dtype=bool)
    for k, thing in enumerate(things):
        if thing.name:
            at, within = _overlap(thing.easel, size)
            cue[at] |= (label[at] == k) & (thing.easel.cue[within] > 0.5)
    return cue


def _salient(things: list[_Thing], rng: np.random.Generator, size: int) -> Field:
    """What a class-agnostic saliency detector might see: soft, uneven, some objects missed, some clutter taken in."""
    result = np.zeros((size, size))
    for thing in things:
        at, within = _overlap(thing.easel, size)
        result[at] += thing.easel.cover[within] * (thing.salient - result[at])
    soft = _blur(size) @ result @ _blur(size).T
    return np.asarray(soft * (1.0 + 0.12 * noise(rng, size, 6)) + 0.04 * np.abs(noise(rng, size, 8)))


@lru_cache(maxsize=8)
def _blur(size: int) -> Field:
    """Weights [size size] of a Gaussian whose deviation is 0.022 of the image."""
    line = np.arange(size)
    weights = np.exp(-0.5 * ((line[:, None] - line) / (0.022 * size)) ** 2)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _bytes(values: Field) -> NDArray[np.uint8]:
    return np.asarray(np.clip(np.rint(values * 255.0), 0.0, 255.0).astype(np.uint8))
