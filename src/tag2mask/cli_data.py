"""The commands below `tag2mask data`. Everything heavy is imported inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Public data sets.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Public data sets."""


@app.command()
def prepare(
    name: Annotated[Literal["voc12", "sbd", "coco14"], typer.Argument(help="sbd adds train_aug to voc12.")],
    root: Annotated[Path, typer.Option(help="Folder to download and unpack into; sbd: the one of voc12.")],
    mirror: Annotated[
        str | None, typer.Option(help="Take the archives from below this address instead of their home.")
    ] = None,
) -> None:
    """Download, check and unpack PASCAL VOC 2012, SBD's train_aug for it, or COCO 2014; goes on where it stopped."""
    from tag2mask.public_data import prepare as make_ready

    typer.echo(make_ready(name, root, mirror=mirror))
