"""How clearly soft maps say what they say, class by class; no truth is needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 200  # of the values of maps in 0..1: quantiles are exact to half a percent
DOUBT = 0.1  # a smaller lead than this counts as doubtful
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class ClassConfidence:
    """One class inside its own region, the pixels where its map beats the background score and all other maps.

    images: tagged images. pixels: of the region, at the size of the stored maps. share: mean over tagged images of the
    region's share of the image. quantiles: of the map's values in the region, at QUANTILES. lead: mean of (map - the
    larger of the background score and the second-best map). doubtful: share of the region where the lead is under
    DOUBT. Values are in 0..1, NaN where there is no image or no pixel.
    """

    images: int
    pixels: int
    share: float
    quantiles: tuple[float, ...]
    lead: float
    doubtful: float


class MapConfidence:
    """Streaming statistics of soft maps; see `ClassConfidence`."""

    def __init__(self, num_classes: int) -> None:
        self.counts: NDArray[np.int64] = np.zeros((num_classes, BINS), np.int64)
        self.images: NDArray[np.int64] = np.zeros(num_classes, np.int64)
        self.shares: NDArray[np.float64] = np.zeros(num_classes)
        self.leads: NDArray[np.float64] = np.zeros(num_classes)
        self.doubts: NDArray[np.int64] = np.zeros(num_classes, np.int64)

    def update(
        self, maps: NDArray[np.floating], classes: NDArray[np.integer], background: float | NDArray[np.floating]
    ) -> None:
        """Counts one image: maps [P h w] in 0..1 of the classes [P] (0..K-1), background score as a number or [h w]."""
        if len(classes) == 0:
            return
        maps = maps.astype(np.float32)
        best = maps.argmax(axis=0)
        value = maps.max(axis=0)
        second = np.sort(maps, axis=0)[-2] if len(maps) > 1 else np.zeros_like(value)
        lead = value - np.maximum(second, np.asarray(background, np.float32))
        for place, k in enumerate(classes):
            region = (best == place) & (value > background)
            bins = np.minimum((value[region] * BINS).astype(np.int64), BINS - 1)
            self.counts[k] += np.bincount(bins, minlength=BINS)
            self.images[k] += 1
            self.shares[k] += region.mean()
            self.leads[k] += lead[region].sum(dtype=np.float64)
            self.doubts[k] += np.count_nonzero(lead[region] < DOUBT)

    def of_class(self, k: int) -> ClassConfidence:
        """The statistics of class k."""
        images, pixels = int(self.images[k]), int(self.counts[k].sum())
        return ClassConfidence(
            images=images,
            pixels=pixels,
            share=float(self.shares[k] / images) if images else float("nan"),
            quantiles=tuple(self._quantile(k, share) for share in QUANTILES),
            lead=float(self.leads[k] / pixels) if pixels else float("nan"),
            doubtful=float(self.doubts[k] / pixels) if pixels else float("nan"),
        )

    def _quantile(self, k: int, share: float) -> float:
        """The middle of the bin where the share is reached."""
        total = self.counts[k].sum()
        if total == 0:
            return float("nan")
        place = int(np.searchsorted(self.counts[k].cumsum(), share * total))
        return (place + 0.5) / BINS
