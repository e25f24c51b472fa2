"""Gathers what is to be exported, from a work folder or from two folders, and hands it to a format."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tag2mask import progress, schema
from tag2mask.collect import find_record
from tag2mask.data.decisions import Decision, decisions_path, read_decisions, reviewed_mask
from tag2mask.data.images import ENDINGS, MASK_ENDINGS, read_image
from tag2mask.data.names import Finder, read_list, scan
from tag2mask.errors import UserError
from tag2mask.export.coco import export_coco
from tag2mask.export.cvat import export_cvat
from tag2mask.export.folders import check_folder, upright_size
from tag2mask.export.huggingface import export_huggingface
from tag2mask.export.label_studio import export_label_studio
from tag2mask.export.labelme import export_labelme
from tag2mask.export.mask_set import Item, MaskSet
from tag2mask.export.mmseg import export_mmseg
from tag2mask.export.pictures import export_pictures
from tag2mask.pipeline import MANIFEST, read_json
from tag2mask.recipe import SOURCES
from tag2mask.stages.labels import MASKS, mask_path

Form: TypeAlias = Literal["palette", "coco", "cvat", "label-studio", "labelme", "mmseg", "huggingface"]
KINDS = (*MASKS, "predict")  # the kinds of stages that leave masks


def export_masks(
    form: Form, out: str | Path, work: str | Path | None = None, *, stage: str | None = None,
    images: str | Path | None = None, masks: str | Path | None = None, classes: Sequence[str] | None = None,
    only: str | Path | None = None, decisions: str | Path | None = None, accepted_only: bool = False,
    overwrite: bool = False,
) -> Path:  # fmt: skip
    """Masks in the form that another tool reads, in the new folder `out`; returns the path that the tool is given.

    The masks of a stage of a work folder (the last one that made masks of the tagged images, if `stage` names none), or
    those of a folder `masks` for the images of a folder `images`, with the names of the classes 1..K. The functions of
    `tag2mask.export.<form>` have the options of each form. For the rest, and what is raised, see `collect_masks`.
    """
    check_folder(Path(out), overwrite)
    found = collect_masks(
        work, stage=stage, images=images, masks=masks, classes=classes,
        only=only, decisions=decisions, accepted_only=accepted_only,
    )  # fmt: skip
    functions: dict[str, Any] = {
        "palette": export_pictures,
        "coco": export_coco,
        "cvat": export_cvat,
        "label-studio": export_label_studio,
        "labelme": export_labelme,
        "mmseg": export_mmseg,
        "huggingface": export_huggingface,
    }
    if form not in functions:
        raise UserError(f"export: there is no form {form!r}; {schema.meant(form, functions)}")
    path: Path = functions[form](found, Path(out), overwrite=overwrite)
    return path


def collect_masks(
    work: str | Path | None = None, *, stage: str | None = None, name: str | None = None,
    images: str | Path | None = None, masks: str | Path | None = None, classes: Sequence[str] | None = None,
    only: str | Path | None = None, decisions: str | Path | None = None, accepted_only: bool = False,
    review: bool = True,
) -> MaskSet:  # fmt: skip
    """What is to be exported: give either a work folder, or images, masks and classes.

    stage, name: which stage of which recipe's run. only: a text file with the names of the images to export.
    decisions: a file of decisions on masks, else that of the review of the work folder. Rejected masks are left out,
    and with `accepted_only` all that were not accepted. review: whether the review of the work folder counts; the masks
    that were changed there take the place of the stage's.
    Raises UserError for a mask that is missing or has another size than its image, for a name on a list that means no
    image, and if nothing is left.
    """
    reviewed: Mapping[str, Decision] = {}
    if work is not None:
        if images is not None or masks is not None or classes is not None:
            raise UserError("export: give either a work folder, or --images, --masks and --classes")
        reviewed = read_decisions(decisions_path(Path(work))) if review else {}
        found = _from_work(Path(work), stage, name)
    elif images is None or masks is None or classes is None:
        raise UserError("export: give a work folder, or --images, --masks and --classes")
    elif stage is not None or name is not None:
        raise UserError("--stage: only a work folder has stages; leave it out")
    else:
        found = _from_folders(Path(images), Path(masks), classes)
    if work is not None and review:
        found = replace(found, items=[_as_reviewed(item, Path(work), reviewed.get(item.name)) for item in found.items])
    if only is not None:
        chosen = listed(Path(only), found)
        found = replace(found, items=[item for item in found.items if item.name in chosen])
    if decisions is not None:
        reviewed = _decisions(Path(decisions), found)
    if accepted_only and not reviewed:
        raise UserError("--accepted-only: there are no decisions; review the masks first, or give --decisions")
    return replace(found, items=[item for item in found.items if _wanted(reviewed.get(item.name), accepted_only)])


def listed(path: Path, masks: MaskSet, *, strict: bool = True) -> frozenset[str]:
    """The names of images in a text file. Raises UserError if one means no image; if not `strict`, only if all do."""
    names, lost = read_list(path, Finder(item.name for item in masks.items))
    if lost and (strict or not names):
        raise UserError(
            f"{path}: {len(lost):,} lines mean no image of the export, the first is {lost[0]}; mend the list"
        )
    if not names:
        raise UserError(f"{path}: names no image; write one name a line")
    return frozenset(names)


def _from_work(work: Path, stage: str | None, name: str | None) -> MaskSet:
    """The masks of a finished stage, with the images that they were made of."""
    record = find_record(work, name)
    there = {key: entry for key, entry in record["stages"].items() if entry["kind"] in KINDS}
    if stage is not None and stage not in there:
        raise UserError(f"--stage {stage}: no stage of run {record['name']!r} that makes masks; {_there(there)}")
    wanted = [stage] if stage is not None else [key for key, entry in there.items() if entry["kind"] in MASKS]
    finished = [key for key in wanted if (work / there[key]["folder"] / MANIFEST).is_file()]
    if not finished:
        what = f"stage {stage} is not finished" if stage else f"no finished stage makes masks; {_there(there)}"
        raise UserError(f"{work}: of run {record['name']!r}, {what}; run it first, or name another --stage")
    folder = work / there[finished[-1]]["folder"]
    manifest = read_json(folder / MANIFEST)
    source = schema.make(SOURCES[record["data"]["name"]], record["data"])
    source.check(work / "checked-images.json")
    if manifest["data"] != source.fingerprint:
        raise UserError(f"{work}: the data have changed since run {record['name']!r}; run the recipe again")
    samples = source.split(manifest["settings"].get("split", "train"))
    files = samples.files or [None] * len(samples)
    items = [
        Item(image, mask_path(folder, image), partial(samples.image, index), file)
        for index, (image, file) in enumerate(zip(samples.names, files, strict=True))
    ]
    missing = [item for item in items if not item.mask_file.is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing):,} of {len(items):,} masks are missing, the first is {missing[0].name}.png; "
            f"remove {MANIFEST} there and run the recipe again"
        )
    return MaskSet(tuple(source.classes), items)


def _from_folders(images: Path, masks: Path, classes: Sequence[str]) -> MaskSet:
    """The masks of a folder (or of its masks/, as `predict` leaves it), each with its image."""
    folder = masks / "masks" if (masks / "masks").is_dir() else masks
    for option, root in (("--images", images), ("--masks", folder)):
        if not root.is_dir():
            raise UserError(f"{option} {root}: is no folder; give the one that holds them")
    if images.resolve() == folder.resolve():
        raise UserError(f"--masks {masks}: is the folder of the images too; give each kind a folder of its own")
    pictures, _ = scan(images, ENDINGS, skip=[folder])
    drawn, _ = scan(folder, MASK_ENDINGS, skip=[images])
    if not drawn:
        raise UserError(f"--masks {folder}: holds no mask ({' '.join(MASK_ENDINGS)})")
    lost = [name for name in drawn if name not in pictures]
    if lost:
        raise UserError(
            f"--masks {folder}: {len(lost):,} of {len(drawn):,} masks have no image in {images}, the first is "
            f"{lost[0]}; name a mask as its image"
        )
    items = []
    for name, files in drawn.items():
        for several in (files, pictures[name]):
            if len(several) > 1:
                raise UserError(f"{several[0].parent}: {several[0].name} and {several[1].name} have one name; keep one")
        mask, image = files[0], pictures[name][0]
        _same_size(mask, image)
        items.append(Item(name, mask, partial(read_image, image), image))
    found = MaskSet(tuple(classes), items)
    if bare := len(pictures) - len(drawn):
        progress.say(f"export: {bare:,} of {len(pictures):,} images have no mask and are left out")
    return found


def _same_size(mask: Path, image: Path) -> None:
    size, wanted = upright_size(mask), upright_size(image)
    if size != wanted:
        raise UserError(
            f"{mask}: has {size[0]} x {size[1]} pixels, but its image has {wanted[0]} x {wanted[1]}; resize the mask"
        )


def _as_reviewed(item: Item, work: Path, decision: Decision | None) -> Item:
    """With the mask that a person changed, unless the last decision is on the mask of the run."""
    path = reviewed_mask(work, item.name)
    changed = path.is_file() and (decision is None or bool(decision.scores))
    return replace(item, mask_file=path) if changed else item


def _decisions(path: Path, masks: MaskSet) -> Mapping[str, Decision]:
    """The decisions of a file. Raises UserError if there is none, or none on these images."""
    if not path.is_file():
        raise UserError(f"--decisions {path}: there is no such file; a review writes WORK/review/decisions.jsonl")
    found = read_decisions(path)
    if not found.keys() & {item.name for item in masks.items}:
        raise UserError(f"--decisions {path}: decides on none of these images; names look like {masks.items[0].name}")
    return found


def _wanted(decision: Decision | None, accepted_only: bool) -> bool:
    word = "undecided" if decision is None else decision.decision
    return word == "accepted" if accepted_only else word != "rejected"


def _there(stages: Collection[str]) -> str:
    return f"there is {', '.join(stages)}" if stages else "it has none"
