"""RCA: regional semantic contrast and aggregation.

Zhou, Zhang, Zhao, Li: Regional Semantic Contrast and Aggregation for Weakly Supervised Semantic Segmentation, CVPR
2022, arXiv:2203.09653.

    P = F_CAM(F)        f_l = mean of F over the pixels where P_l > mean of P_l, for every tagged class l        (1, 2)
    m_l <- gamma m_l + (1 - gamma) f_l, the memory of class l in this image, if its score exceeds nu                (3)
    L_NCE(f, l) = mean_m+ -log( e^(cos(f, m+) / tau) / (e^(cos(f, m+) / tau) + sum_m- e^(cos(f, m-) / tau)) )       (4)
                  m+ in the memory of class l, m- in those of all others
    fhat_l = omega f_l + (1 - omega) f_l-, omega ~ Beta(beta, beta), f_l- a region of another image and class       (5)
    L_RM(l) = omega L_NCE(fhat_l, l) + (1 - omega) L_NCE(fhat_l, l-)                                                (6)
    F' = softmax(F Q^T) Q, Q the k-means centres of every class's memory       O = F_CAM([F, F'])        (7, 8, 9, 10)
    L = alpha_1 mean of L_RM + alpha_2 L_CE(GAP(P)) + L_CE(GAP(O))                                                 (11)

    symbol      here                   meaning
    F           features["plain"]      last features, [B D h w]
    [F, F']     features["last"]       what the baseline's classifier reads; L_CE(GAP(O)) is the baseline's own loss
    P           heads.coarse(...)      coarse maps, [B K h w]; for training only, as is the memory
    f_l, M_l    vectors, masks         pseudo-regions, [B K D] and [B K h w]
    m_l         memory                 see ops.memory; the batch of a step meets the memory as the step before left it
    Q           prototypes             [K, `clusters`, D], made anew at the start of every epoch; kept for inference
    alpha_1,2   contrast, coarse
    gamma, nu   momentum, gate
    beta        mix                    a whole number: the median of 2 beta - 1 uniform draws is Beta(beta, beta)

Where the paper leaves something open:
- A memory starts empty. Eq. 3 would keep 0.99^30 = 74% of any first value after 30 epochs; here it is corrected for
  that (see ops.memory). What holds nothing is no positive, no negative and not clustered; a region whose class holds
  nothing is left out; and while there are no prototypes F' = 0.
- Eq. 7 has no scale: features after a ReLU would make the softmax choose one prototype. It is 1/sqrt(D).
- The partner is drawn anew for each region: one of the other images that have a class which this one has not, then one
  of these classes. If there is none, omega = 1. Regions of the global batch are partners, and all have gradients.
- "score" of the gate is sigmoid(GAP(O)), as in the released code: nu = 0.7 suits no un-normalised score.
- An image has the mean of its regions, the batch the mean of its images; alpha_1 is 0.02, since the released 0.01 is on
  the sum of the 2 images of each GPU. tau = 0.07 is the released one; the paper has none.
- Padding is in no region. Of several views only the full one has regions; all have F'.

Where the released code differs (VGG16 and OAA on VOC only; recipe `voc12-rca-oaa-released`):

    argument          paper       code          what it does
    aggregation       scaled      released      learned q, k, v, no softmax, [F, F'] projected to D channels again
    heads             conv        towers        three 3x3 convolutions before each 1x1, and for O one tower per class
    capacity          null        500           a ring for each class whose slots mix images
    start             zero        random        N(0, 1), never told from memories; so are the first prototypes
    query             false       true          regions of the loss, not of the memory, are means of g(F)
    masks             scores      shares        P_l is first made a softmax over the classes
    cumulative_masks  false       true          a slip: pooled over the masks of all classes before it, too, then
                                                divided by the area of its own mask alone
    partners          other       any           maybe of the same image or class
    warmup            1           2             epochs without contrast
    contrast, images  0.02, mean  0.01, sum     over the images of a GPU, then the mean over the GPUs
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.core import FULL, Baseline, Batch, CamOutput, Features, Losses, Method, Progress, TrainingOnly, View
from tag2mask.errors import UserError
from tag2mask.ops.aggregation import LearnedAttention, attend, normal, towers
from tag2mask.ops.cams import pool
from tag2mask.ops.contrast import valid_on_grid
from tag2mask.ops.gather import gather
from tag2mask.ops.kmeans import kmeans
from tag2mask.ops.memory import Memory
from tag2mask.ops.regions import Bank, Regions, at, gathered, highest, masked_pool, nce, partners
from tag2mask.ops.seed import seed_of

LOWEST = 0.025  # temperature at which e^(cosine / temperature) spans what float32 can hold


class RCA(Method):
    """Regions are contrasted with a memory of the data set, and every pixel reads its prototypes.

    contrast, coarse: weights of the region contrast and of the coarse maps' classification (alpha_1, alpha_2).
    temperature: of the contrast. clusters: prototypes per class (K). momentum: what a memory keeps at a write (gamma).
    gate: score above which a region is written (nu). mix: shape of the mixing weights (beta). warmup: epochs without
    contrast.
    capacity: slots per class; null: one for every (image, class) of the training tags. start: "zero", "copy" or
    "random", see ops.memory.Memory; with "random" prototypes are so until the second epoch.
    aggregation: "scaled" is eq. 7 with a scale of 1/sqrt(D), "printed" without, "released" is learned and has no
    softmax, "none" leaves the features alone. heads: "conv" is one 1x1 convolution each, or for the final one the
    baseline's own, "towers" are deep ones, of `width` channels.
    query: regions of the loss are pooled from a learned projection. masks: from the coarse "scores", or from their
    softmax over the classes ("shares"). cumulative_masks: a slip, see above. gate_from: sigmoid of the "final" score,
    or the "coarse" one, un-normalised, as printed.
    denominator: of eq. 4, the one positive and all "negatives", as printed; "all" entries; or "balanced", where every
    class has the same share of the negatives. exclude_own: a region's own memory is no positive; without capacity only.
    partners: regions are mixed with one of an "other" image and class, with "any", or with "none". images: the "mean"
    or the "sum" over the images of the batch.

    Raises UserError for a value out of range.
    """

    prototypes: Tensor
    found: Tensor

    def __init__(
        self,
        *,
        contrast: float = 0.02,
        coarse: float = 0.4,
        temperature: float = 0.07,
        clusters: int = 10,
        momentum: float = 0.99,
        gate: float = 0.7,
        mix: int = 8,
        warmup: float = 1.0,
        capacity: int | None = None,
        start: Literal["zero", "copy", "random"] = "zero",
        aggregation: Literal["scaled", "printed", "released", "none"] = "scaled",
        heads: Literal["conv", "towers"] = "conv",
        width: int = 512,
        query: bool = False,
        masks: Literal["scores", "shares"] = "scores",
        cumulative_masks: bool = False,
        gate_from: Literal["final", "coarse"] = "final",
        denominator: Literal["negatives", "all", "balanced"] = "negatives",
        exclude_own: bool = False,
        partners: Literal["other", "any", "none"] = "other",
        images: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        if temperature < LOWEST or not 0 <= momentum < 1:
            raise UserError(f"rca: temperature must be at least {LOWEST}, momentum in 0..1, below 1")
        if min(clusters, mix, width, 1 if capacity is None else capacity) < 1:
            raise UserError("rca: clusters, mix, width and capacity must be at least 1")
        if exclude_own and capacity is not None:
            raise UserError("rca: no memory of a ring is a region's own; set capacity: null or exclude_own: false")
        self.contrast, self.coarse, self.temperature, self.warmup = contrast, coarse, temperature, warmup
        self.clusters, self.momentum, self.gate, self.mix = clusters, momentum, gate, mix
        self.capacity, self.start, self.aggregation = capacity, start, aggregation
        self.tower = width if heads == "towers" else None
        self.query, self.masks, self.cumulative_masks, self.gate_from = query, masks, cumulative_masks, gate_from
        self.denominator, self.exclude_own, self.partners, self.images = denominator, exclude_own, partners, images

    def bind(self, net: Baseline, num_classes: int) -> None:
        """Create the heads, the memory and the prototypes; make the classifier read F' too."""
        if "last" not in net.dims or not any(p.requires_grad for p in net.parameters()):
            raise UserError(
                f"rca trains the features 'last'; {type(net).__name__.lower()} has none that can be trained"
            )
        dim = net.dims["last"]
        self.most = num_classes  # regions of an image
        self.heads = _Heads(dim, num_classes, tower=self.tower, query=self.query)
        self.memory = Memory(num_classes, dim, capacity=self.capacity, momentum=self.momentum, start=self.start)
        random = self.start == "random"
        shape = (num_classes, self.clusters, dim)
        self.register_buffer("prototypes", torch.randn(shape) if random else torch.zeros(shape))
        self.register_buffer("found", torch.full(shape[:2], random))
        self.attention = LearnedAttention(dim) if self.aggregation == "released" else None
        if self.aggregation in ("scaled", "printed"):
            net.widen(dim)
        if self.tower is not None:
            maps = [m for m in net.classifier.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
            net.classifier = towers(net.dims["last"], self.tower, maps, count=maps)

    def remember(self, tags: Tensor) -> None:
        """Make the memory, and room for as many regions as the image with most tags has."""
        self.memory.remember(tags)
        self.most = max(1, int((tags > 0).sum(dim=1).max()))

    def adapt(self, features: Features) -> Features:
        """[F, F'] in the place of F, which is kept as "plain" (eq. 7 to 9)."""
        plain = features["last"]
        prototypes, found = self.prototypes.flatten(0, 1), self.found.flatten()
        if self.aggregation == "none":
            last = plain
        elif self.attention is not None:
            last = self.attention(plain, prototypes, found, len(self.prototypes) / self.clusters)
        else:
            scale = 1.0 if self.aggregation == "printed" else 1 / math.sqrt(plain.shape[1])
            last = torch.cat([plain, attend(plain, prototypes, found, scale)], dim=1)
        return features | {"plain": plain, "last": last}

    def losses(self, batch: Batch, outs: dict[View, CamOutput], progress: Progress) -> Losses:
        """Contrast of mixed regions with the memory, and classification by the coarse maps."""
        out = outs[FULL]
        maps = self.heads.coarse(out.features["plain"])
        scores = pool(maps)
        regions = self._regions(batch, out, maps.detach(), scores.detach())
        weight = self.contrast * (progress.epoch >= self.warmup)
        return {
            "contrast": weight * self._contrast(regions, gather(batch.tags), progress.seed),
            "coarse": self.coarse * F.multilabel_soft_margin_loss(scores, batch.tags),
        }

    @torch.no_grad()
    def on_epoch_start(self, epoch: int) -> None:
        """Prototypes from the memory, the same on all processes (section 3.2.4)."""
        if epoch > 0 and self.aggregation != "none":
            centres, found = kmeans(*self.memory.by_class(), self.clusters, seed=seed_of(epoch))
            self.prototypes.copy_(gather(centres[None])[0])
            self.found.copy_(gather(found[None])[0])

    @torch.no_grad()
    def after_step(self, net: Baseline) -> None:
        """The memory takes the regions of the last `losses` (eq. 3)."""
        self.memory.write()

    def _regions(self, batch: Batch, out: CamOutput, maps: Tensor, scores: Tensor) -> Regions:
        """Pseudo-regions of the global batch (eq. 2); those whose class scores high wait to be written (eq. 3)."""
        features = out.features["plain"]
        classes, final = highest(scores, batch.tags, self.most), out.logits.detach().sigmoid()
        inside = valid_on_grid(batch.valid, (maps.shape[-2], maps.shape[-1]))[:, None].to(maps.dtype)
        maps = at(maps.softmax(dim=1) if self.masks == "shares" else maps, classes)
        mean = (maps * inside).sum(dim=(2, 3)) / inside.sum(dim=(2, 3)).clamp(min=1)
        masks = (maps > mean[:, :, None, None]).to(maps.dtype) * inside
        exist = at(batch.tags > 0, classes) & masks.any(dim=(2, 3))
        confident = exist & (at(final if self.gate_from == "final" else scores, classes) > self.gate)

        vectors = masked_pool(features, masks)
        written = vectors.detach()
        if self.cumulative_masks:
            written = _pool_cumulatively(features.detach(), masks, confident, classes)
        self.memory.stage(written, confident, batch.index, classes)

        if self.heads.query is not None:
            vectors = masked_pool(self.heads.query(features), masks)
        own = at(self.memory.slots_of(batch.index), classes) if self.exclude_own else torch.full_like(classes, -1)
        return gathered(vectors, classes, exist, own)

    def _contrast(self, regions: Regions, tags: Tensor, seed: int) -> Tensor:
        """The mean of L_RM over the regions of an image, then over the images (eq. 4 to 6); 0 if there are none."""
        bank = Bank.of(self.memory)
        held = regions.exist & bank.positives(regions.classes, regions.slots).any(dim=2)
        draws = torch.Generator(device=tags.device).manual_seed(seed)
        omega, partner = self._mixing(regions, held, tags, draws)

        vectors, classes, slots = regions.vectors.flatten(0, 1), regions.classes.flatten(), regions.slots.flatten()
        mixed = omega[:, None] * vectors + (1 - omega)[:, None] * vectors[partner]
        logits = bank.similarities(mixed, self.temperature)
        both = torch.stack([torch.arange(len(partner), device=partner.device), partner])
        own, other = nce(logits, classes[both], bank, self.denominator, slots[both])
        losses = (omega * own + (1 - omega) * other).view(held.shape)

        images = torch.where(held, losses, 0).sum(dim=1) / held.sum(dim=1).clamp(min=1)
        return images.sum() if self.images == "sum" else images.sum() / held.any(dim=1).sum().clamp(min=1)

    def _mixing(self, regions: Regions, held: Tensor, tags: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """omega [N M] of the global batch's regions, 1 where there is no partner, and their partners [N M], flat."""
        (images, most), device = held.shape, tags.device
        uniform = torch.rand(images, most, 2 * self.mix - 1, generator=draws, device=device)
        omega = uniform.median(dim=2).values.to(regions.vectors.dtype)
        to_image = torch.rand(images, most, images, generator=draws, device=device)
        to_class = torch.rand(images, most, most, generator=draws, device=device)
        allowed = held.expand(images, images, most)
        if self.partners == "other":
            elsewhere = ~torch.eye(images, dtype=torch.bool, device=device)[..., None]
            allowed = allowed & elsewhere & (tags[:, regions.classes.flatten()].view(allowed.shape) == 0)
        partner, exists = partners(allowed & (self.partners != "none"), to_image, to_class)
        return torch.where(exists, omega, 1).flatten(), partner.flatten()


class _Heads(TrainingOnly):
    """The coarse head, and g if there is one: 3x3 convolution, batch norm, ReLU, 3x3 convolution."""

    def __init__(self, dim: int, num_classes: int, *, tower: int | None, query: bool) -> None:
        super().__init__()
        self.coarse: nn.Module
        if tower is not None:
            self.coarse = towers(dim, tower, num_classes, count=1)
        else:
            self.coarse = nn.Conv2d(dim, num_classes, kernel_size=1, bias=False)
            nn.init.xavier_uniform_(self.coarse.weight)
        self.query: nn.Module | None = None
        if query:
            first, second = (nn.Conv2d(dim, dim, kernel_size=3, padding=1) for _ in range(2))
            norm = nn.BatchNorm2d(dim, track_running_stats=False)  # for training only: no use for running statistics
            self.query = normal(nn.Sequential(first, norm, nn.ReLU(), second))


def _pool_cumulatively(features: Tensor, masks: Tensor, confident: Tensor, classes: Tensor) -> Tensor:
    """Sums over what is in the masks of all confident classes up to this one, divided by the area of its own: [B M D].

    features [B D h w], masks [B M h w], confident bool [B M], classes [B M].
    """
    order = classes.argsort(dim=1)
    common = at(torch.where(confident[:, :, None, None], masks, 1), order).cumprod(dim=1)
    common = at(common, order.argsort(dim=1))
    share = common.sum(dim=(2, 3)) / masks.sum(dim=(2, 3)).clamp(min=1)
    return masked_pool(features, common) * share[..., None]
