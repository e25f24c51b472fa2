"""Tags from labelme: the image-level `flags` of the JSON files that it writes beside the images."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

from tag2mask import progress
from tag2mask.data.names import read_text
from tag2mask.data.tag_formats.spelling import beside
from tag2mask.data.tags import Row, TagTable
from tag2mask.errors import UserError


def is_labelme(content: Any) -> bool:
    """Whether parsed JSON is one file of labelme."""
    return isinstance(content, dict) and "imagePath" in content and "shapes" in content


def read_labelme(root: Path, files: list[Path], shapes: bool) -> TagTable | None:
    """One row for each labelme file below `root`: the flags that are true. `shapes`: labels of its shapes, too.

    A flag that is never true is no class. Classes are in the order in which the files have them. JSON files of other
    tools are passed over; None if there is no other. Raises UserError for broken JSON, and where no flag is set.
    """
    rows: list[Row] = []
    order: dict[str, None] = {}
    drawn = False
    for path in progress.track(files, "reading labelme", len(files), show=len(files) > 1000):
        try:
            content = json.loads(read_text(path))
        except (ValueError, RecursionError) as reason:
            raise UserError(f"{path}: is not valid JSON: {reason}.") from None
        if not is_labelme(content):
            continue
        flags, labels = _flags(content), _labels(content)
        drawn = drawn or bool(labels)
        wrong = tuple(("flags", f"'{name}' is {value!r}") for name, value in flags.items() if type(value) is not bool)
        if not flags and not shapes:
            wrong += (("flags", "has none"),)
        tags = [name for name, value in flags.items() if value is True] + (labels if shapes else [])
        place = path.relative_to(root).as_posix()
        order |= dict.fromkeys([*flags, *tags])
        rows.append(Row(_image(place, content["imagePath"]), tuple(dict.fromkeys(tags)), place, wrong))
    if not rows:
        return None
    used = {tag for row in rows for tag in row.tags}
    if not used and not shapes:
        remedy = "`tag2mask tags convert --shapes` takes the labels of its shapes" if drawn else "Set some and save"
        raise UserError(f"{root}: no image has a labelme flag that is true. {remedy}.")
    return TagTable((), tuple(rows), tuple(name for name in order if name in used), "labelme")


def _flags(content: dict[str, Any]) -> dict[str, Any]:
    flags = content.get("flags")
    return {_name(name): value for name, value in flags.items()} if isinstance(flags, dict) else {}


def _labels(content: dict[str, Any]) -> list[str]:
    shapes = content["shapes"] if isinstance(content["shapes"], list) else []
    return [_name(s["label"]) for s in shapes if isinstance(s, dict) and isinstance(s.get("label"), str)]


def _image(place: str, written: Any) -> str:
    """labelme writes the path from the JSON file to the image."""
    return beside(place, written) if isinstance(written, str) and written.strip() else place.removesuffix(".json")


def _name(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())
