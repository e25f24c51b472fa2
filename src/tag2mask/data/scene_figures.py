"""The things in the built-in scenes: fox, cat, sheep, boat and mushroom, and clutter that belongs to no class.

A figure is a large body and a small cue (the head, the sails, the cap). Three knobs act here: `part` takes the class
out of the body, `variety` pulls the sub-types of a class apart, `alike` draws the fox and the cat together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tag2mask.data.scene_easel import Coat, Easel, coat, join, mix_coats, union
from tag2mask.data.scene_textures import Field, rgb

CLASSES = ("fox", "cat", "sheep", "boat", "mushroom")
ALIKE = ("fox", "cat")


class Knobs(NamedTuple):
    """How strong each trouble is: 0 absent, 1 strong. See `scenes.Scenes`."""

    part: float
    context: float
    variety: float
    alike: float


class Form(NamedTuple):
    """Proportions of a four-legged animal, in units of its scale. The second row is the head's: the cue."""

    length: float
    depth: float
    legs: float
    tail: float
    bush: float
    wool: float

    wide: float = 0.28
    tall: float = 0.26
    ear: float = 0.3
    droop: float = 0.0
    snout: float = 0.1
    tuft: float = 0.0


_FORMS = {
    "fox": Form(0.60, 0.25, 0.44, 0.80, 0.19, 0.0, wide=0.28, tall=0.24, ear=0.36, snout=0.23),
    "cat": Form(0.52, 0.29, 0.42, 0.74, 0.06, 0.0, wide=0.31, tall=0.27, ear=0.24, snout=0.07),
    "sheep": Form(0.60, 0.41, 0.36, 0.16, 0.10, 1.0, wide=0.20, tall=0.29, ear=0.26, droop=1.0, snout=0.12, tuft=1.0),
}
_SHARED_FORM = (0.58, 0.32, 0.41, 0.52, 0.09, 0.15)  # length .. wool of the body that all animals share

# Three sub-types a class: the body's coat, the cue's coat (colour: main, second: markings) and a shape number in -1..1.
_LOOKS: dict[str, tuple[tuple[Coat, Coat, float], ...]] = {
    "fox": (
        (coat("cf6f2c", "e08c45", 0.2), coat("d9742b", "fbf3e6"), 0.0),
        (coat("9c4326", "5e2c20", 0.4), coat("b04a24", "f2e2d0"), -1.0),
        (coat("dba24e", "b87a34", 0.0, 0.3), coat("e0a040", "fff6dc"), 1.0),
    ),
    "cat": (
        (coat("7d8694", "4c535f", 0.0, 1.0), coat("7f8a9a", "3f4753"), 0.0),
        (coat("ded3c0", "8d7a69", 0.7), coat("d9cbb5", "5f4d44"), 1.0),
        (coat("3d3f48", "24252c", 0.0, 0.5), coat("4a4d59", "17181d"), -1.0),
    ),
    "sheep": (
        (coat("efe8d8", "d8cdb8", 0.2, 0.0, 1.0), coat("37302f", "f3ecdd"), 0.0),
        (coat("c9b79c", "a8947a", 0.4, 0.0, 1.0), coat("e9d9c4", "8b6b4f"), 1.0),
        (coat("6f625a", "8b7d72", 0.4, 0.0, 1.0), coat("241f20", "8d8078"), -1.0),
    ),
    "boat": (
        (coat("b5322c", "7d1f20", 0.0, 0.2), coat("faf5e8", "c8392f"), 0.0),
        (coat("23527f", "183a5c", 0.0, 0.6), coat("f3c94b", "23527f"), 1.0),
        (coat("2f6b4c", "e8dfc8", 0.0, 0.5), coat("e9743f", "fbeed2"), -1.0),
    ),
    "mushroom": (
        (coat("f1e6cf", "d9c7a5", 0.0, 0.2), coat("c9252b", "fff7ea"), 0.0),
        (coat("d9cfe0", "a99bb8", 0.3), coat("7a4bb0", "f0e3ff"), 1.0),
        (coat("c9a877", "8f6f45", 0.0, 0.6), coat("e2a126", "7a3f14"), -1.0),
    ),
}
_SHARED = (  # the looks that all bodies share
    coat("9c7d62", "7d6049", 0.4, 0.0, 0.2),
    coat("b9a184", "7a614b", 0.0, 0.8, 0.1),
    coat("6f6258", "93826f", 0.6, 0.0, 0.5),
    coat("c8b9a3", "a08c74", 0.5, 0.2, 0.6),
    coat("857466", "5b4a40", 0.0, 0.4, 0.3),
)
_DARK, _WHITE, _NOSE, _AMBER = rgb("1d1a1c"), rgb("faf6ee"), rgb("c9807c"), rgb("dfe07a")


