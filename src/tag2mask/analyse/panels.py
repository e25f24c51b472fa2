"""Pictures with captions in rows, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import PIL.Image
from PIL import ImageDraw, ImageFont

from tag2mask.report import Panel

SIDE, GAP, LETTERS = 200, 8, 12  # the longer side of a picture, the space between two, the size of letters; in pixels
LINES = 2  # of a caption
INK, PAPER = (29, 33, 39), (255, 255, 255)


def write_grid(path: Path, rows: Sequence[Sequence[Panel]]) -> None:
    """Write rows of panels; every picture [H W 3] is brought to a longer side of 200 pixels, its caption below.

    A caption is cut to two lines, broken at its line break.
    """
    scaled = [[_scaled(panel) for panel in row] for row in rows]
    below = LINES * (LETTERS + 4) + GAP
    heights = [max(picture.height for picture in row) + below for row in scaled]
    columns = max(len(row) for row in rows)
    sheet = PIL.Image.new("RGB", (GAP + columns * (SIDE + GAP), GAP + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for row, pictures, height in zip(rows, scaled, heights, strict=True):
        for column, (panel, picture) in enumerate(zip(row, pictures, strict=True)):
            left = GAP + column * (SIDE + GAP)
            sheet.paste(picture, (left, top))
            for line, text in enumerate(panel.caption.split("\n")[:LINES]):
                at = (left, top + picture.height + 2 + line * (LETTERS + 4))
                draw.text(at, _fitted(text), fill=INK, font=ImageFont.load_default(size=LETTERS))
        top += height
    sheet.save(path)


def _scaled(panel: Panel) -> PIL.Image.Image:
    picture = PIL.Image.fromarray(panel.image)
    factor = SIDE / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture.resize(size, PIL.Image.Resampling.LANCZOS)


def _fitted(text: str) -> str:
    """The text, cut where it would run into the next picture."""
    font = ImageFont.load_default(size=LETTERS)
    if font.getlength(text) <= SIDE:
        return text
    while text and font.getlength(text + "…") > SIDE:
        text = text[:-1]
    return text + "…"
