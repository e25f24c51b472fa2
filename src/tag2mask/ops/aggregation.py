"""Features that attend to the prototypes of a data set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.ops.contrast import EXCLUDED


def attend(features: Tensor, prototypes: Tensor, found: Tensor, scale: float) -> Tensor:
    """softmax(scale * F Q^T) Q at every pixel (RCA, eq. 7 and 8): [B D h w] -> [B D h w].

    prototypes Q [P D], zero where not found (bool [P]); those take no part, and if there are none the result is zero.
    """
    affinity = scale * F.conv2d(features, prototypes[:, :, None, None])
    shares = affinity.masked_fill(~found[:, None, None], EXCLUDED).softmax(dim=1)
    return F.conv2d(shares, prototypes.T[:, :, None, None])


class LearnedAttention(nn.Module):
    """fuse([F, out(scale * q k^T v)]), q = query(F), k = key(Q), v = value(Q), and no softmax: RCA as released.

    Without a softmax this is a linear map of F that depends on the prototypes.
    """

    trunk = True  # learns like the backbone, see make_optimizer: so it does in the released code

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.out = (nn.Conv2d(channels, channels, kernel_size=1) for _ in range(2))
        self.key, self.value = (nn.Linear(channels, channels) for _ in range(2))
        self.fuse = nn.Conv2d(2 * channels, channels, kernel_size=1)
        for conv in (self.query, self.out, self.fuse):
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, features: Tensor, prototypes: Tensor, found: Tensor, scale: float) -> Tensor:
        """features [B D h w], prototypes [P D], found bool [P] -> [B D h w]."""
        keys = torch.where(found[:, None], self.key(prototypes), 0)
        affinity = scale * F.conv2d(self.query(features), keys[:, :, None, None])
        context = self.out(F.conv2d(affinity, self.value(prototypes).T[:, :, None, None]))
        fused: Tensor = self.fuse(torch.cat([features, context], dim=1))
        return fused


def towers(channels: int, width: int, classes: int, count: int) -> nn.Sequential:
    """`count` heads side by side, each for its share of the classes: three 3x3 convolutions with ReLU and a 1x1."""
    layers: list[nn.Module] = []
    for place in range(3):
        layers.append(nn.Conv2d(channels, count * width, kernel_size=3, padding=1, groups=count if place else 1))
        layers.append(nn.ReLU())
        channels = count * width
    layers.append(nn.Conv2d(channels, classes, kernel_size=1, groups=count))
    return normal(nn.Sequential(*layers))


def normal(layers: nn.Sequential) -> nn.Sequential:
    """The same layers, weights of the convolutions drawn anew from N(0, 0.01^2)."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
    return layers