def figure(name: str, easel: Easel, rng: np.random.Generator, knobs: Knobs) -> None:
    """Paint a figure of class `name` on the easel. Draws the same random numbers whatever the knobs are."""
    kind, shared_kind = int(rng.integers(3)), int(rng.integers(len(_SHARED)))
    swing, lift, wag = (float(value) for value in rng.uniform(-1.0, 1.0, 3))
    body, cue, shape = _look(name, kind, knobs.variety)
    blend = 0.0
    if name in ALIKE:
        other_name = ALIKE[1 - ALIKE.index(name)]
        other = _look(other_name, kind, knobs.variety)
        blend = 0.39 * knobs.alike
        body, cue, shape = (
            mix_coats(body, other[0], blend),
            mix_coats(cue, other[1], blend),
            shape * (1.0 - 2.0 * blend),
        )
    hide = 1.0 - (1.0 - knobs.part) ** 2  # how much of the class leaves the body
    body = mix_coats(body, mix_coats(_SHARED[0], _SHARED[shared_kind], knobs.variety), hide)
    small = 1.0 - 0.18 * knobs.part  # the cue's size
    if name == "boat":
        _boat(easel, body, cue, shape, hide, small)
    elif name == "mushroom":
        _mushroom(easel, body, cue, shape, swing, hide, small)
    else:
        form = _FORMS[name]
        if blend:
            form = Form(*(a + (b - a) * blend for a, b in zip(form, _FORMS[other_name], strict=True)))
        own = [a + (b - a) * hide for a, b in zip(form[:6], _SHARED_FORM, strict=True)]
        form = Form(own[0] * (1.0 + 0.12 * shape), *own[1:], *(value * 1.12 for value in form[6:]))
        _animal(easel, name, form, body, cue, (swing, lift, wag), small)


def _look(name: str, kind: int, variety: float) -> tuple[Coat, Coat, float]:
    first, other = _LOOKS[name][0], _LOOKS[name][kind]
    return mix_coats(first[0], other[0], variety), mix_coats(first[1], other[1], variety), other[2] * variety


def _animal(
    e: Easel, name: str, form: Form, body: Coat, cue: Coat, move: tuple[float, float, float], small: float
) -> None:
    swing, lift, wag = move
    length, depth = form.length, form.depth
    step, foot = 0.10 * swing, 0.22 + form.legs
    for x, away in ((-0.72 * length, -step), (0.62 * length, step)):  # far legs
        e.paint(e.limb((x + 0.1, 0.1), (x + 0.12 + away, foot - 0.04), 0.10, 0.065), body, depth=0.12, shade=0.62)
    hip, tip = (-0.85 * length, -0.02), (-0.85 * length - 0.45 * form.tail, -0.02 - form.tail * (0.45 + 0.3 * wag))
    bend = (hip[0] - 0.55 * form.tail, 0.10 + 0.1 * wag)
    curve = [_bezier(hip, bend, tip, t) for t in (0.0, 0.3, 0.55, 0.8, 1.0)]
    radii = [0.06, 0.05 + 0.5 * form.bush, 0.03 + form.bush, 0.03 + 0.9 * form.bush, 0.04]
    behind = e.near(hip[0] - 0.3, hip[1] - 0.25, 0.68)
    tail = behind.limb(curve[0], curve[1], radii[0], radii[1])
    for k in (1, 2, 3):
        tail = join(tail, behind.limb(curve[k], curve[k + 1], radii[k], radii[k + 1]), 0.06)
    behind.paint(tail, body, depth=0.12)
    head = (0.86 * length + 0.10, -0.30 - 0.5 * depth + 0.07 * lift)
    trunk = join(e.ellipse(-0.05, 0.02, length, depth), e.ellipse(0.55 * length, -0.04, 0.30, depth * 0.98), 0.15)
    trunk = join(trunk, e.limb((0.6 * length, -0.08), head, 0.23, 0.15), 0.12)
    if form.wool > 0.0:
        turn = np.arctan2(e.y, e.x + 0.05)
        trunk = trunk - form.wool * (0.07 * np.abs(np.sin(6.5 * turn)) - 0.02)
    for x, away in ((-0.72 * length, step), (0.62 * length, -step)):  # near legs
        leg = join(e.limb((x, 0.0), (x + away, foot), 0.15, 0.08), e.ellipse(x + away + 0.04, foot, 0.11, 0.07), 0.05)
        trunk = join(trunk, leg, 0.07)
    e.paint(trunk, body, depth=0.30)
    _head(e, name, form, cue, head, small)


