"""The commands below `tag2mask analyse`. Everything heavy is imported inside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tag2mask.errors import UserError

if TYPE_CHECKING:
    from tag2mask.engine import Devices

app = typer.Typer(help="Figures and diagnostics of the papers, from finished runs.", no_args_is_help=True)

Work = Annotated[Path, typer.Argument(help="The folder that was used as --work.")]
Name = Annotated[str | None, typer.Option(help="Of which recipe, if several were run there.")]
Stage = Annotated[str | None, typer.Option(help="Which stage, if the recipe has several; the last one by default.")]
Out = Annotated[Path | None, typer.Option(help="Where pictures and numbers are written. Default: WORK/analysis.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Compute on the CPU, even if there is a GPU.")]
Workers = Annotated[int, typer.Option(min=0, help="Threads that load images.")]


@app.callback()
def _group() -> None:
    """Figures and diagnostics of the papers, from finished runs."""


@app.command()
def scales(
    work: Work,
    scales: Annotated[str, typer.Option(help="Factors on the images' size, separated by commas.")] = "0.5,1,1.5,2",
    name: Name = None, stage: Stage = None, out: Out = None, cpu: Cpu = False, workers: Workers = 2,
) -> None:  # fmt: skip
    """Seeds of every single scale of the images, their mean and spread (RCM and MAM, table 5)."""
    from tag2mask.analyse import scales as room
    from tag2mask.analyse.work import open_work, out_folder

    factors = _numbers(scales)
    run, folder = open_work(work, name), out_folder(work, out)
    found = room.scale_table(run, folder, scales=factors, devices=_devices(cpu), stage=stage, workers=workers)
    _tell(room.table(found), folder, ["scales.svg", "scales.json"])


@app.command()
def thresholds(
    works: Annotated[list[Path], typer.Argument(metavar="WORK...", help="The folders that were used as --work.")],
    runs: Annotated[
        bool, typer.Option("--runs", help="Several runs over the one setting in which they differ.")
    ] = False,
    name: Name = None,
    out: Out = None,
) -> None:
    """The mIoU of seeds over all background scores; with --runs, results over the setting in which runs differ."""
    from tag2mask.analyse import sensitivity
    from tag2mask.analyse import thresholds as room
    from tag2mask.analyse.work import out_folder

    if runs:
        folder = out_folder(works[0], out)
        _tell(
            sensitivity.table(sensitivity.sensitivity(works, folder, name=name)),
            folder,
            ["sensitivity.svg", "sensitivity.json"],
        )
        return
    if len(works) > 1:
        raise UserError("thresholds: takes one work folder; add --runs to compare several")
    folder = out_folder(works[0], out)
    found = room.threshold_curves(works[0], folder, name=name)
    _tell(room.table(found), folder, ["thresholds.svg", "thresholds.json"])


@app.command()
def prototypes(
    work: Work,
    image: Annotated[str, typer.Option(help="Name of an image as in the data: a/0001, without its ending.")],
    class_: Annotated[str | None, typer.Option("--class", help="One class; all tags of the image by default.")] = None,
    most: Annotated[int, typer.Option(min=1, help="Prototypes of a class that are shown.")] = 10,
    name: Name = None, stage: Stage = None, out: Out = None, cpu: Cpu = False,
) -> None:  # fmt: skip
    """Which pixels are like which prototype (RCA, figure 3; CPAL, figure 5a)."""
    from tag2mask.analyse import prototypes as room
    from tag2mask.analyse.work import open_work, out_folder

    run, folder = open_work(work, name), out_folder(work, out)
    found = room.prototype_maps(
        run, folder, image=image, devices=_devices(cpu), only=class_, most=most, stage=stage
    )  # fmt: skip
    picture = Path(found["picture"])
    _tell(room.table(found, most), folder, [picture.name, picture.with_suffix(".json").name])


@app.command()
def embedding(
    work: Work,
    of: Annotated[Literal["instances", "pixels"], typer.Option(help="A point for each image and tag, or pixels.")] = (
        "instances"
    ),
    features: Annotated[
        Literal["last", "projected", "aligned"],
        typer.Option(help="What the classifier reads; or z of CPAL, or z + delta."),
    ] = "last",
    regions: Annotated[Literal["cam", "truth"], typer.Option(help="Which pixels are a class's.")] = "cam",
    above: Annotated[float, typer.Option(min=0, max=1, help="Least value of a map in its region.")] = 0.3,
    split: Annotated[Literal["train", "score", "test"], typer.Option(help="Of which images.")] = "score",
    images: Annotated[int, typer.Option(min=1, help="At most so many images.")] = 500,
    points: Annotated[int, typer.Option(min=5, help="At most so many points.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawing of pixels and of the t-SNE.")] = 0,
    name: Name = None, stage: Stage = None, out: Out = None, cpu: Cpu = False, workers: Workers = 2,
) -> None:  # fmt: skip
    """Features of tagged classes as a t-SNE, and how compact they are (CPAL, figure 3)."""
    from tag2mask.analyse import embedding as room
    from tag2mask.analyse.work import open_work, out_folder

    run, folder = open_work(work, name), out_folder(work, out)
    choice = room.Choice(
        of=of, features=features, regions=regions, above=above, split=split, images=images, points=points, seed=seed
    )
    found = room.embedding(run, folder, choice=choice, devices=_devices(cpu), stage=stage, workers=workers)
    _tell(room.table(found), folder, ["embedding.svg", "embedding.json"])


@app.command()
def compare(
    work1: Annotated[Path, typer.Argument(help="The folder that was used as --work of the first run.")],
    work2: Annotated[Path, typer.Argument(help="That of the second run, on the same data.")],
    images: Annotated[int, typer.Option(min=1, help="Rows of the picture.")] = 8,
    name: Name = None, stage: Stage = None, out: Out = None, workers: Workers = 2,
) -> None:  # fmt: skip
    """Maps of two runs side by side, with the scores of each image."""
    from tag2mask.analyse import compare as room
    from tag2mask.analyse.work import open_work, out_folder

    folder = out_folder(work1, out)
    found = room.compare(
        open_work(work1, name), open_work(work2, name), folder, stage=stage, images=images, workers=workers
    )
    _tell(room.table(found), folder, ["compare.png", "compare.json"])


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--scales {text}: must be numbers separated by commas, e.g. 0.5,1,1.5,2") from None


def _devices(cpu: bool) -> Devices:
    from tag2mask.engine import Devices

    return Devices("cpu" if cpu else "auto")


def _tell(table: Sequence[Mapping[str, Any]], folder: Path, files: Sequence[str]) -> None:
    """The table and the paths, for people."""
    from tag2mask import tables

    typer.echo("\n".join([tables.rows(table), *(str(folder / file) for file in files)]))
