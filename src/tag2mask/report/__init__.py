"""One self-contained HTML page per run."""

from tag2mask.report.page import render
from tag2mask.report.summary import (
    Compared,
    Confidence,
    FewMasks,
    GalleryItem,
    Panel,
    RunSummary,
    StageRow,
    SuspectTag,
    TagCheck,
    TrainingCurve,
)
from tag2mask.report.suspicions import check_tags, write_csv
from tag2mask.report.suspicions import to_picture as suspects_to_picture

__all__ = [
    "Compared",
    "Confidence",
    "FewMasks",
    "GalleryItem",
    "Panel",
    "RunSummary",
    "StageRow",
    "SuspectTag",
    "TagCheck",
    "TrainingCurve",
    "check_tags",
    "render",
    "suspects_to_picture",
    "write_csv",
]