def _bezier(
    start: tuple[float, float], bend: tuple[float, float], end: tuple[float, float], t: float
) -> tuple[float, float]:
    a, b, c = (1.0 - t) ** 2, 2.0 * t * (1.0 - t), t * t
    return a * start[0] + b * bend[0] + c * end[0], a * start[1] + b * bend[1] + c * end[1]


def _head(e: Easel, name: str, form: Form, cue: Coat, at: tuple[float, float], small: float) -> None:
    x, y = at
    e = e.near(x, y, 0.75)
    wide, tall, ear = form.wide * small, form.tall * small, form.ear * small
    plain, marks = Coat(cue.colour, cue.second), Coat(cue.second, cue.second)
    ears, hollows = [], []
    for side in (-1.0, 1.0):
        start = (x + side * 0.62 * wide, y - (0.55 - 0.35 * form.droop) * tall)
        out, up = side * ear * (0.30 + 0.65 * form.droop), ear * (0.95 - 0.80 * form.droop)
        ears.append(e.limb(start, (start[0] + out, start[1] - up), 0.13 * small, 0.025))
        hollows.append(e.limb(start, (start[0] + 0.55 * out, start[1] - 0.55 * up), 0.06 * small, 0.02))
    e.paint(union(*ears), plain, depth=0.08, shade=0.85, cue=True)
    e.paint(union(*hollows), _NOSE if name == "cat" else _DARK, depth=0.0, cue=True)
    chin = y + tall * 0.55 + form.snout * small
    skull = join(e.ellipse(x, y, wide, tall), e.limb((x, y), (x, chin), 0.75 * wide, 0.07 * small), 0.08)
    e.paint(skull, plain, depth=0.16, cue=True)
    if name == "fox":
        left, right = (e.ellipse(x + k * wide, y + 0.55 * tall, 0.62 * wide, 0.62 * tall) for k in (-0.62, 0.62))
        e.paint(np.maximum(union(left, right), skull + 0.01), marks, depth=0.0, cue=True)
    elif name == "cat":
        stripes = [
            e.limb((x + k * wide, y - 0.95 * tall), (x + 0.55 * k * wide, y - 0.35 * tall), 0.045, 0.02)
            for k in (-0.45, 0.0, 0.45)
        ]
        e.paint(np.maximum(union(*stripes), skull + 0.01), marks, depth=0.0, cue=True)
        e.paint(e.ellipse(x, y + 0.52 * tall, 0.42 * wide, 0.30 * tall), _WHITE, depth=0.10, cue=True)
    if form.tuft > 0.0:
        turn = np.arctan2(e.y - y + 0.8 * tall, e.x - x)
        tuft = e.ellipse(x, y - 0.8 * tall, 0.85 * wide, 0.42 * tall) - 0.04 * np.abs(np.sin(4.0 * turn))
        e.paint(tuft, marks, depth=0.10, cue=True)
    eyes = [(x + side * 0.42 * wide, y - 0.05 * tall) for side in (-1.0, 1.0)]
    white = union(*(e.ellipse(at_x, at_y, 0.065, 0.065) for at_x, at_y in eyes))
    pupils = union(*(e.ellipse(at_x + 0.01, at_y, 0.038, 0.05) for at_x, at_y in eyes))
    e.paint(white, _WHITE if name == "sheep" else _AMBER, depth=0.0, cue=True)
    e.paint(pupils, _DARK, depth=0.0, cue=True)
    nose = _NOSE if name == "cat" else (rgb("8d7a78") if name == "sheep" else _DARK)
    e.paint(e.ellipse(x, chin - 0.02 if name == "fox" else y + 0.42 * tall, 0.06, 0.045), nose, depth=0.05, cue=True)


