"""Context prototypes: clusters of what many images show of a class, and how well each of them suits an image.

Tang et al.: Hunting Attributes: Context Prototype-Aware Learning for Weakly Supervised Semantic Segmentation, CVPR
2024, arXiv:2403.07630. Numbers in brackets are its equations; what they leave open is told in methods/cpal.py.

    anchors    [B C D]           instance prototypes: what image b shows of class c
    contexts   [C N D]           context prototypes of the classes, of which those `found`, bool [C N], are there
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tag2mask.ops.contrast import EXCLUDED
from tag2mask.ops.kmeans import kmeans

Measure = Literal["dot", "cosine", "l1", "l2"]
FEWEST = 2  # instance prototypes that a class needs; of one, the only cluster would be that one itself


def instance_prototypes(z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means (4) of features z [B D h w]: (anchors [B C D], where there is one: bool [B C]).

    weights [B C h w]: at least 0; with all of them 0 there is none, and the anchor is zero.
    """
    totals = weights.sum(dim=(2, 3))[..., None]
    anchors = torch.einsum("bchw,bdhw->bcd", weights, z) / torch.where(totals > 0, totals, 1)
    return anchors, totals[..., 0] > 0


def context_prototypes(rows: Tensor, present: Tensor, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Cluster means (5) of instance prototypes [C Q D] where `present`, bool [C Q]: (contexts [C N D], found [C N]).

    A class of no more than N = `count` keeps its own; one with fewer than two has no context prototypes.
    """
    contexts, found = kmeans(rows, present, count, seed=seed)
    return contexts, found & (present.sum(dim=1, keepdim=True) >= FEWEST)


def feature_shift(contexts: Tensor, found: Tensor, mean: Tensor, known: Tensor) -> Tensor:
    """delta (12), [C D], of mean instance prototypes [C D]; zero for a class that has no contexts or is not `known`."""
    count = found.sum(dim=1, keepdim=True)
    shift = contexts.sum(dim=1) / count.clamp(min=1) - mean
    return torch.where((count > 0) & known[:, None], shift, 0)


def temperature(measure: Measure, dim: int, length: float) -> float:
    """gamma of (7) for features of `dim` channels and about this length, so that many prototypes have a say."""
    root = math.sqrt(dim)
    return {"dot": length**2 / root, "cosine": 1 / root, "l1": length * root, "l2": length}[measure]


def positiveness(
    anchors: Tensor,
    contexts: Tensor,
    found: Tensor,
    *,
    neighbours: int,
    gamma: float,
    measure: Measure = "dot",
    weighted: bool = True,
    rank_weighted: bool = True,
) -> Tensor:
    """w (6, 7), [B C N]: zero for all but the `neighbours` that suit an anchor best, summing to 1.

    weighted: they share by their measure; else alike. rank_weighted: they are ranked by w times the cosine; else by
    the cosine.
    """
    there = found[None]
    units = F.normalize(contexts, dim=2)
    cosine = torch.einsum("bcd,cnd->bcn", F.normalize(anchors, dim=2), units)
    if measure == "dot":
        close = torch.einsum("bcd,cnd->bcn", anchors, contexts)
    elif measure == "cosine":
        close = cosine
    else:
        p, slow = 1.0 if measure == "l1" else 2.0, "donot_use_mm_for_euclid_dist"
        close = -torch.cdist(anchors.transpose(0, 1), contexts, p=p, compute_mode=slow).transpose(0, 1)
    logits = (close / gamma).masked_fill(~there, EXCLUDED)
    score = logits.softmax(dim=2) * cosine if rank_weighted else cosine
    order = score.masked_fill(~there, -torch.inf).argsort(dim=2, descending=True, stable=True)
    kept = torch.zeros_like(score).scatter(2, order[..., :neighbours], 1) * there
    logits = logits if weighted else torch.zeros_like(logits)
    return logits.masked_fill(kept == 0, EXCLUDED).softmax(dim=2)  # is the softmax over all, over its kept sum


def folded(weights: Tensor, contexts: Tensor) -> Tensor:
    """sum_i w_i p_i / |p_i|, [B C D]: its dot product with z / |z| is the weighted mean of the cosines in (13)."""
    return torch.einsum("bcn,cnd->bcd", weights, F.normalize(contexts, dim=2))
