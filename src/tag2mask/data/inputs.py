"""The images that somebody names on a command line: folders, files and patterns, each image under a name of its own."""

from __future__ import annotations

import glob
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from tag2mask.data.images import ENDINGS
from tag2mask.data.names import scan
from tag2mask.errors import UserError

WILD = re.compile(r"[*?\[]")
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")


def find_images(given: Sequence[str | Path], skip: Iterable[Path] = ()) -> dict[str, Path]:
    """Every image that is meant, by name, in the order of people: frame_2 before frame_10.

    given: folders (searched with their sub-folders), files, and patterns with *, ?, [] and ** (any folders). A name has
    no ending and is relative to the folder, or to what stands before the first wildcard; a file is named by itself.
    skip: folders that are not searched.
    Raises UserError if one of them means no image, or if two images would have one name.
    """
    left_out = [path.resolve() for path in skip]
    found: dict[str, Path] = {}
    for written in given:
        for name, path in _meant(written, left_out):
            other = found.setdefault(name, path)
            if other != path and other.resolve() != path.resolve():
                raise UserError(
                    f"{path}: would have the same mask as {other}, {name}.png; "
                    "rename one, or give the folder above both"
                )
    return dict(sorted(found.items(), key=lambda pair: natural(pair[0])))


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key to sort names by, in which numbers count as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def _meant(written: str | Path, skip: Sequence[Path]) -> list[tuple[str, Path]]:
    path = Path(written)
    if path.is_dir():
        images, _ = scan(path, ENDINGS, skip=skip)
        if not images:
            raise UserError(f"{path}: no images here (endings {', '.join(ENDINGS)})")
        return [(name, file) for name, files in images.items() for file in files]
    if path.is_file():
        if path.suffix.lower() in VIDEOS:
            raise UserError(
                f"{path}: is a video; take it apart (ffmpeg -i {path.name} frames/%06d.png) and give the folder"
            )
        if path.suffix.lower() not in ENDINGS:
            raise UserError(f"{path}: is no image that is read (endings {', '.join(ENDINGS)})")
        return [(_name(path, path.parent), path)]
    if WILD.search(str(written)):
        return _matching(str(written), skip)
    raise UserError(f"{path}: there is no such file or folder; give images, a folder of them, or a quoted pattern")


def _matching(pattern: str, skip: Sequence[Path]) -> list[tuple[str, Path]]:
    """What a pattern means; of one folder that is reached by several ways (links), the shortest counts."""
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if WILD.search(part))
    if ".." in parts[first:]:
        raise UserError(f"{pattern}: has .. behind a wildcard; write the folder that is meant before it")
    base = Path(*parts[:first])
    words = glob.iglob(pattern, recursive=True)  # noqa: PTH207  (that of Path finds hidden files, too)
    there = [path for path in map(Path, words) if path.suffix.lower() in ENDINGS]
    seen: set[Path] = set()
    found = []
    for path in sorted(there, key=lambda path: (len(path.parts), path)):
        real = path.parent.resolve() / path.name
        if real not in seen and path.is_file() and not any(real.is_relative_to(folder) for folder in skip):
            seen.add(real)
            found.append((_name(path, base), path))
    if not found:
        raise UserError(f"{pattern}: matches no image (endings {', '.join(ENDINGS)})")
    return found


def _name(path: Path, base: Path) -> str:
    return unicodedata.normalize("NFC", path.relative_to(base).with_suffix("").as_posix())
