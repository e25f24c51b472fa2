"""IRN: learns from the sure parts of CAMs where the boundaries between classes are.

Ahn, Cho and Kwak: Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations, CVPR 2019,
arXiv:1904.05044.

    a_ij = 1 - max_{k on the path from i to j} B_k                                        (section 4.4; refine/pairs.py)
    L_B  = bg / 4 + fg / 4 + neg / 2                                                      (section 4.4; refine/pairs.py)
    L_D  = mean_fg |D_i - D_j - (p_j - p_i)| / 2 + mean_bg |D_i - D_j| / 2                                (section 4.3)

    symbol   here                  meaning
    B        IRNet(images)         boundaries, here as logits: one number for each cell of 4 x 4 pixels
    D        IRNet.displacement    the way from a cell to the centre of its object
    P        pairs_of              pairs of cells closer than `radius`
    labels   confident_labels      classes that a CRF keeps although the background is scored high, background that it
                                   keeps although the background is scored low; all other pixels are unlabelled (255)

Five levels of the backbone are reduced to 32 channels each, brought to stride 4 and mixed to one. The backbone is as it
was pre-trained (`freeze`). The walk reads boundaries alone. The displacements tell instances of a class apart, which
nothing here needs: with a frozen backbone they share no parameter with the boundaries, so training them makes no
difference to any mask. They are there for those who want instances; their mean over the data, which the paper subtracts
for that, is not kept.

Where the released code differs: labels go to the grid by nearest pixel, here by vote of a cell's pixels; it crops
images larger than 512 pixels, here none is; `border="psa"` leaves out the pairs that it leaves out in training.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tag2mask.backbones import BackboneSettings, build_backbone
from tag2mask.core import Batch, Features, Losses, Progress
from tag2mask.data.source import IGNORE
from tag2mask.errors import UserError
from tag2mask.ops.cams import to_mask
from tag2mask.refine.crf import PRESETS, DenseCRF
from tag2mask.refine.grid import grid_size, labels_on_grid, pad_to_multiple
from tag2mask.refine.pairs import (
    Border,
    Pairs,
    affinity_losses,
    mean_over_pairs,
    pairs_of,
    path_maximum,
    runs_of,
)

WIDTH, GROUPS = 32, 4  # of every side branch for boundaries
WAYS = {"c1": (64, 8), "c2": (128, 16), "c3": (256, 16), "c4": (256, 16), "last": (256, 16)}  # for displacements
TAPS = tuple(WAYS)


class Side(nn.Module):
    """1x1 convolution, group norm, resizing to a grid, ReLU."""

    def __init__(self, channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.GroupNorm(groups, width))

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """[B D h' w'] -> [B width h w], with the grid of `like` [B D h w]."""
        x = self.layers(x)
        if x.shape[-2:] != like.shape[-2:]:
            x = F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
        return x.relu()


class Displacement(nn.Module):
    """The branch for displacements: taps by name -> [B 2 h w], rows then columns, in cells of stride 4."""

    def __init__(self, dims: dict[str, int]) -> None:
        super().__init__()
        self.sides = nn.ModuleDict({tap: Side(dims[tap], *WAYS[tap]) for tap in dims})
        deep = sum(WAYS[tap][0] for tap in ("c3", "c4", "last"))
        shallow = sum(WAYS[tap][0] for tap in ("c1", "c2") if tap in dims)
        self.deep, self.both = Side(deep, 256, 16), Side(256 + shallow, 256, 16)
        self.out = nn.Conv2d(256, 2, 1, bias=False)

    def forward(self, taps: Features) -> Tensor:
        """Deep levels meet at stride 8, then all at stride 4."""
        found = {tap: side(taps[tap], taps["c3" if tap in ("c3", "c4", "last") else "c2"])
                 for tap, side in self.sides.items()}  # fmt: skip
        deep = self.deep(torch.cat([found.pop(tap) for tap in ("c3", "c4", "last")], dim=1), taps["c2"])
        ways: Tensor = self.out(self.both(torch.cat([*found.values(), deep], dim=1), taps["c2"]))
        return ways


class IRNet(nn.Module):
    """Boundaries between classes: images [B 3 H W] -> logits [B 1 h w] at stride 4.

    backbone: see BackboneSettings; resnet50 with output stride 16 and dilate: false as published. One without a level
    of stride 2 (ConvNeXt) has four side branches instead of five. freeze: the backbone stays as it was pre-trained; one
    from scratch must not. radius: of the pairs in training, in cells of 4 pixels. border: "all" pairs, or in training
    only those of the released code (see refine.pairs.pairs_of). displacement: also train the branch that tells
    instances apart; with a frozen backbone this has no effect on masks.
    Raises UserError for a radius under 2.
    """

    stride = 4

    def __init__(
        self,
        *,
        backbone: BackboneSettings,
        freeze: bool = True,
        radius: int = 10,
        border: Border = "all",
        displacement: bool = False,
    ) -> None:
        super().__init__()
        pairs_of((1, 1), radius)  # says what is wrong with the radius
        self.backbone = build_backbone(backbone, stem=True)
        self.multiple = backbone.output_stride
        self.freeze, self.radius, self.border = freeze, radius, border
        dims = {tap: self.backbone.dims[tap] for tap in TAPS if tap in self.backbone.dims}
        self.sides = nn.ModuleDict({tap: Side(channels, WIDTH, GROUPS) for tap, channels in dims.items()})
        self.out = nn.Conv2d(WIDTH * len(dims), 1, 1)
        self.displacement = Displacement(dims) if displacement else None
        if freeze:
            self.backbone.requires_grad_(False)
            self.backbone.eval()

    def train(self, mode: bool = True) -> IRNet:
        """As usual, but a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.freeze:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the boundaries, also of cells that the image covers in part."""
        return self.boundaries(self.look(images), grid_size(images, self.stride))

    def look(self, images: Tensor) -> Features:
        """What the side branches read; the stem's output is pooled to stride 4."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            taps: Features = self.backbone(pad_to_multiple(images, self.multiple))
            if "c1" in taps:
                taps = taps | {"c1": F.max_pool2d(taps["c1"], kernel_size=3, stride=2, padding=1)}
        return taps

    def boundaries(self, taps: Features, size: tuple[int, int]) -> Tensor:
        """Logits [B 1 h w], cut to `size`."""
        sides = [side(taps[tap], taps["c2"]) for tap, side in self.sides.items()]
        logits: Tensor = self.out(torch.cat(sides, dim=1))
        return logits[..., : size[0], : size[1]]


