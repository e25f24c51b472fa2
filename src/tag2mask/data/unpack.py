"""Unpacks an archive that was downloaded: never outside its folder, and only what is not there yet."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from tag2mask import progress
from tag2mask.errors import UserError

MEGABYTE = 1_000_000


def unpack(archive: Path, folder: Path, *, show: bool = True) -> int:
    """Unpack a .zip or a .tar (also .tgz, .tar.gz) into `folder`; returns the number of files in it.

    A file that is there with the right size is left alone, so that an interrupted call can be made again. Only plain
    files are written: links and devices are passed over.
    Raises UserError with one line for a damaged archive, and for one with a name that leads out of `folder`.
    """
    try:
        members = _zipped if archive.suffix == ".zip" else _tarred
        return _unpack(members, archive, folder, show)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as reason:
        said = " ".join(str(reason).split())
        raise UserError(f"{archive}: is damaged ({said}); delete it and download it again") from None


# (name, size in bytes, its content to be read, share of the archive that is done by then, in megabytes)
Member = tuple[str, int, Callable[[], IO[bytes]], int]


def _unpack(members: Callable[[Path], Iterator[Member]], archive: Path, folder: Path, show: bool) -> int:
    count, shown = 0, 0
    total = archive.stat().st_size // MEGABYTE
    with progress.bar(f"unpacking {archive.name}, MB", total, 0, show) as advance:
        for name, size, content, done in members(archive):
            target = _inside(folder, name, archive)
            count += 1
            if not (target.is_file() and target.stat().st_size == size):
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f".{target.name}.part")
                with content() as source, part.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                os.replace(part, target)
            advance(min(done, total) - shown)
            shown = min(done, total)
    return count


def _zipped(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as opened:
        read = 0
        for entry in opened.infolist():
            read += entry.compress_size
            link = entry.external_attr >> 16 & 0o170000 == 0o120000
            if not entry.is_dir() and not link:
                yield entry.filename, entry.file_size, partial(opened.open, entry), read // MEGABYTE


def _tarred(archive: Path) -> Iterator[Member]:
    with archive.open("rb") as file, tarfile.open(fileobj=file, mode="r:*") as opened:
        for entry in opened:
            if entry.isreg():
                yield entry.name, entry.size, partial(_plain, opened, entry), file.tell() // MEGABYTE


def _plain(opened: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    content = opened.extractfile(entry)
    assert content is not None  # a plain file has content
    return content


def _inside(folder: Path, name: str, archive: Path) -> Path:
    """Where a member goes. Raises UserError if that is not inside the folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0].startswith("/") or ":" in parts[0]:
        raise UserError(f"{archive}: holds {name!r}, which leads out of {folder}; do not trust it, get another one")
    return folder.joinpath(*parts)
