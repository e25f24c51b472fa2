"""PASCAL VOC 2012 as it comes (VOCdevkit/VOC2012), with the train_aug list of the weakly supervised field.

Everingham et al., "The PASCAL Visual Object Classes Challenge 2012"; the 9,118 further training images are those of
Hariharan et al., "Semantic Contours from Inverse Detectors" (SBD), ICCV 2011. Only their names are needed here: tags
come from VOC's own annotations, which cover every image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tag2mask import progress
from tag2mask.data.images import ENDINGS
from tag2mask.data.listed import Listed
from tag2mask.data.names import Finder, read_list, scan
from tag2mask.data.source import Split
from tag2mask.errors import UserError

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
HOME = "VOCdevkit/VOC2012"  # where the official archive puts everything
LISTS = "ImageSets/Segmentation"
OFFICIAL = {"train": 1464, "val": 1449, "trainval": 2913, "train_aug": 10582, "test": 1456}  # images on each list
SPELLINGS = {"train_aug": ("train_aug", "trainaug")}  # what the field calls its files
SOURCES = {  # of lists that the first archive lacks
    "train_aug": "get it: `tag2mask data prepare sbd --root {root}`, or put the list there",
    "test": "it comes with the test images: unpack VOC2012test.tar of the evaluation server into {root}",
}


class Voc12(Listed):
    """PASCAL VOC 2012: read where it lies, never written to.

    root       the folder VOC2012, the VOCdevkit around it, or the folder around that
    train      train on these images: the name of a list in ImageSets/Segmentation, or a text file
    score      measure maps and pseudo-masks on these images, which must be on the train list too
    test       measure the segmenter on these images; `test` (no masks are public) predicts for the VOC server
    masks      folder with the masks of `score` and `test`: beside JPEGImages, or a path
    difficult  whether objects that are marked "difficult" count as tags; they do in the labels that all published
               methods use
    saliency   folder of grey maps called like the images; each training image needs one

    Lists hold names with or without folders and ending, one a line; of several columns the first counts.
    `train_aug` (10,582 images) is written by `tag2mask data prepare sbd`.
    An image is tagged with the names of its objects in Annotations; the parts of a person (head, hand, foot) are no
    objects. Images of `test` without masks need no annotation.
    Raises UserError with one line that names what is missing and how to get it.
    """

    def __init__(
        self,
        *,
        root: str,
        train: str = "train_aug",
        score: str = "train",
        test: str = "val",
        masks: str = "SegmentationClass",
        difficult: bool = True,
        saliency: str | None = None,
    ) -> None:
        home = find_home(root)
        remedy = f"unpack the archive again (`tag2mask data prepare voc12 --root {root}`)"
        folder = _beside(home, masks)
        absent = [part for part in ("Annotations", LISTS) if not (home / part).is_dir()]
        absent += [] if folder.is_dir() else [masks]
        if absent:
            raise UserError(f"{home}: {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing; {remedy}")
        found = _names(home / "JPEGImages", (".jpg",))
        self._lists: dict[Split, str] = {"train": train, "score": score, "test": test}
        finder = Finder(found)
        splits = {split: listed(home, written, root, finder) for split, written in self._lists.items()}
        used = dict.fromkeys(name for names in splits.values() for name in names)
        truth = _names(folder, (".png",))
        _all_or_none(splits["score"], truth, folder, remedy, none=False)
        _all_or_none(splits["test"], truth, folder, remedy)
        untagged = set(splits["test"]) - truth.keys() - set(splits["train"])
        super().__init__(
            where=str(home),
            remedy=remedy,
            classes=CLASSES,
            splits=splits,
            tags={name: _tags(home, name, difficult, name in untagged, remedy) for name in used},
            images={name: found[name] for name in used},
            masks={name: truth[name] for name in (*splits["score"], *splits["test"]) if name in truth},
            saliency=saliency_of(saliency, splits["train"]),
        )

    def check(self, cache: Path | None = None, show: bool = True) -> None:
        """As `Listed.check`; says so if a list of the benchmark has another length than it should."""
        super().check(cache, show)
        for split, written in self._lists.items():
            there, wanted = len(self._splits[split]), OFFICIAL.get(written)
            if show and wanted and there != wanted:
                progress.say(f"voc12: {written} lists {there:,} images, the official list {wanted:,}: do not compare")

    def summary(self) -> dict[str, Any]:
        """As `Listed.summary`, with the name of each split's list."""
        return super().summary() | {"list": dict(self._lists)}


