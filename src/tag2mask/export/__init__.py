"""Masks out: palette PNG and pictures of masks and soft maps."""

from tag2mask.export.palette import colourise, heatmap, overlay, voc_palette, write_mask

__all__ = ["colourise", "heatmap", "overlay", "voc_palette", "write_mask"]
