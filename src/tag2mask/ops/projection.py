"""Features projected into the space where prototypes live, and their similarity to vectors of that space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.core import Features
from tag2mask.errors import UserError
from tag2mask.ops.cams import resize_corners

LAST, SIDES = {"last": 1}, {"c2": 1, "c3": 1, "c4": 2, "c5": 2}  # tap -> its share of the channels


class Projection(nn.Module):
    """z = v(f), [B D h w] from features by tap.

    kind: "conv" is a 1x1 convolution without bias of the tap "last". "hierarchical" is one of each of c2, c3, c4, c5
    to 1, 1, 2 and 2 sixths of the channels, L2-normalised one by one, resized, side by side: that of SIPE (Chen et al.:
    Self-supervised Image-specific Prototype Exploration for Weakly Supervised Semantic Segmentation, CVPR 2022).
    "identity" is the tap "last". dims: channels of every tap. dim: D; null: 256, 768 if hierarchical. detach: no
    gradient into the features. unit: z is L2-normalised. length: of z if its channels have variance 1 where it has no
    fixed one.

    Raises UserError when a tap is missing or `dim` does not divide.
    """

    def __init__(
        self,
        kind: Literal["conv", "hierarchical", "identity"],
        dims: Mapping[str, int],
        *,
        dim: int | None = None,
        detach: bool = False,
        unit: bool = False,
    ) -> None:
        super().__init__()
        shares = SIDES if kind == "hierarchical" else LAST
        if missing := [tap for tap in shares if tap not in dims]:
            raise UserError(f"projection: {kind} reads {', '.join(shares)}; this network has no {missing[0]}")
        total = dim or (768 if kind == "hierarchical" else 256)
        self.dim = dims["last"] if kind == "identity" else total
        if self.dim % sum(shares.values()):
            raise UserError(f"dim: {self.dim} is shared by {', '.join(shares)}, it must be a multiple of 6")
        self.kind, self.detach, self.unit = kind, detach, unit
        self.length = 1.0 if unit else 2.0 if kind == "hierarchical" else float(self.dim**0.5)
        part = self.dim // sum(shares.values())
        self.taps = nn.ModuleDict(
            {
                tap: nn.Identity() if kind == "identity" else _conv(dims[tap], share * part)
                for tap, share in shares.items()
            }
        )

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """[B D h w] for (h, w) = size."""
        parts = [v(features[tap].detach() if self.detach else features[tap]) for tap, v in self.taps.items()]
        if self.kind == "hierarchical":
            parts = [F.normalize(part, dim=1) for part in parts]
        z = torch.cat([resize_corners(part, size) for part in parts], dim=1)
        return F.normalize(z, dim=1) if self.unit else z


def _conv(channels: int, dim: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, dim, kernel_size=1, bias=False)
    nn.init.xavier_uniform_(conv.weight)
    return conv


def cosine_maps(features: Tensor, vectors: Tensor, shift: Tensor | None = None) -> Tensor:
    """v . (z + s) / |z + s| at every pixel, for the vector v of every image and class: [B C h w].

    features z [B D h w]; vectors v [B C D]; shift s [C D], or none. A v of length 1 gives the cosine, a weighted mean
    of such v the weighted mean of their cosines. As |z + s|^2 = |z|^2 + 2 z . s + |s|^2, no class has a copy of the
    features.
    """
    square = features.square().sum(dim=1, keepdim=True)
    if shift is None:
        along = torch.einsum("bcd,bdhw->bchw", vectors, features)
    else:
        both = torch.cat([vectors, shift.expand_as(vectors)], dim=1)
        along, to_shift = torch.einsum("bcd,bdhw->bchw", both, features).chunk(2, dim=1)
        along = along + (vectors * shift).sum(dim=2)[..., None, None]
        terms = square + shift.square().sum(dim=1)[:, None, None]
        square = torch.maximum(terms + 2 * to_shift, 1e-6 * terms)  # what rounding leaves of opposites
    return along / square.clamp(min=1e-12).sqrt()
