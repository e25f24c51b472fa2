"""The gallery: images sorted into best and worst, and their pictures as small data: URIs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from tag2mask.report.summary import GalleryItem, Picture

THUMBNAIL = 400  # longest side in pixels: twice what a column shows, for sharp screens
EACH_END = 4  # how many of the best and of the worst
UNFOLDED = 2 * EACH_END  # how many examples show at once where there are no scores to sort by


@dataclass(frozen=True)
class Thumbnail:
    """A picture in the page; `flat` for pictures of few colours, which are enlarged without smoothing."""

    caption: str
    alt: str
    source: str
    width: int
    height: int
    flat: bool


@dataclass(frozen=True)
class Row:
    """One image of the gallery."""

    name: str
    tags: list[str]
    score: float | None
    thumbnails: list[Thumbnail]


@dataclass(frozen=True)
class Part:
    """Rows under one heading; `folded` parts open on demand."""

    title: str
    rows: list[Row]
    folded: bool = False


def gallery(items: Sequence[GalleryItem]) -> list[tuple[str, list[Part]]]:
    """The parts of each group, groups in order of appearance."""
    groups: dict[str, list[GalleryItem]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    return [(name, _parts(members)) for name, members in groups.items()]


def _parts(items: Sequence[GalleryItem]) -> list[Part]:
    """Best, worst (worst first), what lies between (folded), then the images without a score, in their order.

    Fewer than four scored images are not called best or worst: everything is an example.
    """
    scored = sorted((i for i in items if i.score is not None), key=lambda i: -(i.score or 0.0))
    unscored = [i for i in items if i.score is None]
    if len(scored) < 4:
        examples = [*scored, *unscored]
        named = [("Examples", examples[:UNFOLDED], False), ("More examples", examples[UNFOLDED:], True)]
    else:
        ends = min(EACH_END, len(scored) // 2)
        named = [
            ("Best of those shown", scored[:ends], False),
            ("Worst of those shown", scored[-ends:][::-1], False),
            ("In between", scored[ends:-ends], True),
            ("Without a score", unscored, True),
        ]
    return [Part(title, [_row(item) for item in members], folded) for title, members, folded in named if members]


def thumbnail(picture: Picture, caption: str, name: str) -> Thumbnail:
    """Shrinks a [H W 3] picture to the size of the page: PNG for flat colours (masks), JPEG for photographs."""
    image = Image.fromarray(picture)
    flat = image.getcolors(maxcolors=64) is not None
    if max(image.size) > THUMBNAIL:
        # Averaging would invent colours between two classes.
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS)
    encoded = BytesIO()
    if flat:
        image.quantize(64, dither=Image.Dither.NONE).save(encoded, format="PNG", optimize=True)
    else:
        image.save(encoded, format="JPEG", quality=85, optimize=True)
    kind = "png" if flat else "jpeg"
    return Thumbnail(
        caption=caption,
        alt=f"{caption} of {name}",
        source=f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}",
        width=image.width,
        height=image.height,
        flat=flat,
    )


def _row(item: GalleryItem) -> Row:
    for panel in item.panels:
        if panel.image.dtype != np.uint8 or panel.image.ndim != 3 or panel.image.shape[2] != 3:
            raise ValueError(f"{item.name}, {panel.caption}: expected [H W 3] uint8, got {panel.image.shape}")
    pictures = [thumbnail(panel.image, panel.caption, item.name) for panel in item.panels]
    return Row(item.name, list(item.tags), item.score, pictures)
