"""Prototype-aware maps (PACAM) where nothing is trained: CPAL on the features of a frozen network and maps that exist.

Tang et al.: Hunting Attributes: Context Prototype-Aware Learning for Weakly Supervised Semantic Segmentation, CVPR
2024, arXiv:2403.07630. Its Tables 4 and 5 have rows on CLIP-ES, but it does not say how CPAL is put there, where no
weight could follow a loss. This is the reading that needs none. Its equations, with the readings of methods/cpal.py:

    (3)        M_n: the maps that exist, max-normalised on the grid of the features
    (4)        as it is: an instance prototype of every tag of an image, if its map exceeds tau somewhere
    (5)        once, over the instance prototypes of up to `bank` images of a class, which are spread evenly over the
               training set; first in, first out keeps as many of a shuffled stream
    (6, 7)     as they are
    (12)       once: the Q_n instances are those of the bank, not those of a mini-batch
    (13)       as it is, max-normalised; then fused with M: (1 - share) M + share M~, max-normalised
    (1, 14)    fall away: there is nothing that L_BCE and L_self could train, and so no projection v that aligns the
               features with the maps

What v would take out is what all features have in common: with it, the cosines of a frozen network are high everywhere,
and so is M~. Hence z = f / |f| less its mean over the images of the bank. gamma null is E|z|^2 over the root of the
number of channels, as in CPAL. A class with fewer than two instance prototypes, and a tag whose map is zero, keep M.
The share of M~ and this z are ours, not the paper's. Its tau is for maps that are trained along; where a wide map is
wrong at its rim, a larger one keeps the prototypes clean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tag2mask.ops.cams import max_norm, resize
from tag2mask.ops.context_prototypes import (
    context_prototypes,
    feature_shift,
    folded,
    instance_prototypes,
    positiveness,
    temperature,
)
from tag2mask.ops.projection import cosine_maps

SEED = 0  # of k-means, which draws where it starts
LEAST = 1e-6  # of a mean square, so that features that are all alike divide by something


@dataclass(frozen=True)
class ContextPrototypes:
    """contexts [K N_p D], of which `found`, bool [K N_p], are there; shift [K D]: delta; mean [D] of all f / |f|."""

    contexts: Tensor
    found: Tensor
    shift: Tensor
    mean: Tensor


def in_the_bank(tags: NDArray[np.uint8], bank: int) -> NDArray[np.bool_]:
    """Which pairs [N K] of the tags [N K] of 0/1 give an instance prototype: `bank` of a class, evenly spread."""
    chosen = np.zeros(tags.shape, dtype=bool)
    for n in range(tags.shape[1]):
        images = np.flatnonzero(tags[:, n])
        if len(images) > bank:
            images = images[np.arange(bank) * len(images) // bank]
        chosen[images, n] = True
    return chosen


def instances(features: Tensor, maps: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """What the images give: (P_n [B K D], where there is one: bool [B K], the mean of f / |f| over places [B D]).

    features [B D h w]; maps [B K H W] at least 0, zero where a class is not tagged.
    """
    z = F.normalize(features, dim=1)
    found, exist = instance_prototypes(z, (_on_grid(maps, z) > threshold).to(z))
    return found, exist, z.mean(dim=(2, 3))


def cluster(rows: Tensor, present: Tensor, mean: Tensor, count: int) -> ContextPrototypes:
    """The context prototypes of instance prototypes [K Q D], where `present`, bool [K Q]; mean [D] of all f / |f|."""
    rows = torch.where(present[..., None], rows - mean, 0)
    contexts, found = context_prototypes(rows, present, count, seed=SEED)
    each = rows.sum(dim=1) / present.sum(dim=1, keepdim=True).clamp(min=1)
    return ContextPrototypes(contexts, found, feature_shift(contexts, found, each, present.any(dim=1)), mean)


def pacam(
    features: Tensor, maps: Tensor, bank: ContextPrototypes, *, threshold: float, neighbours: int, gamma: float | None
) -> tuple[Tensor, Tensor]:
    """(M~ [B K h w] in 0..1, which of them there are: bool [B K]); features and maps as for `instances`."""
    anchors, exist, _ = instances(features, maps, threshold)
    anchors = torch.where(exist[..., None], anchors - bank.mean, 0)
    length = (1 - bank.mean.square().sum()).clamp(min=LEAST).sqrt()
    weights = positiveness(
        anchors, bank.contexts, bank.found, neighbours=neighbours,
        gamma=gamma or temperature("dot", len(bank.mean), float(length)),
    )  # fmt: skip
    z = F.normalize(features, dim=1) - bank.mean[:, None, None]
    part = exist & bank.found.any(dim=1)
    aware = max_norm(cosine_maps(z, folded(weights, bank.contexts), bank.shift))
    return aware * part[..., None, None], part


def fuse(maps: Tensor, aware: Tensor, part: Tensor, share: float) -> Tensor:
    """M [B K H W] and M~ [B K h w] where there is one, bool [B K]: their weighted mean, max-normalised; else M."""
    both = max_norm((1 - share) * maps + share * resize(aware, (maps.shape[-2], maps.shape[-1])))
    return torch.where(part[..., None, None], both, maps)


def _on_grid(maps: Tensor, features: Tensor) -> Tensor:
    """M_n (3) on the grid of the features."""
    return max_norm(resize(maps, (features.shape[-2], features.shape[-1])))
