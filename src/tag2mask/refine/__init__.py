"""Refinement of maps and masks: dense CRF, random walk, affinity networks."""

from tag2mask.refine.crf import PRESETS, Bilateral, DenseCRF, Gaussian, dense_crf
from tag2mask.refine.irn import IRNet
from tag2mask.refine.psa import AffinityNet
from tag2mask.refine.walk import Affinity

AFFINITY_NETS = {"affinitynet": AffinityNet}
BOUNDARY_NETS = {"irnet": IRNet}

__all__ = [
    "AFFINITY_NETS", "BOUNDARY_NETS", "PRESETS", "Affinity", "AffinityNet", "Bilateral", "DenseCRF", "Gaussian",
    "IRNet", "dense_crf",
]  # fmt: skip
