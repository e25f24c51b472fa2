"""Finds image files in a folder and the image that a line in somebody's list means."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from tag2mask.data.images import ENDINGS
from tag2mask.errors import UserError

Files: TypeAlias = dict[str, list[Path]]  # by name


def scan(folder: Path, endings: Sequence[str], skip: Iterable[Path] = ()) -> tuple[Files, Files]:
    """Every file below `folder` with one of the `endings` (in any case), and every other file, by name.

    A name is the path relative to `folder`, with "/" and without ending, in Unicode form NFC ("a/0001"); names are
    sorted. Hidden files and folders are ignored, and so are the folders in `skip`. Links are followed.
    """
    left_out = {folder.resolve(), *(path.resolve() for path in skip)}
    found: Files = defaultdict(list)
    others: Files = defaultdict(list)
    for root, folders, files in os.walk(folder, followlinks=True):
        kept = []
        for name in sorted(folders):
            real = (Path(root) / name).resolve()
            if not name.startswith(".") and real not in left_out:
                left_out.add(real)  # a folder that is linked into itself is walked once
                kept.append(name)
        folders[:] = kept
        for file in sorted(files):
            path = Path(root) / file
            if file.startswith("."):
                continue
            name = unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
            (found if path.suffix.lower() in endings else others)[name].append(path)
    return dict(sorted(found.items())), dict(others)


class Finder:
    """Which image a written name means: with or without ending, with more or fewer folders in front than it has."""

    def __init__(self, names: Iterable[str], unread: Files | None = None) -> None:
        """`unread`: files of other endings, only for `hint`."""
        self.names = set(names)
        self._unread = unread or {}
        self._by_last: dict[str, list[str]] = defaultdict(list)
        self._loosely: dict[str, list[str]] = defaultdict(list)
        self._by_upload: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.names):
            self._by_last[_last(name)].append(name)
            self._loosely[_loose(name)].append(name)

    def find(self, written: str) -> str | None:
        """The name, or None where no image or more than one fits.

        "b/1.jpg", "b/1" and "set/b/1.png" all mean the image "b/1"; "1" does if no other folder has a "1".
        """
        cleaned = clean(written)
        for name in dict.fromkeys((without_ending(cleaned), cleaned)):
            if name in self.names:
                return name
            near = [other for other in self._by_last.get(_last(name), ()) if _fits(name, other)]
            if len(near) == 1:
                return near[0]
        return None

    def find_upload(self, written: str) -> str | None:
        """The one image that an upload to a web tool renamed to this: "my photo (1).jpg" to "my_photo_1.jpg"."""
        if not self._by_upload:
            for name in self.names:
                self._by_upload[_as_uploaded(_last(name))].append(name)
        near = self._by_upload.get(_as_uploaded(_last(without_ending(clean(written)))), [])
        return near[0] if len(near) == 1 else None

    def hint(self, written: str) -> str:
        """The written name, with what may have been meant."""
        name = without_ending(clean(written))
        near = [other for other in self._by_last.get(_last(name), ()) if _fits(name, other)]
        if len(near) > 1:
            return f"{written} (fits {near[0]} and {near[1]}: write the folder too)"
        near = near or self._loosely.get(_loose(name), [])
        if len(near) == 1:
            return f"{written} (did you mean {near[0]}?)"
        other = self._unread.get(name) or self._unread.get(name.rpartition(".")[0])
        return f"{written} (there is {other[0].name}, but {other[0].suffix} is not read)" if other else written


def read_list(path: Path, finder: Finder) -> tuple[list[str], list[str]]:
    """A text file with one name a line: the names found, each once, and the lines that mean no image.

    Empty lines and lines that begin with # are skipped. Of a line of several columns, such as
    "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png", the first counts.
    """
    found: dict[str, None] = {}
    lost: list[str] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        written = line.strip()
        if not written or written.startswith("#"):
            continue
        name = finder.find(written) or finder.find(written.split()[0])
        if name is None:
            lost.append(f"{path.name} line {number}: {finder.hint(written)}")
        else:
            found[name] = None
    return list(found), lost


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without BOM, or of a UTF-16 file with one (a spreadsheet's "Unicode text").

    Raises UserError for a missing file or another encoding.
    """
    try:
        data = path.read_bytes()
    except OSError as reason:
        raise UserError(f"{path}: cannot be opened ({reason.strerror or reason}).") from None
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as reason:
        line = data.count(b"\n", 0, reason.start) + 1
        raise UserError(
            f"{path}: line {line} is not UTF-8 text. Save the file as UTF-8 (in a spreadsheet: 'CSV UTF-8')."
        ) from None


def clean(written: str) -> str:
    """A written path in the form of a name, its ending kept."""
    return unicodedata.normalize("NFC", re.sub(r"^(\./|/)+", "", written.strip().replace("\\", "/")))


def without_ending(name: str) -> str:
    """The name without the ending of an image; other text after a dot is part of the name."""
    stem, dot, ending = name.rpartition(".")
    return stem if stem and dot + ending.lower() in ENDINGS else name


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _fits(name: str, other: str) -> bool:
    return name.endswith("/" + other) or other.endswith("/" + name)


def _as_uploaded(name: str) -> str:
    return re.sub(r"[^\w.-]", "", name.strip().replace(" ", "_"))


def _loose(name: str) -> str:
    """What stays of a name when a spreadsheet has eaten its leading zeros, or somebody its capitals."""
    return _last(name).casefold().lstrip("0")
