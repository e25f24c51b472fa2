"""Which tags a classifier does not believe."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def tag_probabilities(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Logistic function, [...] -> [...] in 0..1; NaN stays NaN."""
    with np.errstate(invalid="ignore"):
        return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))


def tag_losses(logits: NDArray[np.floating], tags: NDArray[np.integer]) -> NDArray[np.float64]:
    """-log of the probability that the classifier gives to each tag as it is, [N K]: log 2 is undecided.

    logits [N K], tags [N K] of 0/1; NaN stays NaN. Raises ValueError for differing shapes.
    """
    if logits.shape != tags.shape:
        raise ValueError(f"expected two [N K] arrays of one shape, got {logits.shape} and {tags.shape}")
    sign = np.where(tags > 0, -1.0, 1.0)
    with np.errstate(invalid="ignore"):
        losses: NDArray[np.float64] = np.logaddexp(0, sign * logits.astype(np.float64))
    return losses
