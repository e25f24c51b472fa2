"""HSC: hierarchical semantic contrast.

Wu, Li, Dai, Li, Liu, Xie: Hierarchical Semantic Contrast for Weakly Supervised Semantic Segmentation, IJCAI 2023.

    L_total = L_cls + gamma (L_rsc + L_csc + L_psc), each the mean over two views of what follows                  (1)
    r_w^i = mean of u_1 over the pixels of image i in m_w, w in {o, b}                                             (3)
    L_rsc = F(r_o, r_b) + F(r_o, r~_b)    F = -1/N^2 sum_ij log(1 - cos(r_o^i, r_b^j))                          (4, 5)
    r_c   = mean over the images tagged c of the mean of u_1 over A_c, weighted by w                               (6)
    L_csc = 1/|C| sum_c [ F(r_c, P) + F(r_c, P~) ]    F = -log softmax_c( cos(r_c, P_l) / tau )                 (8, 9)
    Q_c   = mean of u_2 over B_c, weighted by w; then L2-normalised, as in PPC                                    (10)
    L_psc = mean_p [ F(p, y', Q) + F(p, y', Q~) + F(p, y~', Q) + F(p, y', Q') ]    F as in PPC, eq. 4         (12, 13)
    P_c <- lambda r_c + (1 - lambda) P_c    Q'_c <- lambda Q_c + (1 - lambda) Q'_c, after each step             (7, 11)

    symbol     here                  meaning
    u_1        Look.coarse           for regions and classes, [B 256 h w]
    u_2        Look.pixels           for pixels, [B h w, 128], L2-normalised; Q is made from them before that
    w          Look.maps             the network's best map, min-max normalised per image and class
    y'         Look.labels           0 background, 1..K: the largest map of the tagged classes, after a CRF
    m_o, m_b   Look.regions          region of interest (ROI): labels > 0; background: 0
    A_c, B_c   k_class, k_pixel      the most activated pixels: of an image tagged c; of those labelled c in the batch
    Q          Look.prototypes       of the global batch, no gradient
    P, Q'      class_, pixel_bank    momentum prototypes, one set for each view; ~ marks what is the other view's
    gamma      *_weight

Where the paper leaves something open:
- Background is one more class in L_psc, not in L_csc: its confidence is the constant `background`, as in the released
  code. Its most activated pixels are therefore all that are labelled so, and its prototype is their plain mean.
- What does not exist is left out: images without ROI or without background add 0 to L_rsc; a class whose map is zero
  everywhere is not in C; a prototype that nothing was merged into yet is neither pulled nor pushed, and takes the
  first value as it is; pixels whose own prototype does not exist are not in the mean.
- The losses of a step see P and Q' as the step before left them.
- All levels work on the grid of the smaller view, and so does the CRF: the paper refines labels of the whole image and
  shrinks them (`crf_size` goes that way). The usual kernel widths are in pixels of that grid.
- The momentum prototypes are compared as they are (12), by cosine in (8).

Where the released code differs (it exists for EPS only; recipe `voc12-hsc-eps-released`):

    argument           paper       code         what it does
    csc_weight         0.1         0.05         the code takes the mean of the four terms of both views
    momentum           0.9         0.5          lambda, the share of the new value
    k_class_loss       null        128          pixels of the r_c in the loss, where they are not the bank's
    k_pixel            32          16
    class_pixels       image       batch        A_c: of the whole batch, tagged or not, w: softmax over the classes of
                                                the maps times tags, P merges L2-normalised r_c
    class_order        together    sequential   classes with a lower index are in the bank already (of the same step)
    coarse_relu        true        false        no activation after the second layer (nor its batch norm, which is
                                                frozen as the constant factor 0.999995)
    coarse_lr          head        backbone     learning rate of u_1's projector: a slip
    rsc_norm           none        width        u_1 is first L2-normalised along the width of the map: a slip
    rsc_range          -1, 0.9995  0.0005, 0.9995  cosines are clamped; the paper has no bound, and log(0)
    rsc_pull           false       true         L1 distances of the regions to their own momentum prototypes
    proto_from         assigned    any          B_c: of all pixels, tags and labels play no role
    background_proto   assigned    ties         arbitrary pixels: a slip, see PPC
    negative_floor     false       true         a slip: see `ops.cams.min_max_norm`
    bank_start         empty       random       N(0, 1); for L_csc background too is a prototype, and stays random
    ignore_padding     true        false
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.core import FULL, Baseline, Batch, CamOutput, Losses, Method, Progress, View
from tag2mask.errors import UserError
from tag2mask.ops.cams import resize_corners
from tag2mask.ops.contrast import EXCLUDED, IGNORE, pixel_contrast, top_pixels, weighted_means
from tag2mask.ops.gather import sum_over_processes
from tag2mask.ops.mean_field import refine_labels
from tag2mask.ops.momentum import MomentumPrototypes
from tag2mask.ops.pooling import class_means, masked_means, top_of_each
from tag2mask.ops.pseudo_labels import Labeller, prototype_weights


@dataclass(frozen=True)
class Look:
    """One view on the grid of the smaller one; prototypes 0 background, 1..K classes. See the table above.

    coarse [B D h w]; pixels [B h w, D']; maps [B K h w]; labels [B h w] 0..K or 255; regions [B h w] alike, for
    L_rsc; prototypes [1+K D']; found bool [1+K].
    """

    coarse: Tensor
    pixels: Tensor
    maps: Tensor
    labels: Tensor
    regions: Tensor
    prototypes: Tensor
    found: Tensor


class HSC(Method):
    """Semantic contrast of regions, classes and pixels, across two views and with momentum prototypes.

    rsc_weight, csc_weight, psc_weight: weights of the three levels. temperature: tau. momentum: lambda, the share of
    the new value in a momentum prototype, in (0, 1]. dim_coarse, dim_pixel: of the projected features. size: side of
    the second view in pixels. background: score of the background, in 0..1. saliency: instead of the constant, the
    background's score is 1 - saliency, for labels; the baseline must read a saliency map.
    refine: "crf" is a fully connected CRF by mean field, see ops.mean_field; refine_regions: also for L_rsc (the
    paper's ablation starts with L_psc alone). crf_size: side of the CRF's grid, null for that of the losses.
    cross: supervision by the other view. momentum_pixels: momentum prototypes in L_psc, too (the last term of eq. 13).
    k_class, k_pixel: pixels per class representation and per pixel-level prototype; the table above says what the
    other settings do. class_pixels: "batch" is L2-normalised and weighted by a softmax. ignore_padding: padded pixels
    take no part.

    Raises UserError for a value out of range.
    """

    def __init__(
        self,
        *,
        rsc_weight: float = 0.1,
        csc_weight: float = 0.1,
        psc_weight: float = 0.1,
        temperature: float = 0.1,
        momentum: float = 0.9,
        dim_coarse: int = 256,
        dim_pixel: int = 128,
        size: int = 128,
        background: float = 0.1,
        saliency: bool = False,
        refine: Literal["crf", "none"] = "crf",
        refine_regions: bool = True,
        crf_size: int | None = None,
        cross: bool = True,
        momentum_pixels: bool = True,
        k_class: int = 16,
        k_class_loss: int | None = None,
        k_pixel: int = 32,
        class_pixels: Literal["image", "batch"] = "image",
        class_order: Literal["together", "sequential"] = "together",
        coarse_relu: bool = True,
        coarse_lr: Literal["head", "backbone"] = "head",
        rsc_norm: Literal["none", "channel", "width"] = "none",
        rsc_range: tuple[float, float] = (-1.0, 0.9995),
        rsc_pull: bool = False,
        proto_from: Literal["assigned", "any"] = "assigned",
        background_proto: Literal["assigned", "ties"] = "assigned",
        negative_floor: bool = False,
        bank_start: Literal["empty", "random"] = "empty",
        ignore_padding: bool = True,
    ) -> None:
        super().__init__()
        if temperature <= 0 or not 0 < momentum <= 1 or not 0 <= background < 1:
            raise UserError("hsc: temperature and momentum must be above 0, momentum at most 1, background in 0..1")
        if min(dim_coarse, dim_pixel, k_class, k_pixel, 1 if k_class_loss is None else k_class_loss) < 1:
            raise UserError("hsc: dim_coarse, dim_pixel, k_class, k_class_loss and k_pixel must be at least 1")
        if crf_size is not None and not 2 <= crf_size <= 96:
            raise UserError("hsc: crf_size must be in 2..96, every pair of its pixels is computed")
        if not -1 <= rsc_range[0] < rsc_range[1] < 1:
            raise UserError("hsc: rsc_range must be [smallest, largest] cosine, at least -1 and below 1")
        self.weights = {"rsc": rsc_weight, "csc": csc_weight, "psc": psc_weight}
        self.temperature, self.momentum, self.dims = temperature, momentum, (dim_coarse, dim_pixel)
        refiner = refine_labels if refine == "crf" else None
        self.labeller = Labeller(background, saliency, refiner, crf_size, ignore_padding, negative_floor)
        self.refine_regions, self.cross, self.momentum_pixels = refine_regions, cross, momentum_pixels
        self.k_class, self.k_class_loss, self.k_pixel = k_class, k_class_loss or k_class, k_pixel
        self.class_pixels, self.class_order = class_pixels, class_order
        self.coarse_relu, self.coarse_lr = coarse_relu, coarse_lr
        self.rsc_norm, self.rsc_range, self.rsc_pull = rsc_norm, rsc_range, rsc_pull
        self.assigned, self.ground_ties = proto_from == "assigned", background_proto == "ties"
        self.random_start = bank_start == "random"
        self.view = View(size=size, align_corners=True)
        self.views = (FULL, self.view)

    def bind(self, net: Baseline, num_classes: int) -> None:
        """Create both projectors and the momentum prototypes."""
        name = type(net).__name__.lower()
        if "last" not in net.dims or not any(p.requires_grad for p in net.parameters()):
            raise UserError(f"hsc trains the features 'last'; {name} has none that can be trained")
        if self.labeller.saliency and "saliency" not in net.needs:
            raise UserError(f"hsc.saliency: {name} reads no saliency maps; set it to false, or take eps")
        last, (coarse, pixel) = net.dims["last"], self.dims
        self.coarse = _Projector(
            nn.Conv2d(last, coarse, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(coarse, coarse, kernel_size=1),
            nn.ReLU() if self.coarse_relu else nn.Identity(),
        )
        self.coarse.trunk = self.coarse_lr == "backbone"
        project = nn.Conv2d(last, pixel, kernel_size=1, bias=False)
        nn.init.xavier_uniform_(project.weight)
        self.pixel = nn.Sequential(project, nn.ReLU())

        def bank(rows: int, dim: int) -> MomentumPrototypes:
            return MomentumPrototypes(2, rows, dim, share=self.momentum, random=self.random_start)

        self.class_bank, self.pixel_bank = bank(1 + num_classes, coarse), bank(1 + num_classes, pixel)
        self.region_bank = bank(2, coarse) if self.rsc_pull else None

    def losses(self, batch: Batch, outs: dict[View, CamOutput], progress: Progress) -> Losses:
        """The contrast of regions, of classes and of pixels, each the mean over the two views and weighted."""
        looks = [self._look(view, batch, outs) for view in self.views]
        losses = {"rsc": self._rsc(looks), "csc": self._csc(looks, batch.tags), "psc": self._psc(looks)}
        return {name: self.weights[name] * loss for name, loss in losses.items()}

    @torch.no_grad()
    def after_step(self, net: Baseline) -> None:
        """Momentum prototypes take what the last `losses` found (eq. 7 and 11)."""
        for bank in (self.class_bank, self.pixel_bank, self.region_bank):
            if bank is not None:
                bank.write()

    def _rsc(self, looks: Sequence[Look]) -> Tensor:
        """Eq. 5: regions of interest away from backgrounds."""
        (roi_1, ground_1), (roi_2, ground_2) = regions = [self._regions(look) for look in looks]
        loss = self._repel(roi_1, ground_1) + self._repel(roi_2, ground_2)
        if self.cross:
            loss = loss + self._repel(roi_1, ground_2) + self._repel(roi_2, ground_1)
        if self.region_bank is not None:
            every = torch.stack([torch.stack(pair) for pair in regions])  # [view, region, N, D]
            apart = (self.region_bank.rows[:, :, None] - every).abs().mean(dim=(2, 3))
            loss = loss + (apart * self.region_bank.known).sum()
            self.region_bank.merge(every.mean(dim=2), torch.ones_like(self.region_bank.known))
        return loss / 2

    def _regions(self, look: Look) -> tuple[Tensor, Tensor]:
        """r_o and r_b of every image of the global batch, unit vectors [N D]; zero where a region has no pixel (3)."""
        coarse, ground = look.coarse, look.regions == 0
        if self.rsc_norm != "none":
            coarse = F.normalize(coarse, dim=1 if self.rsc_norm == "channel" else 3, eps=1e-5)
        roi = (look.regions != IGNORE) & ~ground
        return _unit(masked_means(coarse, roi)), _unit(masked_means(coarse, ground))

    def _repel(self, roi: Tensor, ground: Tensor) -> Tensor:
        """F_rsc (eq. 4) of unit vectors [N D]; zero vectors have cosine 0."""
        low, high = self.rsc_range
        return -(1 - (roi @ ground.T).clamp(low, high)).log().mean()

    def _csc(self, looks: Sequence[Look], tags: Tensor) -> Tensor:
        """Eq. 9: every class to its momentum prototypes, away from those of the others."""
        count, bank = tags.shape[1], self.class_bank
        found, merged = ([self._classes(look, tags, k) for look in looks] for k in (self.k_class_loss, self.k_class))
        new, present = (torch.stack(x) for x in zip(*merged, strict=True))
        rows, known = bank.merge(F.pad(new, (0, 0, 1, 0)), F.pad(present, (1, 0)))  # the background is never present
        own = torch.arange(1, count + 1, device=tags.device)
        earlier = torch.arange(count + 1, device=tags.device) < own[:, None]  # [class, prototype]
        earlier = earlier & (self.class_order == "sequential")
        terms = []
        for this, (means, exist) in enumerate(found):
            for view in (this, 1 - this) if self.cross else (this,):
                before, after = (_unit(means) @ _unit(x[view]).T for x in (bank.rows, rows))
                logits = torch.where(earlier, after, before) / self.temperature
                logits = logits.masked_fill(~torch.where(earlier, known[view], bank.known[view]), EXCLUDED)
                counts = exist & bank.known[view, 1:]
                losses = torch.where(counts, F.cross_entropy(logits, own, reduction="none"), 0)
                terms.append(losses.sum() / counts.sum().clamp(min=1))
        return torch.stack(terms).sum() / 2

    def _classes(self, look: Look, tags: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """r_c (eq. 6) of the global batch: [K D], and whether there is one: bool [K]."""
        inside = (look.labels != IGNORE)[:, None]
        maps = look.maps * tags[:, :, None, None]
        if self.class_pixels == "image":
            weights = top_of_each(maps.clamp(min=0) * inside, k)
            return class_means(look.coarse, weights / weights.sum(dim=(2, 3), keepdim=True).clamp(min=1e-12))
        ground = torch.full_like(maps[:, :1], self.labeller.background)
        shares = torch.cat([ground, maps], dim=1).softmax(dim=1)[:, 1:]
        weights = torch.where(top_pixels(shares, inside.expand_as(shares), k), shares, 0)
        means, found = class_means(look.coarse, weights)
        return _unit(means), found & (sum_over_processes(tags.sum(dim=0)) > 0)

    def _psc(self, looks: Sequence[Look]) -> Tensor:
        """Eq. 13: every pixel to the prototype of its label, away from those of the other labels."""
        bank, terms = self.pixel_bank, []
        for view, (this, other) in enumerate((looks, looks[::-1])):
            rows, known = bank.rows[view], bank.known[view]
            similarity = this.pixels @ torch.cat([this.prototypes, other.prototypes, rows]).T
            to_own, to_other, to_momentum = similarity.chunk(3, dim=1)
            labels, others_labels = this.labels.flatten(), other.labels.flatten()
            terms.append(pixel_contrast(to_own, labels, this.found, self.temperature))
            if self.cross:
                terms.append(pixel_contrast(to_other, labels, other.found, self.temperature))
                terms.append(pixel_contrast(to_own, others_labels, this.found, self.temperature))
            if self.momentum_pixels:
                terms.append(pixel_contrast(to_momentum, labels, known, self.temperature))
        bank.merge(torch.stack([x.prototypes for x in looks]), torch.stack([x.found for x in looks]))
        return torch.stack(terms).sum() / 2

    def _look(self, view: View, batch: Batch, outs: dict[View, CamOutput]) -> Look:
        """Representations, pseudo-labels and prototypes of one view."""
        height, width = outs[self.view].cams.shape[-2:]
        grid, cams, features = (height, width), outs[view].best.detach(), outs[view].features["last"]
        coarse, pixel = (resize_corners(project(features), grid) for project in (self.coarse, self.pixel))
        maps, plain = self.labeller.assign(cams, batch, grid)
        labels = self.labeller.refine(plain, cams, batch, self.view(batch.images))
        weights = prototype_weights(maps, labels, self.k_pixel, assigned=self.assigned, ground_ties=self.ground_ties)
        means, found = weighted_means(pixel, weights)
        pixels = F.normalize(pixel.permute(0, 2, 3, 1).flatten(0, 2), dim=1)
        regions = labels if self.refine_regions else plain
        return Look(coarse, pixels, maps, labels, regions, F.normalize(means, dim=1), found)


class _Projector(nn.Sequential):
    trunk = False  # True: learns like the backbone, see make_optimizer


def _unit(x: Tensor) -> Tensor:
    """Rows [N D] of length 1; those of length 0 stay."""
    return F.normalize(x, dim=1, eps=1e-5)
