"""Measures masks, soft maps and tag scores: streaming, exact integers, mergeable across processes."""

from tag2mask.metrics.classification import average_precision, mean_average_precision
from tag2mask.metrics.confusion import Confusion, Scores
from tag2mask.metrics.curve import DEFAULT_THRESHOLDS, ThresholdCurve
from tag2mask.metrics.shares import MaskShares

__all__ = [
    "DEFAULT_THRESHOLDS",
    "Confusion",
    "MaskShares",
    "Scores",
    "ThresholdCurve",
    "average_precision",
    "mean_average_precision",
]
