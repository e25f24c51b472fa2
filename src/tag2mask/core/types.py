"""The values that travel through the library. No logic beyond the shape of things.

Class axis: always the K foreground classes. Background is never a column of a class tensor; where a
network predicts it, it is a separate [B 1 h w] tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Features = dict[str, Tensor]  # tap name ("s8", "s16", "last") -> [B D h w]
Losses = dict[str, Tensor]  # name -> scalar


@dataclass(frozen=True)
class View:
    """One way of looking at a batch: as loaded, resized to a square of `size` pixels, or by `scale`.

    Hashable, so that two parts which ask for the same look share one forward pass. Resizing is bilinear;
    `align_corners` is False except where a paper's released code needs True.
    """

    size: int | None = None
    scale: float = 1.0
    align_corners: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and self.scale != 1.0:
            raise ValueError("a View has a size or a scale, not both")

    def __call__(self, images: Tensor) -> Tensor:
        """[B C H W] -> [B C H' W']."""
        if not self._changes(images):
            return images
        return F.interpolate(images, size=self._target(images), mode="bilinear", align_corners=self.align_corners)

    def nearest(self, mask: Tensor) -> Tensor:
        """The same look at a mask [B C H W] whose values must not mix."""
        return F.interpolate(mask, size=self._target(mask), mode="nearest-exact") if self._changes(mask) else mask

    def _target(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        if self.size is not None:
            return self.size, self.size
        return int(height * self.scale), int(width * self.scale)

    def _changes(self, images: Tensor) -> bool:
        return self._target(images) != tuple(images.shape[-2:])


FULL = View()


@dataclass(frozen=True)
class Progress:
    """Where training stands.

    epoch counts passes over the data (2.5 = half-way through the third); done runs 0..1. seed is the same on all
    processes and another one each step: draws that concern the whole batch are made from it.
    """

    epoch: float
    done: float
    seed: int = 0


@dataclass
class Batch:
    """Images and their tags.

    images [B 3 H W] normalised; tags [B K] of 0/1; index [B] position in the data set; valid [B 1 H W] is 1 on the
    image and 0 where a crop was padded; side: further maps by name, e.g. saliency [B 1 H W] in 0..1; target [B H W]
    index masks (0 background, 1..K, 255 ignore), only when a segmenter is trained; place [B 2 3]: where in its image
    each crop lies (see ops.place), None where images are not cropped.
    """

    images: Tensor
    tags: Tensor
    index: Tensor
    valid: Tensor
    side: dict[str, Tensor] = field(default_factory=dict)
    target: Tensor | None = None
    place: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; copies overlap with computation where the memory is pinned."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return Batch(
            move(self.images), move(self.tags), move(self.index), move(self.valid),
            {name: move(x) for name, x in self.side.items()},
            None if self.target is None else move(self.target),
            None if self.place is None else move(self.place),
        )  # fmt: skip

    def pin_memory(self) -> Batch:
        """Called by the data loader when a GPU will read the batch."""
        return Batch(
            self.images.pin_memory(), self.tags.pin_memory(), self.index.pin_memory(), self.valid.pin_memory(),
            {name: x.pin_memory() for name, x in self.side.items()},
            None if self.target is None else self.target.pin_memory(),
            None if self.place is None else self.place.pin_memory(),
        )  # fmt: skip


@dataclass
class CamOutput:
    """What a network says about one view.

    logits [B K]; cams [B K h w] raw (may be negative), differentiable; features: tap name -> [B D h w];
    refined [B K h w]: the baseline's own better map, if it has one (SEAM's PCM); background [B 1 h w], if the
    network predicts one.
    """

    logits: Tensor
    cams: Tensor
    features: Features
    refined: Tensor | None = None
    background: Tensor | None = None

    @property
    def best(self) -> Tensor:
        """The refined map where there is one, the CAM elsewhere: [B K h w]."""
        return self.cams if self.refined is None else self.refined

    def float(self) -> CamOutput:
        """The same in float32: losses are computed outside autocast."""
        return replace(
            self,
            logits=self.logits.float(),
            cams=self.cams.float(),
            features={tap: x.float() for tap, x in self.features.items()},
            refined=None if self.refined is None else self.refined.float(),
            background=None if self.background is None else self.background.float(),
        )
