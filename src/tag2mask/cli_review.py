"""The command `tag2mask review`. Everything heavy is imported inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def review(
    work: Annotated[Path, typer.Argument(help="The folder that was used as --work.")] = Path("work"),
    name: Annotated[str | None, typer.Option(help="Of which recipe, if several were run there.")] = None,
    stage: Annotated[str | None, typer.Option(help="Which stage of masks; default: the last one.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes any free one.")] = 8765,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in your browser.")] = False,
) -> None:
    """A page on which you walk through the masks, move thresholds, and accept, reject or flag each."""
    import webbrowser

    from tag2mask.errors import Interrupted
    from tag2mask.review.server import ReviewServer
    from tag2mask.review.session import open_review

    with open_review(work, name, stage) as session, ReviewServer(session, port) as server:
        typer.echo(server.address)
        typer.echo("Ctrl-C stops it; every decision is stored at once, the same command goes on.", err=True)
        if browser:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except Interrupted:
            counts = session.counts()
            typer.echo(", ".join(f"{number:,} {decision}" for decision, number in counts.items()), err=True)
