"""CPAL: context prototype-aware learning.

Tang, Xu, Qu, Feng, Jiang, Ge: Hunting Attributes: Context Prototype-Aware Learning for Weakly Supervised Semantic
Segmentation, CVPR 2024, arXiv:2403.07630. No code was released: what the paper leaves open is decided here.

    L     = L_BCE + lambda L_self      L_self = 1/(N+1) |M - M~|_1                                              (1, 14)
    M_n   = ReLU(CAM_n) / max ReLU(CAM_n)      M_b = 1 - max_n M_n                                                  (3)
    P_n   = mean of z over the pixels where M_n > tau, for every tag n of an image                                  (4)
    p_i   = mean of the i-th of N_p clusters of the P_n of many images; n has its own                               (5)
    w_i   = softmax_i(P_n . p_i / gamma)                                                                            (7)
    P~_n  = the K of the p_i with the largest w_i cos(p_i, P_n)                                                     (6)
    delta_n = mean_i p_i - mean_q P_n,q, q in the batch                                                            (12)
    M~_n(j) = ReLU( sum_{i in P~_n} w_i cos(z(j) + delta_n, p_i) / sum_{i in P~_n} w_i )                           (13)

    symbol     here                meaning
    z          project(...)        projected features, [B D h w]
    M_n        maps                class activation maps, max-normalised, [B N h w]
    P_n        anchors             instance prototypes, [B N D]; those of past batches are in the memory (support bank)
    p_i        contexts            context prototypes, [N N_p D]: k-means over the memory when an epoch begins
    w_i, P~_n  _aware              positiveness and soft positive neighbours. As the ReLU is outside the sum, the
                                   neighbours of an image and class collapse into the vector sum_i w_i p_i / |p_i|
    delta_n    _shift              feature alignment
    M~_n       _pacam              prototype-aware CAM (PACAM), also the map to export

Prototypes, w and delta carry no gradient; M and, through z, M~ do.

Where the paper leaves something open:
- Eq. 6 ranks by cos(w_i p_i, P_n) and eq. 13 sums cos(f, w_i p_i): a cosine does not feel a factor, so as printed w is
  without effect, which Table 2 contradicts. Here w weighs both the rank and the mean (`positiveness`, `rank`).
- gamma would cancel as well; it is read as a temperature, for without one the softmax keeps a single prototype.
- delta is to be added to "instance features". Added to P_n it takes all that is special about an image out if the image
  is the only one of its class in the batch; added to the features it does not (`align`). At inference the mean of the
  batch is a running mean.
- Eq. 13 compares features with prototypes of another space, z is what is meant. M~ is max-normalised like M, and the
  background of M~ is 1 - max_n M~_n.
- A class takes part once it has prototypes, which takes two entries in the memory at the start of an epoch; one with
  fewer than N_p entries takes the entries themselves. Until then an image's tag counts as none, and so does a tag whose
  map is zero everywhere. At inference the plain map stands in.
- L_self is the mean over pixels, images and the N + 1 maps; padding counts nowhere.
- On a baseline that predicts a background, maps are its softmax shares. A baseline's refined map is not read.

What the arguments stand for, where there is more than one reading:

    argument       default     other readings
    positiveness   weighted    uniform: eq. 13 as printed
    rank           weighted    cosine: eq. 6 as printed
    measure        dot         cosine, l1, l2: Table 3. With cosine, rank by cosine and gamma 1, w is that of SNCLR (Ge
                               et al., ICLR 2023), where it is from: the softmax over the K kept ones alone is the same
    gamma          null        1: eq. 7 without a temperature
    align          features    anchor: eq. 9 as printed; both; off
    projection     conv        hierarchical: that of SIPE, on which CPAL builds (ops/projection.py); identity: z = f
    background     complement  bank: the background has prototypes, too, of the pixels where M_b / 2 exceeds all M_n
    reduction      mean        sum: eq. 14 without a mean over pixels
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tag2mask.core import FULL, Baseline, Batch, CamOutput, Losses, Method, Progress, View
from tag2mask.errors import UserError
from tag2mask.ops.cams import max_norm
from tag2mask.ops.context_prototypes import (
    Measure,
    context_prototypes,
    feature_shift,
    folded,
    instance_prototypes,
    positiveness,
    temperature,
)
from tag2mask.ops.contrast import valid_on_grid
from tag2mask.ops.gather import processes, sum_over_processes
from tag2mask.ops.memory import Memory
from tag2mask.ops.momentum import MomentumPrototypes
from tag2mask.ops.projection import Projection, cosine_maps
from tag2mask.ops.seed import seed_of


class CPAL(Method):
    """Maps must agree with the similarity of features to prototypes of their class that suit the image.

    weight: lambda. threshold: tau. bank: instance prototypes kept per class, first in, first out. prototypes: N_p.
    neighbours: K. projection: "conv" is a 1x1 convolution of the tap "last"; "hierarchical" of c2, c3, c4, c5. dim:
    of z; null: 256, 768 if hierarchical. detach: z sends no gradient into the network. positiveness, rank, measure,
    align, background, reduction: see the table above. gamma: what the measure is divided by; null: the root of dim,
    where z has channels of variance 1 and the measure is dot or l2, and what is equivalent to that elsewhere.
    align_mean: "running" takes the running mean in training, too; running: share of a batch in it. delta_scale: times
    delta. pooling: "cam" weighs the pixels of an instance prototype with M. unit: z and instance prototypes are
    L2-normalised. gate: only prototypes of tags with a score of at least this, in 0..1, are stored. pacam_norm: "none"
    leaves M~ as a cosine. stop: no gradient through "pacam" (the projection then stays as it was initialised) or "cam".
    first: the first clustering, in epochs; below 1 it comes on the way. export: "sum" is M + M~.

    Raises UserError for a value out of range.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        threshold: float = 0.1,
        bank: int = 1000,
        prototypes: int = 50,
        neighbours: int = 20,
        projection: Literal["conv", "hierarchical", "identity"] = "conv",
        dim: int | None = None,
        detach: bool = True,
        positiveness: Literal["weighted", "uniform"] = "weighted",
        rank: Literal["weighted", "cosine"] = "weighted",
        measure: Measure = "dot",
        gamma: float | None = None,
        align: Literal["features", "anchor", "both", "off"] = "features",
        align_mean: Literal["batch", "running"] = "batch",
        delta_scale: float = 1.0,
        running: float = 0.1,
        background: Literal["complement", "bank"] = "complement",
        pooling: Literal["mask", "cam"] = "mask",
        unit: bool = False,
        gate: float = 0.0,
        pacam_norm: Literal["max", "none"] = "max",
        stop: Literal["none", "pacam", "cam"] = "none",
        reduction: Literal["mean", "sum"] = "mean",
        first: float = 1.0,
        export: Literal["pacam", "cam", "sum"] = "pacam",
    ) -> None:
        super().__init__()
        if min(bank, prototypes, neighbours, 1 if dim is None else dim) < 1:
            raise UserError("cpal: bank, prototypes, neighbours and dim must be at least 1")
        if not (0 <= threshold < 1 and 0 <= gate <= 1 and 0 < running <= 1 and 0 < first <= 1):
            raise UserError("cpal: threshold and gate must be in 0..1, running and first above 0 and at most 1")
        if gamma is not None and gamma <= 0:
            raise UserError("cpal: gamma must be positive; null takes what suits the measure")
        if projection == "identity" and detach and stop == "cam":
            raise UserError("cpal: with projection: identity, detach and stop: cam nothing would learn; change one")
        self.weight, self.threshold, self.capacity = weight, threshold, bank
        self.count, self.neighbours = prototypes, neighbours
        self.projection, self.dim, self.detach = projection, dim, detach
        self.weighted, self.rank_weighted = positiveness == "weighted", rank == "weighted"
        self.measure: Measure = measure
        self.gamma = gamma
        self.shift_features, self.shift_anchors = align in ("features", "both"), align in ("anchor", "both")
        self.running_mean, self.delta_scale, self.share = align_mean == "running", delta_scale, running
        self.ground = int(background == "bank")  # rows of the background, before those of the classes
        self.weigh_pixels, self.unit, self.gate = pooling == "cam", unit, gate
        self.normalise, self.stop, self.summed = pacam_norm == "max", stop, reduction == "sum"
        self.first, self.export = first, export

    def bind(self, net: Baseline, num_classes: int) -> None:
        """Create the projection, the memory and the context prototypes."""
        self.project = Projection(self.projection, net.dims, dim=self.dim, detach=self.detach, unit=self.unit)
        self.project.requires_grad_(self.stop != "pacam")
        dim = self.project.dim
        self.scale = self.gamma or temperature(self.measure, dim, self.project.length)
        rows = self.ground + num_classes
        self.memory = Memory(rows, dim, capacity=self.capacity)
        self.average = MomentumPrototypes(rows, dim, share=self.share)
        self.contexts: Tensor
        self.found: Tensor
        self.register_buffer("contexts", torch.zeros(rows, self.count, dim))
        self.register_buffer("found", torch.zeros(rows, self.count, dtype=torch.bool))
        self._due, self._made = False, False  # whether prototypes are wanted within the first epoch, and are there

    def losses(self, batch: Batch, outs: dict[View, CamOutput], progress: Progress) -> Losses:
        """L_self (eq. 14), weighted."""
        out, self._due = outs[FULL], progress.epoch >= self.first and progress.epoch < 1
        valid = valid_on_grid(batch.valid, _size(out))[:, None].to(out.cams)
        maps, z = self._maps(out, valid), self.project(out.features, _size(out))
        anchors, exist = self._anchors(z, maps, batch.tags, valid)
        sure = F.pad(out.logits.sigmoid() >= self.gate, (self.ground, 0), value=True)
        self.memory.stage(anchors, exist & sure, batch.index)
        mean, known = self._batch_mean(anchors, exist)
        self.average.merge(mean, known)
        if self.running_mean:
            mean = torch.where(self.average.known[:, None], self.average.rows, mean)
        pacam, part = self._pacam(z, anchors, exist, self._shift(mean, known), valid)

        own = _with_background(maps * part[:, self.ground :], valid)
        if self.ground:
            own = torch.cat([own[:, :1] * part[:, :1], own[:, 1:]], dim=1)
            aware = pacam
        else:
            aware = _with_background(pacam, valid)
        if self.stop == "pacam":
            aware = aware.detach()
        elif self.stop == "cam":
            own = own.detach()
        loss = (own - aware).abs().sum() / own.shape[1]
        if self.summed:
            return {"self": self.weight * loss / len(own)}
        return {"self": self.weight * loss * processes() / sum_over_processes(valid.sum()).clamp(min=1)}

    @torch.no_grad()
    def on_epoch_start(self, epoch: int) -> None:
        """Context prototypes: the clusters of what the memory holds (eq. 5)."""
        contexts, found = context_prototypes(*self.memory.by_class(), self.count, seed=seed_of(epoch))
        self.contexts.copy_(contexts)
        self.found.copy_(found)

    @torch.no_grad()
    def after_step(self, net: Baseline) -> None:
        """Instance prototypes of the step into the memory; the first clustering, if it comes within the first epoch."""
        self.memory.write()
        self.average.write()
        if self._due and not self._made:  # waits for the device, once in a run
            if not self.found.any():
                self.on_epoch_start(0)
            self._made = bool(self.found.any())

    @torch.no_grad()
    def cams(self, out: CamOutput, tags: Tensor) -> Tensor:
        """M~ of every class as if it were tagged, [B K h w] in 0..1; M where a class has no prototypes."""
        valid = torch.ones_like(out.cams[:, :1])
        maps, z = self._maps(out, valid), self.project(out.features, _size(out))
        anchors, exist = self._anchors(z, maps, torch.ones_like(out.logits), valid)
        pacam, part = self._pacam(z, anchors, exist, self._shift(self.average.rows, self.average.known), valid)
        pacam = torch.where(part, pacam, F.pad(maps, (0, 0, 0, 0, self.ground, 0)))[:, self.ground :]
        return {"pacam": pacam, "cam": maps, "sum": maps + pacam}[self.export]

    @torch.no_grad()
    def explain(self, out: CamOutput) -> tuple[Tensor, Tensor, Tensor]:
        """What `cams` compares: z [B D h w], delta as added to it [C D], and w of every context prototype [B C N_p]."""
        valid = torch.ones_like(out.cams[:, :1])
        maps, z = self._maps(out, valid), self.project(out.features, _size(out))
        anchors, _ = self._anchors(z, maps, torch.ones_like(out.logits), valid)
        shift = self._shift(self.average.rows, self.average.known)
        weights = self._positiveness(anchors + shift if self.shift_anchors else anchors)
        return z, shift * self.shift_features, weights

    def _maps(self, out: CamOutput, valid: Tensor) -> Tensor:
        """M_n (eq. 3), [B K h w]; valid [B 1 h w] of 0/1."""
        cams = out.cams
        if out.background is not None:
            cams = torch.cat([cams, out.background], dim=1).softmax(dim=1)[:, :-1]
        return max_norm(cams * valid)

    @torch.no_grad()
    def _anchors(self, z: Tensor, maps: Tensor, tags: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Instance prototypes (eq. 4), [B C D], and where there is one, bool [B C]; C is K, or 1+K with background."""
        maps = maps * tags[:, :, None, None]
        regions = maps > self.threshold
        if self.ground:
            best = maps.amax(dim=1, keepdim=True)
            regions = torch.cat([((1 - best) / 2 >= best) & (valid > 0), regions], dim=1)
            maps = torch.cat([1 - best, maps], dim=1)
        anchors, exist = instance_prototypes(z, regions * maps if self.weigh_pixels else regions.to(z))
        return F.normalize(anchors, dim=2) if self.unit else anchors, exist

    @torch.no_grad()
    def _batch_mean(self, anchors: Tensor, exist: Tensor) -> tuple[Tensor, Tensor]:
        """The mean instance prototype of every class in the global batch, [C D], and whether there is one: bool [C]."""
        sums = (anchors * exist[..., None]).sum(dim=0)
        both = sum_over_processes(torch.cat([sums, exist.sum(dim=0)[:, None]], dim=1))
        return both[:, :-1] / both[:, -1:].clamp(min=1), both[:, -1] > 0

    @torch.no_grad()
    def _shift(self, mean: Tensor, known: Tensor) -> Tensor:
        """delta (eq. 12) for mean instance prototypes [C D], [C D]; zero for a class that lacks either."""
        return self.delta_scale * feature_shift(self.contexts, self.found, mean, known)

    @torch.no_grad()
    def _aware(self, anchors: Tensor) -> Tensor:
        """sum_i w_i p_i / |p_i| over the soft positive neighbours of anchors [B C D]."""
        return folded(self._positiveness(anchors), self.contexts)

    def _positiveness(self, anchors: Tensor) -> Tensor:
        """w_i (eq. 6, 7) for anchors [B C D]: [B C N_p], zero for all but the neighbours, summing to 1."""
        return positiveness(
            anchors, self.contexts, self.found, neighbours=self.neighbours, gamma=self.scale, measure=self.measure,
            weighted=self.weighted, rank_weighted=self.rank_weighted,
        )  # fmt: skip

    def _pacam(self, z: Tensor, anchors: Tensor, exist: Tensor, shift: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """M~ (eq. 13), [B C h w], and which of them there are, bool [B C 1 1]: zero elsewhere."""
        aware = self._aware(anchors + shift if self.shift_anchors else anchors)
        pacam = cosine_maps(z, aware, shift if self.shift_features else None) * valid
        pacam = max_norm(pacam) if self.normalise else pacam.relu()
        part = (exist & self.found.any(dim=1))[..., None, None]
        return pacam * part, part


def _with_background(maps: Tensor, valid: Tensor) -> Tensor:
    """M_b = 1 - max_n M_n before maps [B K h w]: [B 1+K h w]."""
    return torch.cat([(1 - maps.amax(dim=1, keepdim=True)) * valid, maps], dim=1)


def _size(out: CamOutput) -> tuple[int, int]:
    return out.cams.shape[-2], out.cams.shape[-1]
