"""VGG16 at stride 8, as OAA and RCA have it: the fourth pooling moves by one pixel, the last level is dilated instead.

Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015, arXiv:1409.1556.

Taps: "c2".."c4" and "c5" = "last" are conv2_2, conv3_3, conv4_3 and conv5_3 after ReLU, at strides 2, 4, 8 and 8.
Parameters have the names of torchvision's and timm's vgg16. Nothing is frozen, as in both papers.

The released code drops a last odd row or column in each of the first three poolings, here it is kept: the map then
covers the image. With sides that are multiples of 8 there is no difference.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tag2mask.backbones.trunk import BackboneSettings, Trunk
from tag2mask.backbones.weights import Tensors, load_from_hub, load_weights
from tag2mask.core import Features
from tag2mask.errors import UserError

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(Trunk):
    """The thirteen convolutions.

    Raises UserError if the settings ask for another stride or the weights cannot be had.
    """

    affinity = ("c4", "c5", "last")

    def __init__(self, settings: BackboneSettings) -> None:
        super().__init__()
        if settings.output_stride != 8 or not settings.dilate:
            raise UserError("backbone: the dilated vgg16 has stride 8; leave dilate out")
        layers: list[nn.Module] = []
        channels = 3
        self._taps: dict[str, int] = {}  # tap -> how many layers there are up to it
        for number, widths in enumerate(BLOCKS, 1):
            dilation = 2 if number == 5 else 1
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
                channels = width
            self._taps[f"c{number}"] = len(layers)
            if number < 4:
                layers.append(nn.MaxPool2d(2, stride=2, ceil_mode=True))
            elif number == 4:
                layers.append(nn.MaxPool2d(3, stride=1, padding=1))
        self.features = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.dims = {f"c{number}": BLOCKS[number - 1][-1] for number in (2, 3, 4, 5)} | {"last": channels}
        if settings.weights == "hub":
            load_from_hub(self, settings.name, keep=_convolutions)
        elif settings.weights is not None:
            load_weights(self, Path(settings.weights), fits=settings.name)
        end = self._taps.get(settings.freeze or "nothing", 0)
        self.settle(settings, list(self.features[:end].parameters()))

    def forward(self, images: Tensor) -> Features:
        """[B 3 H W] -> {tap: [B D h w]}, at stride 8 with h = ceil(H / 8)."""
        x, features, start = images.contiguous(memory_format=torch.channels_last), {}, 0
        for tap, end in self._taps.items():
            x = self.features[start:end](x)
            features[tap], start = x, end
        del features["c1"]
        return features | {"last": x}


def _convolutions(tensors: Tensors, model: nn.Module) -> Tensors:
    return {name: tensors[name] for name in model.state_dict()}
