"""Line plots as geometry: paths, ticks and marks in drawing units. The template turns them into inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tag2mask.report.summary import Result, TrainingCurve
from tag2mask.report.words import how_chosen, number, percent

MAX_POINTS = 400  # more do not show at this size and only make the page heavy


@dataclass(frozen=True)
class Tick:
    """A position along an axis and the number that stands there."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """`path` is the SVG path; `style` the CSS class that gives colour and width."""

    label: str
    style: str
    path: str


@dataclass(frozen=True)
class Mark:
    """A dot at (x, y), with a line down to the axis if `drop`.

    Its label, if any, starts there, or ends there where `end` is set.
    """

    x: float
    y: float
    label: str
    end: bool
    drop: bool = True


@dataclass(frozen=True)
class Plot:
    """One plot of `width` x `height` units; its axes span left..right and top..bottom."""

    title: str
    description: str
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_label: str = ""
    marks: Sequence[Mark] = ()


@dataclass(frozen=True)
class Used:
    """One threshold in use: its value, how it was chosen, the mIoU there and the points lost against the best."""

    threshold: str
    how: str
    miou: str
    lost: str


@dataclass(frozen=True)
class ThresholdPlot:
    """The curve of one set of maps and what to read off it; `plateau` is where mIoU is within 1 point of the best."""

    plot: Plot
    title: str
    best: str
    best_threshold: str
    plateau: tuple[str, str]
    used: list[Used]


class _Scale:
    """Maps values in low..high to units in start..end."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.start = low, start
        self.slope = (end - start) / ((high - low) or 1.0)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.slope


def threshold_plots(results: Sequence[Result]) -> list[ThresholdPlot]:
    """One plot per set of maps that was evaluated with a curve, however many thresholds were tried on it."""
    same: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result["kind"] == "maps" and len(_pairs(*_curve(result, "miou"))) > 1:
            same.setdefault((result["of"], result["split"]), []).append(result)
    return [_threshold_plot(tried, f"{of} on “{split}”") for (of, split), tried in same.items()]


def _threshold_plot(tried: Sequence[Result], title: str) -> ThresholdPlot:
    points = _pairs(*_curve(tried[-1], "miou"))
    best_threshold, best = max(points, key=lambda point: point[1])
    plateau = [t for t, value in points if value >= best - 0.01]
    left, right, top, bottom = 40, 468, 12, 244
    x, y = _Scale(points[0][0], points[-1][0], left, right), _Scale(0, 1, bottom, top)
    series = (("precision", "precision", "second"), ("recall", "recall", "third"), ("miou", "mIoU", "first"))
    lines = [Line(label, style, _path(_pairs(*_curve(tried[-1], key)), x, y)) for key, label, style in series]
    known = [r for r in tried if r.get("threshold") is not None and r.get("miou") is not None]
    # One label only, that of the threshold that can be had in practice: several would run into each other.
    named = ([r for r in known if r.get("threshold_by") != "oracle"] or known)[-1:]
    furthest = max((r["threshold"] for r in known), default=0.0)
    plot = Plot(
        title=title,
        description=f"mIoU, precision and recall over the background threshold; mIoU is largest at "
        f"{number(best_threshold)}, with {percent(best)} %.",
        width=480,
        height=288,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        lines=lines,
        x_ticks=[Tick(x(v), f"{v:.1f}") for v in nice_ticks(points[0][0], points[-1][0], 6)],
        y_ticks=[Tick(y(v / 100), str(v)) for v in range(0, 101, 20)],
        x_label="background threshold",
        marks=[
            Mark(
                x=x(r["threshold"]),
                y=y(r["miou"]),
                label=f"{number(r['threshold'])}: {percent(r['miou'])} %" if any(r is n for n in named) else "",
                end=x(r["threshold"]) > 300 or (r["threshold"] < furthest and x(r["threshold"]) > 140),
            )
            for r in known
        ],
    )
    return ThresholdPlot(
        plot=plot,
        title=title,
        best=percent(best),
        best_threshold=number(best_threshold),
        plateau=(number(plateau[0]), number(plateau[-1])),
        used=[
            Used(
                threshold=number(r["threshold"]),
                how=how_chosen(r.get("threshold_by", "")),
                miou=percent(r["miou"]),
                lost=percent(best - r["miou"]) if best - r["miou"] >= 0.0005 else "",
            )
            for r in known
            if r.get("threshold_by") != "oracle"
        ],
    )


def _curve(result: Result, key: str) -> tuple[Sequence[float | None], Sequence[float | None]]:
    """(thresholds, values) of a result's curve; empty without one."""
    curve = result.get("curve") or {}
    return (curve["threshold"], curve[key]) if key in curve else ((), ())


def training_plots(curve: TrainingCurve) -> list[Plot]:
    """One small plot per loss (and the learning rate last), over steps: the values and their running mean."""
    names = [name for row in curve.rows for name in row if name not in ("step", "epoch", "lr", "seconds")]
    ordered = [*dict.fromkeys(names), "lr"]
    return [plot for name in ordered if (plot := _training_plot(curve.rows, name)) is not None]


def _training_plot(rows: Sequence[Mapping[str, Any]], name: str) -> Plot | None:
    points = _pairs([row.get("step") for row in rows], [row.get(name) for row in rows])
    if len(points) < 2:
        return None
    smooth = points if name == "lr" else _running_mean(points, window=max(1, len(points) // 20))
    left, right, top, bottom = 44, 252, 8, 112
    low, high = min(v for _, v in points), max(v for _, v in points)
    low = 0.0 if 0 <= low < 0.5 * high else low
    x = _Scale(points[0][0], points[-1][0], left, right)
    y = _Scale(low, high, bottom, top)
    lines = [Line("mean", "first", _path(smooth, x, y))]
    if smooth is not points:
        lines.insert(0, Line("raw", "raw", _path(points, x, y)))
    return Plot(
        title="learning rate" if name == "lr" else name,
        description=f"{name} from {number(points[0][1])} at step {number(points[0][0])} to {number(smooth[-1][1])} at "
        f"step {number(points[-1][0])}.",
        width=264,
        height=136,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        lines=lines,
        x_ticks=[Tick(x(v), number(v)) for v in (points[0][0], points[-1][0])],
        y_ticks=[Tick(y(v), number(v)) for v in nice_ticks(low, high, 4)],
    )


def _pairs(xs: Sequence[float | None], ys: Sequence[float | None]) -> list[tuple[float, float]]:
    """The points where both numbers exist and are finite."""
    pairs = zip(xs, ys, strict=True)
    return [(x, y) for x, y in pairs if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)]


def _running_mean(points: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """The mean over up to `window` points on each side."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    result = []
    for i, (at, _) in enumerate(points):
        first, last = max(0, i - window), min(len(points), i + window + 1)
        result.append((at, (sums[last] - sums[first]) / (last - first)))
    return result


def _path(points: list[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    stride = math.ceil(len(points) / MAX_POINTS)
    kept = points[::stride] + ([points[-1]] if (len(points) - 1) % stride else [])
    return "M" + " L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in kept) if kept else ""


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within low..high."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
