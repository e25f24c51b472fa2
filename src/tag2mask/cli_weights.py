"""The commands below `tag2mask weights`. Everything heavy is imported inside them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Pre-trained weights: where they are from, and their conversion.", no_args_is_help=True)


@app.command("ls")
def ls(as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False) -> None:
    """The published weights that recipes name: file, backbone, address, checksum, licence."""
    from tag2mask.backbones import PUBLISHED

    rows = [asdict(published) for published in PUBLISHED]
    lines = [f"{row['file']}\n" + "\n".join(f"    {key:<9} {row[key]}" for key in row if key != "file") for row in rows]
    typer.echo(json.dumps(rows, indent=1) if as_json else "\n".join(lines))


@app.command("convert")
def convert(
    file: Annotated[Path, typer.Argument(help="ResNet38 as an MXNet .params file, or any .pth file.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Write weights as safetensors, with the names that our backbones read."""
    from tag2mask.backbones import convert_weights

    typer.echo(f"{convert_weights(file, out)} tensors in {out}")
