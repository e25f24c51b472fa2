"""One self-contained HTML page per run."""

from tag2mask.report.page import render
from tag2mask.report.summary import GalleryItem, Panel, RunSummary, StageRow, TrainingCurve

__all__ = ["GalleryItem", "Panel", "RunSummary", "StageRow", "TrainingCurve", "render"]
