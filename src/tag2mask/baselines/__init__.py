"""Networks that learn CAMs from tags, one file each."""

from collections.abc import Mapping

from tag2mask.baselines.cam import CAM
from tag2mask.baselines.eps import EPS
from tag2mask.baselines.mctformer import MCTformer
from tag2mask.baselines.oaa import OAA
from tag2mask.baselines.seam import SEAM
from tag2mask.core import Baseline

BASELINES: Mapping[str, type[Baseline]] = {"cam": CAM, "eps": EPS, "mctformer": MCTformer, "oaa": OAA, "seam": SEAM}

__all__ = ["BASELINES", "CAM", "EPS", "OAA", "SEAM", "MCTformer"]
