"""Renders a run as one self-contained HTML file: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from tag2mask.report import words
from tag2mask.report.advice import advice
from tag2mask.report.areas import area_table
from tag2mask.report.beside import beside_rows, class_rows, few_plot, worth_showing
from tag2mask.report.confidence import confidence_rows
from tag2mask.report.data import data_view
from tag2mask.report.gallery import gallery
from tag2mask.report.plots import threshold_plots, training_plots
from tag2mask.report.results import cards, class_table, describe, result_rows
from tag2mask.report.summary import RunSummary
from tag2mask.report.suspicions import pictured, strong

_TEMPLATES = ("page.html.jinja", "parts.html.jinja", "trust.html.jinja", "page.css")


def render(summary: RunSummary, path: Path) -> None:
    """Writes the page to `path` (UTF-8). The file appears whole or not at all; missing folders are made.

    All text of the summary is escaped: class and file names are the user's.
    """
    folder = resources.files("tag2mask.report")
    loader = DictLoader({name: (folder / name).read_text("utf-8") for name in _TEMPLATES})
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for word in ("percent", "number", "count", "duration", "memory", "moment"):
        environment.filters[word] = getattr(words, word)
    page = environment.get_template(_TEMPLATES[0]).render(context(summary))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def context(summary: RunSummary) -> dict[str, Any]:
    """What the template is given: the summary and everything computed from it."""
    measured = {describe(r, summary.stages) for r in summary.results if r.get("miou") is not None}
    return {
        "run": summary,
        "cards": cards(summary),
        "results": [row for row in result_rows(summary) if row.what != "Classifier"],
        "seeds": any(result.get("seed") is not None for result in summary.results),
        "oracle": any(result.get("threshold_by") == "oracle" for result in summary.results),
        "gallery": gallery(summary.gallery),
        "colours": {name: f"rgb({r} {g} {b})" for name, (r, g, b) in summary.legend.items()},
        "thresholds": threshold_plots(summary.results),
        "by_class": class_table(summary),
        "areas": area_table(summary),
        "advice": advice(summary),
        "beside": beside_rows(summary),
        "class_gains": class_rows(summary),
        "some_beside": worth_showing(summary.compared),
        "confidence": confidence_rows(summary),
        "suspects": pictured(summary.tags),
        "suspect_images": len({s.image for s in strong(summary.tags.suspects)}) if summary.tags else 0,
        "few": few_plot(summary.few_masks),
        "can_try_few": {"Pseudo-masks", "Segmenter"} <= measured,
        "trainings": [(curve, plots) for curve in summary.curves if (plots := training_plots(curve))],
        "data": data_view(summary.data),
        "stage_seconds": sum(stage.seconds for stage in summary.stages),
        "settings": [(s, list(words.dotted(s.settings))) for s in summary.stages if s.settings],
    }
