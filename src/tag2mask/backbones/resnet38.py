"""ResNet38-d, the wide residual network that PSA brought into the field: images -> features at stride 8.

Wu, Shen, van den Hengel: Wider or Deeper: Revisiting the ResNet Model for Visual Recognition, Pattern Recognition 90,
2019, arXiv:1611.10080 (model A1); dilated as in Ahn, Kwak: Learning Pixel-level Semantic Affinity with Image-level
Supervision for Weakly Supervised Semantic Segmentation, CVPR 2018, arXiv:1803.10464.

    a = ReLU(BN(x))        block(x) = shortcut + conv(... ReLU(BN(conv(a))))        shortcut = x or conv_1x1(a)

    symbol   here           meaning
    conv4    tap "c4"       a at the entrance of b5, 512 channels
    conv5    tap "c5"       a at the entrance of b6, 1024 channels
    conv6    tap "last"     ReLU(bn7(b7)), 4096 channels; these three at stride 8
             "c2", "c3"     a at the entrance of b3 and of b4, strides 2 and 4

Parameters and buffers have the names of the published weights, 105.07 million in all. As in all code of the field,
with weights all batch norms are frozen, and `conv1a` and the blocks b2 as well.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.backbones.trunk import BackboneSettings, Trunk
from tag2mask.backbones.weights import Tensors, how_to_get, load_weights
from tag2mask.core import Features
from tag2mask.errors import UserError


class Stage(NamedTuple):
    """Blocks of two 3x3 convolutions; stride is the first one's, whose first convolution is never dilated."""

    blocks: int
    channels: int
    middle: int
    out: int
    stride: int = 2
    dilation: int = 1


class Wide(NamedTuple):
    """A block of a 1x1, a 3x3 and a 1x1 convolution, with dropout of channels before the latter two."""

    channels: int
    out: int
    dropout: float
    dilation: int = 4


STEM = 64
STAGES = {
    "b2": Stage(3, STEM, 128, 128),
    "b3": Stage(3, 128, 256, 256),
    "b4": Stage(6, 256, 512, 512),
    "b5": Stage(3, 512, 512, 1024, stride=1, dilation=2),
}
WIDES = {"b6": Wide(1024, 2048, 0.3), "b7": Wide(2048, 4096, 0.5)}
ENTRANCES = {"b3": "c2", "b4": "c3", "b5": "c4", "b6": "c5"}  # block -> the tap that is its a
LEVELS = {"nothing": 0, "c1": 1, "c2": 2, "c3": 3, "c4": 4, "c5": 5}  # how many of stem, b2, ... are frozen


class ResNet38(Trunk):
    """The trunk, without a classifier.

    Raises UserError if the settings ask for another stride or the weights cannot be had.
    """

    affinity = ("c4", "c5", "last")

    def __init__(self, settings: BackboneSettings) -> None:
        super().__init__()
        if settings.output_stride != 8 or not settings.dilate:
            raise UserError("backbone: resnet38 is made for stride 8; set output_stride: 8 and leave dilate out")
        self.conv1a = nn.Conv2d(3, STAGES["b2"].channels, 3, padding=1, bias=False)
        self._blocks: list[str] = []
        self.dims = {}
        for name, stage in STAGES.items():
            for number in range(stage.blocks):
                self._add(f"{name}_{number}" if number else name, _Plain(stage, first=number == 0))
        for name, wide in WIDES.items():
            self._add(name, _Bottleneck(wide))
        self.dims["last"] = WIDES["b7"].out
        self.bn7 = nn.BatchNorm2d(self.dims["last"])
        self.to(memory_format=torch.channels_last)
        if settings.weights == "hub":
            raise UserError(f"backbone.weights: resnet38 is on no hub; {how_to_get(Path('hub'), settings.name)}")
        if settings.weights is not None:
            load_weights(self, Path(settings.weights), fits=settings.name, rename=torch_names)
        usual = "nothing" if settings.weights is None else "c2"
        levels = LEVELS[settings.freeze or usual]
        parts = ("conv1a", *STAGES)[:levels]
        self.settle(settings, [p for name, p in self.named_parameters() if name.startswith(parts)])

    def _add(self, name: str, block: nn.Module) -> None:
        if name in ENTRANCES:
            self.dims[ENTRANCES[name]] = block.channels  # type: ignore[assignment]
        self.add_module(name, block)
        self._blocks.append(name)

    def forward(self, images: Tensor) -> Features:
        """[B 3 H W] -> {tap: [B D h w]}, at stride 8 with h = ceil(H / 8)."""
        x, features = self.conv1a(images.contiguous(memory_format=torch.channels_last)), {}
        for name in self._blocks:
            x, entrance = self.get_submodule(name)(x)
            if name in ENTRANCES:
                features[ENTRANCES[name]] = entrance
        return features | {"last": activate(self.bn7, x)}


