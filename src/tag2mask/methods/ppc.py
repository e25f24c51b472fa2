"""PPC: pixel-to-prototype contrast.

Du, Fu, Liu, Wang: Weakly Supervised Semantic Segmentation by Pixel-to-Prototype Contrast, CVPR 2022, arXiv:2110.07110.

    L = alpha * (L_cp + L_cc) + beta * L_intra, each summed over the two views                                 (1, 8)
    F(v_i; y_i; P) = -log( exp(v_i . p_yi / tau) / sum_{p_c in P} exp(v_i . p_c / tau) )                         (4)
    p_c = sum_{i in Omega_c} m_ci f_i / sum_{i in Omega_c} m_ci, then L2-normalised                              (5)
    L_cp = mean_i F(v_i; y_i; P')    L_cc = mean_i F(v_i; y'_i; P)    L_intra = mean_i F(v_i; y_i; P)      (6, 7, 9)

    symbol     here                   meaning
    f          project(...).relu()    projected features, [B 128 h w]; v are the same, L2-normalised per pixel
    m          maps                   the network's best map, min-max normalised per image and class
    y, y'      labels                 pseudo-labels of this and of the other view: the largest map of the tagged classes
    P, P'      prototypes             one per class of this and of the other view, from the global batch; no gradient
    Omega_c    prototype_weights      the `top` most confident pixels assigned to c, over the global batch
    tau        temperature

L_intra sees each pixel's own prototype and some semi-hard others (section 3.5): of the 60% that are most similar to the
pixel, half. It is the mean over a sample of pixels: for each class as many as half of its pixels at random, and as many
that are least similar to its prototype; who is drawn twice counts twice.

Where the paper leaves something open:
- Background is one more class with prototype; its confidence is the constant `background`, as in the released code.
  Its top pixels are therefore all that are assigned to it, and its prototype is their plain mean.
- A class that has no pixel in the global batch has no prototype: it is no negative, and a pixel that the other view
  assigns to it is left out of the mean.
- The second view is resized, and the maps of the first brought to its grid, with corners aligned, as SEAM does.
- "choose 50%" is read as at random (as in Wang et al. 2021, which the paper follows here), and as 50% of the 60%.

Where the released code differs (recipes `voc12-ppc-*-released`):

    argument            paper         code                what it does
    alpha, beta         0.1           0.05                the code averages over the views, the paper adds them up
    top                 32            32 SEAM, 16 EPS
    background          -             0.2 SEAM, 0.1 EPS
    dropout             -             0.5 SEAM, 0 EPS
    proto_from          assigned      any                 top pixels of the whole map: tags and assignment play no role
    background_proto    assigned      ties                arbitrary pixels: a slip, the constant score has no top
    negative_floor      false         true                a slip: see `ops.cams.min_max_norm`; prototypes of empty maps
    negatives           random        ranks               the less similar of the 60%, as many as half of all
    exclude_positive    true          false               may count the own prototype among the negatives, too
    hard_pixels         hardest       semi                passes over the hardest tenth
    intra_mean          pixels        classes             mean per class, then over the classes that occur
    ignore_padding      true          false
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.core import FULL, Baseline, Batch, CamOutput, Losses, Method, Progress, View
from tag2mask.errors import UserError
from tag2mask.ops.cams import resize_corners
from tag2mask.ops.contrast import (
    EXCLUDED,
    confidence,
    pixel_contrast,
    positives,
    pseudo_labels,
    rank_within_group,
    valid_on_grid,
    weighted_means,
)
from tag2mask.ops.gather import gather, processes, rank
from tag2mask.ops.pseudo_labels import prototype_weights


@dataclass(frozen=True)
class Look:
    """One view on the grid of the smaller one; P pixels of this process, prototypes 0 background, 1..K classes.

    pixels [P D] and their lengths [P 1]; labels [P] 0..K or 255; prototypes [1+K D] unit vectors; found bool [1+K].
    """

    pixels: Tensor
    lengths: Tensor
    labels: Tensor
    prototypes: Tensor
    found: Tensor


class PPC(Method):
    """Pixel-to-prototype contrast across two views and within each.

    alpha, beta: weights of the cross-view and the intra-view contrast. temperature: of the softmax. dim: of the
    projected features. dropout: share of feature channels dropped before the projection, in training. top: pixels per
    prototype. background: score of the background, in 0..1.
    size: side of the second view in pixels; null: it is resized by scale instead. A baseline with the same second view
    shares the forward pass.
    proto_from: "assigned" takes a prototype's pixels from those with its label, "any" from all. background_proto:
    "assigned" is the mean of all background pixels, "ties" of the first `top` pixels of the batch. negative_floor: see
    `ops.cams.min_max_norm`; changes prototypes with proto_from: any only.
    negatives: of the share hard_negatives of the other prototypes that is most similar to a pixel, "random" draws the
    share kept_negatives; "ranks" takes the least similar ones, as many as the share kept_negatives of all; "all": no
    mining. exclude_positive: the own prototype is no candidate.
    hard_pixels: half of a class's pixels at random and half "hardest" (least similar to the prototype); "semi": the
    second half are the last of the hardest 60%; "all": no sampling. intra_mean: over "pixels", or over the pixels of a
    class and then over "classes" (one with a single pixel adds nothing but counts).
    ignore_padding: padded pixels take no part.

    Raises UserError for a value out of range.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        beta: float = 0.1,
        temperature: float = 0.1,
        dim: int = 128,
        dropout: float = 0.0,
        top: int = 32,
        background: float = 0.2,
        size: int | None = 128,
        scale: float = 0.3,
        proto_from: Literal["assigned", "any"] = "assigned",
        background_proto: Literal["assigned", "ties"] = "assigned",
        negative_floor: bool = False,
        negatives: Literal["random", "ranks", "all"] = "random",
        hard_negatives: float = 0.6,
        kept_negatives: float = 0.5,
        exclude_positive: bool = True,
        hard_pixels: Literal["hardest", "semi", "all"] = "hardest",
        intra_mean: Literal["pixels", "classes"] = "pixels",
        ignore_padding: bool = True,
    ) -> None:
        super().__init__()
        if min(temperature, top, dim, scale, 1 if size is None else size) <= 0 or not 0 <= background < 1:
            raise UserError("ppc: temperature, top, dim, size and scale must be positive, background in 0..1, below 1")
        if not (0 < hard_negatives <= 1 and 0 < kept_negatives <= 1):
            raise UserError("ppc: hard_negatives and kept_negatives are shares, above 0 and at most 1")
        self.alpha, self.beta, self.temperature, self.dim = alpha, beta, temperature, dim
        self.top, self.background = top, background
        self.proto_from, self.background_proto, self.negative_floor = proto_from, background_proto, negative_floor
        self.negatives, self.hard_negatives, self.kept_negatives = negatives, hard_negatives, kept_negatives
        self.exclude_positive, self.hard_pixels, self.intra_mean = exclude_positive, hard_pixels, intra_mean
        self.ignore_padding = ignore_padding
        self.view = View(size=size, scale=1.0 if size else scale, align_corners=True)
        self.views = (FULL, self.view)
        self.dropout = nn.Dropout2d(dropout)

    def bind(self, net: Baseline, num_classes: int) -> None:
        """Create the projection head: a 1x1 convolution without bias."""
        if "last" not in net.dims or not any(p.requires_grad for p in net.parameters()):
            raise UserError(
                f"ppc trains the features 'last'; {type(net).__name__.lower()} has none that can be trained"
            )
        self.project = nn.Conv2d(net.dims["last"], self.dim, kernel_size=1, bias=False)
        nn.init.xavier_uniform_(self.project.weight)

    def losses(self, batch: Batch, outs: dict[View, CamOutput], progress: Progress) -> Losses:
        """The three contrasts, each summed over the two views and weighted."""
        one, two = self._look(FULL, batch, outs), self._look(self.view, batch, outs)
        draws = torch.Generator(device=batch.tags.device).manual_seed(progress.seed)
        prototype, cam, intra = [], [], []
        for this, other in ((one, two), (two, one)):
            similarity = this.pixels @ torch.cat([this.prototypes, other.prototypes]).T / this.lengths
            to_own, to_other = similarity.chunk(2, dim=1)
            prototype.append(pixel_contrast(to_other, this.labels, other.found, self.temperature))
            cam.append(pixel_contrast(to_own, other.labels, this.found, self.temperature))
            intra.append(self._intra(to_own, this, len(batch.tags), draws))
        return {
            "cross_prototype": self.alpha * torch.stack(prototype).sum(),
            "cross_cam": self.alpha * torch.stack(cam).sum(),
            "intra": self.beta * torch.stack(intra).sum(),
        }

    def _look(self, view: View, batch: Batch, outs: dict[View, CamOutput]) -> Look:
        """Features, pseudo-labels and prototypes of one view on the grid of the second."""
        height, width = outs[self.view].cams.shape[-2:]
        grid = (height, width)
        features = self.project(self.dropout(outs[view].features["last"])).relu()
        features = resize_corners(features, grid)
        with torch.no_grad():
            valid = valid_on_grid(batch.valid, grid)
            if not self.ignore_padding:
                valid = torch.ones_like(valid)
            cams = resize_corners(outs[view].best.relu(), grid)
            maps = confidence(cams, valid, negative_floor=self.negative_floor)
            labels = pseudo_labels(maps, batch.tags, self.background, valid)
            assigned, ties = self.proto_from == "assigned", self.background_proto == "ties"
            weights = prototype_weights(maps, labels, self.top, assigned=assigned, ground_ties=ties)
            means, found = weighted_means(features, weights)
        pixels = features.permute(0, 2, 3, 1).flatten(0, 2)
        lengths = pixels.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return Look(pixels, lengths, labels.flatten(), F.normalize(means, dim=1), found)

    def _intra(self, similarity: Tensor, look: Look, images: int, draws: torch.Generator) -> Tensor:
        """L_intra of one view (eq. 9), with semi-hard prototypes and hard pixels drawn for the global batch."""
        pixels, columns = similarity.shape
        shape = (images * processes(), pixels // images)
        own, defined = positives(look.labels, look.found)
        to_pick = torch.rand(*shape, columns, generator=draws, device=similarity.device)
        losses = self._mined(similarity, own, look.found, to_pick[rank() :: processes()].flatten(0, 1))
        to_sample = torch.rand(shape, generator=draws, device=similarity.device).flatten()
        closeness = gather(similarity.gather(1, own.unsqueeze(1)).view(images, -1)).flatten()
        groups = gather(torch.where(defined, own, columns).view(images, -1)).flatten()
        weights = self._pixel_weights(closeness, groups, columns, to_sample)
        weights = weights.view(shape)[rank() :: processes()].flatten()
        return (weights * torch.where(defined, losses, 0)).sum() * processes()

    def _mined(self, similarity: Tensor, own: Tensor, found: Tensor, draws: Tensor) -> Tensor:
        """-log of the softmax of each pixel's own prototype among itself and its semi-hard negatives: [P].

        similarity and draws [P C]. Draws belong to ranks of similarity, not to classes: the order of the classes
        makes no difference.
        """
        logits = similarity / self.temperature
        place = torch.arange(len(found), device=own.device)
        candidates = found.expand_as(logits)
        if self.exclude_positive:
            candidates = candidates & (place != own.unsqueeze(1))
        order = logits.detach().masked_fill(~candidates, EXCLUDED).argsort(dim=1, descending=True)
        count = (found.sum() - int(self.exclude_positive)).clamp(min=0)
        hard = torch.minimum(_share(self.hard_negatives, count).clamp(min=1), count)
        if self.negatives != "all":  # no more than this many are hard
            order = order[:, : max(1, math.floor(self.hard_negatives * (len(found) - self.exclude_positive) + 0.5))]
            place = place[: order.shape[1]]
        if self.negatives == "random":
            kept = torch.minimum(_share(self.kept_negatives, hard).clamp(min=1), hard)
            order = order.gather(1, draws[:, : len(place)].masked_fill(place >= hard, 2).argsort(dim=1))
            chosen = place < kept
        elif self.negatives == "ranks":
            chosen = (place < hard) & (place >= hard - (self.kept_negatives * count).floor())
        else:
            chosen = place < count
        others = logits.gather(1, order).masked_fill(~chosen, EXCLUDED)
        positive = logits.gather(1, own.unsqueeze(1))
        return torch.cat([positive, others], dim=1).logsumexp(dim=1) - positive[:, 0]

    def _pixel_weights(self, closeness: Tensor, groups: Tensor, count: int, draws: Tensor) -> Tensor:
        """The share of every pixel of the global batch in L_intra: [P], summing to 1, or 0 where nothing is sampled.

        closeness [P] to the own prototype; groups [P] the own class in 0..count-1, or count for pixels that are out.
        """
        (drawn, hardness), sizes = rank_within_group(
            torch.stack([draws.to(closeness.dtype), closeness]), groups, count + 1
        )
        size, inside = sizes[groups], groups < count
        half = size // 2
        if self.hard_pixels == "all":
            times, per_class = inside.to(closeness.dtype), size
        else:
            last = half if self.hard_pixels == "hardest" else 3 * size // 5
            hard = (hardness < last) & (hardness >= last - half)
            times, per_class = ((drawn < half).to(closeness.dtype) + hard) * inside, 2 * half
        if self.intra_mean == "pixels":
            return times / times.sum().clamp(min=1)
        return times / per_class.clamp(min=1) / (sizes[:count] > 0).sum().clamp(min=1)


def _share(share: float, of: Tensor) -> Tensor:
    """share * of, rounded half up."""
    return (share * of + 0.5).floor()
