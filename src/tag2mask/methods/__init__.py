"""What a paper adds to a baseline, one file each."""

from collections.abc import Mapping

from tag2mask.core import Method
from tag2mask.methods.cpal import CPAL
from tag2mask.methods.hsc import HSC
from tag2mask.methods.ppc import PPC
from tag2mask.methods.rca import RCA
from tag2mask.methods.rcm_mam import RCMMAM

METHODS: Mapping[str, type[Method]] = {"cpal": CPAL, "hsc": HSC, "ppc": PPC, "rca": RCA, "rcm_mam": RCMMAM}

__all__ = ["CPAL", "HSC", "METHODS", "PPC", "RCA", "RCMMAM"]
