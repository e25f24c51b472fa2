"""Public data sets made ready: downloaded, checked, unpacked, completed. Every step goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tag2mask import progress
from tag2mask.data import sbd, voc12
from tag2mask.data.coco14 import Coco14
from tag2mask.data.fetch import Remote, fetch
from tag2mask.data.unpack import unpack
from tag2mask.errors import UserError
from tag2mask.pipeline import make_folder


@dataclass(frozen=True)
class Archive:
    """A file to download, and the number of files that each of its folders (from the root) holds when unpacked."""

    remote: Remote
    holds: Mapping[str, int]


_COCO = "http://images.cocodataset.org"
ARCHIVES: Mapping[str, tuple[Archive, ...]] = {
    "voc12": (
        Archive(
            Remote(
                "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
                1_999_639_040,
                "sha256:e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
            ),
            {
                f"{voc12.HOME}/JPEGImages": 17125,
                f"{voc12.HOME}/Annotations": 17125,
                f"{voc12.HOME}/SegmentationClass": 2913,
                f"{voc12.HOME}/{voc12.LISTS}": 3,
            },
        ),
    ),
    "sbd": (
        Archive(
            Remote(
                "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
                1_419_539_633,
                "md5:82b4d87ceb2ed10f6038a1cba92111cb",
            ),
            {f"{sbd.HOME}/cls": 11355, sbd.HOME: 2},
        ),
    ),
    "coco14": (
        Archive(
            Remote(
                f"{_COCO}/annotations/annotations_trainval2014.zip",
                252_872_794,
                "sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
            ),
            {"annotations": 6},
        ),
        Archive(
            Remote(
                f"{_COCO}/zips/val2014.zip",
                6_645_013_297,
                "sha256:fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
            ),
            {"val2014": 40504},
        ),
        Archive(
            Remote(
                f"{_COCO}/zips/train2014.zip",
                13_510_573_713,
                "sha256:ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
            ),
            {"train2014": 82783},
        ),
    ),
}


def prepare(
    name: str,
    root: str | Path,
    *,
    mirror: str | None = None,
    archives: Mapping[str, tuple[Archive, ...]] = ARCHIVES,
    show: bool = True,
    pause: float = 2.0,
) -> str:
    """Make `voc12`, `sbd` or `coco14` ready in `root`; returns a sentence about what is there.

    Archives are kept in `root`; one that is put there by hand is used. What is unpacked already is left alone.
    `mirror`: take the files from below this address instead of their home.
    Raises UserError with one line; `fetch` and `unpack` say for what.
    """
    if name not in archives:
        raise UserError(f"no data set {name!r} to prepare; there is {', '.join(archives)}")
    base = Path(root).expanduser()
    make_folder(base, "--root")
    if name == "sbd":
        voc12.find_home(base)  # before an hour of download
    for archive in archives[name]:
        if not _short(archive, base):
            continue
        remote = archive.remote
        if mirror:
            remote = replace(remote, url=f"{mirror.rstrip('/')}/{remote.name}")
        unpack(fetch(remote, base, show=show, pause=pause), base, show=show)
        if short := _short(archive, base):
            raise UserError(f"{base}: {remote.name} is unpacked, but {short}; delete the archive and try again")
    if show:
        kept = [archive.remote.name for archive in archives[name] if (base / archive.remote.name).exists()]
        if kept:
            progress.say(f"{', '.join(kept)} in {base} can be deleted now")
    return _completed(name, base, show)


def _completed(name: str, base: Path, show: bool) -> str:
    home = base if name == "coco14" else voc12.find_home(base)
    if name == "sbd":
        count = sbd.write_train_aug(home, base / sbd.HOME, show=show)
        return f"{count:,} images on {home / voc12.LISTS}/train_aug.txt, masks in {home / sbd.MASKS}"
    if name == "coco14":
        source = Coco14(root=str(base))
        source.draw(show=show)
        return f"COCO 2014 in {base}, its masks in {base / 'tag2mask'}"
    return f"PASCAL VOC 2012 in {home}; for the train_aug list: tag2mask data prepare sbd --root {base}"


def _short(archive: Archive, base: Path) -> str:
    """Which folder lacks files, "" if none does."""
    for folder, wanted in archive.holds.items():
        place = base / folder
        if folder.startswith(voc12.HOME) and not place.is_dir():  # VOC may lie without its outer folders
            place = _voc(base) / folder.removeprefix(f"{voc12.HOME}/")
        there = sum(1 for entry in place.iterdir() if entry.is_file()) if place.is_dir() else 0
        if there < wanted:
            return f"{place} holds {there:,} of {wanted:,} files"
    return ""


def _voc(base: Path) -> Path:
    try:
        return voc12.find_home(base)
    except UserError:
        return base / voc12.HOME
