"""Reads the arrays of an MXNet `.params` file with numpy alone: nothing in the file is executed.

All numbers are little-endian. The layout, as MXNet 0.x to 1.x writes it (its src/ndarray/ndarray.cc):

    file     u64 0x112 · u64 reserved · u64 count · that many arrays · u64 count · that many names
    name     u64 length · that many bytes, "arg:..." for what is learned and "aux:..." for running statistics
    array    shape · i32 device type · i32 device number · i32 type of element · the elements, the last axis fastest
    shape    of version 0:  u32 axes · u32 each                       what a file of 2016 has
             of version 1:  u32 0xF993FAC8 · u32 axes · i64 each
             of version 2:  u32 0xF993FAC9 · i32 storage · u32 axes · i64 each         storage 0 is dense
             of version 3:  u32 0xF993FACA, else as version 2

An array without axes ends after its shape. Sparse storage is not read.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAGIC, VERSION_1, VERSION_2, VERSION_3 = 0x112, 0xF993FAC8, 0xF993FAC9, 0xF993FACA
TYPES = ("<f4", "<f8", "<f2", "|u1", "<i4", "|i1", "<i8")
MOST_AXES = 32  # numpy's limit; more is no shape but noise


class MalformedError(ValueError):
    """The bytes are no such file, or not all of it."""


def read(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of a file by name, "arg:" and "aux:" left out.

    Raises MalformedError if the file is of another kind, sparse, cut short or has something behind its end, OSError if
    it cannot be read.
    """
    cursor = _Cursor(np.fromfile(path, np.uint8))
    if cursor.number("<u8") != MAGIC:
        raise MalformedError("it does not begin like an MXNet file")
    cursor.number("<u8")
    arrays = [cursor.array() for _ in range(cursor.count())]
    names = [cursor.text() for _ in range(cursor.count())]
    if len(names) != len(arrays) or len(set(names)) != len(names):
        raise MalformedError(f"{len(set(names))} names for {len(arrays)} arrays")
    if cursor.left:
        raise MalformedError(f"{cursor.left} bytes behind its end")
    return dict(zip(names, arrays, strict=True))


class _Cursor:
    """Takes one thing after the other from bytes."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.at = data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, kind: str, count: int) -> NDArray[np.generic]:
        size = np.dtype(kind).itemsize * count
        if not 0 <= size <= self.left:
            raise MalformedError("it is cut short")
        part = self.data[self.at : self.at + size]
        self.at += size
        return part.view(kind)

    def number(self, kind: str) -> int:
        return int(self.take(kind, 1)[0])

    def count(self) -> int:
        """How many things follow, each of which takes four bytes or more."""
        count = self.number("<u8")
        if 4 * count > self.left:
            raise MalformedError("it is cut short")
        return count

    def text(self) -> str:
        name = self.take("|u1", self.number("<u8")).tobytes().decode("utf-8", "replace")
        return name.removeprefix("arg:").removeprefix("aux:")

    def array(self) -> NDArray[np.generic]:
        first, wide = self.number("<u4"), "<i8"
        if first in (VERSION_2, VERSION_3) and self.number("<i4") != 0:
            raise MalformedError("it holds sparse arrays")
        if first in (VERSION_1, VERSION_2, VERSION_3):
            axes = self.number("<u4")
        else:
            axes, wide = first, "<u4"
        if axes > MOST_AXES:
            raise MalformedError(f"an array of {axes} axes")
        if axes == 0:
            return np.zeros(0, np.float32)
        shape = [int(side) for side in self.take(wide, axes)]
        _device, _number, kind = (self.number("<i4") for _ in range(3))
        if not 0 <= kind < len(TYPES) or min(shape) < 0:
            raise MalformedError(f"an array of type {kind} and shape {shape}")
        return self.take(TYPES[kind], math.prod(shape)).reshape(shape)
