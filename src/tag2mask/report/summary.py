"""What a report is made of: plain values that the caller fills in and `render` lays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tag2mask.metrics.confidence import ClassConfidence

Picture: TypeAlias = NDArray[np.uint8]  # [H W 3]
Result: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class StageRow:
    """One finished step of the pipeline; `inputs` are parameter -> stage.

    `seconds` of wall-clock, `peak_mb` of device memory (None: not measured).
    """

    name: str
    do: str
    folder: str
    seconds: float
    peak_mb: float | None = None
    device: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)


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
class SuspectTag:
    """A tag that the classifier contradicts: what it is (`tagged` or not), its score and its loss -log p(tag)."""

    image: str
    label: str
    tagged: bool
    score: float
    loss: float


@dataclass(frozen=True)
class TagCheck:
    """The classifier's opinion of the tags it learnt from, on `images` images.

    `suspects` worst first; `map` its mean average precision there; `medians` class -> median score of images with the
    tag; `pictures` of the images that the page shows; `file` where all suspects are listed.
    """

    images: int
    suspects: Sequence[SuspectTag]
    map: float | None
    medians: Mapping[str, float]
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    file: str = ""


@dataclass(frozen=True)
class Confidence:
    """How clearly the maps of stage `of` speak: class -> statistics, over `images` images, at a background score.

    `background` is the score in words.
    """

    of: str
    images: int
    background: str
    classes: Mapping[str, ClassConfidence]


@dataclass(frozen=True)
class Compared:
    """A result beside those of other runs: `runs` differ in seeds alone (this one first), `plain` have no methods.

    All are results, with "seed", the seeds of their trainings as text.
    """

    runs: Sequence[Result]
    plain: Sequence[Result] = ()


@dataclass(frozen=True)
class FewMasks:
    """mIoU of the segmenter trained on few true masks, `points` [(masks, mIoU of each run)], beside that of tags."""

    of: str
    split: str
    tags: float
    points: Sequence[tuple[int, Sequence[float]]]


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
                 Values are in 0..1 or None. Masks have "shares" {class: share of the answered pixels} and, with truth,
                 "truth_shares". Without truth masks: "skipped" (the reason) and, where known, "coverage".
    tags         what the classifier thinks of its training tags; None without its scores
    confidence   how clearly the maps speak; None without maps
    compared     results that other runs have, too
    plain        what the run without methods is called ("plain CAM"); empty for a run without methods
    few_masks    what few true masks would buy; None if that was not tried
    commands     command lines that make what is not there: "plain", "seed", "few-masks"
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
    tags: TagCheck | None = None
    confidence: Confidence | None = None
    compared: Sequence[Compared] = ()
    plain: str = ""
    few_masks: FewMasks | None = None
    commands: Mapping[str, str] = field(default_factory=dict)
