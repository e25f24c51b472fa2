"""Results as cards and tables: which number is the headline, what stands in each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tag2mask.report.summary import Result, RunSummary, StageRow
from tag2mask.report.words import DASH, count, duration, headline_duration, how_chosen, number, percent


@dataclass(frozen=True)
class Card:
    """A headline number: "61.5" "% mIoU", with lines of small print. `value` is empty where nothing was measured."""

    label: str
    value: str
    unit: str
    details: list[str]


@dataclass(frozen=True)
class ResultRow:
    """One line of the table of all results; every entry is text, a dash where it does not apply."""

    what: str
    stage: str
    of: str
    split: str
    images: str
    seed: str
    threshold: str
    how: str
    miou: str
    precision: str
    recall: str
    accuracy: str
    coverage: str
    skipped: str


@dataclass(frozen=True)
class Cell:
    """`value` in percent, `bar` 0..100 for its width, `small` print below; an empty bar where undefined."""

    value: str
    bar: float
    small: str = ""


@dataclass(frozen=True)
class Column:
    """One result in a per-class table: heading, unit, its mean, and a cell per row."""

    title: str
    subtitle: str
    mean: str
    cells: list[Cell]


@dataclass(frozen=True)
class ClassTable:
    """One row per class, one column per result."""

    caption: str
    rows: list[str]
    columns: list[Column]


def describe(result: Result, stages: Sequence[StageRow]) -> str:
    """What a result measures, in the words of the field: classifier, seeds, pseudo-masks or segmenter."""
    if result["kind"] == "classifier":
        return "Classifier"
    if result["kind"] == "maps":
        return "Seeds"
    did = {stage.name: stage.do for stage in stages}.get(result["of"])
    if did in ("segment", "predict") or (did is None and result["split"] == "test"):
        return "Segmenter"
    return "Pseudo-masks"


def cards(summary: RunSummary) -> list[Card]:
    """Seeds, pseudo-masks, segmenter, classifier (the last result of each that saw no truth), then the total time."""
    kinds: dict[str, list[Result]] = {}
    for result in summary.results:
        kinds.setdefault(describe(result, summary.stages), []).append(result)
    order = ("Seeds", "Pseudo-masks", "Segmenter", "Classifier")
    details = [summary.device]
    if summary.stages:
        slowest = max(summary.stages, key=lambda stage: stage.seconds)
        details.append(f"longest: {slowest.name}, {duration(slowest.seconds)}")
    value, unit = headline_duration(summary.seconds)
    return [*(_card(what, kinds[what]) for what in order if what in kinds), Card("Total time", value, unit, details)]


def _card(what: str, results: Sequence[Result]) -> Card:
    result = ([r for r in results if r.get("threshold_by") != "oracle"] or results)[-1]
    where = f"{result['of']}, on {_images(result)}"
    if "skipped" in result:
        coverage = result.get("coverage")
        if coverage is None:
            return Card(what, "", "", [result["skipped"], where])
        told = [f"mIoU not measured: {result['skipped']}", where, *_threshold(result)]
        return Card(what, percent(coverage), "% coverage", told)
    if result["kind"] == "classifier":
        return Card(what, percent(result["map"]), "% mAP", [where])
    details = [where, *_threshold(result)]
    if result.get("threshold") is not None:
        same = [r for r in results if r is not result and (r["of"], r["split"]) == (result["of"], result["split"])]
        oracle = [r for r in same if r.get("threshold_by") == "oracle"]
        details += [f"oracle: {percent(r['miou'])} at {number(r['threshold'])}" for r in oracle[-1:]]
    if result.get("coverage") is not None and result["coverage"] < 0.9995:
        details.append(f"{percent(result['coverage'])} % of the pixels have an answer")
    return Card(what, percent(result["miou"]), "% mIoU", details)


def _threshold(result: Result) -> list[str]:
    """The background score and how it was chosen, if one is known."""
    if result.get("threshold") is None:
        return []
    how = how_chosen(result["threshold_by"], result.get("thresholds"))
    return [f"threshold {number(result['threshold'])}: {how}"]


def _images(result: Result) -> str:
    """ "1 464 images of score", or the split alone where the count is unknown."""
    images = result.get("images")
    return f"{result['split']}" if images is None else f"{count(images)} images of “{result['split']}”"


def result_rows(summary: RunSummary) -> list[ResultRow]:
    """Every result, in pipeline order."""
    rows = []
    for result in summary.results:
        threshold, seed = result.get("threshold"), result.get("seed")
        images = result.get("images")
        rows.append(
            ResultRow(
                what=describe(result, summary.stages),
                stage=result["stage"],
                of=result["of"],
                split=result["split"],
                images=DASH if images is None else count(images),
                seed=DASH if seed is None else str(seed),
                threshold=DASH if threshold is None else number(threshold),
                how="" if threshold is None else result.get("threshold_by", ""),
                miou=percent(result.get("miou")),
                precision=percent(_mean(result.get("precision"))),
                recall=percent(_mean(result.get("recall"))),
                accuracy=percent(result.get("pixel_accuracy")),
                coverage=percent(result.get("coverage")),
                skipped=result.get("skipped", ""),
            )
        )
    return rows


def class_table(summary: RunSummary) -> ClassTable | None:
    """AP of the classifier, IoU with precision and recall of everything else: one row per class, one column per result.

    None if nothing was measured.
    """
    measured = [result for result in summary.results if "skipped" not in result]
    rows = _row_names(measured, ("iou", "ap"))
    columns = []
    for result in measured:
        if result["kind"] == "classifier":
            cells = [_cell(result["ap"].get(name)) for name in rows]
            subtitle, mean = "AP", result["map"]
        else:
            precision, recall = result.get("precision") or {}, result.get("recall") or {}
            cells = [
                _cell(result["iou"].get(name), _precision_recall(precision.get(name), recall.get(name)))
                for name in rows
            ]
            by = result.get("threshold_by", "") if result.get("threshold") is not None else ""
            subtitle, mean = f"IoU · {by}" if by else "IoU", result["miou"]
        title = f"{result['of']} · {result['split']}"
        columns.append(Column(describe(result, summary.stages), f"{title} · {subtitle}", percent(mean), cells))
    small = any(cell.small for column in columns for cell in column.cells)
    caption = "Per class, in percent. P is precision, R recall." if small else "Per class, in percent."
    return ClassTable(caption, rows, columns) if columns else None


def _row_names(results: Sequence[Result], keys: Sequence[str]) -> list[str]:
    """All names below `keys` in the order of first appearance, background in front."""
    names = dict.fromkeys(name for key in keys for result in results for name in result.get(key) or ())
    return sorted(names, key=lambda name: name != "background")


def _cell(value: float | None, small: str = "") -> Cell:
    return Cell(percent(value), 0.0 if value is None else round(100 * value, 1), small)


def _precision_recall(precision: float | None, recall: float | None) -> str:
    return "" if precision is None and recall is None else f"P {percent(precision)}  R {percent(recall)}"


def _mean(values: Mapping[str, float | None] | None) -> float | None:
    """Mean of the defined values of a per-class dictionary."""
    defined = [value for value in (values or {}).values() if value is not None]
    return sum(defined) / len(defined) if defined else None
