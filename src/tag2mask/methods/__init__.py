"""What a paper adds to a baseline, one file each."""

from collections.abc import Mapping

from tag2mask.core import Method
from tag2mask.methods.hsc import HSC
from tag2mask.methods.ppc import PPC

METHODS: Mapping[str, type[Method]] = {"hsc": HSC, "ppc": PPC}

__all__ = ["HSC", "METHODS", "PPC"]
