"""How much results depend on one setting: several runs that differ in nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tag2mask.analyse.svg import Curve, line_chart
from tag2mask.collect import find_record, results
from tag2mask.errors import UserError
from tag2mask.pipeline import write_json
from tag2mask.report.words import plain

ABSENT = "not there"
SHOWN = 4  # settings that an error names


def sensitivity(works: Sequence[Path], out: Path, *, name: str | None = None) -> dict[str, Any]:
    """The main numbers of several runs over the one setting in which their recipes differ.

    works: their work folders; of each, the newest run is read, or that of recipe `name`. Writes sensitivity.json and
    sensitivity.svg, which shows the mIoUs where there are any. Returns {"setting", "runs": [{"work", "value",
    "numbers": {stage: mIoU or mean AP in 0..1}}]}, by value where all values are numbers, else in the order given.
    Raises UserError for fewer than two runs, and where they differ in no setting or in several.
    """
    if len(works) < 2:
        raise UserError("thresholds --runs: give at least two work folders")
    records = [find_record(work, name) for work in works]
    recipes = [
        dict(leaves(_recipe(work / f"{record['name']}.recipe.yaml")))
        for work, record in zip(works, records, strict=True)
    ]
    setting = only_difference(recipes)
    runs = [
        {"work": str(work), "value": recipe.get(setting, ABSENT), "numbers": _numbers(work, record)}
        for work, record, recipe in zip(works, records, recipes, strict=True)
    ]
    if all(isinstance(run["value"], (int, float)) and not isinstance(run["value"], bool) for run in runs):
        runs.sort(key=lambda run: float(run["value"]))
    stages = list(dict.fromkeys(stage for run in runs for stage in run["numbers"]))
    if not stages:
        raise UserError(f"{works[0]}: no finished evaluation in these runs; run the recipes to their end")
    found = {"setting": setting, "runs": runs}
    write_json(out / "sensitivity.json", found)
    kinds = {stage: entry["kind"] for record in records for stage, entry in record["stages"].items()}
    drawn = [stage for stage in stages if kinds[stage] != "evaluate_classifier"]  # average precision has another range
    lines = [
        Curve(
            stage,
            [(i, 100 * run["numbers"][stage]) for i, run in enumerate(runs) if stage in run["numbers"]],
            dots=True,
        )
        for stage in drawn or stages
    ]
    values, label = [plain(run["value"]) for run in runs], "mIoU, %" if drawn else "mean AP, %"
    title, path = f"Sensitivity to {setting}", out / "sensitivity.svg"
    line_chart(path, lines, title=title, x_label=setting, y_label=label, x_names=values)
    return found


def leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """("classify.train.lr", 0.01) of every setting; lists are values, and so is a group of nothing."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found += leaves(value, f"{prefix}{key}.") if inner else [(f"{prefix}{key}", value)]
    return found


def only_difference(recipes: Sequence[Mapping[str, Any]]) -> str:
    """The key whose value is not the same in all recipes. Raises UserError unless there is exactly one."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    differing = [
        key for key in keys if any(recipe.get(key, ABSENT) != recipes[0].get(key, ABSENT) for recipe in recipes)
    ]
    if not differing:
        raise UserError("thresholds --runs: the recipes of these runs are the same; give runs that differ in a setting")
    if len(differing) > 1:
        more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise UserError(
            f"thresholds --runs: the recipes differ in {', '.join(differing[:SHOWN])}{more}; "
            "give runs that differ in one setting"
        )
    return differing[0]


def table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows for people."""
    stages = dict.fromkeys(stage for run in found["runs"] for stage in run["numbers"])
    rows = []
    for run in found["runs"]:
        numbers = {s: f"{100 * run['numbers'][s]:.1f}" if s in run["numbers"] else None for s in stages}
        rows.append({found["setting"]: plain(run["value"])} | numbers | {"run": run["work"]})
    return rows


def _recipe(path: Path) -> dict[str, Any]:
    """Data and stages of a run's recipe as it was carried out, all defaults written out."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {"data": tree["data"], **tree["stages"]}
    except (OSError, yaml.YAMLError, TypeError, KeyError):
        raise UserError(f"{path}: cannot be read; run the recipe again, finished stages are skipped") from None


def _numbers(work: Path, record: Mapping[str, Any]) -> dict[str, float]:
    found = {result["stage"]: result.get("miou", result.get("map")) for result in results(work, record)}
    return {stage: float(value) for stage, value in found.items() if value is not None}