class IRNObjective(nn.Module):
    """The losses of an IRNet on confident labels (the batch's target)."""

    def __init__(self, net: IRNet, *, bf16: bool = False) -> None:
        super().__init__()
        self.net = net
        self.bf16 = bf16

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """{"background", "foreground", "different"} of the boundaries, {"centre", "still"} of the displacements."""
        if batch.target is None:
            raise ValueError("IRN is trained on batches with a target")
        size, ways = grid_size(batch.images, self.net.stride), None
        with torch.autocast(batch.images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            taps = self.net.look(batch.images)
            logits = self.net.boundaries(taps, size)
            if self.net.displacement is not None:
                ways = self.net.displacement(taps)[..., : size[0], : size[1]]
        labels = labels_on_grid(batch.target, size, self.net.stride, batch.tags.shape[1])
        pairs = pairs_of(size, self.net.radius, self.net.border)
        runs = runs_of(logits[:, 0].float().sigmoid(), self.net.radius)
        losses = affinity_losses(lambda each: 1 - path_maximum(runs, each), labels, pairs)
        return losses if ways is None else losses | displacement_losses(ways.float(), labels, pairs)

    def on_epoch_start(self, epoch: int) -> None:
        """Nothing to do."""

    def after_step(self) -> None:
        """Nothing to do."""


def displacement_losses(ways: Tensor, labels: Tensor, pairs: list[Pairs]) -> Losses:
    """L_D of displacements [B 2 h w] on labels [B h w]: {"centre", "still"}, its two terms."""

    def costs(each: Pairs) -> Tensor:
        apart = each.first(ways) - each.second(ways)
        still = apart.abs().sum(dim=1)
        centre = (apart[:, 0] - each.dy).abs() + (apart[:, 1] - each.dx).abs()
        return torch.stack([still, centre, torch.zeros_like(still)])

    still, centre, _ = mean_over_pairs(costs, labels, pairs).unbind()
    return {"centre": centre / 2, "still": still / 2}


@torch.no_grad()
def edges(net: IRNet, images: Tensor, *, flip: bool = True) -> Tensor:
    """Boundaries [B h w] in 0..1 of normalised images [B 3 H W]; with `flip` the mean logit with the mirror image."""
    logits: Tensor = net(torch.cat([images, images.flip(-1)]) if flip else images).float()
    if flip:
        plain, mirrored = logits.chunk(2)
        logits = (plain + mirrored.flip(-1)) / 2
    return logits[:, 0].sigmoid()


def check_scores(foreground: float, background: float) -> None:
    """Raises UserError unless 0 <= background <= foreground < 1."""
    if not 0 <= background <= foreground < 1:
        raise UserError(
            f"foreground {foreground}, background {background}: both are background scores in 0..1, the one for "
            "foreground at least the one for background; IRN: 0.3 and 0.05"
        )


def confident_labels(
    image: NDArray[np.uint8],
    maps: Tensor,
    classes: Tensor,
    *,
    foreground: float = 0.3,
    background: float = 0.05,
    steps: int = 10,
) -> NDArray[np.uint8]:
    """The sure pixels of an image [H W 3], as an index mask [H W]: 0 background, class index + 1, 255 not sure.

    maps [P H W] in 0..1 of the P tagged classes, classes [P] their indices. Seeds are made with a constant background
    score, once high (`foreground`) and once low (`background`), and each goes through a CRF. A class where the first
    says so, background where both do. No class: all background.
    """
    check_scores(foreground, background)
    if len(maps) == 0:
        return np.zeros(image.shape[:2], np.uint8)
    crf = DenseCRF(image, **PRESETS["irn"])
    names = np.concatenate([[0], classes.numpy() + 1]).astype(np.uint8)
    places = torch.arange(len(maps))

    def labels(score: float) -> NDArray[np.uint8]:
        seed = to_mask(maps, places, score).numpy()
        found: NDArray[np.uint8] = names[np.asarray(crf.from_labels(seed, len(names), gt_prob=0.7)).argmax(axis=0)]
        return found

    surely_a_class, surely_background = labels(foreground), labels(background)
    both = (surely_a_class == 0) & (surely_background == 0)
    sure = np.where(surely_a_class == 0, IGNORE, surely_a_class)
    return np.where(both, 0, sure).astype(np.uint8)
