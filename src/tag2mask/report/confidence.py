"""How clearly the soft maps speak, class by class, as rows of a table with a small box plot each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tag2mask.report.results import describe
from tag2mask.report.summary import RunSummary
from tag2mask.report.words import DASH, count, percent


@dataclass(frozen=True)
class ConfidenceRow:
    """One class. `box` are the 10, 25, 50, 75 and 90 % quantiles of its map in its region, in 0..100; empty if none."""

    name: str
    images: str
    box: list[float]
    spoken: str
    lead: str
    doubtful: str
    tag_score: str
    iou: str


def confidence_rows(summary: RunSummary) -> list[ConfidenceRow]:
    """A row per class, the least clear one first; classes without an image last."""
    if summary.confidence is None:
        return []
    scores = summary.tags.medians if summary.tags else {}
    masks = [r for r in summary.results if r["kind"] == "masks" and describe(r, summary.stages) == "Pseudo-masks"]
    iou = (masks[-1].get("iou") or {}) if masks else {}
    rows = []
    by_class = summary.confidence.classes.items()
    for name, found in sorted(by_class, key=lambda item: math.inf if math.isnan(item[1].lead) else item[1].lead):
        box = [round(100 * q, 1) for q in found.quantiles] if found.pixels else []
        rows.append(
            ConfidenceRow(
                name=name,
                images=count(found.images),
                box=box,
                spoken=f"median {box[2]:.0f}, half between {box[1]:.0f} and {box[3]:.0f}" if box else "no region",
                lead=_number(found.lead),
                doubtful=percent(None if math.isnan(found.doubtful) else found.doubtful),
                tag_score=percent(scores.get(name)),
                iou=percent(iou.get(name)),
            )
        )
    return rows


def _number(value: float) -> str:
    return DASH if math.isnan(value) else f"{value:.2f}"
