"""Fully connected CRF by mean field on any device, a batch at a time; also for labels refined inside a training step.

Kraehenbuehl and Koltun: Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials, NIPS 2011,
arXiv:1210.5644.

    k(i, j) = w1 exp(-|p_i - p_j|^2 / 2 sigma^2) + w2 exp(-|p_i - p_j|^2 / 2 sigma_xy^2 - |I_i - I_j|^2 / 2 sigma_rgb^2)
    Q_i(l) <- exp(-U_i(l) + sum_j k(i, j) Q_j(l)) / Z_i                                      (eq. 3, Potts: algorithm 1)

Each of the two kernels is normalised symmetrically, D^-1/2 K D^-1/2 with D the row sums of K, and keeps its diagonal,
as the filters of the usual implementations do. K is the permutohedral lattice's approximation of the Gaussian, again
as usual; the exact one gives other labels at 1 to 2 pixels in 100.

On a small grid the lattice filters the identity once, and from then on is a matrix: a few operations for a whole batch
where the filters would take hundreds, which is what counts on a GPU. Refining labels never makes the host wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tag2mask.ops.permutohedral import Lattice

RGB_SCALE = (58.395, 57.12, 57.375)  # 255 * standard deviation of ImageNet, by which images are normalised
SMALL_ON_CPU, SMALL_ELSEWHERE = 100, 600  # pixels up to which the lattice becomes a matrix

# Anything that refines labels: (labels [B h w] in 0..count - 1, colours [B 3 h w] in steps of 0..255, count,
# valid [B h w] or None) -> labels [B h w].
Refiner = Callable[[Tensor, Tensor, int, Tensor | None], Tensor]


@dataclass(frozen=True)
class Kernels:
    """Widths and weights of the two kernels. sigma, sigma_xy: pixels of the grid; sigma_rgb: colours in 0..255."""

    sigma: float = 3.0
    weight: float = 3.0
    sigma_xy: float = 50.0
    sigma_rgb: float = 5.0
    weight_rgb: float = 10.0


LABEL_KERNELS = Kernels()  # the usual choice where the unary comes from labels (IRN, PPC, HSC)


class Messages:
    """What all pixels say to each: marginals [B P L] -> sum_j k(i, j) Q_j(l), [B P L], by the lattice.

    kernels: (points [B P d] or [1 P d], standard deviations of the d coordinates, weight). valid [B P]: pixels that are
    False neither send nor receive. compact: see `Lattice`.
    """

    def __init__(
        self,
        kernels: Sequence[tuple[Tensor, Sequence[float], float]],
        valid: Tensor | None = None,
        *,
        compact: bool = False,
    ) -> None:
        self.parts: list[tuple[Lattice, Tensor]] = []
        for points, sigmas, weight in kernels:
            points = points if valid is None else points.expand(len(valid), -1, -1)
            lattice = Lattice(points, sigmas, valid, compact=compact)
            sums = lattice.filter(points.new_ones(*points.shape[:2], 1))
            self.parts.append((lattice, math.sqrt(weight) * sums.clamp(min=1e-20).rsqrt()))

    @torch.no_grad()
    def __call__(self, marginals: Tensor) -> Tensor:
        """One step of message passing."""
        total = torch.zeros_like(marginals)
        for lattice, scale in self.parts:
            total = total + scale * lattice.filter(scale * marginals)
        return total

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """The same as k(i, j) of all pairs, [B P P]."""
        total = torch.zeros(())
        for lattice, scale in self.parts:
            everyone = torch.eye(lattice.count, dtype=scale.dtype, device=scale.device)
            total = scale * lattice.filter(everyone.expand(lattice.batch, -1, -1)) * scale.mT + total
        return total


@torch.no_grad()
def colours_of(images: Tensor) -> Tensor:
    """Normalised images [B 3 h w] in steps of 0..255; a constant is missing, which makes no difference to kernels."""
    return torch.stack([images[:, channel] * scale for channel, scale in enumerate(RGB_SCALE)], dim=1)


def positions(colours: Tensor) -> tuple[Tensor, Tensor]:
    """Column and row of every pixel [1 P 2], and both with its colour [B P 2+C].

    colours [B C h w]; pixels row by row, P = h w.
    """
    height, width = colours.shape[-2:]
    rows, columns = torch.meshgrid(
        torch.arange(height, device=colours.device), torch.arange(width, device=colours.device), indexing="ij"
    )
    places = torch.stack([columns, rows], dim=-1).flatten(0, 1).to(colours.dtype)[None]
    shades = colours.flatten(2).transpose(1, 2)
    return places, torch.cat([places.expand(len(shades), -1, -1), shades], dim=2)


@torch.no_grad()
def pair_weights(colours: Tensor, kernels: Kernels = LABEL_KERNELS, valid: Tensor | None = None) -> Tensor:
    """k(i, j) of all pairs of pixels with exact Gaussians, [B 3 h w] -> [B P P] with P = h w, pixels row by row.

    valid [B h w]: pixels that are 0 there neither send nor receive. Memory and time grow with (h w)^2.
    """
    mask = None if valid is None else valid.flatten(1).to(colours.dtype)
    total = torch.zeros((), device=colours.device)
    for points, sigmas, weight in _weighted(colours, kernels):
        total = weight * _normalised(_gaussian(points / points.new_tensor(sigmas)), mask) + total
    return total


@torch.no_grad()
def mean_field(
    unary: Tensor, pairs: Tensor | Callable[[Tensor], Tensor], iterations: int = 10, counts: Tensor | None = None
) -> Tensor:
    """Marginals Q [B L P] of a Potts model with energies `unary` [B L P].

    pairs: k(i, j) [B P P], or a function of the marginals [B P L] like `Messages`. counts [B L]: label l stands for
    that many labels which are alike; the result is of one of them. 0: it stands for none, and its result is 0.
    """
    scores = -unary.transpose(1, 2)
    several = torch.ones_like(scores[:, :1]) if counts is None else counts[:, None].to(scores)
    share = several.clamp(min=1).reciprocal()

    def normalised(scores: Tensor) -> Tensor:
        return (scores + several.log()).softmax(dim=2) * share

    marginals = normalised(scores)
    for _ in range(iterations):
        messages = pairs @ marginals if isinstance(pairs, Tensor) else pairs(marginals)
        marginals = normalised(scores + messages)
    return marginals.transpose(1, 2)


@torch.no_grad()
def refine_labels(
    labels: Tensor,
    colours: Tensor,
    count: int,
    valid: Tensor | None = None,
    *,
    gt_prob: float = 0.7,
    iterations: int = 10,
    kernels: Kernels = LABEL_KERNELS,
    filters: Literal["lattice", "exact"] = "lattice",
) -> Tensor:
    """Labels [B h w] in 0..count - 1 after the CRF; `colours` [B 3 h w] in 0..255 of the same grid; count >= 2.

    Unary: -log gt_prob for a pixel's own label, -log((1 - gt_prob) / (count - 1)) for every other. Every label takes
    part, whether it occurs or not: to find out which do would make the host wait for the device.
    """
    flat = labels.flatten(1)
    own = flat[:, None, :] == torch.arange(count, device=flat.device)[:, None]
    mine, other = -math.log(gt_prob), -math.log((1 - gt_prob) / (count - 1))
    unary = torch.where(own, mine, other).to(colours.dtype)
    pairs: Tensor | Messages
    if filters == "exact":
        pairs = pair_weights(colours, kernels, valid)
    else:
        pairs = Messages(_weighted(colours, kernels), None if valid is None else valid.flatten(1) > 0)
        small = SMALL_ON_CPU if colours.device.type == "cpu" else SMALL_ELSEWHERE
        pairs = pairs.matrix() if flat.shape[1] <= small else pairs
    return mean_field(unary, pairs, iterations).argmax(dim=1).view_as(labels)


def _weighted(colours: Tensor, kernels: Kernels) -> list[tuple[Tensor, tuple[float, ...], float]]:
    """Both kernels as `Messages` takes them."""
    near, alike = positions(colours)
    shades = (kernels.sigma_rgb,) * colours.shape[1]
    return [
        (near, (kernels.sigma,) * 2, kernels.weight),
        (alike, (kernels.sigma_xy, kernels.sigma_xy, *shades), kernels.weight_rgb),
    ]


def _gaussian(x: Tensor) -> Tensor:
    """exp(-|x_i - x_j|^2 / 2) of points [B P D], [B P P]. By differences: |a|^2 - 2ab + |b|^2 loses digits."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square().mul(-0.5).exp()


def _normalised(kernel: Tensor, mask: Tensor | None) -> Tensor:
    """D^-1/2 K D^-1/2 without the pixels where `mask` [B P] is 0."""
    if mask is not None:
        kernel = kernel * mask[:, :, None] * mask[:, None, :]
    scale = kernel.sum(dim=2).clamp(min=1e-20).rsqrt()
    return kernel * scale[:, :, None] * scale[:, None, :]
