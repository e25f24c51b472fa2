"""From image-level tags to segmentation masks, and from masks to a trained segmenter.

The functions below are those of `tag2mask.api`; they are imported when first used, so that this package is light.
"""

from importlib import import_module
from typing import Any

__all__ = [
    "Options", "evaluate", "export_masks", "export_onnx", "few_masks", "folder_recipe", "load", "load_segmenter",
    "predict", "prepare", "run", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("tag2mask.api"), name)
    raise AttributeError(f"module 'tag2mask' has no attribute {name!r}")