class _Plain(nn.Module):
    def __init__(self, stage: Stage, *, first: bool) -> None:
        super().__init__()
        self.channels = stage.channels if first else stage.out
        stride, dilation = (stage.stride, 1) if first else (1, stage.dilation)
        self.bn_branch2a = nn.BatchNorm2d(self.channels)
        self.conv_branch2a = _conv(self.channels, stage.middle, 3, stride=stride, dilation=dilation)
        self.bn_branch2b1 = nn.BatchNorm2d(stage.middle)
        self.conv_branch2b1 = _conv(stage.middle, stage.out, 3, dilation=stage.dilation)
        same = self.channels == stage.out and stride == 1
        self.conv_branch1 = None if same else _conv(self.channels, stage.out, 1, stride=stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B D h w] -> (the result, a)."""
        a = activate(self.bn_branch2a, x)
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(a)
        return shortcut + self.conv_branch2b1(activate(self.bn_branch2b1, self.conv_branch2a(a))), a


class _Bottleneck(nn.Module):
    def __init__(self, wide: Wide) -> None:
        super().__init__()
        self.channels, out = wide.channels, wide.out
        self.bn_branch2a = nn.BatchNorm2d(self.channels)
        self.conv_branch2a = _conv(self.channels, out // 4, 1)
        self.bn_branch2b1 = nn.BatchNorm2d(out // 4)
        self.conv_branch2b1 = _conv(out // 4, out // 2, 3, dilation=wide.dilation)
        self.bn_branch2b2 = nn.BatchNorm2d(out // 2)
        self.conv_branch2b2 = _conv(out // 2, out, 1)
        self.conv_branch1 = _conv(self.channels, out, 1)
        self.dropout = nn.Dropout2d(wide.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B D h w] -> (the result, a)."""
        a = activate(self.bn_branch2a, x)
        y = self.dropout(activate(self.bn_branch2b1, self.conv_branch2a(a)))
        y = self.dropout(activate(self.bn_branch2b2, self.conv_branch2b1(y)))
        return self.conv_branch1(a) + self.conv_branch2b2(y), a


def _conv(channels: int, out: int, size: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (size // 2)
    return nn.Conv2d(channels, out, size, stride=stride, padding=padding, dilation=dilation, bias=False)


def activate(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """ReLU(norm(x)). A frozen batch norm is a scale and a shift, of which nothing has to be kept for the gradient."""
    if norm.training or norm.weight.requires_grad:
        return F.relu(norm(x), inplace=True)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    return torch.addcmul(_wide(shift, x), x, _wide(scale, x)).relu_()


def _wide(channels: Tensor, like: Tensor) -> Tensor:
    return channels.to(like.dtype)[:, None, None]


NAME = re.compile(r"(res|bn)(\d)(?:a|b(\d+))_(branch\w+?)_(?:moving_)?(weight|gamma|beta|mean|var)")
ENDS = {"weight": "weight", "gamma": "weight", "beta": "bias", "mean": "running_mean", "var": "running_var"}


def torch_names(tensors: Tensors) -> Tensors:
    """Tensors by their names in the MXNet file -> by ours; those of the classifier are left out.

    res4b5_branch2a_weight -> b4_5.conv_branch2a.weight, bn7a_branch2b1_moving_var -> b7.bn_branch2b1.running_var; the
    one batch norm that is in no block is bn7.
    """
    found = {}
    for name, tensor in tensors.items():
        if match := NAME.fullmatch(name):
            kind, level, number, branch, end = match.groups()
            block = f"b{level}_{number}" if number else f"b{level}"
            found[f"{block}.{'conv' if kind == 'res' else 'bn'}_{branch}.{ENDS[end]}"] = tensor
        elif name == "conv1a_weight":
            found["conv1a.weight"] = tensor
        elif name.startswith("bn") and (end := name.rpartition("_")[2]) in ENDS:
            found[f"bn7.{ENDS[end]}"] = tensor
    return found
