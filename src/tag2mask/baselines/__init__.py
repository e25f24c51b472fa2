"""Networks that learn CAMs from tags, one file each."""

from tag2mask.baselines.cam import CAM

BASELINES = {"cam": CAM}

__all__ = ["BASELINES", "CAM"]
