"""What masks hold when there is no truth to compare with: coverage and the share of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tag2mask.metrics.confusion import IGNORE, check_num_classes, none_if_nan


class MaskShares:
    """Streaming pixel counts of index masks.

    `counts` is [K+2] int64: background, the K classes, no answer (255). To join processes, add them.
    """

    def __init__(self, num_classes: int) -> None:
        check_num_classes(num_classes)
        self.num_classes = num_classes
        self.counts: NDArray[np.int64] = np.zeros(num_classes + 2, dtype=np.int64)

    def update(self, mask: NDArray[np.uint8]) -> None:
        """Counts one mask [H W] uint8. Raises ValueError for a value in K+1..254."""
        table = np.bincount(mask.ravel(), minlength=256)
        if table[self.num_classes + 1 : IGNORE].any():
            raise ValueError(f"the mask holds values other than 0..{self.num_classes} and {IGNORE}")
        self.counts[:-1] += table[: self.num_classes + 1]
        self.counts[-1] += table[IGNORE]

    def merge(self, other: MaskShares) -> None:
        """Adds the counts of another process or shard."""
        if other.num_classes != self.num_classes:
            raise ValueError(f"cannot merge {other.num_classes} classes into {self.num_classes}")
        self.counts += other.counts

    def to_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """JSON-ready {"coverage", "shares": {"background": ..., class: ...}}.

        coverage: pixels with an answer / all pixels. shares: of the pixels with an answer; None if there is none.
        """
        names = ["background", *classes]
        if len(names) != self.num_classes + 1:
            raise ValueError(f"{len(classes)} class names for {self.num_classes} classes")
        answered, total = int(self.counts[:-1].sum()), int(self.counts.sum())
        shares = self.counts[:-1] / answered if answered else np.full(self.num_classes + 1, np.nan)
        return {
            "coverage": answered / total if total else None,
            "shares": {name: none_if_nan(share) for name, share in zip(names, shares, strict=True)},
        }
