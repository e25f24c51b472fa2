"""What a report is made of: plain values that the caller fills in and `render` lays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Picture: TypeAlias = NDArray[np.uint8]  # [H W 3]
Result: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class StageRow:
    """One finished step of the pipeline. `seconds` of wall-clock, `peak_mb` of device memory (None: not measured)."""

    name: str
    do: str
    folder: str
    seconds: float
    peak_mb: float | None = None
    device: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingCurve:
    """The log of one training: rows with "step", "epoch", "lr", "seconds" and one entry per loss."""

    stage: str
    rows: Sequence[Mapping[str, float | None]]


@dataclass(frozen=True)
class Panel:
    """One picture of a gallery row: a short caption ("image", "CAM", "seed", "mask", "truth") and [H W 3] uint8."""

    caption: str
    image: Picture


@dataclass(frozen=True)
class GalleryItem:
    """One image seen at each step. `score` is its own mean IoU in 0..1, None without a truth mask.

    Items of one `group` ("Pseudo-masks", "Segmenter") stand together and are ranked among themselves.
    """

    name: str
    tags: Sequence[str]
    score: float | None
    panels: Sequence[Panel]
    group: str = ""


@dataclass(frozen=True)
class RunSummary:
    """Everything that one report page shows. Any part may be empty; its section is then left out.

    seconds      wall-clock of the whole run
    created      ISO date and time
    data         a source's summary: "splits" {split: images}, "classes" {class: {split: images}}, "sizes" [[...]],
                 any counts by split, any {"min", "median", "max"}, any single facts; "name" is used in the text
    supervision  all that was learnt from, extra networks' training included: "image tags", "ImageNet weights"
    results      the result.json of each evaluation, in pipeline order: "stage", "kind" ("classifier" | "maps" |
                 "masks"), "of", "split", "images", "seed", "classes" and
                   classifier  "map", "ap" {class: value}
                   maps        "threshold", "threshold_by", "thresholds" {"first", "last", "step"}, "miou", "iou",
                               "precision", "recall" {class: value}, "pixel_accuracy", "coverage",
                               "curve" {"threshold", "miou", "precision", "recall": [...]}
                   masks       as maps, without thresholds and curve
                 Values are in 0..1 or None. Without truth masks: "skipped" (the reason) and, where known, "coverage"
                 and "shares" {class: share of the answered pixels}.
    gallery      images worth a look; those with a score are ranked within their group, best and worst first
    legend       class name ("background" too, if wanted) -> RGB colour in the masks
    """

    title: str
    recipe: str
    created: str
    command: str
    seconds: float
    device: str
    versions: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    supervision: Sequence[str] = ()
    stages: Sequence[StageRow] = ()
    curves: Sequence[TrainingCurve] = ()
    results: Sequence[Result] = ()
    gallery: Sequence[GalleryItem] = ()
    notes: Sequence[str] = ()
    legend: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
