"""Tags from "CVAT for images 1.1": the XML of an export."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path
from xml.parsers import expat

from tag2mask.data.tags import Row, TagTable
from tag2mask.errors import UserError

SHAPES = ("box", "polygon", "polyline", "points", "ellipse", "cuboid", "skeleton", "mask")


def read_cvat(path: Path) -> TagTable:
    """One row for each <image>: the labels of its <tag>s and of its shapes; a note counts the shapes.

    The file is streamed. Classes are in the order of CVAT's list of labels, those that no image has left out.
    Raises UserError for XML that is broken or has a document type (entities are never read), and for other XML.
    """
    found = _Export(path)
    parser = expat.ParserCreate()
    found.parser = parser
    parser.StartElementHandler = found.start
    parser.EndElementHandler = found.end
    parser.CharacterDataHandler = found.text
    parser.StartDoctypeDeclHandler = found.doctype
    try:
        with path.open("rb") as file:
            parser.ParseFile(file)
    except OSError as reason:
        raise UserError(f"{path}: cannot be opened ({reason.strerror or reason}).") from None
    except expat.ExpatError as reason:
        raise UserError(f"{path}: is not valid XML ({reason}). Export it from CVAT again.") from None
    return found.table()


class _Export:
    """What was seen of the file so far."""

    def __init__(self, path: Path) -> None:
        self.parser: expat.XMLParserType | None = None
        self._path = path
        self._open: list[str] = []
        self._labels: dict[str, None] = {}
        self._label = ""
        self._rows: list[Row] = []
        self._tags: dict[str, None] = {}
        self._wrong: list[tuple[str, str]] = []
        self._image = ("", "")
        self._drawn: Counter[str] = Counter()

    def doctype(self, name: str, system: str | None, public: str | None, internal: bool) -> None:
        raise UserError(f"{self._path}: has a document type (<!DOCTYPE>), which CVAT never writes; it is not read.")

    def start(self, name: str, attributes: dict[str, str]) -> None:
        assert self.parser is not None
        self._open.append(name)
        line = f"line {self.parser.CurrentLineNumber}"
        if len(self._open) == 1 and name != "annotations":
            raise UserError(f"{self._path}: is no XML from CVAT, its first element is <{name}> and not <annotations>.")
        if self._open == ["annotations", "track"]:
            raise UserError(f"{self._path}: is 'CVAT for video'. Export it as 'CVAT for images 1.1'.")
        if self._open == ["annotations", "image"]:
            self._image, self._tags, self._wrong = (attributes.get("name", ""), line), {}, []
        elif self._open[:-1] == ["annotations", "image"] and (name == "tag" or name in SHAPES):
            label = _name(attributes.get("label", ""))
            if label:
                self._tags[label] = None
            else:
                self._wrong.append(("label", f"<{name}> in {line} has no label"))
            self._drawn[name] += name != "tag"
        elif self._open[-3:] == ["labels", "label", "name"]:
            self._label = ""

    def text(self, data: str) -> None:
        if self._open[-3:] == ["labels", "label", "name"]:
            self._label += data

    def end(self, name: str) -> None:
        if self._open[-3:] == ["labels", "label", "name"]:
            self._labels[_name(self._label)] = None
        elif self._open == ["annotations", "image"]:
            self._rows.append(Row(self._image[0], tuple(self._tags), self._image[1], tuple(self._wrong)))
        self._open.pop()

    def table(self) -> TagTable:
        if not self._rows:
            raise UserError(f"{self._path}: holds no <image>. Export it as 'CVAT for images 1.1'.")
        used = {tag for row in self._rows for tag in row.tags}
        order = (*(name for name in self._labels if name in used), *sorted(used - set(self._labels)))
        drawn = ", ".join(f"{count} {name}" for name, count in self._drawn.items() if count)
        notes = (f"labels of shapes count as tags ({drawn})",) if drawn else ()
        return TagTable((), tuple(self._rows), order, "CVAT", notes)


def _name(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())
