"""`tag2mask table`. Everything heavy is imported inside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

WIDE = 1000  # characters: one line per number, whatever there is to say about it


def table(
    data: Annotated[Literal["voc12", "coco14"], typer.Argument(help="The benchmark.")],
    work: Annotated[
        list[Path] | None,
        typer.Option(help="Where recipes were run; give several, one per seed, for means and spreads. Default: work."),
    ] = None,
    paper: Annotated[Literal["PPC", "RCM+MAM", "HSC", "RCA", "CPAL"] | None, typer.Option(help="One alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, for scripts.")] = False,
) -> None:
    """Our numbers beside those of the papers, table by table; blank where nothing was run."""
    from tag2mask import compare, tables

    works = work if work else [path for path in (Path("work"),) if path.is_dir()]
    lines = compare.comparison(data, works, paper)
    typer.echo(json.dumps(lines, indent=1) if as_json else tables.rows(compare.shown(lines), width=WIDE))
