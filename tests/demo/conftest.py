"""The command line in this very process, where a process of its own would take too long."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator

import pytest
from commands import Drawn, Outcome, draw

from tag2mask import cli


@pytest.fixture
def tag2mask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Outcome]]:
    """`tag2mask("status", work)`: the same, but in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["tag2mask", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return Outcome(int(left.value.code or 0), said.out, said.err)

    try:
        yield run
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def drawn_once(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Drawn once, to be copied or only read."""
    return draw(tmp_path_factory.mktemp("drawn"))
