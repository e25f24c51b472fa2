"""The archive that the PASCAL VOC 2012 evaluation server takes, and the check that it would."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import PIL.Image

from tag2mask import progress
from tag2mask.data import voc12
from tag2mask.data.images import Undecodable, decode, read_mask
from tag2mask.data.index_png import encode_mask, voc_palette
from tag2mask.data.source import IGNORE
from tag2mask.errors import UserError

Competition: TypeAlias = Literal["comp5", "comp6"]  # trained on VOC alone; on any data but VOC's test images
Set: TypeAlias = Literal["test", "val"]
Size: TypeAlias = tuple[int, int]  # width, height


def inside(competition: Competition, images: Set) -> str:
    """The folder in the archive, e.g. results/VOC2012/Segmentation/comp6_test_cls."""
    return f"results/VOC2012/Segmentation/{competition}_{images}_cls"


def expected(root: str | Path, images: Set) -> dict[str, Size]:
    """Image id -> (width, height) of all images of a list of VOC. Raises UserError if list or images are missing."""
    home = voc12.find_home(root)
    sizes = {}
    for name in voc12.listed(home, images, root):
        with PIL.Image.open(home / "JPEGImages" / f"{name}.jpg") as picture:
            sizes[name] = picture.size
    return sizes


def export_voc_server(
    masks: str | Path, out: str | Path, root: str | Path, *, images: Set = "test", competition: Competition = "comp6"
) -> int:
    """Pack the index masks of a folder (or of a stage's folder, in masks/) for the server, and check the archive.

    root: VOC 2012 with the list and the images of the set. Returns the number of masks. The same masks give the same
    bytes. Raises UserError with one line: `out` is not called .tar.gz, a mask is missing, or the server would refuse.
    """
    folder, target = Path(masks), Path(out)
    folder = folder / "masks" if (folder / "masks").is_dir() else folder
    if not target.name.endswith((".tar.gz", ".tgz")):
        raise UserError(f"{target}: the server takes .tar.gz; call it {target.stem}.tar.gz")
    sizes = expected(root, images)
    missing = [name for name in sizes if not (folder / f"{name}.png").is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing):,} of {len(sizes):,} masks of the {images} images are missing, the first is "
            f"{missing[0]}.png; predict them (data.test={images} in a recipe)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        with (
            part.open("wb") as raw,
            gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for name in progress.track(sizes, "packing", len(sizes)):
                content = encode_mask(read_mask(folder / f"{name}.png", len(voc12.CLASSES)))
                entry = tarfile.TarInfo(f"{inside(competition, images)}/{name}.png")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        check_voc_server(part, sizes, images=images, competition=competition)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return len(sizes)


def check_voc_server(
    archive: str | Path, sizes: Mapping[str, Size], *, images: Set = "test", competition: Competition = "comp6"
) -> None:
    """Look an archive over as the server would: raises UserError with one line for the first thing that it refuses.

    One file for each image and nothing else, in the right folder; a PNG with a palette, which is VOC's; as large as
    its image; values 0..20 only, for there is no "no answer".
    """
    folder, seen = inside(competition, images), set[str]()
    try:
        with tarfile.open(archive, "r:gz") as opened:
            for entry in opened:
                if entry.isdir():
                    continue
                where, _, file = entry.name.rpartition("/")
                name = file.removesuffix(".png")
                if where != folder or name not in sizes or not entry.isfile() or name in seen:
                    raise UserError(f"{archive}: {entry.name} does not belong there; expected {folder}/<image>.png")
                seen.add(name)
                content = opened.extractfile(entry)
                assert content is not None
                if wrong := _refused(content.read(), sizes[name]):
                    raise UserError(f"{archive}: {entry.name} {wrong}")
    except (tarfile.TarError, OSError, EOFError) as reason:
        raise UserError(f"{archive}: is no .tar.gz that can be read ({reason}); make it again") from None
    if missing := [name for name in sizes if name not in seen]:
        raise UserError(
            f"{archive}: {len(missing):,} of {len(sizes):,} masks are missing, the first is {missing[0]}.png"
        )


def _refused(content: bytes, size: Size) -> str:
    """What is wrong with one file, "" if nothing."""
    try:
        picture = decode(content)
    except Undecodable as reason:
        return f"{reason}; write it again"
    if picture.format != "PNG" or picture.mode != "P":
        return f"is a {picture.format} of mode {picture.mode}; write an index PNG with a palette (mode P)"
    colours = np.asarray(picture.getpalette(), np.uint8).reshape(-1, 3)[: len(voc12.CLASSES) + 1]
    if not np.array_equal(colours, voc_palette()[: len(colours)]):
        return "has another palette than VOC; write it with ours"
    if picture.size != size:
        return f"has {picture.width} x {picture.height} pixels, but its image {size[0]} x {size[1]}; resize the answer"
    largest = int(np.asarray(picture).max())
    if largest > len(voc12.CLASSES):
        what = "no answer" if largest == IGNORE else "no class"
        return f"holds the value {largest} ({what}), and the server takes 0..{len(voc12.CLASSES)}; answer every pixel"
    return ""
