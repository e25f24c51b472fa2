"""What a paper adds to a baseline, one file each."""

from collections.abc import Mapping

from tag2mask.core import Method

METHODS: Mapping[str, type[Method]] = {}

__all__ = ["METHODS"]
