"""Regions of the global batch, mixed pairwise and compared with a memory: what RCA's contrast is made of.

Regions come as [N M ...]: M places for each of the N images of the global batch, in which tagged classes are, by
falling score, so that the order of the classes makes no difference. Nothing loops over regions or waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tag2mask.ops.contrast import EXCLUDED
from tag2mask.ops.gather import gather
from tag2mask.ops.memory import Memory
from tag2mask.ops.pooling import gather_with_gradient


@dataclass(frozen=True)
class Regions:
    """vectors [N M D]; classes [N M]; exist bool [N M]; slots [N M]: those of a memory of pairs, or -1."""

    vectors: Tensor
    classes: Tensor
    exist: Tensor
    slots: Tensor


def masked_pool(features: Tensor, masks: Tensor) -> Tensor:
    """The sum of features [B D h w] over every mask [B K h w] of 0/1, divided by its area or 1: [B K D]."""
    sums = torch.einsum("bkhw,bdhw->bkd", masks, features)
    return sums / masks.sum(dim=(2, 3)).clamp(min=1)[..., None]


def highest(scores: Tensor, tags: Tensor, most: int) -> Tensor:
    """The `most` classes of every image with the highest scores, tagged ones first: scores, tags [n K] -> [n M]."""
    return scores.masked_fill(tags == 0, -torch.inf).topk(most, dim=1).indices


def at(x: Tensor, classes: Tensor) -> Tensor:
    """x [n K ...] at classes [n M] -> [n M ...]."""
    return x.gather(1, classes.view(*classes.shape, *[1] * (x.ndim - 2)).expand(*classes.shape, *x.shape[2:]))


def gathered(vectors: Tensor, classes: Tensor, exist: Tensor, slots: Tensor) -> Regions:
    """The regions of the global batch from those of this process, [n M ...]. Gradient: see ops.pooling."""
    facts = gather(torch.stack([classes, exist.long(), slots], dim=1))
    return Regions(gather_with_gradient(vectors), facts[:, 0], facts[:, 1] > 0, facts[:, 2])


@torch.no_grad()
def partners(allowed: Tensor, image_draws: Tensor, class_draws: Tensor) -> tuple[Tensor, Tensor]:
    """For every region another one: an image at random, then one of its regions at random.

    allowed bool [N N M]: which regions (j, m) an image i may have. image_draws [N M N] and class_draws [N M M]: the
    largest draw wins. Returns (number j * M + m of the partner [N M], bool [N M]: False where there is none).
    """
    most = allowed.shape[2]
    images = allowed.any(dim=2)
    image = image_draws.masked_fill(~images[:, None], -1).argmax(dim=2)
    possible = allowed.gather(1, image[..., None].expand(-1, -1, most))
    place = class_draws.masked_fill(~possible, -1).argmax(dim=2)
    return image * most + place, images.any(dim=1, keepdim=True).expand_as(image)


@dataclass(frozen=True)
class Bank:
    """What a memory holds, for comparisons: rows [S D], S slots, at most Q of each of K classes.

    lengths [S] of the rows; class_of [S]; valid bool [S]; slots and there (bool) [K Q]: the valid slots by class.
    """

    rows: Tensor
    lengths: Tensor
    class_of: Tensor
    valid: Tensor
    slots: Tensor
    there: Tensor

    @classmethod
    def of(cls, memory: Memory) -> Bank:
        """The bank of a memory, rows as they lie there: correcting their bias would not change a cosine."""
        valid, (slots, inside) = memory.filled(), memory.slots_by_class()
        there = inside if len(valid) == 0 else inside & valid[slots]
        return cls(memory.rows, memory.rows.norm(dim=1).clamp(min=1e-12), memory.class_of, valid, slots, there)

    def positives(self, classes: Tensor, own: Tensor) -> Tensor:
        """Which of a class's slots [.. Q] are positives, given classes [..] and a slot [..] that is none, or -1."""
        return self.there[classes] & (self.slots[classes] != own[..., None])

    def similarities(self, vectors: Tensor, temperature: float) -> Tensor:
        """Cosines by temperature, [R D] -> [R S]."""
        return (F.normalize(vectors, dim=1) / temperature) @ self.rows.to(vectors.dtype).T * self.lengths.reciprocal()


def nce(
    logits: Tensor, targets: Tensor, bank: Bank, denominator: Literal["negatives", "all", "balanced"], own: Tensor
) -> Tensor:
    """The mean of -log( e^positive / denominator ) over the entries of the target class (RCA, eq. 4): [T R].

    logits [R S]: similarities to the bank, in -40..40. targets [T R]: T classes for every region.
    denominator: "negatives" is the one positive and all entries of other classes, "all" is all entries (Khosla et al.
    2020), "balanced" is as "negatives", but every class counts as if it had the same number of entries. own [T R]: a
    slot that is no positive, or -1. With no positive the value is 0.
    """
    positive = bank.positives(targets, own)
    near = logits.expand(len(targets), -1, -1).gather(2, bank.slots[targets])
    if denominator == "all":
        counted = bank.valid & (torch.arange(logits.shape[1], device=own.device) != own[..., None])
        losses = logits.masked_fill(~counted, EXCLUDED).logsumexp(dim=2, keepdim=True) - near
    else:
        far = _log_of_others(logits, bank, balanced=denominator == "balanced").expand(len(targets), -1, -1)
        losses = F.softplus(far.gather(2, targets[..., None]) - near, threshold=40)
    return torch.where(positive, losses, 0).sum(dim=2) / positive.sum(dim=2).clamp(min=1)


def _log_of_others(logits: Tensor, bank: Bank, *, balanced: bool) -> Tensor:
    """log of the sum of e^logit over the entries of all classes but k, for every class k: [R S] -> [R K].

    One pass over the logits serves all classes: sums for each class first, then those of the others.
    """
    classes = torch.arange(len(bank.slots), device=logits.device)
    members = ((bank.class_of[:, None] == classes) & bank.valid[:, None]).to(logits.dtype)
    share = members.new_ones(len(classes))
    if balanced:
        sizes = bank.there.sum(dim=1).to(logits.dtype)
        share = sizes.sum() / (sizes > 0).sum().clamp(min=1) / sizes.clamp(min=1)
    others = share[:, None] * (classes[:, None] != classes)
    sums = logits.exp() @ members @ others
    return torch.where(sums > 0, sums.clamp(min=torch.finfo(sums.dtype).tiny).log(), EXCLUDED)
