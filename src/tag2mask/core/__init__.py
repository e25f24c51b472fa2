"""The vocabulary: everything else is written in these words."""

from tag2mask.core.baseline import Baseline
from tag2mask.core.method import Method
from tag2mask.core.objective import Objective
from tag2mask.core.state import TrainingOnly, inference_state, load_inference_state
from tag2mask.core.types import FULL, Batch, CamOutput, Features, Losses, Progress, View

__all__ = [
    "FULL", "Baseline", "Batch", "CamOutput", "Features", "Losses", "Method", "Objective", "Progress", "TrainingOnly",
    "View", "inference_state", "load_inference_state",
]  # fmt: skip
