"""What is in a table of tags, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tag2mask.data.tags import TagTable

PARTNERS = 5  # of a class, in the table


def tag_stats(table: TagTable) -> dict[str, Any]:
    """JSON-able numbers: images, untagged images, images by number of tags, and by class its images, its share of all,
    how often it is alone, and with which other classes how often (`together`, by name, the most frequent first).
    """
    names = table.classes
    place = {name: k for k, name in enumerate(names)}
    present = np.zeros((len(table.rows), len(names)), dtype=np.int64)
    for i, row in enumerate(table.rows):
        present[i, [place[tag] for tag in row.tags]] = 1
    pairs = present.T @ present  # [K K] images that show both
    sizes = present.sum(axis=1)
    alone = present[sizes == 1].sum(axis=0)
    classes = {}
    for k, name in enumerate(names):
        others = sorted((j for j in range(len(names)) if j != k and pairs[k, j]), key=lambda j, k=k: -pairs[k, j])  # type: ignore[misc]
        classes[name] = {
            "images": int(pairs[k, k]),
            "share": float(pairs[k, k] / max(1, len(table.rows))),
            "alone": int(alone[k]),
            "together": {names[j]: int(pairs[k, j]) for j in others},
        }
    counted = Counter(sizes.tolist())
    return {
        "images": len(table.rows),
        "without_tag": counted.get(0, 0),
        "tags_per_image": {str(size): counted[size] for size in sorted(counted)},
        "mean_tags": float(sizes.mean()) if len(sizes) else 0.0,
        "classes": classes,
        **({"notes": list(table.notes)} if table.notes else {}),
    }


def class_rows(stats: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The classes of `tag_stats` as the rows of a table for people."""
    rows = []
    for name, found in stats["classes"].items():
        together = list(found["together"].items())
        shown = ", ".join(f"{other} {count}" for other, count in together[:PARTNERS])
        more = f", and {len(together) - PARTNERS} more" if len(together) > PARTNERS else ""
        rows.append(
            {
                "class": name,
                "images": found["images"],
                "%": f"{100 * found['share']:.1f}",
                "alone": found["alone"],
                "together with": shown + more or None,
            }
        )
    return rows
