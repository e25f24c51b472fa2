"""Decodes every file of a data set once, remembers what was seen, and skips files that have not changed since."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from tag2mask.data.images import Undecodable, decode, grey16, indices, rgb
from tag2mask.progress import bar

Role: TypeAlias = Literal["image", "mask", "map"]
File: TypeAlias = tuple[Role, Path]

VERSION = 1  # of the cache; a change of what is looked at needs a new one


@dataclass(frozen=True)
class Facts:
    """What one decoded file holds. `values` are the distinct numbers in a mask; `peak` is the largest value of a
    picture stored with 16 bits, 0 for all others. `height` and `width` are those after EXIF rotation.
    """

    digest: str
    height: int
    width: int
    values: tuple[int, ...] = ()
    peak: int = 0


def verify(files: Iterable[File], cache: Path | None, show: bool) -> tuple[dict[File, Facts], dict[File, str]]:
    """Facts about every file that decodes, and for the others the reason why not.

    A file whose size and modification time are those in `cache` is not read. The cache is written in the end, also
    when interrupted, so that no file is decoded twice; damaged files are not in it and are tried again.
    """
    known = _load(cache) if cache else {}
    facts: dict[File, Facts] = {}
    broken: dict[File, str] = {}
    stamps: dict[File, tuple[int, int]] = {}
    for file in dict.fromkeys(files):
        try:
            status = file[1].stat()
        except OSError as reason:
            broken[file] = f"cannot be opened ({reason.strerror or reason})"
            continue
        stamps[file] = (status.st_size, status.st_mtime_ns)
        if (seen := known.get(_key(file))) and seen[0] == stamps[file]:
            facts[file] = seen[1]
    todo = [file for file in stamps if file not in facts]
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # decoding releases the interpreter lock
    try:
        with bar("checking", total=len(todo), show=show) as advance:
            for file, result in zip(todo, pool.map(_look, todo), strict=True):
                if isinstance(result, Facts):
                    facts[file] = result
                else:
                    broken[file] = result
                advance()
    finally:
        pool.shutdown(cancel_futures=True)
        if cache and todo:
            known |= {_key(file): (stamps[file], facts[file]) for file in todo if file in facts}
            _save(cache, known)
    return facts, broken


def _look(file: File) -> Facts | str:
    role, path = file
    try:
        data = path.read_bytes()
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        picture = decode(data)
        if role == "mask":
            values = tuple(np.flatnonzero(np.bincount(indices(picture).ravel())).tolist())
            return Facts(digest, picture.height, picture.width, values)
        rgb(picture)
        peak = int(grey16(picture).max()) if picture.mode.startswith("I;16") else 0
        return Facts(digest, picture.height, picture.width, peak=peak)
    except Undecodable as reason:
        return str(reason)
    except OSError as reason:
        return f"cannot be opened ({reason.strerror or reason})"


Cache: TypeAlias = dict[str, tuple[tuple[int, int], Facts]]


def _key(file: File) -> str:
    return f"{file[0]}:{file[1].absolute()}"


def _load(cache: Path) -> Cache:
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            return {}
        return {
            key: ((entry.pop("size"), entry.pop("mtime_ns")), Facts(**(entry | {"values": tuple(entry["values"])})))
            for key, entry in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # no cache yet, or not ours: everything is looked at again


def _save(cache: Path, known: Cache) -> None:
    files = {key: {"size": size, "mtime_ns": mtime, **asdict(facts)} for key, ((size, mtime), facts) in known.items()}
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(f"{cache.name}.{os.getpid()}.part")
    partial.write_text(json.dumps({"version": VERSION, "files": files}), encoding="utf-8")
    partial.replace(cache)
