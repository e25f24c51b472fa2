"""Line charts and scatter plots, one SVG file each: black on white, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TypeAlias

from tag2mask.report.plots import nice_ticks
from tag2mask.report.words import number

Point: TypeAlias = tuple[float, float]

# Colours that stay apart for colour-blind eyes (Okabe and Ito), the darkest first.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
WIDTH, LEFT, RIGHT, TOP, HEIGHT = 640, 58, 622, 34, 300  # of the plot without its legend
LINE = 19  # height of a line of the legend


@dataclass(frozen=True)
class Curve:
    """Points (x, y) joined by a line; between the two x of `strong` the line is thick. `dots` marks every point."""

    label: str
    points: Sequence[Point]
    strong: tuple[float, float] | None = None
    dots: bool = False


def line_chart(
    path: Path, curves: Sequence[Curve], *, title: str, x_label: str, y_label: str, x_names: Sequence[str] = ()
) -> None:
    """Write curves with a legend line each. `x_names` stand at x = 0, 1, 2, ... instead of numbers."""
    xs = [x for curve in curves for x, _ in curve.points] if not x_names else [0.0, len(x_names) - 1.0]
    ys = [y for curve in curves for _, y in curve.points]
    low, high = min(ys), max(ys)
    room = max(0.08 * (high - low), 0.5)
    low = max(0.0, low - room) if low >= 0 else low - room
    x, y = _axis(min(xs), max(xs), LEFT + 14, RIGHT - 14), _axis(low, high + room, HEIGHT, TOP)
    parts = [_text(LEFT, 20, title, size=14, weight=600)]
    for tick in nice_ticks(low, high + room, 6):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f} H{RIGHT}" stroke="#e2e3de"/>')
        parts.append(_text(LEFT - 7, y(tick) + 4, number(tick), anchor="end"))
    named = {float(at): label for at, label in enumerate(x_names)}
    named = named or {tick: number(tick) for tick in nice_ticks(min(xs), max(xs), 8)}
    parts += [_text(x(at), HEIGHT + 18, label, anchor="middle") for at, label in named.items()]
    parts.append(f'<path d="M{LEFT} {HEIGHT} H{RIGHT}" stroke="#5d6570"/>')
    parts.append(_text((LEFT + RIGHT) / 2, HEIGHT + 38, x_label, anchor="middle"))
    middle = (TOP + HEIGHT) / 2
    turned = f' transform="rotate(-90 15 {middle})"'
    parts.append(_text(15, middle, y_label, anchor="middle", more=turned))
    for place, curve in enumerate(curves):
        colour = COLOURS[place % len(COLOURS)]
        drawn = [(x(a), y(b)) for a, b in curve.points]
        parts.append(_line(drawn, colour, 1.6))
        if curve.strong is not None:
            first, last = curve.strong
            parts.append(_line([(x(a), y(b)) for a, b in curve.points if first <= a <= last], colour, 5))
        if curve.dots:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>' for a, b in drawn]
        beside = HEIGHT + 62 + LINE * place
        parts.append(f'<path d="M{LEFT} {beside - 4} h22" stroke="{colour}" stroke-width="3"/>')
        parts.append(_text(LEFT + 30, beside, curve.label))
    _write(path, parts, HEIGHT + 62 + LINE * len(curves))


def scatter(
    path: Path, points: Sequence[Point], groups: Sequence[int], names: Sequence[str], colours: Sequence[str], title: str
) -> None:
    """Write points without axes, coloured by group; `names` and `colours` are those of groups 0, 1, 2, ...

    Both axes have the same scale. The legend names the groups that occur, three a line.
    """
    side = RIGHT - LEFT
    lows = [min(p[i] for p in points) for i in (0, 1)]
    reach = max(max(p[i] for p in points) - lows[i] for i in (0, 1)) or 1.0
    parts = [_text(LEFT, 20, title, size=14, weight=600)]
    parts.append(f'<rect x="{LEFT}" y="{TOP}" width="{side}" height="{side}" fill="none" stroke="#c9cbc4"/>')
    for (a, b), group in zip(points, groups, strict=True):
        at = (LEFT + 10 + (a - lows[0]) / reach * (side - 20), TOP + side - 10 - (b - lows[1]) / reach * (side - 20))
        parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="3" fill="{colours[group]}" fill-opacity="0.75"/>')
    there = sorted(set(groups))
    for place, group in enumerate(there):
        beside, below = LEFT + (place % 3) * side / 3, TOP + side + 24 + LINE * (place // 3)
        parts.append(f'<circle cx="{beside + 5:.1f}" cy="{below - 4}" r="5" fill="{colours[group]}"/>')
        parts.append(_text(beside + 16, below, f"{names[group]} ({list(groups).count(group)})"))
    _write(path, parts, TOP + side + 24 + LINE * ((len(there) + 2) // 3))


@dataclass(frozen=True)
class _Axis:
    """Maps values to drawing units."""

    low: float
    start: float
    slope: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.slope


def _axis(low: float, high: float, start: float, end: float) -> _Axis:
    """low..high onto start..end; one value alone stands in the middle."""
    return _Axis(low, start, (end - start) / (high - low)) if high > low else _Axis(low, (start + end) / 2, 0.0)


def _line(points: Sequence[Point], colour: str, width: float) -> str:
    path = " L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    return f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: int = 400, more: str = ""
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"{more}>'
        f"{escape(text)}</text>"
    )


def _write(path: Path, parts: Sequence[str], height: float) -> None:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="Helvetica, Arial, sans-serif" fill="#1d2127">'
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>'
    )
    path.write_text("\n".join([head, *parts, "</svg>\n"]), encoding="utf-8")
