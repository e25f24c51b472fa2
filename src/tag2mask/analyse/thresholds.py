"""How much seeds depend on the background score: mIoU over all thresholds that a run tried, and its plateau."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tag2mask.analyse.svg import Curve, line_chart
from tag2mask.collect import find_record, results
from tag2mask.errors import UserError
from tag2mask.pipeline import write_json

POINT = 0.01  # of mIoU: what counts as the same


def threshold_curves(work: Path, out: Path, *, name: str | None = None) -> list[dict[str, Any]]:
    """One entry for every finished evaluate_maps stage of a run; writes thresholds.json and thresholds.svg.

    Returns [{"stage", "of", "split", "threshold", "threshold_by", "miou", "plateau": [first, last], "width", "curve":
    [(threshold, mIoU)]}]; see `plateau`. Raises UserError if the run has no such curve.
    """
    record = find_record(work, name)
    found = []
    for result in results(work, record):
        curve = result.get("curve", {})
        pairs = zip(curve.get("threshold", ()), curve.get("miou", ()), strict=True)
        points = [(float(t), float(v)) for t, v in pairs if v is not None]
        if points:
            threshold, best, first, last = plateau(points)
            head = {key: result[key] for key in ("stage", "of", "split", "threshold_by")}
            numbers = {"threshold": threshold, "miou": best, "plateau": [first, last], "width": round(last - first, 8)}
            found.append(head | numbers | {"curve": points})
    if not found:
        raise UserError(
            f"{work}: run {record['name']!r} has no finished evaluate_maps stage with truth; add one to the recipe"
        )
    write_json(out / "thresholds.json", found)
    lines = [
        Curve(
            f"{e['stage']} ({e['of']} on {e['split']}): {100 * e['miou']:.1f} % at {e['threshold']:g}, "
            f"within 1 point from {e['plateau'][0]:g} to {e['plateau'][1]:g}",
            [(t, 100 * v) for t, v in e["curve"]],
            strong=(e["plateau"][0], e["plateau"][1]),
        )
        for e in found
    ]
    title = f"{record['title']}: background scores"
    line_chart(out / "thresholds.svg", lines, title=title, x_label="background score", y_label="mIoU, %")
    return found


def plateau(points: Sequence[tuple[float, float]]) -> tuple[float, float, float, float]:
    """(best threshold, its mIoU, first and last threshold of the plateau) of a curve of (threshold, mIoU).

    The plateau is what is tried without a gap around the best threshold and loses at most 1 point of mIoU against it.
    """
    best = max(range(len(points)), key=lambda i: points[i][1])
    first = last = best
    least = points[best][1] - POINT
    while first > 0 and points[first - 1][1] >= least:
        first -= 1
    while last + 1 < len(points) and points[last + 1][1] >= least:
        last += 1
    return points[best][0], points[best][1], points[first][0], points[last][0]


def table(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for people."""
    return [
        {
            "stage": e["stage"], "of": e["of"], "on": e["split"], "mIoU, %": f"{100 * e['miou']:.1f}",
            "at": f"{e['threshold']:g}", "within 1 point": f"{e['plateau'][0]:g} to {e['plateau'][1]:g}",
            "width": f"{e['width']:g}",
        }
        for e in found
    ]  # fmt: skip
