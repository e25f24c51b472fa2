"""Scores of every background threshold at once, from one pass over the images.

A pixel with best class c and score s is class c if s > t, else background. Instead of thresholding T times, one
histogram over (true class, best class, number of thresholds below s) is kept; cumulative sums over its last axis give
the confusion matrix of each threshold. The integers are exactly those of T separate evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tag2mask.metrics.confusion import (
    IGNORE,
    Counts,
    Mask,
    Scores,
    check_num_classes,
    none_if_nan,
    scores_from_counts,
)

DEFAULT_THRESHOLDS: tuple[float, ...] = tuple(i / 100 for i in range(100))


class ThresholdCurve:
    """Streaming evaluation of all thresholds.

    `thresholds` is [T], strictly increasing also when rounded to float32. `histogram` is [K+1, K, T+1] int64 and is the
    whole state: to join processes, add the histograms (or `merge`).

    Scores and thresholds are compared as float32 numbers, strictly: a pixel is foreground iff
    float32(score) > float32(threshold). Half-precision scores are exact in float32, so a score stored as
    float16(0.3) = 0.300048828125 is above the threshold 0.3, and a float32 score of 0.3 is not.
    """

    def __init__(self, num_classes: int, thresholds: Sequence[float] = DEFAULT_THRESHOLDS) -> None:
        check_num_classes(num_classes)
        self.num_classes = num_classes
        self.thresholds: NDArray[np.float32] = np.asarray(thresholds, dtype=np.float32)
        if self.thresholds.ndim != 1 or not self.thresholds.size or not (np.diff(self.thresholds) > 0).all():
            raise ValueError("thresholds must be a non-empty list of strictly increasing numbers")
        shape = (num_classes + 1, num_classes, self.thresholds.size + 1)
        self.histogram: Counts = np.zeros(shape, dtype=np.int64)

    def update(self, best_class: Mask, best_score: NDArray[np.floating], truth: Mask) -> None:
        """Counts one image.

        best_class  [H W] uint8, 0..K-1: the foreground class with the largest score
        best_score  [H W] float16, float32 or float64: that score. Where no tagged class exists (an image without
                    tags) give 0 or -1 and any class: such a pixel is background at every threshold >= 0.
        truth       [H W] uint8, 0..K, or 255 to leave the pixel out

        Raises ValueError for differing shapes, masks that are not uint8, values out of range, or a NaN score.
        """
        if not best_class.shape == best_score.shape == truth.shape:
            raise ValueError(f"shapes differ: {best_class.shape}, {best_score.shape}, {truth.shape}")
        if best_class.dtype != np.uint8 or truth.dtype != np.uint8:
            raise ValueError(f"expected uint8 classes and truth, got {best_class.dtype}, {truth.dtype}")
        kept = truth != IGNORE
        row, column = truth[kept].astype(np.intp), best_class[kept]
        score = best_score[kept].astype(np.float32)
        if not row.size:
            return
        if row.max() > self.num_classes or column.max() >= self.num_classes:
            raise ValueError(f"truth {row.max()} or best_class {column.max()} is no class: K is {self.num_classes}")
        if np.isnan(score).any():
            raise ValueError("best_score holds NaN")
        # side="left": the number of thresholds strictly below the score, that is, at which the pixel is foreground.
        below = np.searchsorted(self.thresholds, score, side="left")
        _, columns, bins = self.histogram.shape
        flat = (row * columns + column) * bins + below
        self.histogram += np.bincount(flat, minlength=self.histogram.size).reshape(self.histogram.shape)

    def merge(self, other: ThresholdCurve) -> None:
        """Adds the counts of another process or shard with the same classes and thresholds."""
        if other.num_classes != self.num_classes or not np.array_equal(other.thresholds, self.thresholds):
            raise ValueError("cannot merge curves of different classes or thresholds")
        self.histogram += other.histogram

    def counts(self) -> Counts:
        """[T, K+1, K+2] int64: the counts (see `Confusion`) of each threshold; the last column is 0, as every pixel
        gets an answer."""
        result = np.zeros((self.thresholds.size, self.num_classes + 1, self.num_classes + 2), dtype=np.int64)
        up_to = self.histogram.cumsum(axis=2)  # [K+1, K, T+1]
        background = up_to[:, :, :-1]
        foreground = up_to[:, :, -1:] - background
        result[:, :, 0] = background.sum(axis=1).T
        result[:, :, 1:-1] = foreground.transpose(2, 0, 1)
        return result

    def scores(self) -> list[Scores]:
        """One `Scores` per threshold."""
        return [scores_from_counts(counts) for counts in self.counts()]

    def best(self) -> tuple[float, Scores]:
        """(threshold, scores) of the largest mean IoU; the smallest threshold of several equal ones.

        The choice uses the truth: report it as "oracle", or as "val-masks" when counted on a held-out part.
        Raises ValueError if nothing was counted.
        """
        scores = self.scores()
        miou = np.array([s.miou for s in scores])
        if np.isnan(miou).all():
            raise ValueError("no pixel with truth was counted, so there is no best threshold")
        index = int(np.nanargmax(miou))
        return self._names()[index], scores[index]

    def to_dict(self) -> dict[str, list[float | None]]:
        """JSON-ready {"threshold", "miou", "precision", "recall"}: one value per threshold, means over classes."""
        scores = self.scores()
        return {
            "threshold": list(self._names()),
            "miou": [none_if_nan(s.miou) for s in scores],
            "precision": [none_if_nan(s.mean_precision) for s in scores],
            "recall": [none_if_nan(s.mean_recall) for s in scores],
        }

    def _names(self) -> list[float]:
        """The thresholds as the shortest decimals with the same float32 value: 0.26, not 0.25999999046."""
        return [float(str(t)) for t in self.thresholds]
