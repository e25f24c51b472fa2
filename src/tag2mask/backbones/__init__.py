"""Images -> features."""

from tag2mask.backbones.build import build_backbone, convert_weights
from tag2mask.backbones.resnet38 import ResNet38
from tag2mask.backbones.timm_cnn import TimmCNN
from tag2mask.backbones.trunk import BackboneSettings, Trunk
from tag2mask.backbones.vgg16 import VGG16
from tag2mask.backbones.vit import ViT, patch_of
from tag2mask.backbones.weights import PUBLISHED

__all__ = [
    "PUBLISHED", "VGG16", "BackboneSettings", "ResNet38", "TimmCNN", "Trunk", "ViT", "build_backbone",
    "convert_weights", "patch_of",
]  # fmt: skip
