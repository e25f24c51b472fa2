"""`tag2mask check` and the commands below `tag2mask tags`. Everything heavy is imported inside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(help="Tags: look them over, count them, bring them into our form.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of images, searched with its sub-folders.")]
Tags = Annotated[
    Path | None,
    typer.Option(
        help="Tags: one-hot CSV, image,tags CSV, JSON, or from labelme, Label Studio, CVAT, COCO or Hugging Face. "
        "Without it the names of the sub-folders are the tags."
    ),
]
Classes = Annotated[str | None, typer.Option(help="Class names in order, separated by commas.")]
List = Annotated[Path | None, typer.Option("--list", help="Text file: images to train on. Default: all but --test.")]
Score = Annotated[Path | None, typer.Option(help="Text file: training images whose masks are scored. Default: all.")]
Test = Annotated[Path | None, typer.Option(help="Text file: images kept for testing the segmenter.")]
Truth = Annotated[Path | None, typer.Option("--masks", help="Folder of true masks (index PNG), used only for scoring.")]
Saliency = Annotated[
    Path | None, typer.Option(help="Folder of saliency maps (grey images), for baselines that need them.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, for scripts.")]
Given = Annotated[Path, typer.Argument(help="File or folder with tags, in any form that --tags takes.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the images: tags are brought to their names.")]
Shapes = Annotated[bool, typer.Option("--shapes", help="labelme, Label Studio: labels of shapes are tags, too.")]


@app.callback()
def _group() -> None:
    """Tags: look them over, count them, bring them into our form."""


@app.command()
def check(
    folder: Folder,
    tags: Tags = None, classes: Classes = None, list_: List = None, score: Score = None, test: Test = None,
    truth: Truth = None, saliency: Saliency = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Look a folder and its tags over: every fault in one report, or what there is."""
    from tag2mask import tables
    from tag2mask.data import folder as folders

    given = folder_settings(tags, classes, list_, score, test, truth, saliency)
    source = folders.Folder(images=str(folder), **{key: value for key, value in given.items() if value is not None})
    source.check()
    summary = source.summary()
    typer.echo(json.dumps(summary, indent=1) if as_json else tables.summary(summary))


@app.command()
def convert(
    tags: Given,
    out: Annotated[Path, typer.Argument(help="File to write, .csv or .json; it must not exist.")],
    images: Images = None, classes: Classes = None,
    form: Annotated[
        Literal["one-hot", "names", "json"] | None,
        typer.Option(help="one-hot (0 and 1 by class, the default for .csv), names (image,tags) or json."),
    ] = None,
    shapes: Shapes = False,
    legacy_npy: Annotated[
        bool, typer.Option("--legacy-npy", help="The tags are a pickled cls_labels.npy; only arrays are read from it.")
    ] = False,
) -> None:  # fmt: skip
    """Write tags of any form as a table or JSON of our own; nothing is overwritten."""
    from tag2mask.data.tag_formats import read_converted, write_tags
    from tag2mask.data.tag_formats.writing import check_target

    check_target(out, form)
    table = read_converted(tags, names_of(classes), images, shapes=shapes, legacy_npy=legacy_npy)
    write_tags(table, out, form)
    for note in table.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{len(table.rows):,} images, {len(table.classes)} classes in {out}")


@app.command()
def stats(
    tags: Given, images: Images = None, classes: Classes = None, shapes: Shapes = False, as_json: AsJson = False
) -> None:
    """Count: images, images by class, which classes come together, tags per image, images without any."""
    from tag2mask import tables
    from tag2mask.data.tag_formats import read_converted
    from tag2mask.data.tag_stats import class_rows, tag_stats

    found = tag_stats(read_converted(tags, names_of(classes), images, shapes=shapes))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    shown = {key: value for key, value in found.items() if key not in ("classes", "notes")}
    shown["mean_tags"] = f"{found['mean_tags']:.2f}"
    shown["tags_per_image"] = ", ".join(f"{count} with {size}" for size, count in found["tags_per_image"].items())
    for note in found.get("notes", ()):
        typer.echo(f"note: {note}", err=True)
    typer.echo("\n".join(f"{key.replace('_', ' '):<15} {value}" for key, value in shown.items()))
    typer.echo("\n" + tables.rows(class_rows(found)))


def names_of(classes: str | None) -> list[str] | None:
    """The names in --classes."""
    return [name.strip() for name in classes.split(",")] if classes else None


def folder_settings(
    tags: Path | None,
    classes: str | None,
    list_: Path | None,
    score: Path | None,
    test: Path | None,
    truth: Path | None,
    saliency: Path | None,
) -> dict[str, Any]:
    """The options of `masks` and `check` as arguments of data.folder.Folder."""
    paths = {"tags": tags, "list": list_, "score": score, "test": test, "masks": truth, "saliency": saliency}
    found: dict[str, Any] = {key: None if path is None else str(path) for key, path in paths.items()}
    return found | {"classes": names_of(classes)}
