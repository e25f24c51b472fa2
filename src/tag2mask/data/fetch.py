"""Downloads one file: goes on where it stopped, checks size and checksum, and says what to do without a network."""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO

from tag2mask import progress
from tag2mask.errors import UserError

MEGABYTE = 1_000_000
CHUNK = 1 << 18
TRIES = 5  # in a row without a byte
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # not the network's fault


@dataclass(frozen=True)
class Remote:
    """A file on the web: its address, its size in bytes, its checksum as "sha256:..." or "md5:..."."""

    url: str
    size: int
    digest: str

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.url.rpartition("/")[2]


def fetch(remote: Remote, folder: Path, *, show: bool = True, pause: float = 2.0) -> Path:
    """The file in `folder`, downloaded if it is not there, checked in any case.

    What has arrived is kept as <name>.part, and the next call asks for the rest only. A connection that breaks is
    made again after `pause` seconds, up to TRIES times without progress.
    Raises UserError with one line: no way to the address (and what to put where instead), a file of another size or
    checksum, no room.
    """
    target, part = folder / remote.name, folder / f"{remote.name}.part"
    if target.exists():
        _verify(target, remote, f"replace {target}", show)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.exists() else 0
    if done > remote.size:
        part.unlink()
        done = 0
    room = shutil.disk_usage(folder).free
    if room < remote.size - done:
        short = f"{room // MEGABYTE:,} MB free, {(remote.size - done) // MEGABYTE:,} MB needed"
        raise UserError(f"{folder}: no room for {remote.name} ({short}); make room or give another folder")
    if done < remote.size:
        _download(remote, part, done, show, pause)
    try:
        _verify(part, remote, "run the same command again to download it anew", show)
    except UserError:
        part.unlink()
        raise
    part.replace(target)
    return target


def _download(remote: Remote, part: Path, done: int, show: bool, pause: float) -> None:
    failures, reason = 0, ""
    with progress.bar(f"{remote.name}, MB", _megabytes(remote.size), _megabytes(done), show) as advance:
        while done < remote.size:
            before = done
            try:
                with _ask(remote, done) as answer:
                    done = _start(answer, remote, done)
                    with part.open("r+b" if done else "wb") as file:
                        file.truncate(done)
                        file.seek(done)
                        while chunk := answer.read(CHUNK):
                            file.write(chunk)
                            done += len(chunk)
                            advance(_megabytes(done) - _megabytes(done - len(chunk)))
            except (HTTPException, OSError) as fault:
                if getattr(fault, "errno", None) in DISK:
                    raise
                reason = str(fault) or type(fault).__name__
                if isinstance(fault, urllib.error.HTTPError) and fault.code < 500:
                    raise UserError(f"{remote.url}: {reason}; {_by_hand(remote, part)}") from None
            failures = 0 if done > before else failures + 1
            if failures >= TRIES:
                raise UserError(f"{remote.url}: cannot be reached ({reason}); {_by_hand(remote, part)}")
            if done < remote.size:
                time.sleep(pause)


def _ask(remote: Remote, done: int) -> HTTPResponse:
    request = urllib.request.Request(remote.url, headers={"User-Agent": "tag2mask"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    answer: HTTPResponse = urllib.request.urlopen(request, timeout=60)
    return answer


def _start(answer: HTTPResponse, remote: Remote, done: int) -> int:
    """The place at which the answer begins: `done`, or 0 from a server that sends the whole file anyway.

    Raises UserError if it is another file.
    """
    partial = re.match(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    start = int(partial[1]) if answer.status == 206 and partial else 0
    length = answer.headers.get("Content-Length")
    size = int(partial[2]) if start and partial else int(length or remote.size)
    if size != remote.size or start not in (0, done):
        raise UserError(f"{remote.url}: gives a file of {size:,} bytes, expected {remote.size:,}; try another address")
    return start


def _verify(path: Path, remote: Remote, remedy: str, show: bool) -> None:
    size, (kind, _, wanted) = path.stat().st_size, remote.digest.partition(":")
    if size != remote.size:
        raise UserError(f"{path}: has {size:,} bytes, expected {remote.size:,}; {remedy}")
    found = _checksum(path, kind, show)
    if found != wanted:
        raise UserError(f"{path}: has the {kind} checksum {found}, expected {wanted}; {remedy}")


def _checksum(path: Path, kind: str, show: bool) -> str:
    counted, size = hashlib.new(kind, usedforsecurity=False), path.stat().st_size
    file: BinaryIO
    with path.open("rb") as file, progress.bar(f"checking {path.name}, MB", _megabytes(size), 0, show) as advance:
        done = 0
        while chunk := file.read(1 << 22):
            counted.update(chunk)
            done += len(chunk)
            advance(_megabytes(done) - _megabytes(done - len(chunk)))
    return counted.hexdigest()


def _by_hand(remote: Remote, part: Path) -> str:
    return (
        f"without a network, put {remote.name} ({remote.size:,} bytes, {remote.digest}) into {part.parent} by hand and "
        f"run the same command again"
    )


def _megabytes(size: int) -> int:
    return size // MEGABYTE
