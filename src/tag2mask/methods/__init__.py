"""What a paper adds to a baseline, one file each."""

from collections.abc import Mapping

from tag2mask.core import Method
from tag2mask.methods.ppc import PPC

METHODS: Mapping[str, type[Method]] = {"ppc": PPC}

__all__ = ["METHODS", "PPC"]
