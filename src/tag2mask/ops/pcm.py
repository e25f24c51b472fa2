"""Pixel correlation module: every pixel's class scores become those of the pixels that look like it.

Wang, Zhang, Kan, Shan, Chen: Self-supervised Equivariant Attention Mechanism for Weakly Supervised Semantic
Segmentation, CVPR 2020, arXiv:2004.04581 (section "pixel correlation module").

    y_i = sum_j a_ij yhat_j / sum_j a_ij        a_ij = ReLU(cos(theta(x_i), theta(x_j)))

    symbol   here                 meaning
    yhat     confident(cams)      the normalised CAM of each pixel's best class, 1 - that as background; no gradient
    x        c4, c5, image        two reduced taps and the image itself, on the grid of the CAM; no gradient to the taps
    theta    PCM.embed            1x1 convolution
    y        refined, background  values in 0..1

Nothing but the three convolutions learns from what is said about y.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tag2mask.core import CamOutput, Features
from tag2mask.errors import UserError
from tag2mask.ops.cams import EPS, resize_corners

TAPS = {"c4": 64, "c5": 128}  # tap -> channels that are kept of it
BLOCK = 2**26  # affinities held at a time: 256 MiB


@dataclass(kw_only=True)
class PCMOutput(CamOutput):
    """A CamOutput whose refined [B K h w] comes from a PCM, with refined_background [B 1 h w]; both in 0..1."""

    refined: Tensor
    refined_background: Tensor


class PCM(nn.Module):
    """Refines CAMs by the similarity of pixels.

    dims: channels of every tap, of which "c4" and "c5" are read. block: see `propagate`.
    Raises UserError when the backbone has no such taps.
    """

    def __init__(self, dims: Mapping[str, int], *, block: int = BLOCK) -> None:
        super().__init__()
        missing = [tap for tap in TAPS if tap not in dims]
        if missing:
            raise UserError(
                f"the pixel correlation module reads the taps {' and '.join(TAPS)}; this backbone has only "
                f"{', '.join(dims)}: take a CNN as backbone"
            )
        self.block = block
        self.reduce = nn.ModuleDict({tap: nn.Conv2d(dims[tap], width, 1, bias=False) for tap, width in TAPS.items()})
        total = sum(TAPS.values())
        self.embed = nn.Conv2d(3 + total, total, 1, bias=False)
        for conv in self.reduce.values():
            nn.init.kaiming_normal_(conv.weight)  # type: ignore[arg-type]
        nn.init.xavier_uniform_(self.embed.weight, gain=4)

    def forward(self, cams: Tensor, features: Features, images: Tensor) -> tuple[Tensor, Tensor]:
        """cams [B K h w], taps, images [B 3 H W] -> (refined [B K h w], background [B 1 h w]) in 0..1, float32.

        Classes compete whether they are tagged or not, as training does not mask the input of the module.
        """
        size = cams.shape[-2], cams.shape[-1]
        reduced = [conv(resize_corners(features[tap].detach(), size)).relu() for tap, conv in self.reduce.items()]
        embedded = self.embed(torch.cat([resize_corners(images, size), *reduced], dim=1))
        with torch.autocast(cams.device.type, enabled=False):
            maps, background = confident(cams.float())
            spread = propagate(torch.cat([maps, background], dim=1), embedded.float(), block=self.block)
        return spread[:, :-1], spread[:, -1:]


@torch.no_grad()
def confident(cams: Tensor) -> tuple[Tensor, Tensor]:
    """Raw CAMs [B K h w] -> (maps [B K h w], background [B 1 h w]), both in 0..1.

    Every map over its maximum; at each pixel the largest stays (all of them if equal), the others become 0, and the
    background is 1 minus the largest. A map of zeros stays zero.
    """
    cams = cams.relu()
    maps = (cams - EPS).relu() / (cams.amax(dim=(2, 3), keepdim=True) + EPS)
    largest = maps.amax(dim=1, keepdim=True)
    return torch.where(maps < largest, 0, maps), 1 - largest


def propagate(maps: Tensor, embedded: Tensor, *, block: int = BLOCK) -> Tensor:
    """maps [B C h w] averaged over pixels, weighted by ReLU(cosine) of embedded [B D h w]: [B C h w].

    The affinity of all pairs of pixels is never held as a whole: columns come in blocks of at most `block` numbers, and
    where there are several they are computed again for the gradient. The sum of a column is the image of a row of ones.
    """
    batch, channels, height, width = maps.shape
    pixels = height * width
    vectors = embedded.flatten(2)
    vectors = vectors / (torch.linalg.vector_norm(vectors, dim=1, keepdim=True) + EPS)
    rows = torch.cat([maps.flatten(2), maps.new_ones(batch, 1, pixels)], dim=1)
    step = max(1, min(pixels, block // (batch * pixels)))
    if step == pixels:
        spread = _spread(rows, vectors, vectors)
    else:
        spread = torch.cat(
            [checkpoint(_spread, rows, vectors, part, use_reentrant=False) for part in vectors.split(step, dim=2)],
            dim=2,
        )
    return (spread[:, :-1] / (spread[:, -1:] + EPS)).reshape(batch, channels, height, width)


def _spread(rows: Tensor, vectors: Tensor, columns: Tensor) -> Tensor:
    affinity: Tensor = (vectors.mT @ columns).relu()
    return rows @ affinity
