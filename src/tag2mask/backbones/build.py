"""From settings to a backbone."""

from __future__ import annotations

from pathlib import Path

from tag2mask.backbones.resnet38 import ResNet38, torch_names
from tag2mask.backbones.timm_cnn import TimmCNN
from tag2mask.backbones.trunk import BackboneSettings, Trunk
from tag2mask.backbones.vgg16 import VGG16
from tag2mask.backbones.vit import ViT, is_vit
from tag2mask.backbones.weights import convert
from tag2mask.errors import UserError


def build_backbone(settings: BackboneSettings, *, stem: bool = False) -> Trunk:
    """The backbone of these settings; `stem` adds the tap "c1" of stride 2, where there is one.

    Raises UserError when the name is unknown, the network cannot have this stride, or the weights cannot be had.
    """
    own: type[ResNet38] | type[VGG16] | type[ViT] | None = None
    if settings.name == "resnet38":
        own = ResNet38
    elif settings.name.partition(".")[0] == "vgg16" and settings.output_stride == 8:
        own = VGG16
    elif is_vit(settings.name):
        own = ViT
    if own is None:
        return TimmCNN(settings, stem=stem)
    if stem:
        raise UserError(f"backbone.name: {settings.name} has no levels of strides 2, 4, 8 and 16; take resnet50")
    return own(settings)


def convert_weights(source: Path, out: Path) -> int:
    """Write the weights of ResNet38 in an MXNet file, or those in a .pth file, as safetensors: how many tensors.

    Raises UserError if the file cannot be read or `out` is to be something else.
    """
    return convert(source, out, torch_names)
