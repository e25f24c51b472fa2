"""The command line. Everything heavy is imported inside the commands, so that --help is instant."""

from __future__ import annotations

import errno
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tag2mask import cli_analyse, cli_data, cli_export, cli_review, cli_table, cli_tags, cli_weights
from tag2mask.cli_tags import Classes, Folder, List, Saliency, Score, Tags, Test, Truth, check, folder_settings
from tag2mask.errors import Interrupted, UserError

if TYPE_CHECKING:
    from tag2mask.runner import Options, Run

app = typer.Typer(
    name="tag2mask",
    help="From image-level tags to segmentation masks, and from masks to a trained segmenter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_analyse.app, name="analyse")
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_export.app, name="export")
app.add_typer(cli_tags.app, name="tags")
app.add_typer(cli_weights.app, name="weights")
app.command()(cli_review.review)
app.command()(cli_table.table)

Work = Annotated[
    Path, typer.Option("--work", help="Folder for everything a run makes; the same command resumes in it.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="KEY=VALUE", help="Change a setting, e.g. classify.train.lr=0.02"),
]
DeviceName = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to compute.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes (training) and threads (inference) that load images.")]
SaveEvery = Annotated[int, typer.Option(min=1, help="Optimiser steps between checkpoints.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, for scripts.")]
Backbone = Annotated[str | None, typer.Option(help="Any timm model, e.g. resnet50; or resnet38.")]
Weights = Annotated[
    str | None, typer.Option(help='"hub" (download), a .safetensors or .pth file, or "none" (from scratch).')
]
Epochs = Annotated[float | None, typer.Option(help="Passes over the images when training the classifier.")]


@app.command()
def demo(
    work: Work = Path("work"), set_: Set = None, device: DeviceName = "auto", workers: Workers = 2,
    save_every: SaveEvery = 200, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run everything on the built-in scenes: tags -> CAMs -> masks -> segmenter -> report, in minutes on a CPU."""
    _run("demo", set_ or [], work, _options(device, workers, save_every), as_json)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe (see `tag2mask ls`) or a YAML file.")],
    set_: Set = None, work: Work = Path("work"), device: DeviceName = "auto", workers: Workers = 2,
    save_every: SaveEvery = 200, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Carry out a recipe. Finished stages are skipped, a stopped one goes on, a changed one gets a new folder."""
    _run(recipe, set_ or [], work, _options(device, workers, save_every), as_json)


@app.command()
def masks(
    folder: Folder,
    tags: Tags = None, classes: Classes = None, list_: List = None, score: Score = None, test: Test = None,
    truth: Truth = None, saliency: Saliency = None,
    backbone: Backbone = None, weights: Weights = None, epochs: Epochs = None,
    recipe: Annotated[str, typer.Option(help="The recipe for folders, built-in or a YAML file.")] = "folder",
    set_: Set = None, work: Work = Path("work"), device: DeviceName = "auto", workers: Workers = 2,
    save_every: SaveEvery = 200, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Masks for your tagged images, and a segmenter for those without tags."""
    from tag2mask import api

    data = folder_settings(tags, classes, list_, score, test, truth, saliency)
    network = api.network_overrides(recipe, backbone=backbone, weights=weights, epochs=epochs)
    loaded = api.folder_recipe(folder, data, [*network, *(set_ or [])], recipe=recipe)
    _run(loaded, [], work, _options(device, workers, save_every), as_json)


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A work folder, one of its segment-... folders, or an .onnx file.")],
    images: Annotated[
        list[str], typer.Argument(help='Folders, images, or quoted patterns ("in/**/*.jpg"); no tags are needed.')
    ],
    out: Annotated[Path, typer.Option(help="Where masks/ (and overlays/, scores/) are written.")] = Path("predicted"),
    overlays: Annotated[bool, typer.Option(help="Also write pictures of the masks over the images.")] = True,
    soft: Annotated[
        bool, typer.Option("--soft", help="Also write the probabilities: .npz, 2 bytes per pixel and class.")
    ] = False,
    crf: Annotated[Literal["psa", "irn", "deeplab"] | None, typer.Option(help="Refine masks with a dense CRF.")] = None,
    device: DeviceName = "auto",
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Masks of untagged images by a trained segmenter. The same command goes on where it was stopped."""
    from tag2mask import api, tables

    found = api.predict(model, images, out, overlays=overlays, soft=soft, crf=crf, device=device, workers=workers)
    if api.is_main_process():
        typer.echo(json.dumps(asdict(found), indent=1) if as_json else tables.prediction(found))


@app.command()
def evaluate(
    predicted: Annotated[Path, typer.Argument(help="Folder of index masks (PNG).")],
    truth: Annotated[Path, typer.Argument(help="Folder of true index masks; each must have a predicted one.")],
    classes: Annotated[str, typer.Option(help="Class names in order, separated by commas; mask value 1 is the first.")],
    as_json: AsJson = False,
) -> None:
    """Compare two folders of index masks: mean IoU, and IoU, precision and recall of each class."""
    from tag2mask import api, tables

    scores = api.evaluate(predicted, truth, [c.strip() for c in classes.split(",")])
    typer.echo(json.dumps(scores, indent=1) if as_json else tables.per_class(scores))


@app.command()
def report(
    work: Annotated[Path, typer.Argument(help="The folder that was used as --work.")] = Path("work"),
    name: Annotated[str | None, typer.Option(help="Of which recipe, if several were run there.")] = None,
    with_: Annotated[
        list[Path] | None, typer.Option("--with", help="Another work folder whose runs stand beside this one.")
    ] = None,
) -> None:
    """Write the page of a run again and print its path."""
    from tag2mask import api

    typer.echo(api.write_report(work, name, beside=with_ or []))


@app.command()
def few_masks(
    work: Annotated[Path, typer.Argument(help="The folder that was used as --work.")] = Path("work"),
    counts: Annotated[str, typer.Option(help="How many true masks, separated by commas.")] = "5,10,20,50",
    name: Annotated[str | None, typer.Option(help="Of which recipe, if several were run there.")] = None,
    device: DeviceName = "auto", workers: Workers = 2, save_every: SaveEvery = 200,
) -> None:  # fmt: skip
    """How many masks would buy as much: a run's segmenter, trained on few true masks; the curve goes into its page."""
    from tag2mask import api

    numbers = [int(word) if word.strip().isdecimal() else 0 for word in counts.split(",")]
    typer.echo(api.few_masks(work, numbers, name, options=_options(device, workers, save_every)))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe or a YAML file.")],
    set_: Set = None, work: Work = Path("work"), as_json: AsJson = False,
    cost: Annotated[bool, typer.Option(help="Estimate time and disk, which goes through every network once.")] = True,
    tflops: Annotated[float, typer.Option(min=0.001, help="Speed assumed for the GPU, 1e12 operations/s.")] = 15,
) -> None:  # fmt: skip
    """Check a recipe and its data and show what would be run and what it would take, without running it."""
    from tag2mask import api, tables

    prepared = api.prepare(api.load(recipe, set_ or []), work)
    stages = tables.planned(prepared, tflops=tflops if cost else None)
    typer.echo(json.dumps(stages, indent=1) if as_json else tables.plan_text(stages, tflops))


@app.command()
def status(
    work: Annotated[Path, typer.Argument(help="The folder that was used as --work.")] = Path("work"),
    name: Annotated[str | None, typer.Option(help="Of which recipe, if several were run there.")] = None,
    as_json: AsJson = False,
) -> None:
    """How far a run is: its stages, their state, time and results."""
    from tag2mask import tables

    state = tables.status(work, name)
    typer.echo(json.dumps(state, indent=1) if as_json else tables.rows(state))


app.command()(check)


@app.command()
def ls(as_json: AsJson = False) -> None:
    """What there is: recipes, baselines, methods, segmenters, stages."""
    from tag2mask import tables

    there = tables.available()
    typer.echo(json.dumps(there, indent=1) if as_json else tables.sections(there))


@app.command()
def describe(
    name: Annotated[str, typer.Argument(help="A recipe, baseline, method, segmenter or stage.")],
    as_json: AsJson = False,
) -> None:
    """What something is, and all its settings with their defaults."""
    from tag2mask import tables

    found = tables.describe(name)
    typer.echo(json.dumps(found, indent=1) if as_json else tables.description(found))


def _options(device: Literal["auto", "cpu", "cuda", "mps"], workers: int, save_every: int) -> Options:
    from tag2mask.runner import Options

    return Options(device, workers, save_every)


def _run(recipe: Any, overrides: list[str], work: Path, options: Options, as_json: bool) -> None:
    from tag2mask import api, tables

    done: Run = api.run(recipe, overrides, work=work, options=options)
    if not api.is_main_process():
        return
    outcome = tables.outcome(done, api.write_report(work, done.recipe.name))
    typer.echo(json.dumps(outcome, indent=1) if as_json else tables.outcome_text(outcome))


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, an interruption says how to go on."""
    signal.signal(signal.SIGINT, lambda *_: _interrupt(130))
    signal.signal(signal.SIGTERM, lambda *_: _interrupt(75))
    try:
        app(prog_name="tag2mask")
    except UserError as fault:
        print(f"tag2mask: {fault}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"tag2mask: {stop}", file=sys.stderr)
        sys.exit(stop.code)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as fault:
        if fault.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"tag2mask: {fault}; make room or give access, and the same command goes on from here", file=sys.stderr)
        sys.exit(2)


def _interrupt(code: int) -> None:
    raise Interrupted(code)


if __name__ == "__main__":
    main()
