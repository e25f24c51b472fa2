"""COCO 2014 as it comes: train2014, val2014 and annotations/instances_*.json, or sorted like a VOC folder.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014. Masks are drawn from the objects' outlines, once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tag2mask.data.coco_annotations import Annotations, read_annotations, render_masks
from tag2mask.data.listed import Listed
from tag2mask.data.names import read_text
from tag2mask.data.source import Split
from tag2mask.data.voc12 import saliency_of
from tag2mask.errors import UserError

HALVES = ("train2014", "val2014")
INSTANCES = "annotations/instances_{}.json"


class Coco14(Listed):
    """COCO 2014: read where it lies; an index and the masks are kept in a folder of their own.

    root      the folder with train2014, val2014 and annotations; the images may be in images/ or JPEGImages/ too
    train     text file: train on these images. None: all of train2014 with an object (82,081)
    score     text file: measure maps and pseudo-masks on these, which must be on the train list. None: all of them
    test      text file: measure the segmenter on these. None: all of val2014 with an object (40,137)
    masks     folder with index masks (0 background, 1..80, 255 ignore) called like the images, in train2014 and
              val2014 (or train and val). None: drawn from the annotations into `cache`, smaller objects on top
    cache     folder for the index of the annotations and the masks. None: `tag2mask` inside root
    saliency  folder of grey maps called like the images; each training image needs one

    The classes are COCO's categories in the order of their ids, without the gaps: 1 person ... 80 toothbrush.
    An image is tagged with every class of which it has an object, a crowd included.
    Lists name an image as COCO_train2014_000000000009, with or without folders and ending, or by its number (with
    zeros in front or without), one a line; of several columns the first counts.
    Raises UserError with one line that names what is missing and how to get it.
    """

    def __init__(
        self,
        *,
        root: str,
        train: str | None = None,
        score: str | None = None,
        test: str | None = None,
        masks: str | None = None,
        cache: str | None = None,
        saliency: str | None = None,
    ) -> None:
        home = Path(root).expanduser()
        get = f"get it: `tag2mask data prepare coco14 --root {root}`"
        images = {name: path for half in HALVES for name, path in _images(home, half, get).items()}
        kept = Path(cache).expanduser() if cache else home / "tag2mask"
        self._halves = [_annotations(home, half, kept, get) for half in HALVES]
        if self._halves[0].classes != self._halves[1].classes:
            raise UserError(f"{home}/annotations: the two instances files list other categories; {get}")
        pictures = {name: picture for half in self._halves for name, picture in half.pictures.items()}
        named = {picture.id: name for name, picture in pictures.items()}
        trained, tested = (
            _listed(written, named)
            if written
            else tuple(name for name, picture in half.pictures.items() if picture.tags)
            for written, half in zip((train, test), self._halves, strict=True)
        )
        splits: dict[Split, tuple[str, ...]] = {
            "train": trained,
            "score": _listed(score, named) if score else trained,
            "test": tested,
        }
        used = dict.fromkeys((*trained, *splits["score"], *tested))
        missing = [name for name in used if name not in images]
        if missing:
            raise UserError(
                f"{home}: {len(missing):,} of {len(used):,} images are missing, the first is {missing[0]}.jpg; unpack "
                f"the archives again, or {get}"
            )
        self._drawn = masks is None
        measured = dict.fromkeys((*splits["score"], *tested))
        super().__init__(
            where=str(home),
            remedy=f"replace these files, or {get}",
            classes=self._halves[0].classes,
            splits=splits,
            tags={name: pictures[name].tags for name in used},
            images={name: images[name] for name in used},
            masks=_masks(masks, list(measured)) if masks else self._places(measured),
            saliency=saliency_of(saliency, trained),
        )

    def check(self, cache: Path | None = None, show: bool = True) -> None:
        """Draw the masks that are not there yet, then as `Listed.check`."""
        self.draw(show=show)
        super().check(cache, show)

    def draw(self, show: bool = True) -> None:
        """Draw the masks that are not there yet, unless somebody else's are used."""
        for half in self._halves if self._drawn else ():
            names = [name for name in self._masks if name in half.pictures]
            render_masks(half, names, self._remedy, show=show)

    def _places(self, names: Mapping[str, None]) -> dict[str, Path]:
        return {name: half.mask_path(name) for half in self._halves for name in half.pictures if name in names}


def _images(home: Path, half: str, remedy: str) -> dict[str, Path]:
    """Name -> file of one half: in the folder itself, in images/ or in JPEGImages/."""
    short = half.removesuffix("2014")
    places = [home / half, home / "images" / half, home / "JPEGImages" / half, home / "JPEGImages" / short]
    folder = next((path for path in places if path.is_dir()), None)
    if folder is None:
        raise UserError(f"{home}: no COCO 2014 here, the folder {half} is missing; {remedy}")
    return {path.stem: path for path in folder.iterdir() if path.suffix == ".jpg"}


def _annotations(home: Path, half: str, cache: Path, remedy: str) -> Annotations:
    file = home / INSTANCES.format(half)
    if not file.is_file():
        raise UserError(f"{file}: no such file, so there are no tags; {remedy}")
    return read_annotations(file, cache, remedy)


def _masks(folder: str, names: list[str]) -> dict[str, Path]:
    """Name -> index mask in a folder that somebody else made."""
    root = Path(folder).expanduser()
    found: dict[str, Path] = {}
    for half in HALVES:
        for place in (root, root / half.removesuffix("2014"), root / half):
            found |= {path.stem: path for path in place.glob("*.png")}
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{folder}: {len(missing):,} of {len(names):,} masks are missing, the first is {missing[0]}.png; "
            f"add them, or leave data.masks out to have them drawn"
        )
    return {name: found[name] for name in names}


def _listed(file: str, named: Mapping[int, str]) -> tuple[str, ...]:
    """The images of a list, each once. The number at the end of what is written is COCO's id of the image."""
    path, found = Path(file).expanduser(), dict[str, None]()
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        digits = re.search(r"(\d+)(?:\.\w+)?$", line.split()[0])
        name = named.get(int(digits[1])) if digits else None
        if name is None:
            raise UserError(f"{path}: line {number}: {line.strip()[:60]} is no image of COCO 2014; correct the list")
        found[name] = None
    return tuple(found)
