"""How much of the images the masks answer, and how much of them each class takes, beside the truth's where it is."""

from __future__ import annotations

from collections.abc import Mapping

from tag2mask.report.results import Cell, ClassTable, Column, describe
from tag2mask.report.summary import Result, RunSummary
from tag2mask.report.words import percent


def area_table(summary: RunSummary) -> ClassTable | None:
    """One row per class, one column per set of masks, the coverage as its foot; None where no masks were counted."""
    counted = [result for result in summary.results if result["kind"] == "masks" and result.get("shares")]
    if not counted:
        return None
    rows = sorted(dict.fromkeys(name for r in counted for name in r["shares"]), key=lambda name: name != "background")
    columns = []
    for result in counted:
        subtitle = f"{result['of']} · {result['split']} · share of pixels"
        cells = [_cell(result, name, in_its_images(summary, result, name)) for name in rows]
        columns.append(Column(describe(result, summary.stages), subtitle, percent(result.get("coverage")), cells))
    small = " ".join(cell.small for column in columns for cell in column.cells)
    below = ["the same in the true masks"] if "truth" in small else []
    below += ["the mean over the images that have the class as a tag"] if "in its images" in small else []
    caption = "Share of each class in the answered pixels, in percent."
    caption += f" Below it {' and '.join(below)}." if below else ""
    return ClassTable(caption, rows, columns)


def in_its_images(summary: RunSummary, result: Result, name: str) -> float | None:
    """The share of a class in the images that are tagged with it, if all images are about the same size.

    Only masks made from tags keep to these images; None for others, and where the number of images is unknown.
    """
    share, images = (result.get("shares") or {}).get(name), result.get("images")
    if share is None or not images or describe(result, summary.stages) != "Pseudo-masks":
        return None
    counts: Mapping[str, int] = (summary.data.get("classes") or {}).get(name) or {}
    tagged = counts.get(result["split"], counts.get("train") if result["split"] == "score" else None)
    splits: Mapping[str, int] = summary.data.get("splits") or {}
    known = splits.get(result["split"]) == images and (result["split"] in counts or splits.get("train") == images)
    return min(1.0, share * images / tagged) if tagged and known else None


def _cell(result: Result, name: str, its: float | None) -> Cell:
    share, truth = result["shares"].get(name), (result.get("truth_shares") or {}).get(name)
    small = [] if truth is None else [f"truth {percent(truth)}"]
    small += [] if its is None else [f"in its images {percent(its)}"]
    return Cell(percent(share), 0.0 if share is None else round(100 * share, 1), "  ".join(small))
