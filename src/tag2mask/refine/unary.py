"""Energies of a dense CRF from probabilities and from labels, and which of them are the same for several labels."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tag2mask.errors import UserError

Floats: TypeAlias = NDArray[np.float32]


def unary_from_softmax(probabilities: ArrayLike, *, clip: float = 1e-5) -> Floats:
    """-log of probabilities (or scores in 0..1) [L ...] that are clipped to clip..1."""
    unary: Floats = -np.log(np.clip(np.asarray(probabilities, np.float32), clip, 1))
    return unary


def unary_from_labels(labels: ArrayLike, count: int, *, gt_prob: float = 0.7, unsure: int | None = None) -> Floats:
    """Energies [count ...] of labels [...] in 0..count-1: -log gt_prob for a pixel's own label, and
    -log((1 - gt_prob) / (count - 1)) for every other.

    unsure: a value of pixels that may be anything, such as 255: all labels are equally likely there.
    Raises UserError for a label that is none, or gt_prob not between 0 and 1.
    """
    given, unknown = checked_labels(labels, count, gt_prob, unsure)
    return label_energies(given, unknown, np.arange(count), count, gt_prob)


def equal_rows(unary: Floats) -> tuple[list[int], NDArray[np.intp]]:
    """Labels whose energies [L ...] are equal, bit by bit: (first row of each group, group of each row)."""
    rows = np.ascontiguousarray(unary).view(np.int32).reshape(len(unary), -1)
    step = max(1, rows.shape[1] // 256)
    seen: dict[bytes, list[int]] = {}  # groups by a sample of their row
    first: list[int] = []
    group = np.zeros(len(rows), np.intp)
    for index, sample in enumerate(np.ascontiguousarray(rows[:, ::step])):
        alike = seen.setdefault(sample.tobytes(), [])
        same = next((place for place in alike if step == 1 or np.array_equal(rows[first[place]], rows[index])), None)
        if same is None:
            same = len(first)
            first.append(index)
            alike.append(same)
        group[index] = same
    return first, group


def checked_labels(
    labels: ArrayLike, count: int, gt_prob: float, unsure: int | None
) -> tuple[NDArray[np.intp], NDArray[np.bool_] | None]:
    """Labels [...] in 0..count-1, and where they are unsure, if anywhere; 0 there."""
    given = np.asarray(labels)
    if not 0 < gt_prob < 1:
        raise UserError(f"crf: gt_prob {gt_prob} is not between 0 and 1")
    if given.size == 0 or given.dtype.kind not in "iub" or count < 1:
        raise UserError("crf: labels must be an array of integers, and count the number of labels, 1 or more")
    inside, unknown = given.astype(np.intp), None
    if unsure is not None:
        unknown = given == unsure
        inside[unknown] = 0
    low, high = int(inside.min()), int(inside.max())
    if low < 0 or high >= count:
        raise UserError(f"crf: label {low if low < 0 else high} is not in 0..{count - 1}; correct it, or say unsure=")
    return inside, unknown


def label_energies(
    labels: NDArray[np.intp], unknown: NDArray[np.bool_] | None, rows: NDArray[np.intp], count: int, gt_prob: float
) -> Floats:
    """Energies of the labels `rows` at every pixel: [len(rows) ...]."""
    mine, other = -math.log(gt_prob), -math.log((1 - gt_prob) / max(count - 1, 1))
    own = labels == rows.reshape(-1, *[1] * labels.ndim)
    unary = np.where(own, np.float32(mine), np.float32(other))
    if unknown is not None:
        unary[:, unknown] = math.log(count)
    return unary
