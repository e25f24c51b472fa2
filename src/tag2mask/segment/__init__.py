"""Masks -> a segmenter -> masks."""

from tag2mask.segment.deeplab import DeepLab, SegmentObjective
from tag2mask.segment.predict import predict

SEGMENTERS = {"deeplab": DeepLab}

__all__ = ["SEGMENTERS", "DeepLab", "SegmentObjective", "predict"]
