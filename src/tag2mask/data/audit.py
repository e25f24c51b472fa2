"""Finds what is wrong with tags before anything is trained on them; every finding goes into a `Faults` report."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from tag2mask.data.faults import Faults, Kind
from tag2mask.data.images import mask_remedy, wrong_values
from tag2mask.data.layout import Layout
from tag2mask.data.names import Finder
from tag2mask.data.source import IGNORE
from tag2mask.data.tags import BACKGROUND, Row, TagTable, did_you_mean, misspelt
from tag2mask.data.verify import Facts, File


def rows_of_images(
    table: TagTable, finder: Finder, used: Collection[str], strict: bool, faults: Faults
) -> dict[str, Row]:
    """The row of each used image. `strict`: a row that means no image is a fault; else it is passed over."""
    rows: dict[str, Row] = {}
    for row in table.rows:
        name = image_of(row, finder)
        if name is None and strict:
            faults.add(Kind.NO_IMAGE, f"{row.place}: {finder.hint(row.image) or '(empty)'}")
        elif name in rows:
            faults.add(Kind.REPEATED, f"{name}: {rows[name].place} and {row.place}")
        elif name is not None and name in used:
            rows[name] = row
    return rows


def image_of(row: Row, finder: Finder) -> str | None:
    """The image that a row means, None if none or several fit."""
    for written in row.spellings or (row.image,):
        if name := finder.find(written):
            return name
    uploaded = row.spellings and "/" not in row.image
    return finder.find_upload(row.image) if uploaded else None


def audit_cells(table: TagTable, faults: Faults) -> set[str]:
    """Reports cells that could not be read, column by column. Returns the columns concerned."""
    columns: dict[str, list[str]] = defaultdict(list)
    for row in table.rows:
        for column, cell in row.problems:
            where = f", column {column}" if table.columns else ""
            columns[column].append(f"{row.place} ({row.image}){where}: {cell}")
    for cells in columns.values():
        shorten = len(cells) > 3 and len(columns) > 1  # so that one bad column does not hide another
        shown = [f"{cells[0]} (and {len(cells) - 1} more cells of this column)"] if shorten else cells
        kind = Kind.BAD_CELL if table.columns else Kind.BAD_TAGS
        remedy = f"correct them where they were made ({table.form})" if table.form else ""
        faults.add(kind, shown, count=len(cells), remedy=remedy)
    return set(columns)


def audit_names(table: TagTable, classes: Sequence[str] | None, faults: Faults) -> set[str]:
    """Reports class names that are unknown, misspelt or "background"; `classes` is the user's list, if there is one.

    Returns the names that were reported.
    """
    counts = Counter(dict.fromkeys(table.columns, 0))
    first: dict[str, str] = {}
    for row in table.rows:
        for tag in row.tags:
            counts[tag] += 1
            first.setdefault(tag, row.place)

    def described(name: str) -> str:
        times = f"{counts[name]} image{'s' * (counts[name] != 1)}"
        return f"'{name}' ({times}, first in {first[name]})" if name in first else f"'{name}' ({times})"

    background = {name for name in (*counts, *(classes or ())) if name.strip("_ ").casefold() == BACKGROUND}
    for name in sorted(background):
        faults.add(Kind.BACKGROUND, described(name))
    if classes is not None:
        wrong = {name: did_you_mean(name, classes) for name in sorted(counts) if name not in classes}
        kind = Kind.UNKNOWN_CLASS
    else:
        wrong = {name: f" looks like {described(other)}" for name, other in misspelt(counts).items()}
        kind = Kind.MISSPELT
    for name, remark in wrong.items():
        if name not in background:
            faults.add(kind, described(name) + remark)
    return background | set(wrong)


def audit_counts(train: Collection[Row], classes: Sequence[str], reported: Collection[str], faults: Faults) -> None:
    """Reports classes that the training images cannot teach, hardly ever or always present; not the `reported`."""
    counts = Counter(tag for row in train for tag in row.tags)
    if not classes:
        faults.add(Kind.RARE, "no class at all: no image has a tag")
    for name in (other for other in classes if other not in reported):
        if counts[name] < 2:
            faults.add(Kind.RARE, f"'{name}': {counts[name] or 'no'} image{'s' * (counts[name] == 0)}")
        elif counts[name] == len(train):
            faults.add(Kind.EVERYWHERE, f"'{name}': all {len(train)} images")


def audit_images(layout: Layout, facts: Mapping[File, Facts], broken: Mapping[File, str], faults: Faults) -> None:
    """Reports images and saliency maps that do not decode, and 16-bit images that would come out black."""
    for (role, path), reason in broken.items():
        if role != "mask":
            faults.add(Kind.UNREADABLE if role == "image" else Kind.BAD_MAP, f"{path}: {reason}")
    peaks = {path: facts[("image", path)].peak for path in layout.images.values() if ("image", path) in facts}
    deep = {path: peak for path, peak in peaks.items() if peak}
    if deep and max(deep.values()) < 4096:
        faults.add(Kind.DARK, [f"{path}: largest value {peak}" for path, peak in deep.items()])


def audit_masks(
    layout: Layout, classes: int, facts: Mapping[File, Facts], broken: Mapping[File, str], faults: Faults
) -> None:
    """Reports masks that do not decode, hold other numbers than 0..classes and 255, or have not their image's size."""
    seen: set[int] = set()
    for name, path in layout.masks.items():
        mask, image = facts.get(("mask", path)), facts.get(("image", layout.images[name]))
        wrong = broken[("mask", path)] if mask is None else wrong_values(mask.values, classes)
        if wrong:
            faults.add(Kind.BAD_MASK, f"{path}: {wrong}", remedy=mask_remedy(classes))
        if mask and image and (mask.height, mask.width) != (image.height, image.width):
            turned = " (it lies on its side)" if (mask.width, mask.height) == (image.height, image.width) else ""
            sizes = f"{mask.width} x {mask.height}, but its image {image.width} x {image.height}"
            faults.add(Kind.MASK_SIZE, f"{path}: {sizes}{turned}")
        seen |= set(mask.values) if mask else set()
    if IGNORE in seen and seen <= {0, IGNORE}:
        faults.add(Kind.NO_CLASS_IN_MASKS, [str(path) for path in layout.masks.values()])


def audit_agreement(
    layout: Layout, classes: Sequence[str], rows: Mapping[str, Row], facts: Mapping[File, Facts], faults: Faults
) -> None:
    """Reports masks that show classes, but none of those that their image is tagged with, if over a quarter are so.

    Fewer are slips in tags or masks. Many mean that the masks count the classes in another order than we do.
    """
    found = []
    for name, path in layout.masks.items():
        mask = facts.get(("mask", path))
        shown = [classes[k - 1] for k in mask.values if 0 < k <= len(classes)] if mask else []
        if shown and name in rows and not set(shown) & set(rows[name].tags):
            tagged = ", ".join(rows[name].tags) or "nothing"
            found.append(f"{path}: shows {', '.join(shown)}, but the image is tagged {tagged}")
    if 4 * len(found) > len(layout.masks):
        order = ", ".join(f"{k} {name}" for k, name in enumerate(classes, start=1))
        remedy = f"mask values are read as {order}: list `classes` in the order of your masks, or correct masks or tags"
        faults.add(Kind.CONTRADICTION, found, remedy=remedy)
