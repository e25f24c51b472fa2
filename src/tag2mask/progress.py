"""Progress with ETA on a terminal, a plain line now and then everywhere else. Rich is imported only when needed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Advance(Protocol):
    """Call it once per finished item (or with `n` items); `note` is a short text shown beside the bar."""

    def __call__(self, n: int = 1, note: str = "") -> None:
        """Advance by `n` finished items."""


def say(text: str) -> None:
    """One line for people, on stderr, so that stdout stays clean for results."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def bar(label: str, total: int, done: int = 0, show: bool = True) -> Iterator[Advance]:
    """A progress bar of `total` items, `done` of them finished earlier (a resumed run).

    On a terminal: a live bar with ETA. Elsewhere (logs, CI): one line at the start, at most one every 15 seconds,
    one at the end. `show=False` (every process but the first) prints nothing.
    """
    if not show or total <= done:
        yield lambda n=1, note="": None
    elif sys.stderr.isatty():
        yield from _live(label, total, done)
    else:
        yield from _plain(label, total, done)


def track(items: Iterable[T], label: str, total: int, done: int = 0, show: bool = True) -> Iterator[T]:
    """The items, with a progress bar that advances as each is finished."""
    with bar(label, total, done, show) as advance:
        for item in items:
            yield item
            advance()


def _live(label: str, total: int, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, completed=done, note="")

        def advance(n: int = 1, note: str = "") -> None:
            progress.advance(task, n)
            if note:
                progress.update(task, note=note)

        yield advance


def _plain(label: str, total: int, done: int, every: float = 15.0) -> Iterator[Advance]:
    start = last = time.monotonic()
    count, first, latest = done, done, ""
    say(f"{label}: {done}/{total}")

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal count, last, latest
        count, latest, now = count + n, note or latest, time.monotonic()
        if now - last >= every and count < total:
            last = now
            eta = (now - start) / max(count - first, 1) * (total - count)
            say(f"{label}: {count}/{total}, {now - start:.0f} s, eta {eta:.0f} s  {latest}".rstrip())

    yield advance
    say(f"{label}: {count}/{total} in {time.monotonic() - start:.1f} s  {latest}".rstrip())
