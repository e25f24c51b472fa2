"""A run beside others: the spread over seeds, the run without methods, the segmenter that a few masks buy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

from tag2mask.report.plots import Line, Mark, Plot, Tick, nice_ticks
from tag2mask.report.results import describe
from tag2mask.report.summary import Compared, FewMasks, Result, RunSummary
from tag2mask.report.words import count, percent


@dataclass(frozen=True)
class Spread:
    """Some values of one score, in points: the mean, the standard deviation from two values on, each with its seeds."""

    mean: float
    deviation: float | None
    each: list[tuple[str, str]]

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f} (n={len(self.each)})")


@dataclass(frozen=True)
class BesideRow:
    """One score of this run: over the runs that differ in the seed, over those without methods, and the difference."""

    what: str
    unit: str
    of: str
    split: str
    runs: Spread
    plain: Spread | None
    difference: str


@dataclass(frozen=True)
class FewPlot:
    """mIoU over the number of true masks; `equal` says how many buy as much as the tags did.

    `once`: whether each point is a single training.
    """

    plot: Plot
    equal: str
    tags: str
    points: list[tuple[str, str]]
    once: bool


def beside_rows(summary: RunSummary) -> list[BesideRow]:
    """A row for every score that was measured."""
    found = []
    for compared in summary.compared:
        runs = spread(compared.runs)
        if runs is None:
            continue
        plain, result = spread(compared.plain), compared.runs[0]
        gain = "" if plain is None else f"{runs.mean - plain.mean:+.1f}"
        unit = "mAP" if result["kind"] == "classifier" else "mIoU"
        what = describe(result, summary.stages)
        found.append(BesideRow(what, unit, result["of"], result["split"], runs, plain, gain.replace("-", "−")))
    return found


def class_rows(summary: RunSummary) -> tuple[str, list[tuple[str, str, str, str]]]:
    """(whose, rows of class, IoU with methods, without, difference) of the last masks that both have; means of runs."""
    pairs = [c for c in summary.compared if c.plain and c.runs[0]["kind"] != "classifier" and c.runs[0].get("iou")]
    if not pairs:
        return "", []
    last = pairs[-1]
    rows = []
    for name in last.runs[0]["iou"]:
        ours, plain = (_class_mean(results, name) for results in (last.runs, last.plain))
        gain = "" if ours is None or plain is None else f"{100 * (ours - plain):+.1f}".replace("-", "−")
        rows.append((name, percent(ours), percent(plain), gain))
    return f"{describe(last.runs[0], summary.stages)} · {last.runs[0]['of']} · {last.runs[0]['split']}", rows


def worth_showing(compared: Sequence[Compared]) -> bool:
    """Whether anything stands beside this run."""
    return any(len(c.runs) > 1 or c.plain for c in compared)


def spread(results: Sequence[Result]) -> Spread | None:
    """Of the main number of results; None where none has it."""
    pairs = [(str(r.get("seed", "")), r.get("map" if r["kind"] == "classifier" else "miou")) for r in results]
    known = [(seed, 100 * value) for seed, value in pairs if value is not None]
    if not known:
        return None
    values = [value for _, value in known]
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, [(seed, f"{v:.1f}") for seed, v in known])


def few_plot(few: FewMasks | None) -> FewPlot | None:
    """The curve, with the tags' segmenter as a horizontal line."""
    if few is None or not few.points:
        return None
    means = [(masks, fmean(values)) for masks, values in few.points]
    left, right, top, bottom = 40, 468, 12, 244
    first, last = math.log(means[0][0]), math.log(means[-1][0])
    high = min(1.0, max([few.tags, *(value for _, value in means)]) * 1.15)

    def x(masks: float) -> float:
        return left + (right - left) * ((math.log(masks) - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / high

    path = "M" + " L".join(f"{x(masks):.1f} {y(value):.1f}" for masks, value in means)
    across = f"M{left} {y(few.tags):.1f} L{right} {y(few.tags):.1f}"
    crossing, equal = equal_masks(few)
    marks = [Mark(x(masks), y(value), "", False, drop=False) for masks, value in means]
    if crossing is not None:
        marks.append(Mark(x(crossing), y(few.tags), f"{equal} masks", end=x(crossing) > 300))
    plot = Plot(
        title="few masks",
        description=f"mIoU of the segmenter over the number of true masks, from {percent(means[0][1])} % with "
        f"{means[0][0]} to {percent(means[-1][1])} % with {means[-1][0]}; tags alone give {percent(few.tags)} %.",
        width=480,
        height=288,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        lines=[Line("tags alone", "second", across), Line("true masks", "first", path)],
        x_ticks=[Tick(x(masks), count(masks)) for masks, _ in means],
        y_ticks=[Tick(y(v / 100), f"{v:g}") for v in nice_ticks(0, 100 * high, 5)],
        x_label="true masks, on a logarithmic axis",
        marks=marks,
    )
    points = [(count(masks), _points(values)) for masks, values in few.points]
    once = all(len(values) == 1 for _, values in few.points)
    return FewPlot(plot, f"{equal} masks", percent(few.tags), points, once)


def equal_masks(few: FewMasks) -> tuple[float | None, str]:
    """(number of masks at which the curve first reaches the tags' mIoU, the same in words); None outside the curve.

    Between two measured numbers of masks, mIoU is taken to be linear in their logarithm.
    """
    means = [(masks, fmean(values)) for masks, values in few.points]
    if means[0][1] >= few.tags:
        exactly = means[0][1] == few.tags
        return (float(means[0][0]), f"about {means[0][0]}") if exactly else (None, f"fewer than {means[0][0]}")
    for (low, below), (high, above) in pairwise(means):
        if below < few.tags <= above:
            share = (few.tags - below) / (above - below)
            found = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
            return found, f"about {round(found)}"
    return None, f"more than {means[-1][0]}"


def _points(values: Sequence[float]) -> str:
    deviation = f" ± {100 * stdev(values):.1f} (n={len(values)})" if len(values) > 1 else ""
    return f"{percent(fmean(values))}{deviation}"


def _class_mean(results: Sequence[Result], name: str) -> float | None:
    known = [value for r in results if (value := (r.get("iou") or {}).get(name)) is not None]
    return fmean(known) if known else None
