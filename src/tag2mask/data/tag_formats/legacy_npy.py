"""Tags from `cls_labels.npy`, a pickled dictionary of arrays as older projects keep it. Nothing but arrays is made.

A pickle is a program: it may call any function there is. Here it finds six names, and behind these are stand-ins that
only remember what they are given; numpy arrays are then made from bytes. Any other name ends the reading.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tag2mask.data.tags import Row, TagTable
from tag2mask.errors import UserError

_NUMBERS = re.compile(r"[<>|=]?(b1|[iuf][1248])")


def read_legacy_npy(path: Path, classes: Sequence[str]) -> TagTable:
    """One row for each image of {name: [K] of 0 and 1}; `classes` are the names of the K classes in order.

    Names may be numbers, as some projects wrote them: 2007000032 is 2007_000032 of VOC, or the id of an image of COCO.
    Raises UserError with one line if the file holds anything but a dictionary of arrays of numbers.
    """
    content = _load(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds no dictionary of names and arrays but {type(content).__name__}.")
    rows = []
    for number, (key, value) in enumerate(content.items(), start=1):
        try:
            row = (value.array() if isinstance(value, _Array) else value).ravel()
        except Exception:  # on a state that is none
            row = None
        if not isinstance(row, np.ndarray) or not isinstance(key, str | int):
            raise UserError(f"{path}: entry {number} is no name with an array of numbers.")
        if len(row) != len(classes):
            raise UserError(f"{path}: entry {number} has {len(row)} classes, but {len(classes)} are named (--classes).")
        wrong = () if set(row.tolist()) <= {0, 1} else (("array", "values other than 0 and 1"),)
        names = _names(key)
        tags = tuple(name for name, cell in zip(classes, row, strict=True) if cell == 1)
        rows.append(Row(names[0], tags, f"entry {number}", wrong, names))
    return TagTable((), tuple(rows), tuple(classes), "cls_labels.npy")


def _names(key: str | int) -> tuple[str, ...]:
    text = str(key)
    if isinstance(key, str):
        return (text,)
    if re.fullmatch(r"20\d{8}", text):
        return f"{text[:4]}_{text[4:]}", text
    return text, *(f"{half}{key:012d}" for half in ("", "COCO_train2014_", "COCO_val2014_"))


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) == (1, 0):
                shape, _, kind = np.lib.format.read_array_header_1_0(file)
            else:
                shape, _, kind = np.lib.format.read_array_header_2_0(file)
            if shape != () or kind != np.dtype(object):
                raise UserError(f"{path}: holds a plain array, so the names of its images are elsewhere.")
            found = _Arrays(file, encoding="latin-1").load()  # Python 2 wrote bytes as text
        content = found.objects() if isinstance(found, _Array) else found
        return content[0] if isinstance(content, list) and len(content) == 1 else content
    except OSError as reason:
        raise UserError(f"{path}: cannot be opened ({reason.strerror or reason}).") from None
    except _Forbidden as reason:
        raise UserError(f"{path}: asks for {reason}, which no array needs. It is not read; do not trust it.") from None
    except UserError:
        raise
    except Exception as reason:  # on damaged bytes the reader raises whatever it stumbles over
        said = " ".join(str(reason).split())[:80]
        raise UserError(f"{path}: is no .npy file with a dictionary of arrays ({said}).") from None


class _Forbidden(Exception):
    """The name that a pickle asked for."""


class _Kind:
    """Stands for a numpy.dtype: the code that was given and the order of the bytes."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])

    def numbers(self, data: Any) -> NDArray[Any]:
        """The numbers in some bytes."""
        code = self.order + self.code
        if not _NUMBERS.fullmatch(code):
            raise ValueError(f"numbers of the kind {code!r} are not read")
        return np.frombuffer(data.encode("latin-1") if isinstance(data, str) else bytes(data), np.dtype(code))

    def scalar(self, data: Any) -> int | float | str:
        """One number, or text as numpy stores it."""
        if re.fullmatch(r"U\d+", self.code) and self.order in "<=":
            text = data.encode("latin-1") if isinstance(data, str) else data
            return str(text, "utf-32-le").rstrip("\0")
        found: int | float = self.numbers(data)[0].item()
        return found


class _Array:
    """Stands for a numpy.ndarray: its state as it was given."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self) -> NDArray[Any]:
        """The array of numbers."""
        _, shape, kind, by_columns, data = self.state
        return kind.numbers(data).reshape(shape, order="F" if by_columns else "C")  # type: ignore[no-any-return]

    def objects(self) -> list[Any]:
        """What is in an array of objects."""
        _, _, kind, _, data = self.state
        if kind.code not in ("O", "O4", "O8") or not isinstance(data, list):
            raise ValueError("an array of numbers, not a dictionary")
        return data


class _Maker:
    """A function that a pickle may call, and do nothing else with."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Forbidden("a change of a function")


def _from_buffer(data: Any, kind: _Kind, shape: Any, order: str) -> NDArray[Any]:
    return kind.numbers(data).reshape(shape, order="F" if order == "F" else "C")


_MAKERS: dict[str, Callable[..., Any]] = {
    "_reconstruct": lambda *_: _Array(),
    "scalar": lambda kind, data: kind.scalar(data),
    "_frombuffer": _from_buffer,
    "dtype": lambda code, *_: _Kind(str(code)),
    "ndarray": lambda *_: _Array(),
    "encode": lambda text, *_: text.encode("latin-1"),
}
_KNOWN = {
    **{(f"numpy.{core}.multiarray", name): name for core in ("core", "_core") for name in ("_reconstruct", "scalar")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): "_frombuffer" for core in ("core", "_core")},
    ("numpy", "dtype"): "dtype",
    ("numpy", "ndarray"): "ndarray",
    ("_codecs", "encode"): "encode",
}


class _Arrays(pickle.Unpickler):
    """Knows the names that a pickled array needs, and stand-ins for them."""

    def __init__(self, file: IO[bytes], *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in; any other name is forbidden."""
        known = _KNOWN.get((module, name))
        if known is None:
            raise _Forbidden(f"{module}.{name}")
        return _Maker(_MAKERS[known])