def _boat(e: Easel, body: Coat, cue: Coat, shape: float, hide: float, small: float) -> None:
    wood = rgb("6b4a30")
    mast = -0.05 + 0.08 * shape
    e.paint(e.limb((mast, 0.35), (mast, -1.0), 0.045, 0.03), wood, depth=0.04, cue=True)
    high = (0.95 + 0.10 * shape) * small
    fore = e.polygon((mast + 0.05, -high), (mast + 0.72 * small, 0.20), (mast + 0.05, 0.24))
    aft = e.polygon((mast - 0.04, 0.22), (mast - (0.55 - 0.12 * shape) * small, 0.18), (mast - 0.04, -high * 0.86))
    sails = union(fore, aft)
    e.paint(sails, Coat(cue.colour, cue.second), depth=0.25, cue=True)
    band = np.maximum(sails + 0.005, np.abs(e.y + 0.10 + 0.1 * shape) - 0.075)
    e.paint(band, Coat(cue.second, cue.second), depth=0.0, cue=True)
    low = 0.66 + 0.10 * hide  # the hull takes more room as the cue gets smaller
    bow = e.polygon((-0.88, 0.26), (0.98, 0.20), (0.62, low), (-0.66, low), bulge=0.10)
    e.paint(bow, body, depth=0.22)
    rail = np.maximum(bow + 0.02, np.abs(e.y - 0.31 + 0.03 * e.x) - 0.035)
    e.paint(rail, body, depth=0.06, shade=1.28)


def _mushroom(e: Easel, body: Coat, cue: Coat, shape: float, lean: float, hide: float, small: float) -> None:
    top = (0.12 * lean, -0.28)
    stalk = e.limb((0.0, 0.55), top, 0.32 + 0.07 * hide, 0.18 + 0.06 * hide)
    e.paint(stalk, body, depth=0.20)
    skirt = e.ellipse(top[0] * 0.6, 0.02, 0.32 + 0.05 * hide, 0.08)
    e.paint(skirt, body, depth=0.08, shade=1.12)
    e = e.near(top[0], top[1] - 0.2, 0.95)
    wide, tall = 0.78 * small * (1.0 + 0.10 * shape), 0.56 * small * (1.0 - 0.22 * shape)
    dome = e.ellipse(top[0], top[1], wide, tall)
    brim = e.y - (top[1] + 0.10)
    e.paint(e.ellipse(top[0], top[1] + 0.09, 0.86 * wide, 0.11), body, depth=0.1, shade=0.6)
    cap = join(dome, brim, -0.14)
    e.paint(cap, Coat(cue.colour, cue.second), depth=0.32, cue=True)
    dots = [
        e.ellipse(top[0] + u * wide, top[1] + v * tall, r * wide, 0.8 * r * wide)
        for u, v, r in (
            (-0.52, -0.28, 0.14),
            (-0.05, -0.62, 0.16),
            (0.02, -0.10, 0.13),
            (0.48, -0.38, 0.15),
            (0.74, 0.02, 0.10),
        )
    ]
    e.paint(np.maximum(union(*dots), cap + 0.02), Coat(cue.second, cue.second), depth=0.10, cue=True)


def clutter(easel: Easel, rng: np.random.Generator) -> None:
    """Paint a rock, a stump, or a bush: things of no class, in the colours that bodies share."""
    kind = rng.integers(3)
    look = _SHARED[rng.integers(len(_SHARED))]
    turn = np.arctan2(easel.y, easel.x)
    phases = rng.uniform(0.0, 2.0 * np.pi, 4)
    outline = sum(np.cos(k * turn + phases[k - 2]) / k for k in (2, 3, 4, 5))
    round_ = np.sqrt(easel.x**2 + (easel.y * 1.3) ** 2)
    if kind == 0:
        grey = Coat(rgb("8b8884"), look.second, 0.5, 0.0, 0.6)
        easel.paint(round_ - 0.75 - 0.10 * outline, grey, depth=0.5)
    elif kind == 1:
        easel.paint(easel.limb((0.0, 0.5), (0.0, -0.25), 0.50, 0.40), look._replace(stripes=0.6), depth=0.3, shade=0.8)
        easel.paint(easel.ellipse(0.0, -0.32, 0.40, 0.18), rgb("c9ad84"), depth=0.1)
        easel.paint(easel.ellipse(0.0, -0.32, 0.24, 0.10), rgb("a98a63"), depth=0.1)
    else:
        leafy: Field = round_ - 0.72 - 0.08 * outline - 0.07 * np.abs(np.sin(7.0 * turn + phases[0]))
        easel.paint(leafy, Coat(rgb("5d7a45"), rgb("86a05c"), 0.8, 0.0, 1.0), depth=0.4)
