"""Tags that the classifier does not believe: ranked, as a CSV for whoever checks them, as pictures for the page."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tag2mask.metrics import mean_average_precision
from tag2mask.metrics.suspicion import tag_losses, tag_probabilities
from tag2mask.report.gallery import Thumbnail, thumbnail
from tag2mask.report.summary import SuspectTag, TagCheck
from tag2mask.report.words import percent

STRONG = 0.8  # how sure the classifier must be of the opposite
SHOWN = 12  # images on the page


@dataclass(frozen=True)
class Suspect:
    """An image of the page: its picture, and a line for each tag in doubt."""

    name: str
    picture: Thumbnail
    lines: list[str]


def check_tags(
    names: Sequence[str], classes: Sequence[str], tags: NDArray[np.integer], logits: NDArray[np.floating]
) -> TagCheck:
    """The tags [N K] that logits [N K] contradict, worst first; images whose logits are NaN are left out."""
    known = ~np.isnan(logits).any(axis=1)
    losses, scores = tag_losses(logits, tags), tag_probabilities(logits)
    against = known[:, None] & (losses > np.log(2))
    ranked = sorted(np.argwhere(against).tolist(), key=lambda place: -losses[place[0], place[1]])
    found = [
        SuspectTag(names[i], classes[k], bool(tags[i, k]), float(scores[i, k]), float(losses[i, k])) for i, k in ranked
    ]
    mean = mean_average_precision(logits[known], tags[known])[0] if known.any() else float("nan")
    medians = {
        name: float(np.median(scores[known & (tags[:, k] > 0), k]))
        for k, name in enumerate(classes)
        if (known & (tags[:, k] > 0)).any()
    }
    return TagCheck(images=int(known.sum()), suspects=found, map=None if np.isnan(mean) else mean, medians=medians)


def strong(suspects: Sequence[SuspectTag]) -> list[SuspectTag]:
    """Those where the classifier is sure of the opposite."""
    return [s for s in suspects if (1 - s.score if s.tagged else s.score) >= STRONG]


def write_csv(path: Path, suspects: Sequence[SuspectTag]) -> None:
    """image, class, tagged (0/1), score (0..1), loss; the worst first. The file appears whole or not at all."""
    text = StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "class", "tagged", "score", "loss"])
    rows.writerows([s.image, s.label, int(s.tagged), f"{s.score:.4f}", f"{s.loss:.4f}"] for s in suspects)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text.getvalue(), "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def pictured(check: TagCheck | None) -> list[Suspect]:
    """What the page shows: the images of `check.pictures` with all their tags in strong doubt."""
    if check is None:
        return []
    lines: dict[str, list[str]] = {}
    for s in strong(check.suspects):
        said = f"tagged {s.label}" if s.tagged else f"not tagged {s.label}"
        lines.setdefault(s.image, []).append(f"{said}, score {percent(s.score)} %")
    return [
        Suspect(name, thumbnail(picture, "image", name), lines[name])
        for name, picture in check.pictures.items()
        if name in lines
    ]


def to_picture(suspects: Sequence[SuspectTag]) -> list[str]:
    """The names of the images that the page shows, the worst first."""
    return list(dict.fromkeys(s.image for s in strong(suspects)))[:SHOWN]
