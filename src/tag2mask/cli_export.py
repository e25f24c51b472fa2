"""The commands below `tag2mask export`. Everything heavy is imported inside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from tag2mask.export.mask_set import MaskSet

app = typer.Typer(help="Masks in the forms that others read.", no_args_is_help=True)

Work = Annotated[
    Path | None, typer.Argument(help="The folder that was used as --work; or give --images, --masks, --classes.")
]
Out = Annotated[Path, typer.Option(help="A new folder for the export.")]
Stage = Annotated[
    str | None, typer.Option(help="Which stage's masks. Default: the last that made masks of the tagged images.")
]
Name = Annotated[str | None, typer.Option(help="Of which recipe, if several were run in the work folder.")]
Images = Annotated[Path | None, typer.Option(help="Folder of images.")]
Masks = Annotated[Path | None, typer.Option(help="Folder of their index masks, e.g. predicted/masks.")]
Classes = Annotated[
    str | None, typer.Option(help="Class names in order, separated by commas; mask value 1 is the first.")
]
Only = Annotated[Path | None, typer.Option(help="Text file: the images to export.")]
Decisions = Annotated[
    Path | None, typer.Option(help="Decisions on masks (JSON lines). Default: WORK/review/decisions.jsonl.")
]
Accepted = Annotated[
    bool, typer.Option("--accepted-only", help="Only accepted masks. Without it all but rejected ones.")
]
NoReview = Annotated[bool, typer.Option("--no-review", help="As the stage made them: WORK/review does not count.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an export that the folder holds already.")]
Copy = Annotated[
    bool, typer.Option("--copy-images", help="Write the images into the folder, too; drawn scenes have no files.")
]
Val = Annotated[Path | None, typer.Option(help="Text file: images for validation. Default: none.")]


@app.callback()
def _group() -> None:
    """Masks in the forms that others read."""


@app.command()
def palette(
    out: Out, work: Work = None, stage: Stage = None, name: Name = None,
    images: Images = None, masks: Masks = None, classes: Classes = None,
    only: Only = None, decisions: Decisions = None, accepted_only: Accepted = False, no_review: NoReview = False,
    overwrite: Overwrite = False,
    overlays: Annotated[bool, typer.Option(help="Also write pictures of the masks over the images.")] = True,
) -> None:  # fmt: skip
    """Index PNGs with the VOC palette, and overlays. Ignored pixels stay 255."""
    from tag2mask.export.pictures import export_pictures

    found = _collect(
        out, overwrite, work, stage, name, images, masks, classes, only, decisions, accepted_only, no_review
    )
    _tell(found, export_pictures(found, out, overlays=overlays, overwrite=overwrite))


@app.command()
def coco(
    out: Out, work: Work = None, stage: Stage = None, name: Name = None,
    images: Images = None, masks: Masks = None, classes: Classes = None,
    only: Only = None, decisions: Decisions = None, accepted_only: Accepted = False, no_review: NoReview = False,
    overwrite: Overwrite = False, copy_images: Copy = False,
    shapes: Annotated[Literal["rle", "polygons"], typer.Option(help="How an object is written down.")] = "rle",
) -> None:  # fmt: skip
    """COCO JSON. An object is a connected part of a class; ignored pixels are in none."""
    from tag2mask.export.coco import export_coco

    found = _collect(
        out, overwrite, work, stage, name, images, masks, classes, only, decisions, accepted_only, no_review
    )
    _tell(found, export_coco(found, out, shapes=shapes, copy_images=copy_images, overwrite=overwrite))


@app.command()
def cvat(
    out: Out, work: Work = None, stage: Stage = None, name: Name = None,
    images: Images = None, masks: Masks = None, classes: Classes = None,
    only: Only = None, decisions: Decisions = None, accepted_only: Accepted = False, no_review: NoReview = False,
    overwrite: Overwrite = False, copy_images: Copy = False,
) -> None:  # fmt: skip
    """CVAT "Segmentation mask 1.1". An object is a connected part of a class; ignored pixels become background."""
    from tag2mask.export.cvat import export_cvat

    found = _collect(
        out, overwrite, work, stage, name, images, masks, classes, only, decisions, accepted_only, no_review
    )
    _tell(found, export_cvat(found, out, copy_images=copy_images, overwrite=overwrite))


@app.command("label-studio")
def label_studio(
    out: Out, work: Work = None, stage: Stage = None, name: Name = None,
    images: Images = None, masks: Masks = None, classes: Classes = None,
    only: Only = None, decisions: Decisions = None, accepted_only: Accepted = False, no_review: NoReview = False,
    overwrite: Overwrite = False, copy_images: Copy = False,
    image_prefix: Annotated[
        str, typer.Option(help="What stands before an image's path: a URL, s3://..., a folder below the local root.")
    ] = "/data/local-files/?d=",
    from_name: Annotated[str, typer.Option(help="Name of the brush labels in the labelling config.")] = "tag",
    to_name: Annotated[str, typer.Option(help="Name of the image in the labelling config.")] = "image",
) -> None:  # fmt: skip
    """Label Studio predictions (brush) and their config. A region is a class; ignored pixels are in none."""
    from tag2mask.export.label_studio import export_label_studio

    found = _collect(
        out, overwrite, work, stage, name, images, masks, classes, only, decisions, accepted_only, no_review
    )
    path = export_label_studio(
        found, out, image_prefix=image_prefix, from_name=from_name, to_name=to_name, copy_images=copy_images,
        overwrite=overwrite,
    )  # fmt: skip
    _tell(found, path)


@app.command()
def labelme(
    out: Out, work: Work = None, stage: Stage = None, name: Name = None,
    images: Images = None, masks: Masks = None, classes: Classes = None,
    only: Only = None, decisions: Decisions = None, accepted_only: Accepted = False, no_review: NoReview = False,
    overwrite: Overwrite = False, copy_images: Copy = False,
) -> None:  # fmt: skip
    """labelme JSON. A polygon is a connected part of a class; ignored pixels are in none."""
    from tag2mask.export.labelme import export_labelme

    found = _collect(
        out, overwrite, work, stage, name, images, masks, classes, only, decisions, accepted_only, no_review
    )
    _tell(found, export_labelme(found, out, copy_images=copy_images, overwrite=overwrite))


@app.command()
def mmseg(
    out: Out, work: Work = None, stage: Stage = None, name: Name = None,
    images: Images = None, masks: Masks = None, classes: Classes = None,
    only: Only = None, decisions: Decisions = None, accepted_only: Accepted = False, no_review: NoReview = False,
    overwrite: Overwrite = False, val: Val = None,
) -> None:  # fmt: skip
    """Images and masks as MMSegmentation lays them out, with a config. Ignored pixels stay 255."""
    from tag2mask.export.mmseg import export_mmseg
    from tag2mask.exporting import listed

    found = _collect(
        out, overwrite, work, stage, name, images, masks, classes, only, decisions, accepted_only, no_review
    )
    held_out = listed(val, found, strict=False) if val else ()
    _tell(found, export_mmseg(found, out, val=held_out, overwrite=overwrite))


@app.command()
def huggingface(
    out: Out, work: Work = None, stage: Stage = None, name: Name = None,
    images: Images = None, masks: Masks = None, classes: Classes = None,
    only: Only = None, decisions: Decisions = None, accepted_only: Accepted = False, no_review: NoReview = False,
    overwrite: Overwrite = False, val: Val = None,
) -> None:  # fmt: skip
    """A folder for `datasets.load_dataset("imagefolder", data_dir=...)`. Ignored pixels stay 255."""
    from tag2mask.export.huggingface import export_huggingface
    from tag2mask.exporting import listed

    found = _collect(
        out, overwrite, work, stage, name, images, masks, classes, only, decisions, accepted_only, no_review
    )
    held_out = listed(val, found, strict=False) if val else ()
    _tell(found, export_huggingface(found, out, val=held_out, overwrite=overwrite))


@app.command()
def onnx(
    model: Annotated[Path, typer.Argument(help="A work folder, or one of its segment-... folders.")],
    out: Annotated[Path, typer.Option(help="The file to write, ending in .onnx; it must not exist.")],
    scales: Annotated[str, typer.Option(help="Sizes at which the image is looked at, e.g. 0.75,1,1.25.")] = "1",
    flip: Annotated[bool, typer.Option("--flip", help="Look at the mirror image, too.")] = False,
) -> None:
    """A segmenter for other programs: one photo of any size in, probabilities and mask out."""
    from tag2mask.errors import UserError
    from tag2mask.predicting import export_onnx

    try:
        sizes = [float(word) for word in scales.split(",")]
    except ValueError:
        raise UserError(f"--scales {scales}: are no numbers; write them as 0.75,1,1.25") from None
    done = export_onnx(model, out, scales=sizes, flip=flip)
    typer.echo(
        f"{done['path']}: {done['bytes'] / 2**20:.1f} MB; scales {', '.join(f'{size:g}' for size in sizes)}, "
        f"{'with' if flip else 'without'} mirror image; differs from PyTorch by at most {done['difference']:.0e}"
    )


@app.command("voc-server")
def voc_server(
    masks: Annotated[Path, typer.Argument(help="Folder of index masks, or a predict-... folder.")],
    out: Annotated[Path, typer.Argument(help="The archive to write, ending in .tar.gz.")],
    root: Annotated[Path, typer.Option(help="PASCAL VOC 2012, with the images and the list of the set.")],
    images: Annotated[Literal["test", "val"], typer.Option(help="Which set the masks are of.")] = "test",
    competition: Annotated[
        Literal["comp5", "comp6"], typer.Option(help="comp5: learnt from VOC alone. comp6: other data, ImageNet too.")
    ] = "comp6",
) -> None:
    """Pack masks for the VOC 2012 evaluation server and check that it would take them."""
    from tag2mask.export.voc_server import export_voc_server

    count = export_voc_server(masks, out, root, images=images, competition=competition)
    typer.echo(f"{count:,} masks in {out}, checked")


def _collect(
    out: Path, overwrite: bool, work: Path | None, stage: str | None, name: str | None,
    images: Path | None, masks: Path | None, classes: str | None,
    only: Path | None, decisions: Path | None, accepted_only: bool, no_review: bool,
) -> MaskSet:  # fmt: skip
    from tag2mask.export.folders import check_folder
    from tag2mask.exporting import collect_masks

    check_folder(out, overwrite)
    return collect_masks(
        work, stage=stage, name=name, images=images, masks=masks,
        classes=[word.strip() for word in classes.split(",")] if classes is not None else None,
        only=only, decisions=decisions, accepted_only=accepted_only, review=not no_review,
    )  # fmt: skip


def _tell(masks: MaskSet, path: Path) -> None:
    typer.echo(f"{len(masks):,} masks in {path}")
