"""How sure a mask is, from its soft maps alone: the order in which a person looks at masks."""

from __future__ import annotations

import math

import numpy as np

from tag2mask.data.maps import Maps


def certainty(stored: Maps, score: float) -> float:
    """In 0..1: how clearly the winner wins at a pixel, averaged, times how sure the classifier is of the tags.

    The winner among the maps and the background score t = `score` leads by (best - max(second, t)) / (1 - t) where a
    class wins, and by (t - best) / t where the background does: 0 is a tie, 1 the largest lead there can be. The tags
    are as sure as the least probable of them is; where the maps have no logits this factor is 1. An image without tags
    has nothing to decide: 1.
    """
    if len(stored.classes) == 0:
        return 1.0
    ranked = np.sort(stored.maps.astype(np.float32), axis=0)[::-1]
    best = ranked[0]
    rival = np.maximum(ranked[1] if len(ranked) > 1 else np.zeros_like(best), np.float32(score))
    lead = np.where(best > score, (best - rival) / (1 - score), (score - best) / max(score, 1e-6))
    logit = float(stored.logits[stored.classes].min())
    sure = 1.0 if math.isnan(logit) else 1 / (1 + math.exp(-max(logit, -50.0)))
    return float(np.clip(lead, 0, 1).mean()) * sure


def constant_of(alpha: float) -> float:
    """The constant background score with the same mask as (1 - largest map)^alpha: the t with t = (1 - t)^alpha."""
    low, high = 0.0, 1.0
    for _ in range(50):  # halves: t - (1 - t)^alpha rises
        middle = (low + high) / 2
        low, high = (middle, high) if middle < (1 - middle) ** alpha else (low, middle)
    return (low + high) / 2
