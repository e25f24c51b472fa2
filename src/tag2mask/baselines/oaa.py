"""OAA: online attention accumulation.

Jiang, Hou, Cao, Cheng, Wei, Xiong: Integral Object Mining via Online Attention Accumulation, ICCV 2019; with the drop
layer: Jiang, Han, Hou, Cheng, Wei, IEEE TPAMI 44(10), 2022.

    M_t <- max(M_{t-1}, A_t)        A_t = ReLU(F_t) / max ReLU(F_t)

    symbol   here                meaning
    F        CamOutput.cams      the map of a class, [h w]: three 3x3 convolutions with ReLU and one 1x1 on the features
    A_t      positive / peak     what the network attends to for a tagged class in step t
    M        Attention.maps      what it has attended to so far, one map per pair of a training image and a tag

The loss is classification alone (multi-label soft margin of the pooled maps). While the network learns, its attention
wanders over the object; the maximum over the training keeps all of it. What counts as the result are the accumulated
maps of the training images (stage `attention`), and what a second network learns from them (stage `integrate`, OAA+).

As in the released code, nothing is accumulated in the first epoch; later on a class's map is taken if the class is
among the |y| most likely ones of an image with |y| tags; and in the last epoch also where there is no map yet.

Where the released code differs:
- It stores a file per map, by the place in the epoch, and therefore neither shuffles nor crops nor flips. Here a map is
  brought from the crop to the whole image (`Batch.place`), on a grid that is the same for all images; what the crop
  does not show stays as it is. The maximum that a map is divided by is the one on this grid: padding has no part in it.
- It rounds to 8 bits, here to half precision. It drops features of all images of a batch, here image by image.
- The last epoch begins with the last pass that is whole: each image is seen once more from then on. That cannot be told
  in the very first step, so in less than two epochs a pair may stay without a map.

What the drop layer sees is not written down: here, the features where the accumulated attention of any tag of the image
exceeds `drop_above` are zero for the classification loss; the maps that are accumulated come from all features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.backbones import BackboneSettings, build_backbone
from tag2mask.core import FULL, Baseline, Batch, CamOutput, Features, Losses, Progress, TrainingOnly, View
from tag2mask.errors import UserError
from tag2mask.ops.cams import pool
from tag2mask.ops.gather import gather, processes, rank
from tag2mask.ops.place import into_crop, onto_image, whole


class OAA(Baseline):
    """A classifier that remembers all that it ever attended to.

    backbone: see BackboneSettings. width: channels of the three convolutions before the maps. std: of the initial
    weights of all four; 0.01 suits a width of 512 (each layer halves what it reads), a narrow one needs more. grid:
    side of an accumulated map. above: least probability of a tag whose map is taken (RCA: 0.1); null: the tag must be
    among the most likely classes of the image. drop: share of the images whose attended features are dropped in each
    step (TPAMI: 0.5); drop_above: where the accumulated attention exceeds this.

    Raises UserError for a value out of range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: BackboneSettings,
        width: int = 512,
        std: float = 0.01,
        grid: int = 46,
        above: float | None = None,
        drop: float = 0.0,
        drop_above: float = 0.6,
    ) -> None:
        super().__init__()
        if min(width, grid) < 1 or std <= 0:
            raise UserError("oaa: width and grid must be at least 1, std above 0")
        if not all(0 <= share <= 1 for share in (0.0 if above is None else above, drop, drop_above)):
            raise UserError("oaa: above, drop and drop_above must be in 0..1")
        self.backbone = build_backbone(backbone)
        self.dims = self.backbone.dims
        self.std, self.drop, self.drop_above = std, drop, drop_above
        layers: list[nn.Module] = []
        for channels in (self.dims["last"], width, width):
            layers += [self._convolution(channels, width, 3), nn.ReLU()]
        self.classifier = nn.Sequential(*layers, self._convolution(width, num_classes, 1))
        self.attention = Attention(num_classes, grid, above=above)

    def _convolution(self, channels: int, out: int, size: int) -> nn.Conv2d:
        convolution = nn.Conv2d(channels, out, size, padding=size // 2)
        nn.init.normal_(convolution.weight, std=self.std)
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        return convolution

    def widen(self, channels: int) -> None:
        """Make the first convolution, new, read `channels` more of the tap "last", or fewer."""
        assert isinstance(self.classifier, nn.Sequential)
        first = self.classifier[0]
        assert isinstance(first, nn.Conv2d)
        self.classifier[0] = self._convolution(first.in_channels + channels, first.out_channels, 3)
        self.dims = self.dims | {"last": self.dims["last"] + channels}
        self.widened += channels

    def remember(self, tags: Tensor) -> None:
        """Make an empty map for every pair of an image and a tag; without it nothing is accumulated."""
        self.attention.remember(tags)

    def encode(self, images: Tensor) -> Features:
        """All taps of the backbone."""
        features: Features = self.backbone(images)
        return features

    def classify(self, features: Features, images: Tensor) -> CamOutput:
        """Maps by the classifier, logits by pooling them."""
        cams = self.classifier(features["last"])
        return CamOutput(logits=pool(cams), cams=cams, features=features)

    def losses(self, batch: Batch, outs: dict[View, CamOutput], progress: Progress) -> Losses:
        """The classification loss, of features with the drop layer if there is one; notes the maps for `after_step`."""
        out = outs[FULL]
        self.attention.stage(out, batch, progress)
        logits = out.logits
        if self.drop > 0:
            logits = pool(self.classifier(self._dropped(out.features["last"], batch, progress)))
        return {"cls": F.multilabel_soft_margin_loss(logits, batch.tags)}

    def after_step(self) -> None:
        """Accumulate what the network attended to in this step."""
        self.attention.write()

    def export_memory(self) -> dict[str, Tensor]:
        """The accumulated attention: see `Attention`."""
        return {"maps": self.attention.maps, "slot": self.attention.slot} if self.attention.slot.numel() else {}

    def _dropped(self, features: Tensor, batch: Batch, progress: Progress) -> Tensor:
        """Features [B D h w], zero where drawn images were attended to before."""
        attended = self.attention.in_crops(batch, (features.shape[-2], features.shape[-1]))
        draws = torch.Generator(device=features.device).manual_seed(progress.seed)
        drawn = torch.rand(len(features) * processes(), generator=draws, device=features.device) < self.drop
        return features * ~(drawn[rank() :: processes(), None, None, None] & (attended > self.drop_above))


class Attention(TrainingOnly):
    """The largest attention so far of every pair of a training image and a tag.

    Buffers: maps [P g g] float16 in 0..1, over the whole image, 0 before anything was taken; slot [N K] int32, the map
    of image and class, -1 for a class that the image does not have. P and N are 0 before `remember`. They are alike on
    all processes. A step changes them in `write` alone.
    """

    maps: Tensor
    slot: Tensor

    def __init__(self, num_classes: int, grid: int, *, above: float | None = None) -> None:
        super().__init__()
        self.above = above
        self.register_buffer("maps", torch.zeros(0, grid, grid, dtype=torch.float16))
        self.register_buffer("slot", torch.zeros(0, num_classes, dtype=torch.int32))
        self._staged: tuple[CamOutput, Batch, Progress] | None = None

    def remember(self, tags: Tensor) -> None:
        """Empty maps for training images whose tags are [N K] of 0/1; what was there is gone."""
        pairs, device = (tags > 0).to(self.slot.device), self.slot.device
        number = pairs.flatten().cumsum(0).view(pairs.shape) - 1
        self.slot = torch.where(pairs, number, -1).int()
        self.maps = torch.zeros(int(pairs.sum()), *self.maps.shape[1:], dtype=self.maps.dtype, device=device)

    def stage(self, out: CamOutput, batch: Batch, progress: Progress) -> None:
        """Note a step's output for `write`."""
        self._staged = CamOutput(out.logits.detach(), out.cams.detach(), {}), batch, progress

    @torch.no_grad()
    def write(self) -> None:
        """maps <- max(maps, new) with what was noted on all processes; nothing happens if nothing was."""
        if self._staged is None or len(self.maps) == 0:
            return
        out, batch, progress = self._staged
        self._staged = None
        share = len(batch.index) * processes() / len(self.slot)  # of an epoch
        begun, last = progress.epoch >= 1, in_last_epoch(progress, share)
        if not begun and not last:
            return
        slot = self.slot[batch.index].long()
        taken = likely(out.logits, batch.tags, self.above) if begun else torch.zeros_like(slot, dtype=torch.bool)
        if last:
            taken = taken | (self.maps[slot.clamp(min=0)].amax(dim=(2, 3)) == 0)
        taken = taken & (slot >= 0) & (batch.tags > 0)
        place = whole(batch.images) if batch.place is None else batch.place
        size = (self.maps.shape[1], self.maps.shape[2])
        positive, _ = onto_image(out.cams.relu(), place, size)
        peak = positive.amax(dim=(2, 3), keepdim=True)
        new = positive / torch.where(peak > 0, peak, 1) * taken[:, :, None, None]
        self._take(gather(new.to(self.maps.dtype)), gather(batch.index))

    def _take(self, new: Tensor, index: Tensor) -> None:
        """The maximum with new [n K g g] for the images at index [n], among which one may be several times."""
        slot = self.slot[index].flatten().long()
        spread = torch.arange(len(slot), device=slot.device) % len(self.maps)
        slot = torch.where(slot < 0, spread, slot)  # their new maps are 0, and not all of them should go to one place
        flat, new = self.maps.flatten(1), new.flatten(0, 1).flatten(1)
        flat.scatter_reduce_(0, slot[:, None].expand_as(new), new, "amax")

    @torch.no_grad()
    def in_crops(self, batch: Batch, size: tuple[int, int]) -> Tensor:
        """The attention to any tag of the image, where the crops are: [B 1 h w], 0 on padding."""
        if len(self.maps) == 0:
            return torch.zeros(len(batch.images), 1, *size, device=batch.images.device)
        slot = self.slot[batch.index].long()
        own = self.maps[slot.clamp(min=0)] * (slot >= 0)[:, :, None, None]
        place = whole(batch.images) if batch.place is None else batch.place
        return into_crop(own.amax(dim=1, keepdim=True).float(), place, size)[0]


def likely(logits: Tensor, tags: Tensor, above: float | None) -> Tensor:
    """bool [B K]: fewer classes have a higher logit than the image has tags; or, given `above`, it is as probable."""
    if above is not None:
        return logits.sigmoid() >= above
    higher = (logits[:, None, :] > logits[:, :, None]).sum(dim=2)
    return higher < tags.sum(dim=1, keepdim=True)


def in_last_epoch(progress: Progress, share: float) -> bool:
    """Whether a batch, which is this share of an epoch, has images of the last whole epoch, or of what comes after."""
    if progress.done <= 0:
        return False  # how long an epoch is compared to the training shows from the second step on
    whole_epochs = math.floor(progress.epoch / progress.done + 1e-6)
    return progress.epoch + share > max(whole_epochs - 1, 0) + 1e-6
