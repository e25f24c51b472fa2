"""Stage: soft maps that have walked along what a trained network says belongs together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tag2mask.data.maps import STRIDE, Maps, map_path, write_maps
from tag2mask.errors import UserError
from tag2mask.ops.cams import EPS, power_background
from tag2mask.refine.grid import pad_to_multiple
from tag2mask.refine.irn import edges
from tag2mask.refine.psa import AffinityNet
from tag2mask.refine.walk import Affinity
from tag2mask.schema import Input
from tag2mask.stages.affinity import load_affinity, maps_of
from tag2mask.stages.context import BatchSize, Context, images_to_do

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class WalkingBackground:
    """A background that walks along with the maps: the constant `score`, or (1 - largest map)^alpha. Neither: none.

    Where it walks, what is kept of a map is its share m / (m + background): the background score 0.5 then means
    "whichever is larger", in `labels` and in every other stage that takes one.
    """

    score: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.score is not None and self.alpha is not None:
            raise UserError("give either score (a constant in 0..1) or alpha (a power), or neither")
        if self.score is not None and not 0 < self.score < 1:
            raise UserError(f"score {self.score} is not between 0 and 1")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise UserError(f"alpha {self.alpha} is not positive")

    def __call__(self, maps: Tensor) -> Tensor | None:
        """The background [1 h w] that goes with maps [P h w], if any does."""
        if self.score is not None:
            return torch.full_like(maps[:1], self.score)
        return None if self.alpha is None else power_background(maps, self.alpha)[None]


def walk(
    ctx: Context,
    *,
    of: Annotated[Path, Input(("psa", "irn"))],
    maps: Annotated[Path, Input(("cams", "clip_es", "pacam", "attention", "amn_maps"))],
    power: Positive = 1.0,
    beta: Positive = 10.0,
    steps: Annotated[int, Field(ge=1)] = 256,
    tol: Share = 1e-5,
    background: WalkingBackground = WalkingBackground(),
    radius: Annotated[int, Field(ge=2)] = 5,
    flip: bool = True,
    batch: BatchSize = 4,
) -> None:
    """Soft maps of every train image after a random walk; they are stored like those of the cams stage.

    of: the trained network. maps: the soft maps to start from. power: what they are raised to before (AMN 1.3). beta:
    power of the affinities (PSA 8, IRN 10). steps: of the walk (PSA and IRN 256, SEAM 64). tol: share that may be lost
    by not doing every step; 0 does them all. background: whether one walks along (PSA: alpha 16, SEAM: alpha 6, IRN:
    none). radius: of the neighbourhood with boundaries from irn, in cells of 4 pixels; a psa network has its own. flip:
    boundaries are averaged with those of the mirror image (irn). batch: images of the same size that go through the
    network together.
    """
    samples = ctx.source.split("train")
    outputs = [map_path(ctx.out, name) for name in samples.names]
    net = load_affinity(of).to(ctx.devices.device)
    # Apple's GPUs have no sparse products; the walk is short.
    device = torch.device("cpu") if ctx.devices.device.type == "mps" else ctx.devices.device
    for indices, images in images_to_do("walk", samples.image, outputs, ctx.devices, workers=ctx.workers, batch=batch):
        with torch.no_grad():
            found = net(images) if isinstance(net, AffinityNet) else edges(net, images, flip=flip)
        for index, own in zip(indices, found.to(device), strict=True):
            stored = maps_of(maps, samples.names[index], (images.shape[2], images.shape[3]))
            start = torch.from_numpy(stored.maps).float().to(device) ** power
            if len(start):
                ground = background(start)
                rows = start if ground is None else torch.cat([start, ground])
                if isinstance(net, AffinityNet):
                    affinity = Affinity.from_features(own, radius=net.radius, border=net.border)
                else:
                    affinity, rows = Affinity.from_edges(own, radius=radius), rows * (1 - own)
                rows = coarsely(affinity, rows, net.stride // STRIDE, beta=beta, steps=steps, tol=tol)
                start = of_largest(rows) if ground is None else against_last(rows)
            write_maps(outputs[index], Maps(stored.classes, start.half().cpu().numpy(), stored.size, stored.logits))


def coarsely(affinity: Affinity, rows: Tensor, factor: int, *, beta: float, steps: int, tol: float) -> Tensor:
    """Rows [P h w] after the walk on a grid whose cells are `factor` times as wide.

    Its cells start with the mean over them, where there is zero outside the image, and end resized bilinearly.
    """
    if factor == 1:
        return affinity.propagate(rows, beta=beta, steps=steps, tol=tol)
    small = F.avg_pool2d(pad_to_multiple(rows, factor), factor)
    walked = affinity.propagate(small, beta=beta, steps=steps, tol=tol)
    large = F.interpolate(walked[None], scale_factor=factor, mode="bilinear", align_corners=False)[0]
    return large[:, : rows.shape[1], : rows.shape[2]]


def of_largest(rows: Tensor) -> Tensor:
    """All rows [P h w] divided by the largest value there is (IRN)."""
    rows = rows.relu()
    return rows / (rows.amax() + EPS)


def against_last(rows: Tensor) -> Tensor:
    """The share m / (m + last) of every row m but the last, [P+1 h w] -> [P h w]; 0 where both are 0."""
    rows = rows.relu()
    return rows[:-1] / (rows[:-1] + rows[-1:]).clamp(min=EPS * EPS)
