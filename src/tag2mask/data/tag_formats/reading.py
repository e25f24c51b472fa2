"""Finds out which form some tags have, by ending and content, and reads them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tag2mask.data.images import ENDINGS, MASK_ENDINGS
from tag2mask.data.names import read_text, scan
from tag2mask.data.tag_formats import coco, cvat, hugging_face, label_studio, labelme
from tag2mask.data.tag_formats.image_names import have_brackets, name_tags
from tag2mask.data.tag_formats.masks import looks_like_mask, mask_tags
from tag2mask.data.tags import TagTable, read_tags
from tag2mask.errors import UserError


def read_any(path: Path, classes: Sequence[str] | None = None, *, shapes: bool = False) -> TagTable:
    """Tags from a file or a folder in any form that is known.

    .csv, .tsv, .txt   a table (see `read_tags`), or Label Studio's CSV or TSV
    .json              names by image (see `read_tags`), COCO, Label Studio's JSON or JSON-MIN, one file of labelme
    .jsonl             a line per image, as in the metadata of a Hugging Face imagefolder
    .xml               CVAT for images 1.1
    a folder           with metadata.csv or .jsonl: Hugging Face imagefolder; with annotations.xml: CVAT; with JSON
                       files: labelme; of index masks, if `classes` are given; of images whose names have brackets
                       ("x[1 0 0 1].png", needs `classes`), or that lie in one sub-folder per tag

    classes: names in order, for forms that have numbers alone. shapes: labels of shapes (labelme, Label Studio) are
    tags, too. Raises UserError with one line for what has none of these forms.
    """
    if path.is_dir():
        return _folder(path, classes, shapes)
    ending = path.suffix.lower()
    if ending == ".json":
        return _json(path, shapes)
    if ending == ".xml":
        return cvat.read_cvat(path)
    if ending in (".jsonl", ".parquet"):
        return hugging_face.read_metadata(path, classes)
    if ending == ".npy":
        raise UserError(
            f"{path}: a pickle is not read where tags are expected. Convert it once: "
            f"tag2mask tags convert --legacy-npy {path.name} tags.csv --classes ..."
        )
    if ending == ".zip":
        raise UserError(f"{path}: is packed. Unpack it, and give the file or folder with the tags that is in it.")
    if ending in (".csv", ".tsv", ".txt"):
        return _table(path, classes)
    return read_tags(path)


def _json(path: Path, shapes: bool) -> TagTable:
    try:
        content: Any = json.loads(read_text(path))
    except (ValueError, RecursionError):
        return read_tags(path)  # says what is wrong
    if coco.is_coco(content):
        return coco.read_coco(path, content)
    if labelme.is_labelme(content) and (table := labelme.read_labelme(path.parent, [path], shapes)):
        return table
    if label_studio.is_tasks(content):
        return label_studio.read_tasks(path, content, shapes)
    first = content[0] if isinstance(content, list) and content else None
    if isinstance(first, dict) and label_studio.is_minimal(list(first)):
        return label_studio.read_records(path, [r for r in content if isinstance(r, dict)], "record", 1)
    return read_tags(path)


def _table(path: Path, classes: Sequence[str] | None) -> TagTable:
    text = read_text(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = "\t" if first.count("\t") > first.count(",") else ","
    if label_studio.is_minimal(next(csv.reader([first], delimiter=delimiter), [])):
        records = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
        return label_studio.read_records(path, records, "row", 2)
    if path.name.lower() == "metadata.csv":
        return hugging_face.read_metadata(path, classes)
    return read_tags(path)


def _folder(path: Path, classes: Sequence[str] | None, shapes: bool) -> TagTable:
    if (path / "annotations.xml").is_file():
        return cvat.read_cvat(path / "annotations.xml")
    images, others = scan(path, ENDINGS)
    listed = [file for files in others.values() for file in files]
    metadata = sorted(file for file in listed if file.name in hugging_face.METADATA)
    if metadata:
        return hugging_face.read_imagefolder(path, metadata, classes)
    written = sorted(file for file in listed if file.suffix.lower() == ".json")
    if written and (table := labelme.read_labelme(path, written, shapes)):
        return table
    if not images:
        raise UserError(f"{path}: holds no tags: no JSON, no metadata.csv, no annotations.xml, no images.")
    pictures = {name: files[0] for name, files in images.items() if files[0].suffix.lower() in MASK_ENDINGS}
    probe = list(pictures.values())[:: max(1, len(pictures) // 3)][:3]
    if pictures and all(looks_like_mask(file, None if classes is None else len(classes)) for file in probe):
        return mask_tags(pictures, classes, path)
    if not any("/" in name for name in images) and not have_brackets(list(images)):
        raise UserError(f"{path}: is a folder, not a tag file, and neither sub-folders nor names in it are tags.")
    return name_tags(images, classes, str(path))
