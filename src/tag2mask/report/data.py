"""Data statistics as tables: what a source's summary holds, laid out by split and by class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tag2mask.report.words import DASH, count, dotted, plain

SHOWN_SIZES = 3


@dataclass(frozen=True)
class DataView:
    """Single facts, a table of counts per split, and the images per class and split as (count, share in percent)."""

    facts: list[tuple[str, str]]
    columns: list[str]
    splits: list[tuple[str, list[str]]]
    positives_in: list[str]
    positives: list[tuple[str, list[tuple[str, float]]]]


def data_view(data: Mapping[str, Any]) -> DataView:
    """Lays out `RunSummary.data`. Counts by split become columns; what is not known by name is shown as a fact."""
    splits: Mapping[str, int] = data.get("splits") or {}
    classes: Mapping[str, Mapping[str, int]] = data.get("classes") or {}
    rest = {key: value for key, value in data.items() if key not in ("name", "splits", "classes")}
    by_split = {key: v for key, v in rest.items() if isinstance(v, Mapping) and v.keys() <= splits.keys()}
    facts = {key: _spread(key, value) for key, value in rest.items() if key not in by_split}
    positives_in = list(dict.fromkeys(split for counts in classes.values() for split in counts))
    return DataView(
        facts=[(key, count(int(text)) if text.isdecimal() else text) for key, text in dotted(facts)],
        columns=["images", *by_split],
        splits=[
            (split, [count(images), *(_fact(values.get(split)) for values in by_split.values())])
            for split, images in splits.items()
        ],
        positives_in=positives_in,
        positives=[
            (name, [_positives(counts.get(split, 0), splits.get(split)) for split in positives_in])
            for name, counts in classes.items()
        ],
    )


def _spread(key: str, value: Any) -> Any:
    """Image sizes in few words: "500 × 375, 333 × 500 and 12 more", "120 to 640, median 500"; the rest unchanged."""
    if key == "sizes":
        shown = ", ".join(" × ".join(str(side) for side in size) for size in value[:SHOWN_SIZES])
        return shown + (f" and {len(value) - SHOWN_SIZES} more" if len(value) > SHOWN_SIZES else "")
    if isinstance(value, Mapping) and value.keys() == {"min", "median", "max"}:
        low, middle, high = (plain(value[name]) for name in ("min", "median", "max"))
        return low if low == high else f"{low} to {high}, median {middle}"
    return value


def _fact(value: Any) -> str:
    return DASH if value is None else count(value) if isinstance(value, int) else plain(value)


def _positives(positives: int, images: int | None) -> tuple[str, float]:
    """The number of images with a class, and their share in percent (0 where the total is unknown)."""
    return count(positives), round(100 * positives / images, 1) if images else 0.0
