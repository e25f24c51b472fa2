"""Tags from COCO JSON: an image has the classes of its annotations."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tag2mask.data.tags import Row, TagTable
from tag2mask.errors import UserError


def is_coco(content: Any) -> bool:
    """Whether parsed JSON has the lists of COCO's instances."""
    return isinstance(content, dict) and all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    )


def read_coco(path: Path, content: dict[str, Any]) -> TagTable:
    """One row for each of `images`: the names of the categories of its annotations, crowds included.

    Ids may have gaps. Classes are in the order of their ids, those that no image has left out. An annotation of no
    image, or of no category, becomes a problem. Raises UserError for entries without id or name.
    """
    try:
        categories = sorted((entry["id"], _name(entry["name"])) for entry in content["categories"])
        images = [(entry["id"], entry["file_name"].strip()) for entry in content["images"]]
        things = [(entry["image_id"], entry["category_id"]) for entry in content["annotations"]]
        names = dict(categories)
        known = {identity for identity, _ in images}
        hash(tuple(things))  # a list or an object is no id
        twice = [identity for identity, count in Counter(identity for identity, _ in images).items() if count > 1]
    except (KeyError, TypeError, AttributeError) as reason:
        raise UserError(
            f"{path}: is no COCO file of objects ({reason!r}): images need id and file_name, categories id and name, "
            "annotations image_id and category_id."
        ) from None
    if twice:
        raise UserError(f"{path}: two images have the id {twice[0]!r}, so nobody knows whose the annotations are.")
    tags: dict[Any, dict[str, None]] = defaultdict(dict)
    wrong: dict[Any, list[tuple[str, str]]] = defaultdict(list)
    lost = []
    for number, (image, category) in enumerate(things, start=1):
        if image not in known:
            missing = ("image_id", f"{image!r} is no image")
            lost.append(Row(f"image_id {image!r}", (), f"annotation {number}", (missing,)))
        elif category not in names:
            wrong[image].append(
                ("category_id", f"annotation {number} has category_id {category!r}, which is no category")
            )
        else:
            tags[image][names[category]] = None
    rows = [
        Row(name, tuple(tags[identity]), f"image {number}", tuple(wrong[identity]))
        for number, (identity, name) in enumerate(images, start=1)
    ]
    used = {name for row in rows for name in row.tags}
    order = tuple(dict.fromkeys(name for _, name in categories if name in used))
    return TagTable((), (*rows, *lost), order, "COCO JSON", (f"tags are the classes of {len(things)} annotations",))


def _name(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())
