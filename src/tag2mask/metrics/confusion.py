"""Counts truth against prediction over many index masks, and turns the counts into IoU, precision, recall and coverage.

Index masks hold 0 for background, 1..K for the classes and 255 for "ignore". In the truth, 255 leaves the pixel out.
In the prediction, 255 means "no answer": it is a miss of the true class (strict scores) and lowers the coverage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

IGNORE = 255

Counts: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix says. Ratios are in 0..1; NaN stands for "undefined" (nothing to divide by).

    iou        [K+1]  TP / (TP + FP + FN); NaN for a class found neither in truth nor in prediction
    precision  [K+1]  TP / (TP + FP); NaN for a class that is never predicted
    recall     [K+1]  TP / (TP + FN); NaN for a class without truth
    miou              mean of the defined IoUs: classes that occur in truth or prediction
                      (in PASCAL VOC all 21 do, so this is the usual mean)
    mean_precision, mean_recall   means of the defined values, background included
    pixel_accuracy    correct pixels / pixels with truth
    coverage          pixels with an answer / pixels with truth
    miou_covered      mean IoU counted on the pixels with an answer only
    """

    iou: Floats
    precision: Floats
    recall: Floats
    miou: float
    mean_precision: float
    mean_recall: float
    pixel_accuracy: float
    coverage: float
    miou_covered: float

    def to_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """A JSON-ready dictionary; `classes` names the K foreground classes, NaN becomes None.

        Per-class entries are dictionaries {"background": ..., class name: ...}.
        """
        names = ["background", *classes]
        if len(names) != len(self.iou):
            raise ValueError(f"{len(classes)} class names for scores of {len(self.iou) - 1} classes")

        def by_class(values: Floats) -> dict[str, float | None]:
            return {name: none_if_nan(value) for name, value in zip(names, values, strict=True)}

        return {
            "miou": none_if_nan(self.miou),
            "iou": by_class(self.iou),
            "precision": by_class(self.precision),
            "recall": by_class(self.recall),
            "mean_precision": none_if_nan(self.mean_precision),
            "mean_recall": none_if_nan(self.mean_recall),
            "pixel_accuracy": none_if_nan(self.pixel_accuracy),
            "coverage": none_if_nan(self.coverage),
            "miou_covered": none_if_nan(self.miou_covered),
        }


class Confusion:
    """A streaming confusion matrix.

    `counts` is [K+1, K+2] int64: row = true class, column = predicted class, last column = no answer (255).
    It is everything there is to know: to join processes, add their counts (or `merge`).
    """

    def __init__(self, num_classes: int) -> None:
        check_num_classes(num_classes)
        self.num_classes = num_classes
        self.counts: Counts = np.zeros((num_classes + 1, num_classes + 2), dtype=np.int64)

    def update(self, pred: Mask, truth: Mask) -> None:
        """Counts one image: both masks [H W] uint8.

        Raises ValueError for masks that differ in shape, are not uint8, or hold a value in K+1..254.
        """
        if pred.dtype != np.uint8 or truth.dtype != np.uint8 or pred.shape != truth.shape:
            raise ValueError(
                f"expected two uint8 masks of one shape, got pred {pred.dtype} {pred.shape}, "
                f"truth {truth.dtype} {truth.shape}"
            )
        k = self.num_classes
        pairs = truth.astype(np.intp).ravel() * 256 + pred.ravel()
        table = np.bincount(pairs, minlength=256 * 256).reshape(256, 256)
        if k < 254 and (table[k + 1 : IGNORE].any() or table[:, k + 1 : IGNORE].any()):
            worst = max(_largest_class(pred), _largest_class(truth))
            raise ValueError(f"mask value {worst} is no class: expected 0..{k} or {IGNORE}")
        self.counts[:, :-1] += table[: k + 1, : k + 1]
        self.counts[:, -1] += table[: k + 1, IGNORE]

    def merge(self, other: Confusion) -> None:
        """Adds the counts of another process or shard."""
        if other.num_classes != self.num_classes:
            raise ValueError(f"cannot merge {other.num_classes} classes into {self.num_classes}")
        self.counts += other.counts

    def scores(self) -> Scores:
        """What the counts say so far."""
        return scores_from_counts(self.counts)


def scores_from_counts(counts: Counts) -> Scores:
    """Scores of a [K+1, K+2] count matrix (see `Confusion`)."""
    truth = counts.sum(axis=1)
    predicted = counts[:, :-1].sum(axis=0)
    answered = counts[:, :-1].sum(axis=1)
    right = counts.diagonal()
    iou = _ratio(right, truth + predicted - right)
    precision = _ratio(right, predicted)
    recall = _ratio(right, truth)
    total = truth.sum(keepdims=True)
    return Scores(
        iou=iou,
        precision=precision,
        recall=recall,
        miou=_mean(iou),
        mean_precision=_mean(precision),
        mean_recall=_mean(recall),
        pixel_accuracy=float(_ratio(right.sum(keepdims=True), total)[0]),
        coverage=float(_ratio(answered.sum(keepdims=True), total)[0]),
        miou_covered=_mean(_ratio(right, answered + predicted - right)),
    )


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN: an undefined value becomes None."""
    return None if np.isnan(value) else float(value)


def check_num_classes(num_classes: int) -> None:
    """Raises ValueError unless K fits an index mask: 1..254 (0 is background, 255 is ignore)."""
    if not 1 <= num_classes <= 254:
        raise ValueError(f"num_classes must be in 1..254, got {num_classes}")


def _ratio(part: Counts, whole: Counts) -> Floats:
    result: Floats = np.full(part.shape, np.nan)
    np.divide(part, whole, out=result, where=whole > 0)
    return result


def _mean(values: Floats) -> float:
    """Mean of the defined values; NaN if there is none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def _largest_class(mask: Mask) -> int:
    return int(mask[mask != IGNORE].max(initial=0))
