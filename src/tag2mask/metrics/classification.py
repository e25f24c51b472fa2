"""How well image-level scores find the tags: average precision per class and its mean."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def average_precision(scores: NDArray[np.floating], tags: NDArray[np.integer]) -> float:
    """Area under the precision-recall steps: sum over n of (R_n - R_{n-1}) P_n, without interpolation.

    scores [N], tags [N] of 0/1. P_n and R_n are precision and recall when everything that scores at least the n-th
    largest *distinct* value is returned, so the order of equal scores does not matter. NaN without a positive.
    Raises ValueError for differing shapes or a NaN score.
    """
    if scores.ndim != 1 or scores.shape != tags.shape:
        raise ValueError(f"expected two vectors of one length, got {scores.shape} and {tags.shape}")
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN")
    if not tags.any():
        return float("nan")
    order = np.argsort(-scores.astype(np.float64), kind="stable")
    ranked, hits = scores[order], (tags[order] > 0).cumsum()
    last_of_tie = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), ranked.size - 1)
    found = hits[last_of_tie]
    precision = found / (last_of_tie + 1)
    recall_steps = np.diff(found, prepend=0) / hits[-1]
    return float((precision * recall_steps).sum())


def mean_average_precision(
    scores: NDArray[np.floating], tags: NDArray[np.integer]
) -> tuple[float, NDArray[np.float64]]:
    """(mAP, AP per class [K]) of scores [N K] and tags [N K] of 0/1.

    The mean is over the classes with at least one positive (the others are NaN); NaN if there is none.
    """
    if scores.ndim != 2 or scores.shape != tags.shape:
        raise ValueError(f"expected two [N K] arrays of one shape, got {scores.shape} and {tags.shape}")
    ap = np.array([average_precision(scores[:, c], tags[:, c]) for c in range(scores.shape[1])], dtype=np.float64)
    defined = ap[~np.isnan(ap)]
    return (float(defined.mean()) if defined.size else float("nan")), ap