def find_home(root: str | Path) -> Path:
    """The folder that holds JPEGImages: `root` or one below it. Raises UserError with one line if there is none."""
    base = Path(root).expanduser()
    for home in (base, base / "VOC2012", base / HOME):
        if (home / "JPEGImages").is_dir():
            return home
    raise UserError(
        f"{root}: no PASCAL VOC 2012 here, {base / HOME}/JPEGImages is missing; point data.root at the folder with "
        f"VOCdevkit, or get it: `tag2mask data prepare voc12 --root {root}`"
    )


def list_file(home: Path, written: str) -> Path | None:
    """The file of a list called by name or by path, None if there is none."""
    names = [home / LISTS / f"{name}.txt" for name in SPELLINGS.get(written, (written,))]
    return next((path for path in (*names, Path(written).expanduser()) if path.is_file()), None)


def saliency_of(folder: str | None, names: Sequence[str]) -> Mapping[str, Path]:
    """name -> the grey map of an image. Raises UserError with one line if one of the names has none."""
    if folder is None:
        return {}
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"{folder}: no such folder; correct data.saliency")
    maps = _names(Path(folder).expanduser(), ENDINGS)
    _all_or_none(names, maps, Path(folder), "add them, or leave data.saliency out", none=False)
    return {name: maps[name] for name in names}


def _names(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    """File name without ending -> file, sub-folders included."""
    return {path.stem: path for paths in scan(folder, endings)[0].values() for path in paths}


def _beside(home: Path, written: str) -> Path:
    return home / written if (home / written).is_dir() else Path(written).expanduser()


def listed(home: Path, written: str, root: str | Path, finder: Finder | None = None) -> tuple[str, ...]:
    """The names on a list, each once. Raises UserError with one line if the list or one of its images is missing."""
    path = list_file(home, written)
    if path is None:
        remedy = SOURCES.get(written, "correct the name, or unpack the archive again").format(root=root)
        raise UserError(f"{home / LISTS / written}.txt: no such list; {remedy}")
    names, lost = read_list(path, finder or Finder(_names(home / "JPEGImages", (".jpg",))))
    if lost:
        raise UserError(
            f"{home}: JPEGImages lacks {len(lost):,} of the {len(names) + len(lost):,} images on a list, the first is "
            f"{lost[0]}; unpack the archive again (`tag2mask data prepare voc12 --root {root}`)"
        )
    return tuple(names)


def _all_or_none(
    names: Sequence[str], files: Mapping[str, Path], folder: Path, remedy: str, *, none: bool = True
) -> None:
    """Raises UserError if some of the names have no file; if none has one, only unless that is fine."""
    missing = [name for name in names if name not in files]
    if missing and not (none and len(missing) == len(names)):
        raise UserError(
            f"{folder}: {len(missing):,} of {len(names):,} files are missing, the first is {missing[0]}; {remedy}"
        )


def _tags(home: Path, name: str, difficult: bool, excused: bool, remedy: str) -> tuple[int, ...]:
    path = home / "Annotations" / f"{name}.xml"
    try:
        tree = ElementTree.fromstring(path.read_bytes())
        return tuple(sorted(set(_objects(tree, difficult))))
    except FileNotFoundError:
        if excused:
            return ()
        raise UserError(f"{path}: no such file, so the image has no tags; {remedy}") from None
    except (OSError, ElementTree.ParseError, ValueError) as reason:
        raise UserError(f"{path}: no annotation of VOC 2012 ({reason}); {remedy}") from None


def _objects(tree: ElementTree.Element, difficult: bool) -> Iterable[int]:
    """The classes of the objects, counted from 0."""
    for thing in tree.iter("object"):
        label = thing.findtext("name", "").strip()
        if label not in CLASSES:
            raise ValueError(f"{label!r} is no class")
        if difficult or thing.findtext("difficult", "0").strip() != "1":
            yield CLASSES.index(label)
