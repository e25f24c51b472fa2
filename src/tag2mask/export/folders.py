"""The folder of an export: it appears whole or not at all, and never takes the place of anything else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from tag2mask.data.images import decode
from tag2mask.errors import UserError
from tag2mask.export.mask_set import Item, MaskSet

MARK = ".tag2mask-export"  # says that a folder is an export and may be overwritten; hidden from tools that read *.json
ORIENTATION = 0x0112  # of EXIF
ENDINGS = {".jpg": ".jpg", ".jpeg": ".jpg", ".jfif": ".jpg", ".png": ".png"}  # what every reader reads, as it is named


@contextmanager
def new_folder(out: Path, kind: str, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder beside `out` to write into; it becomes `out` at the end, or is removed if that is not reached.

    Raises UserError if `out` holds something: an export may be replaced with `overwrite`, anything else never.
    """
    check_folder(out, overwrite)
    out = Path(os.path.realpath(out))  # a link stays, what it leads to is replaced
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        part.mkdir(parents=True)
    except OSError as fault:
        raise UserError(f"--out {out}: cannot make this folder ({fault.strerror}); give another one") from None
    try:
        yield part
        (part / MARK).write_text(kind + "\n", encoding="utf-8")
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(part, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_folder(out: Path, overwrite: bool) -> None:
    """Raises UserError if an export cannot become this folder."""
    if not out.name:
        raise UserError(f"--out {out}: is no name of a folder; give one")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / MARK).is_file():
        raise UserError(f"--out {out}: holds other files, which stay; give a new folder")
    if not overwrite:
        raise UserError(f"--out {out}: holds an export already; give a new folder, or --overwrite to replace it")


def write_text(path: Path, text: str) -> None:
    """Text as UTF-8 with plain newlines; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def as_json(value: Any) -> str:
    """One line of JSON; names keep their letters."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def picture_ending(masks: MaskSet) -> str | None:
    """The one ending that all images can be copied with, None if some have to be written anew (as PNG)."""
    found = {copied_ending(item.file) for item in masks.items}
    return found.pop() if len(found) == 1 else None


def copied_ending(file: Path | None) -> str | None:
    """.jpg or .png if every reader gets the same pixels from this file as the masks were made for, else None.

    That is not so for a photo with an EXIF rotation, more than 8 bits, transparency, CMYK, or another format.
    """
    if file is None or file.suffix.lower() not in ENDINGS:
        return None
    try:
        with PIL.Image.open(file) as picture:
            plain = picture.mode in ("L", "RGB", "P") and not picture.has_transparency_data
            upright = picture.getexif().get(ORIENTATION, 1) == 1
            kind = ".jpg" if picture.format == "JPEG" else ".png" if picture.format == "PNG" else None
    except OSError:
        return None  # reading it says what is wrong
    return kind if plain and upright and kind == ENDINGS[file.suffix.lower()] else None


def place_image(item: Item, stem: Path, ending: str | None) -> Path:
    """Writes an image to `stem` with an ending: a copy of its file if `ending` is given, else its pixels as PNG."""
    path = stem.with_name(stem.name + (ending or ".png"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if ending is not None and item.file is not None:
        shutil.copyfile(item.file, path)
    else:
        PIL.Image.fromarray(item.image()).save(path)
    return path


def copy_beside(item: Item, folder: Path) -> str:
    """Writes an image below `folder`/images; its path there, which is the one that it has below its own folder."""
    images = folder / "images"
    return place_image(item, images / item.name, copied_ending(item.file)).relative_to(images).as_posix()


def upright_size(file: Path) -> tuple[int, int]:
    """(width, height) of a picture once its EXIF rotation is applied; only its head is read if possible."""
    try:
        with PIL.Image.open(file) as picture:
            turned = picture.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = picture.size
    except (OSError, ValueError, SyntaxError):
        width, height = decode(file.read_bytes()).size
        turned = False
    return (height, width) if turned else (width, height)


def write_grey(path: Path, mask: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """An index mask [H W] as a grey PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(mask).save(path)
