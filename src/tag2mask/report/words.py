"""Numbers and settings as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

DASH = "–"


def percent(value: float | None) -> str:
    """A ratio as a percentage with one decimal: 0.6154 -> "61.5"; None -> a dash."""
    return DASH if value is None else f"{100 * value:.1f}"


def number(value: float) -> str:
    """Three significant digits without needless zeros: 0.01, 1.23, 456, 1.2e-05; whole numbers in full."""
    return count(int(value)) if float(value).is_integer() and abs(value) < 1e9 else f"{value:.3g}"


def count(value: int) -> str:
    """Whole numbers with a thin space every three digits: 10 582."""
    return f"{value:,}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """0.42 s, 8.3 s, 12 min 3 s, 1 h 05 min."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def headline_duration(seconds: float) -> tuple[str, str]:
    """A duration as one short number and its unit: ("13.5", "min")."""
    if seconds < 59.95:
        return f"{seconds:.1f}", "s"
    return (f"{seconds / 60:.1f}", "min") if seconds < 3597 else (f"{seconds / 3600:.1f}", "h")


def memory(megabytes: float | None) -> str:
    """640 MB, 3.2 GB; None -> a dash."""
    if megabytes is None:
        return DASH
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"


def moment(iso: str) -> str:
    """An ISO date and time to the minute: "2026-03-01T14:05:59+00:00" -> "2026-03-01 14:05"."""
    return iso[:16].replace("T", " ")


def how_chosen(threshold_by: str, tried: Mapping[str, float] | None = None) -> str:
    """The sentence that tells an honest threshold from one that saw the truth; `tried` has first, last and step."""
    if threshold_by == "oracle":
        swept = "all thresholds"
        if tried:
            first, last, step = (number(tried[key]) for key in ("first", "last", "step"))
            swept = f"{first} to {last} in steps of {step}"
        return f"best of {swept}, found with the truth masks (oracle)"
    if threshold_by == "recipe":
        return "fixed in the recipe"
    if threshold_by == "no-mask":
        return "chosen without any mask (no-mask)"
    if threshold_by.startswith("val-masks n="):
        return f"chosen on {threshold_by.removeprefix('val-masks n=')} held-out masks (val-masks)"
    return f"chosen by {threshold_by}"


def dotted(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as ("train.lr", "0.01"): the names that overrides on the command line use."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", plain(value)


def plain(value: Any) -> str:
    """A setting's value: true/false for booleans, a list with commas, "none" for None, "{}" for an empty group."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(v) for v in value)
    return str(value)
