"""Which file is what: the images of a folder, their masks and saliency maps, and the splits they fall into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tag2mask.data.faults import Faults, Kind
from tag2mask.data.images import ENDINGS, MASK_ENDINGS
from tag2mask.data.names import Files, Finder, read_list, scan
from tag2mask.data.source import Split
from tag2mask.data.verify import File
from tag2mask.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Files by image name, and image names by split. `finder` knows all images, the others only those in use.

    `unread` counts the files of the image folder that were passed over, by ending.
    """

    finder: Finder
    images: Mapping[str, Path]
    masks: Mapping[str, Path]
    maps: Mapping[str, Path]
    splits: Mapping[Split, tuple[str, ...]]
    unread: Counter[str]

    @property
    def used(self) -> dict[str, None]:
        """The names of all splits, each once, in order; a dict for its fast `in`."""
        return dict.fromkeys(name for names in self.splits.values() for name in names)

    def all_in(self, split: Split, files: Mapping[str, Path]) -> bool:
        """Whether every image of a split has one of these files. Not so for an empty split."""
        names = self.splits[split]
        return bool(names) and all(name in files for name in names)

    @property
    def files(self) -> list[File]:
        """All files of all images in use, each with the role it plays."""
        return (
            [("image", path) for path in self.images.values()]
            + [("mask", path) for path in self.masks.values()]
            + [("map", path) for path in self.maps.values()]
        )


def lay_out(
    images: str,
    masks: str | None,
    saliency: str | None,
    train: str | None,
    score: str | None,
    test: str | None,
    faults: Faults,
) -> Layout:
    """Finds all files; see `Folder` for what the arguments mean. No image, no folder, no list: UserError at once."""
    root = _folder("images", images)
    mask_root = _folder("masks", masks) if masks else None
    map_root = _folder("saliency", saliency) if saliency else None
    if root.resolve() in [other.resolve() for other in (mask_root, map_root) if other]:
        raise UserError(f"{images}: holds images and masks or maps together. Give each kind a folder of its own.")
    found, others = scan(root, ENDINGS, skip=[other for other in (mask_root, map_root) if other])
    if not found:
        raise UserError(f"{images}: holds no image ({' '.join(ENDINGS)}).{_in_vain(_endings(others))}")
    finder = Finder(found, others)

    tested = _listed("test", test, finder, faults) if test else ()
    held_out = set(tested)
    if train:
        trained = _listed("list", train, finder, faults)
        faults.add(Kind.LEAK, [name for name in trained if name in held_out])
    else:
        trained = tuple(name for name in found if name not in held_out)
    if not trained and not train:
        raise UserError(f"{test}: lists every image, so none is left to train on. Take some off, or give `list`.")
    mask_files = _beside(mask_root, MASK_ENDINGS, "masks", found)
    if score:
        scored = _listed("score", score, finder, faults)
        faults.add(Kind.NOT_TRAINED, sorted(set(scored) - set(trained)))
    else:
        scored = tuple(name for name in trained if name in mask_files) or trained
    if masks:
        owed = dict.fromkeys((*(scored if score else ()), *tested))
        faults.add(Kind.NO_MASK, [name for name in owed if name not in mask_files])
    map_files = _beside(map_root, ENDINGS, "saliency", found)
    if saliency:
        faults.add(Kind.NO_MAP, [name for name in trained if name not in map_files])

    used = dict.fromkeys((*trained, *scored, *tested))
    for files in (found, mask_files, map_files):
        double = [files[name] for name in used if len(files.get(name, ())) > 1]
        faults.add(Kind.SAME_NAME, [" and ".join(str(path) for path in paths) for paths in double])
    return Layout(
        finder=finder,
        images={name: found[name][0] for name in used},
        masks={name: mask_files[name][0] for name in used if name in mask_files},
        maps={name: map_files[name][0] for name in used if name in map_files},
        splits={"train": trained, "score": scored, "test": tested},
        unread=_endings(others),
    )


def _folder(key: str, written: str) -> Path:
    path = Path(written).expanduser()
    if not path.is_dir():
        raise UserError(f"{key}: {written} is {'a file, not a' if path.exists() else 'no'} folder.")
    return path


def _listed(key: str, written: str, finder: Finder, faults: Faults) -> tuple[str, ...]:
    found, lost = read_list(Path(written).expanduser(), finder)
    if not found and not lost:
        raise UserError(f"{key}: {written} names no image. Write one name a line.")
    faults.add(Kind.UNLISTED, lost)
    return tuple(found)


def _beside(root: Path | None, endings: Sequence[str], key: str, names: Collection[str]) -> dict[str, list[Path]]:
    """The files of a masks or saliency folder by name; UserError if none of them belongs to an image."""
    if root is None:
        return {}
    files, others = scan(root, endings)
    if not files:
        raise UserError(
            f"{key}: {root} holds no file that can be read ({' '.join(endings)}).{_in_vain(_endings(others))}"
        )
    if not any(name in files for name in names):
        wanted, there = next(iter(names)), next(iter(files.values()))[0]
        raise UserError(
            f"{key}: no file in {root} has the name of an image. Image '{wanted}' needs {root / wanted}{endings[0]}; "
            f"what is there is called like {there}."
        )
    return files


def _in_vain(unread: Counter[str]) -> str:
    """A sentence about files that were passed over, "" if there are none."""
    listed = ", ".join(f"{number} {ending}" for ending, number in unread.most_common(4))
    return f" It holds other files: {listed}." if listed else ""


def _endings(files: Files) -> Counter[str]:
    return Counter(path.suffix.lower() or "(no ending)" for paths in files.values() for path in paths)
