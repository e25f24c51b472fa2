"""RCM + MAM: regional contrast and multi-scale attention, supervised by a network that follows.

Yoon, Kweon, Jeong, Kim, Kim, Yoon: Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation,
2021, arXiv:2112.05351. No code was released: what the paper leaves open is decided here.

    L = L_cls + lambda_2 L_RCM + lambda_3 L_MAM                                                                     (9)
    M^k = 1 where A^G,k is the largest of the tagged classes and above threshold; M^0 = 1 where no M^k is         (1, 2)
    pt^k = mean of X^G over M^k; then the mean over images, then L2-normalised                                      (3)
    L_RCM = - sum_p log( exp(X^F_p . pt^k / T) / sum_w exp(X^F_p . pt^w / T) ), k the class of p in M            (4, 5)
    xi_ij^k = 2 - cos(A^F_i,k, A^G_j,k)                                                                             (6)
    L_MAM = sum_k sum_i | 1/3 sum_j xi_ij^k A^G_j,k - A^F_i,k |_1                                                (7, 8)

    symbol       here               meaning
    F, G         -, support         MainNet, which is trained; SupportNet, its moving average, which is not
    i, j         views              scales of the image: 0.5, 1 and 2
    X            _project(...)      features of 256 channels at scale 1, [B 256 h w]
    A_i          own, theirs        CAMs at every scale, on the grid of scale 1, each over its maximum, [S B K h w]
    A^G in (1)   _regions           msinf-CAM: the mean of the A^G_j, over its maximum again
    M            labels             0 background, 1..K
    pt           prototypes         0 background, 1..K; of the global batch. A class that is not in it keeps the latest
    T            temperature
    lambda_2, 3  *_weight           lambda_3 is 0 until mam_epoch; lambda_1 is the baseline's

X lies within the network (`head: inside`): the trunk's features, a 1x1 convolution and a ReLU make X, and the
classifier reads X. With `head: beside` X comes from a branch, and the baseline keeps the classifier that it has.

Where the paper leaves something open:
- The ReLU after the convolution; without one the two convolutions would be one linear map. G starts as a copy of F, is
  in evaluation mode, and follows after each step.
- A prototype exists from the first batch on that has the class; until then it is no negative.
- M comes from the map that the baseline refines, where there is one (SEAM, EPS with a PCM), L_MAM compares CAMs: what
  is refined does not train the trunk. On a baseline that predicts a background both are shares of a softmax.
- xi is at least 1, hence the target up to twice a map of at most 1. It is cut at 1; no gradient flows through xi.
- L_RCM is the mean over the pixels of each class, then over classes: a sum grows with the image. L_MAM is the mean over
  pixels, summed over scales, and the mean over the tagged pairs of image and class. Padding takes no part.
- Images at inference go through F; the SupportNet is not exported.

What the arguments stand for, where there is more than one reading:

    argument              default     other readings
    rcm                   contrast    literal: eq. 5 as printed, without a logarithm; direct: no prototypes, but the
                                      cross-entropy of M and the CAM at scale 1 (Table 2), where background has logit 0
    rcm_mean              classes     pixels: plain mean; sum: over pixels, eq. 5 as printed
    prototype_mean        images      pixels: the sum of eq. 3 as printed, large regions count more
    background_weight     1           less, for pixels below the threshold may be missed parts of things
    background_threshold  null        a number: those up to it are background, between it and threshold they are nothing
    renormalise           true        false: the threshold applies to the mean of the A^G_j as it is
    module                mam         mmm: xi = 1; smm: xi = 1, and F at scale 1 alone (Table 1)
    attention             printed     distance: xi = 1 - cos; normalised: xi / sum_j xi; softmax: over j, each in place
                                      of xi / 3 (distance: of xi)
    clamp                 true        false: targets above 1 stay
    attention_gradient    false       true: xi is differentiated
    mam_mean              pixels      sum: over pixels, scales and classes, eq. 8 as printed
    grid                  features    image: X and A at the size of the image, as printed; takes 64 times the memory
    cls_others            0           1: L_cls at the other scales, too
    momentum              0.997       0: weight sharing (Table 2)
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.core import FULL, Baseline, Batch, CamOutput, Features, Losses, Method, Progress, TrainingOnly, View
from tag2mask.errors import UserError
from tag2mask.ops.cams import max_norm, resize
from tag2mask.ops.contrast import EXCLUDED, IGNORE, positives, pseudo_labels, valid_on_grid, weighted_means
from tag2mask.ops.gather import processes, sum_over_processes
from tag2mask.ops.momentum import MomentumPrototypes
from tag2mask.ops.region_means import mean_over_regions
from tag2mask.ops.teacher import Teacher


class SupportNet(TrainingOnly):
    """G: copies of the network and of the convolution that makes X, and the prototypes that they gave."""

    def __init__(self, net: Baseline, head: nn.Conv2d, num_classes: int, momentum: float) -> None:
        super().__init__()
        self.net = Teacher(net, momentum=momentum)
        self.head = Teacher(head, momentum=momentum)
        self.prototypes = MomentumPrototypes(1 + num_classes, head.out_channels, share=1.0)


class RCMMAM(Method):
    """Regional contrast with prototypes and multi-scale attention, both taught by a moving average of the network.

    rcm_weight, mam_weight: lambda_2, lambda_3; mam_epoch: passes over the data before lambda_3 applies. momentum: of
    the SupportNet. dim, head: of X, see above. scales: of the images, among them 1. threshold: above which a pixel
    belongs to a class, in 0..1. temperature: T. cls_others: weight of L_cls at each other scale. The table above says
    what the other settings do.

    Raises UserError for a value out of range.
    """

    def __init__(
        self,
        *,
        rcm_weight: float = 1.0,
        mam_weight: float = 1.0,
        mam_epoch: float = 6.0,
        momentum: float = 0.997,
        dim: int = 256,
        head: Literal["inside", "beside"] = "inside",
        scales: tuple[float, ...] = (0.5, 1.0, 2.0),
        threshold: float = 0.2,
        temperature: float = 0.5,
        rcm: Literal["contrast", "literal", "direct"] = "contrast",
        rcm_mean: Literal["classes", "pixels", "sum"] = "classes",
        prototype_mean: Literal["images", "pixels"] = "images",
        background_weight: float = 1.0,
        background_threshold: float | None = None,
        renormalise: bool = True,
        module: Literal["mam", "mmm", "smm"] = "mam",
        attention: Literal["printed", "distance", "normalised", "softmax"] = "printed",
        clamp: bool = True,
        attention_gradient: bool = False,
        mam_mean: Literal["pixels", "sum"] = "pixels",
        grid: Literal["features", "image"] = "features",
        cls_others: float = 0.0,
    ) -> None:
        super().__init__()
        if min(dim, temperature, *scales) <= 0 or 1.0 not in scales or len(set(scales)) < len(scales):
            raise UserError("rcm_mam: dim, temperature and scales must be positive, one scale must be 1, none twice")
        if not (0 <= momentum < 1 and 0 <= (background_threshold or 0) <= threshold < 1):
            raise UserError("rcm_mam: momentum and thresholds must be in 0..1, below 1, background's at most the other")
        if min(rcm_weight, mam_weight, mam_epoch, background_weight, cls_others) < 0:
            raise UserError("rcm_mam: no weight and no epoch may be negative")
        if head == "beside" and rcm == "direct":
            raise UserError("rcm_mam: with rcm: direct nothing reads a head beside the network; set head: inside")
        self.rcm_weight, self.mam_weight, self.mam_epoch = rcm_weight, mam_weight, mam_epoch
        self.momentum, self.dim, self.inside, self.cls_others = momentum, dim, head == "inside", cls_others
        self.views = tuple(View(scale=scale) for scale in scales)
        self.middle = scales.index(1.0)
        self.threshold, self.temperature = threshold, temperature
        self.rcm, self.rcm_mean, self.prototype_mean = rcm, rcm_mean, prototype_mean
        self.background_weight, self.background_threshold = background_weight, background_threshold
        self.renormalise, self.module, self.attention, self.clamp = renormalise, module, attention, clamp
        self.attention_gradient, self.mam_mean = attention_gradient, mam_mean
        self.image_grid = grid == "image"
        self._bf16 = False

    def bind(self, net: Baseline, num_classes: int) -> None:
        """Create the convolution that makes X, put it before the classifier if it belongs there, and copy both."""
        if "last" not in net.dims or not any(p.requires_grad for p in net.parameters()):
            name = type(net).__name__.lower()
            raise UserError(f"rcm_mam trains the features 'last'; {name} has none that can be trained")
        if net.widened:
            raise UserError(
                "rcm_mam: another method has changed what the classifier reads, and the SupportNet, a copy of the "
                "network alone, cannot follow that; keep one of the two"
            )
        self.project = nn.Conv2d(net.dims["last"], self.dim, kernel_size=1, bias=False)
        nn.init.xavier_uniform_(self.project.weight)
        if self.inside:
            net.widen(self.dim - net.dims["last"])
        self.support = SupportNet(net, self.project, num_classes, self.momentum)

    def adapt(self, features: Features) -> Features:
        """X in place of the features that the classifier reads, if it belongs there."""
        self._bf16 = torch.is_autocast_enabled(features["last"].device.type)  # so will the SupportNet compute
        return self._with_x(features, self.project) if self.inside else features

    def losses(self, batch: Batch, outs: dict[View, CamOutput], progress: Progress) -> Losses:
        """Both losses, weighted, and L_cls at other scales if asked for."""
        out, taught = outs[FULL], [self._support(view(batch.images)) for view in self.views]
        height, width = (batch.images if self.image_grid else out.cams).shape[-2:]
        valid = valid_on_grid(batch.valid, (height, width))
        own, theirs = (
            torch.stack([_over_maximum(_cams(x), batch.tags, valid) for x in looks])
            for looks in ([outs[view] for view in self.views], taught)
        )
        labels = self._regions(taught, batch.tags, valid)
        if self.rcm == "direct":
            rcm = self._direct(out, labels, batch.tags)
        else:
            x, target = self._x(out, self.project), self._x(taught[self.middle], self.support.head.model)
            rcm = self._contrast(x, target, labels)
        mam_weight = self.mam_weight * float(progress.epoch >= self.mam_epoch)
        losses = {"rcm": self.rcm_weight * rcm, "mam": mam_weight * self._mam(own, theirs, batch.tags, valid)}
        if self.cls_others:
            others = [outs[view].logits for view in self.views if view != FULL]
            terms = [F.multilabel_soft_margin_loss(logits, batch.tags) for logits in others]
            losses["cls"] = self.cls_others * torch.stack(terms).sum()
        return losses

    @torch.no_grad()
    def after_step(self, net: Baseline) -> None:
        """The SupportNet follows; the prototypes of the step stay."""
        self.support.net.follow(net)
        self.support.head.follow(self.project)
        self.support.prototypes.write()

    @torch.no_grad()
    def _support(self, images: Tensor) -> CamOutput:
        """What the SupportNet says about images [B 3 H W], in float32."""
        net = self.support.net.model
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            features = net.encode(images)
            if self.inside:
                features = self._with_x(features, self.support.head.model)
            out = net.classify(features, images)
        return out.float() if self._bf16 else out

    @staticmethod
    def _with_x(features: Features, project: nn.Conv2d) -> Features:
        return features | {"last": project(features["last"]).relu()}

    def _x(self, out: CamOutput, project: nn.Conv2d) -> Tensor:
        """X at scale 1, [B D h w]."""
        last = out.features["last"]
        return last if self.inside else project(last).relu()

    @torch.no_grad()
    def _regions(self, taught: list[CamOutput], tags: Tensor, valid: Tensor) -> Tensor:
        """Class region masks (eq. 1, 2) as labels [B h w]: 0 background, 1..K, 255 nothing."""
        best = [_cams(out) if out.refined is None else out.refined for out in taught]
        maps = torch.stack([_over_maximum(x, tags, valid) for x in best]).mean(dim=0)
        if self.renormalise:
            maps = max_norm(maps)
        labels = pseudo_labels(maps, tags, self.threshold, valid)
        if self.background_threshold is not None:
            unsure = (labels == 0) & (maps.amax(dim=1) > self.background_threshold)
            labels = torch.where(unsure, IGNORE, labels)
        return labels

    def _contrast(self, own: Tensor, theirs: Tensor, labels: Tensor) -> Tensor:
        """L_RCM (eq. 5) of X of MainNet and SupportNet, [B D h w] each; the prototypes are `merge`d here."""
        size = labels.shape[-2], labels.shape[-1]
        bank = self.support.prototypes
        masks = (labels[:, None] == torch.arange(len(bank.rows), device=labels.device)[:, None, None]).to(theirs)
        if self.prototype_mean == "images":
            masks = masks / masks.sum(dim=(2, 3), keepdim=True).clamp(min=1)
        rows, known = bank.merge(*weighted_means(resize(theirs, size), masks))
        pixels = F.normalize(resize(own, size).permute(0, 2, 3, 1).flatten(0, 2), dim=1)
        logits = (pixels @ F.normalize(rows, dim=1).T / self.temperature).masked_fill(~known, EXCLUDED)
        return self._mean_over_regions(logits, labels, known)

    def _direct(self, out: CamOutput, labels: Tensor, tags: Tensor) -> Tensor:
        """The cross-entropy of the labels and the CAM; the tagged classes and the background compete."""
        size = labels.shape[-2], labels.shape[-1]
        ground = torch.zeros_like(out.cams[:, :1]) if out.background is None else out.background
        cams = out.cams.masked_fill(tags[:, :, None, None] == 0, EXCLUDED)
        logits = resize(torch.cat([ground, cams], dim=1), size).permute(0, 2, 3, 1).flatten(0, 2)
        return self._mean_over_regions(logits, labels, torch.ones_like(logits[0], dtype=torch.bool))

    def _mean_over_regions(self, logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        """-log softmax of every pixel's own column of the logits [P 1+K], averaged; known bool [1+K]."""
        columns, defined = positives(labels.flatten(), known)
        losses = F.cross_entropy(logits, columns, reduction="none")
        if self.rcm == "literal":
            losses = -(-losses).exp()
        weights = F.pad(torch.ones_like(logits[0, 1:]), (1, 0), value=self.background_weight)
        return mean_over_regions(losses, torch.where(defined, columns, -1), weights, self.rcm_mean, len(labels))

    def _mam(self, own: Tensor, theirs: Tensor, tags: Tensor, valid: Tensor) -> Tensor:
        """L_MAM (eq. 8) of A^F and A^G, [S B K h w] each, zero for what is not tagged and on padding."""
        if self.module == "smm":
            own = own[self.middle : self.middle + 1]
        target = torch.einsum("bkij,jbkhw->ibkhw", self._attention(own, theirs), theirs)
        if self.clamp:
            target = target.clamp(max=1)
        errors = (target - own).abs().sum(dim=(3, 4))
        if self.mam_mean == "sum":
            return errors.sum() / len(tags)
        errors = errors / valid.sum(dim=(1, 2)).clamp(min=1)[:, None]
        return errors.sum() * processes() / sum_over_processes(tags.sum()).clamp(min=1)

    def _attention(self, own: Tensor, theirs: Tensor) -> Tensor:
        """The share of every A^G_j in the target of A^F_i (eq. 6, 7), for every image and class: [B K I J]."""
        if not self.attention_gradient:
            own = own.detach()
        unit_own, unit_theirs = (F.normalize(x.flatten(3), dim=3) for x in (own, theirs))
        cosine = torch.einsum("ibkp,jbkp->bkij", unit_own, unit_theirs)
        if self.module != "mam":
            return torch.full_like(cosine, 1 / len(theirs))
        if self.attention == "distance":
            return (1 - cosine) / len(theirs)
        xi = 2 - cosine
        if self.attention == "softmax":
            return xi.softmax(dim=3)
        return xi / (xi.sum(dim=3, keepdim=True) if self.attention == "normalised" else len(theirs))


def _cams(out: CamOutput) -> Tensor:
    """[B K h w]; shares of every pixel where the network predicts a background."""
    if out.background is None:
        return out.cams
    return torch.cat([out.cams, out.background], dim=1).softmax(dim=1)[:, :-1]


def _over_maximum(maps: Tensor, tags: Tensor, valid: Tensor) -> Tensor:
    """Maps [B K h' w'] on the grid of valid (bool [B h w]), each over its maximum; zero where not tagged or padded."""
    size = valid.shape[-2], valid.shape[-1]
    return max_norm(resize(maps, size) * valid[:, None]) * tags[:, :, None, None]
