"""Masks out: palette PNG, pictures of masks and soft maps; each form of another tool is a module of its own."""

from tag2mask.data.index_png import voc_palette, write_mask
from tag2mask.export.palette import colourise, heatmap, overlay

__all__ = ["colourise", "heatmap", "overlay", "voc_palette", "write_mask"]
