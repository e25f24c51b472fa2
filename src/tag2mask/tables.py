"""What the command line prints: results, stages, what there is - as plain values (for --json) and as text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tag2mask import collect, progress, schema
from tag2mask import recipe as recipes
from tag2mask.baselines import BASELINES
from tag2mask.errors import UserError
from tag2mask.methods import METHODS
from tag2mask.pipeline import MANIFEST, read_json
from tag2mask.predicting import Prediction
from tag2mask.refine import AFFINITY_NETS, BOUNDARY_NETS
from tag2mask.runner import Run
from tag2mask.segment import SEGMENTERS
from tag2mask.stages import STAGES
from tag2mask.stages.cost import Cost, cost_of, typical_size
from tag2mask.stages.labels import MASKS

Row = Mapping[str, Any]
NUMBERS = ("%", "paper %", "ours %", "seconds", "result", "iou", "precision", "recall")
RIGHT = (*NUMBERS, "GPU", "CPU", "disk")  # columns that stand to the right


def outcome(run: Run, report: Path) -> dict[str, Any]:
    """What a finished run is about: its results, and where masks, model and report are."""
    record = collect.find_record(run.work, run.recipe.name)
    return {
        "results": collect.results(run.work, record),
        "supervision": collect.supervision(run.work, record),
        "masks": [str(folder / "masks") for kind in MASKS for folder in run.folders(kind)],
        "models": [str(folder) for folder in run.folders("segment")],
        "report": str(report),
    }


def outcome_text(found: Mapping[str, Any]) -> str:
    """The result table and the paths, for people."""
    lines = [rows([_result_row(result) for result in found["results"]])]
    lines += [f"learnt from {', '.join(found['supervision'])}"]
    lines += [f"masks   {path}" for path in found["masks"]]
    lines += [f"model   {path}" for path in found["models"]]
    return "\n".join([*lines, f"report  {found['report']}"])


def _result_row(result: Row) -> Row:
    if result["kind"] == "classifier":
        measured, value = "tag scores, mean AP", result.get("map")
    else:
        measured, value = {"maps": "CAM seeds, mIoU"}.get(result["kind"], "masks, mIoU"), result.get("miou")
    note = result.get("skipped", "")
    if "threshold" in result:
        note = f"threshold {result['threshold']:.2f} ({result['threshold_by']})"
        if tried := result.get("thresholds"):
            note += f", best of {tried['first']:g}..{tried['last']:g} step {tried['step']:g}"
    shown = "-" if value is None else f"{100 * value:.1f}"
    where = f"{result['split']}, {result['images']} images"
    return {"stage": result["stage"], "measured": measured, "of": result["of"], "%": shown, "on": where, "note": note}


def planned(run: Run, *, tflops: float | None) -> list[Row]:
    """Every stage of a prepared run, and what is to do will take if a GPU does `tflops` 1e12 operations a second.

    Seconds on the GPU, of other work on one core, and bytes that stay; nothing of it if `tflops` is None.
    """
    found: list[Row] = [
        {"stage": s.name, "do": s.kind, "state": s.state(run.work), "folder": s.folder(run.work).name}
        for s in run.stages
    ]
    if tflops is None:
        return found
    progress.say("counting what the networks compute")
    size = typical_size(run.source)
    steps = zip(run.stages, found, strict=True)
    costs = [Cost() if row["state"] == "done" else cost_of(stage, run.source, size) for stage, row in steps]
    return [
        {**row, "gpu_seconds": c.flops / tflops / 1e12, "cpu_seconds": c.cpu_seconds, "bytes": c.disk}
        for row, c in zip(found, costs, strict=True)
    ]


def plan_text(stages: Sequence[Row], tflops: float) -> str:
    """`planned` as text."""
    if "bytes" not in stages[0]:
        return rows(stages)
    columns = {"GPU": ("gpu_seconds", _duration), "CPU": ("cpu_seconds", _duration), "disk": ("bytes", _size)}
    table = []
    for row in [*stages, _sum(stages)]:
        plain = {key: row[key] for key in ("stage", "do", "state", "folder")}
        table.append(plain | {title: show(row[key]) for title, (key, show) in columns.items()})
    return f"{rows(table)}\nGPU: networks at {tflops:g} TFLOP/s (--tflops); CPU: other work, on one core. Estimates."


def _sum(stages: Sequence[Row]) -> Row:
    names = ("gpu_seconds", "cpu_seconds", "bytes")
    return {"stage": "together", "do": "", "state": "", "folder": ""} | {n: sum(s[n] for s in stages) for n in names}


def _duration(seconds: float) -> str:
    if seconds < 0.5:
        return "-"
    unit, name = next((u, n) for u, n in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= u or u == 1)
    return f"{seconds / unit:.{1 if unit > 1 else 0}f} {name}"


def _size(count: float) -> str:
    return "-" if count < 1 else f"{count / 2**20:.1f} MB" if count < 2**30 else f"{count / 2**30:.1f} GB"


def status(work: Path, name: str | None) -> list[Row]:
    """State, time and device of every stage of a run, and its main number. Raises UserError if there is no run."""
    record = collect.find_record(work, name)
    numbers = {r["stage"]: r.get("miou", r.get("map")) for r in collect.results(work, record)}
    found: list[Row] = []
    for stage, entry in record["stages"].items():
        folder = work / entry["folder"]
        manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
        number = numbers.get(stage)
        found.append(
            {
                "stage": stage,
                "state": "done" if manifest else "partial" if folder.exists() else "to do",
                "seconds": manifest.get("seconds"),
                "result": None if number is None else round(100 * number, 1),
                "folder": entry["folder"],
            }
        )
    return found


def available() -> dict[str, dict[str, str]]:
    """Names and first lines of everything a recipe can name."""
    sections: dict[str, Mapping[str, Callable[..., Any]]] = {
        "data": recipes.SOURCES,
        "baselines": BASELINES,
        "methods": METHODS,
        "affinities": {**AFFINITY_NETS, **BOUNDARY_NETS},
        "segmenters": SEGMENTERS,
        "stages": {name: kind.function for name, kind in STAGES.items()},
    }
    there = {"recipes": recipes.built_in()}
    return there | {title: {n: _first_line(c) for n, c in table.items()} for title, table in sections.items()}


def describe(name: str) -> dict[str, Any]:
    """A recipe's text, a component's documentation and settings, or both where they share the name.

    Raises UserError for an unknown name.
    """
    found: dict[str, Any] = {"name": name}
    if name in recipes.names():
        found["text"] = recipes.load_text(name).rstrip()
    everything: dict[str, Callable[..., Any]] = {
        **recipes.SOURCES, **BASELINES, **METHODS, **AFFINITY_NETS, **BOUNDARY_NETS, **SEGMENTERS,
        **{stage: kind.function for stage, kind in STAGES.items()},
    }  # fmt: skip
    if name not in everything and "text" in found:
        return found
    if name not in everything:
        known = dict.fromkeys([*everything, *recipes.names()])
        raise UserError(f"nothing is called {name!r}; {schema.meant(name, known)}")
    component = everything[name]
    settings = [
        {
            "setting": key,
            "type": _type_name(field.type),
            "default": "required" if field.required else repr(field.default),
        }
        for key, field in schema.fields(component).items()
    ]
    texts = [*([found["text"]] if "text" in found else []), inspect.getdoc(component) or ""]
    return found | {"text": "\n\n".join(texts), "settings": settings}


def description(found: Mapping[str, Any]) -> str:
    """`describe` as text."""
    return f"{found['text']}\n\n{rows(found['settings'])}" if found.get("settings") else str(found["text"])


def per_class(scores: Mapping[str, Any]) -> str:
    """IoU, precision and recall of each class, and the mean IoU."""
    table = [
        {"class": name, **{key: _percent(scores[key][name]) for key in ("iou", "precision", "recall")}}
        for name in scores["iou"]
    ]
    return f"{rows(table)}\nmean IoU {_percent(scores['miou'])} over {scores['images']} images"


def prediction(found: Prediction) -> str:
    """Share of each class, speed, and where everything is."""
    table = [
        {"class": row["class"], "%": f"{100 * row['pixels']:.1f}", "in images": row["images"]} for row in found.classes
    ]
    speed = "all there already"
    if found.images_per_second is not None:
        kept = f", {found.images - found.made:,} there already" if found.made < found.images else ""
        speed = f"{found.images_per_second:.2g} images/s on {found.device}{kept}"
    where = [f"{found.images:,} masks in {found.masks}"]
    where += [f"pictures in {found.overlays}"] if found.overlays else []
    where += [f"probabilities in {found.scores}"] if found.scores else []
    found_none = found.images > 0 and not any(row["images"] for row in found.classes[1:])
    note = "\nno class in any image: the segmenter may have learnt too little, see its report" if found_none else ""
    return f"{rows(table)}\n{speed}\n{', '.join(where)}{note}"


def summary(found: Mapping[str, Any]) -> str:
    """A data set's summary as text."""
    lines = []
    for key, value in found.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        lines.append(f"{key:<12} {shown}")
    return "\n".join(lines)


def sections(there: Mapping[str, Mapping[str, str]]) -> str:
    """Titled lists of names and what they are."""
    return "\n".join(
        f"{title}\n" + "".join(f"  {name:<22} {line}\n" for name, line in entries.items())
        for title, entries in there.items()
        if entries
    ).rstrip()


def rows(table: Sequence[Row], *, width: int = 200) -> str:
    """A table with the keys of the first row as its head; what is wider than `width` characters is wrapped."""
    if not table:
        return "nothing"
    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for key in table[0]:
        drawn.add_column(key, justify="right" if key in RIGHT else "left")
    for row in table:
        drawn.add_row(*("-" if value is None else str(value) for value in row.values()))
    console = Console(file=StringIO(), width=width, highlight=False, markup=False)
    console.print(drawn)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in printed.splitlines())


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _first_line(component: Callable[..., Any]) -> str:
    return (inspect.getdoc(component) or "").split("\n")[0]


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
