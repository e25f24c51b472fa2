"""Our numbers beside those of the papers: what the built-in recipes expect, and what runs in work folders gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tag2mask import collect
from tag2mask import recipe as recipes
from tag2mask.errors import UserError
from tag2mask.papers import PAPERS, Paper, Row
from tag2mask.pipeline import MANIFEST, read_json
from tag2mask.recipe import Recipe
from tag2mask.runner import record_path
from tag2mask.stages.evaluate import RESULT

PLACES = ("root", "cache", "saliency", "masks")  # where data lie does not change what a run is


def comparison(data: str, works: Sequence[Path], paper: str | None = None) -> list[dict[str, Any]]:
    """One entry per number that a built-in recipe on `data` expects, in the order of the papers' tables.

    Each has paper, table, row, recipe, stage, expected (in %), supervision, ours (the mean over the runs in `works`, in
    %, None without a run), spread (the standard deviation, None for fewer than two runs) and runs: work, miou in %,
    split and images it was measured on, threshold, how that was chosen (threshold_by) and from where (thresholds), and
    changed (settings that are not the recipe's, seeds aside).
    Raises UserError for a work folder that is not there.
    """
    missing = [work for work in works if not work.is_dir()]
    if missing:
        raise UserError(f"{missing[0]}: no such folder; give one that was used as --work")
    there = {work.resolve(): work for work in works}.values()
    found: list[dict[str, Any]] = []
    for recipe, its in _of(data, paper):
        made = {work: read_json(record_path(work, recipe.name)) for work in there if _was_run(work, recipe)}
        found += [line for row in its.rows for line in _lines(recipe, its.name, row, made)]
    return sorted(found, key=lambda line: (PAPERS.index(line["paper"]), _natural(line["table"])))


def shown(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same for people: a number is blank where nothing was run."""
    return [
        {
            "paper": line["paper"],
            "table": line["table"],
            "row": line["row"],
            "what": line["stage"],
            "paper %": _printed(line["expected"]),
            "ours %": _number(line),
            "on": "; ".join(dict.fromkeys(f"{run['split']}, {run['images']} images" for run in line["runs"])),
            "threshold": "; ".join(dict.fromkeys(_threshold(run) for run in line["runs"])),
            "supervision": ", ".join(line["supervision"]),
            "recipe": line["recipe"],
            "note": "; ".join(dict.fromkeys(filter(None, map(_note, line["runs"])))),
        }
        for line in lines
    ]


def _of(data: str, paper: str | None) -> Iterator[tuple[Recipe, Paper]]:
    """The built-in recipes on a data set with a paper, this one or any."""
    for name in recipes.names():
        tree = recipes.written(name)
        if tree["data"]["name"] == data and tree.get("paper") and paper in (None, tree["paper"]["name"]):
            recipe = recipes.load(name, ["data.root=."])
            assert recipe.paper is not None
            yield recipe, recipe.paper


def _was_run(work: Path, recipe: Recipe) -> bool:
    """Whether the recipe was run there on its own data, not on somebody's folder."""
    if not record_path(work, recipe.name).exists():
        return False
    return bool(collect.find_record(work, recipe.name)["data"]["name"] == recipe.data["name"])


def _lines(recipe: Recipe, paper: str, row: Row, made: Mapping[Path, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for stage, expected in row.expected.items():
        runs = [run for work, record in made.items() for run in _run(work, record, recipe, stage)]
        values = [run["miou"] for run in runs]
        yield {
            "paper": paper, "table": row.table, "row": row.row, "recipe": recipe.name, "stage": stage,
            "expected": expected, "ours": fmean(values) if values else None,
            "spread": stdev(values) if len(values) > 1 else None,
            "supervision": ["image tags", *recipe.supervision], "runs": runs,
        }  # fmt: skip


def _run(work: Path, record: Mapping[str, Any], recipe: Recipe, stage: str) -> list[dict[str, Any]]:
    """What a run measured in a stage: one entry, or none where that is not finished or had no masks to compare with."""
    entry = record["stages"].get(stage)
    if entry is None or not (work / entry["folder"] / MANIFEST).exists():
        return []
    result = read_json(work / entry["folder"] / RESULT)
    if result.get("miou") is None:
        return []
    measured = {key: result.get(key) for key in ("split", "images", "threshold", "threshold_by", "thresholds")}
    changed = _changed(work, record, recipe, stage)
    return [{"work": str(work), "miou": 100 * result["miou"], **measured, "changed": changed}]


def _changed(work: Path, record: Mapping[str, Any], recipe: Recipe, stage: str) -> list[str]:
    """Settings of the data and of all stages that led to this one which are not the recipe's; seeds may differ."""
    led = [stage]
    for name in led:
        led += [i for i in record["stages"][name]["inputs"].values() if i not in led]
    ours = {f"data.{key}": value for key, value in _flat(record["data"]) if key not in PLACES}
    theirs = {f"data.{key}": value for key, value in _flat(recipe.data) if key not in PLACES}
    for name in (name for name in record["stages"] if name in led):
        entry, own = record["stages"][name], recipe.stages.get(name, {})
        settings = read_json(work / entry["folder"] / MANIFEST)["settings"] | entry["inputs"] | {"do": entry["kind"]}
        ours |= {f"{name}.{key}": value for key, value in _flat(settings)}
        theirs |= {f"{name}.{key}": value for key, value in _flat(own)}
    keys = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key) and not key.endswith(".train.seed")]
    return [f"{key}={ours.get(key)}" for key in keys]


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """("train.lr", 0.1), ...: all leaves as JSON has them; of a file of weights the name counts, not its folder."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        elif key == "weights" and value is not None:
            yield above + key, Path(value).name
        else:
            yield above + key, list(value) if isinstance(value, tuple) else value


def _natural(table: str) -> tuple[int, str]:
    """ "2" before "10"; what is no number comes last."""
    return (int(table), "") if table.isdecimal() else (10**6, table)


def _printed(value: float) -> str:
    """As papers print it, with one or two digits behind the point."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def _number(line: Mapping[str, Any]) -> str:
    if line["ours"] is None:
        return ""
    spread = "" if line["spread"] is None else f" ± {line['spread']:.1f} (n={len(line['runs'])})"
    return f"{line['ours']:.1f}{spread}"


def _note(run: Mapping[str, Any]) -> str:
    return f"with {', '.join(run['changed'])}" if run["changed"] else ""


def _threshold(run: Mapping[str, Any]) -> str:
    """How the background score was chosen, as in the outcome of a run."""
    if run["threshold"] is None:
        return f"by the {run['threshold_by']}"
    text = f"{run['threshold']:.2f} ({run['threshold_by']})"
    tried = run["thresholds"]
    return f"{text}, best of {tried['first']:g}..{tried['last']:g} step {tried['step']:g}" if tried else text
