"""Masks -> a segmenter -> masks."""

from tag2mask.segment.deeplab import DeepLab, DeepLabLargeFOV, DeepLabV2, DeepLabV3Like, SegmentObjective
from tag2mask.segment.predict import predict

SEGMENTERS = {"deeplab": DeepLabLargeFOV, "deeplab_v2": DeepLabV2, "deeplab_v3_like": DeepLabV3Like}

__all__ = [
    "SEGMENTERS", "DeepLab", "DeepLabLargeFOV", "DeepLabV2", "DeepLabV3Like", "SegmentObjective", "predict",
]  # fmt: skip
