"""The commands below `tag2mask export`. Everything heavy is imported inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Masks in the forms that others read.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Masks in the forms that others read."""


@app.command("voc-server")
def voc_server(
    masks: Annotated[Path, typer.Argument(help="Folder of index masks, or a predict-... folder.")],
    out: Annotated[Path, typer.Argument(help="The archive to write, ending in .tar.gz.")],
    root: Annotated[Path, typer.Option(help="PASCAL VOC 2012, with the images and the list of the set.")],
    images: Annotated[Literal["test", "val"], typer.Option(help="Which set the masks are of.")] = "test",
    competition: Annotated[
        Literal["comp5", "comp6"], typer.Option(help="comp5: learnt from VOC alone. comp6: other data, ImageNet too.")
    ] = "comp6",
) -> None:
    """Pack masks for the VOC 2012 evaluation server and check that it would take them."""
    from tag2mask.export.voc_server import export_voc_server

    count = export_voc_server(masks, out, root, images=images, competition=competition)
    typer.echo(f"{count:,} masks in {out}, checked")
