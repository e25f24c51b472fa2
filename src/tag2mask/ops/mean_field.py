"""Fully connected CRF on small grids: exact mean field, a batch at a time, for labels refined inside a training step.

Kraehenbuehl and Koltun: Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials, NIPS 2011,
arXiv:1210.5644.

    k(i, j) = w1 exp(-|p_i - p_j|^2 / 2 sigma^2) + w2 exp(-|p_i - p_j|^2 / 2 sigma_xy^2 - |I_i - I_j|^2 / 2 sigma_rgb^2)
    Q_i(l) <- exp(-U_i(l) + sum_j k(i, j) Q_j(l)) / Z_i                                      (eq. 3, Potts: algorithm 1)

Each of the two kernels is normalised symmetrically, D^-1/2 K D^-1/2 with D the row sums of K, and keeps its diagonal,
as the filters of the usual implementations do. Every pair of pixels is computed: memory and time grow with
(h w)^2, so this is for grids of up to about 64 x 64. A filter that approximates the sum can take the place of
`refine_labels`: same signature, other insides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RGB_SCALE = (58.395, 57.12, 57.375)  # 255 * standard deviation of ImageNet, by which images are normalised

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


@torch.no_grad()
def colours_of(images: Tensor) -> Tensor:
    """Normalised images [B 3 h w] in steps of 0..255; a constant is missing, which makes no difference to kernels."""
    return torch.stack([images[:, channel] * scale for channel, scale in enumerate(RGB_SCALE)], dim=1)


@torch.no_grad()
def pair_weights(colours: Tensor, kernels: Kernels = LABEL_KERNELS, valid: Tensor | None = None) -> Tensor:
    """k(i, j) of all pairs of pixels, [B 3 h w] -> [B P P] with P = h w, pixels row by row.

    valid [B h w]: pixels that are 0 there neither send nor receive.
    """
    height, width = colours.shape[-2:]
    rows, columns = torch.meshgrid(
        torch.arange(height, device=colours.device), torch.arange(width, device=colours.device), indexing="ij"
    )
    places = torch.stack([rows, columns], dim=-1).flatten(0, 1).to(colours.dtype)[None]  # [1 P 2]
    shades = colours.flatten(2).transpose(1, 2)  # [B P 3]
    both = torch.cat([(places / kernels.sigma_xy).expand(len(shades), -1, -1), shades / kernels.sigma_rgb], dim=2)
    mask = None if valid is None else valid.flatten(1).to(colours.dtype)
    near, alike = _gaussian(places / kernels.sigma), _gaussian(both)
    return kernels.weight * _normalised(near, mask) + kernels.weight_rgb * _normalised(alike, mask)


@torch.no_grad()
def mean_field(unary: Tensor, pairs: Tensor, iterations: int = 10) -> Tensor:
    """Marginals Q [B L P] of a Potts model with energies `unary` [B L P] and `pairs` [B P P]."""
    marginals = (-unary).softmax(dim=1)
    for _ in range(iterations):
        marginals = (marginals @ pairs - unary).softmax(dim=1)
    return marginals


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
) -> Tensor:
    """Labels [B h w] in 0..count - 1 after the CRF; `colours` [B 3 h w] in 0..255 of the same grid; count >= 2.

    Unary: -log gt_prob for a pixel's own label, -log((1 - gt_prob) / (count - 1)) for every other. Every label takes
    part, whether it occurs or not: to find out which do would make the host wait for the device.
    """
    flat = labels.flatten(1)
    own = flat[:, None, :] == torch.arange(count, device=flat.device)[:, None]
    mine, other = -math.log(gt_prob), -math.log((1 - gt_prob) / (count - 1))
    unary = torch.where(own, mine, other).to(colours.dtype)
    marginals = mean_field(unary, pair_weights(colours, kernels, valid), iterations)
    return marginals.argmax(dim=1).view_as(labels)


def _gaussian(x: Tensor) -> Tensor:
    """exp(-|x_i - x_j|^2 / 2) of points [B P D], [B P P]. By differences: |a|^2 - 2ab + |b|^2 loses digits."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square().mul(-0.5).exp()


def _normalised(kernel: Tensor, mask: Tensor | None) -> Tensor:
    """D^-1/2 K D^-1/2 without the pixels where `mask` [B P] is 0."""
    if mask is not None:
        kernel = kernel * mask[:, :, None] * mask[:, None, :]
    scale = kernel.sum(dim=2).clamp(min=1e-20).rsqrt()
    return kernel * scale[:, :, None] * scale[:, None, :]
