"""Images -> features."""

from tag2mask.backbones.timm_cnn import BackboneSettings, TimmCNN

__all__ = ["BackboneSettings", "TimmCNN"]
