"""The layout of MMSegmentation, with a config that it reads.

    img_dir/{train,val}/<name>.png or .jpg
    ann_dir/{train,val}/<name>.png      index PNG with a palette: 0 background, 1..K classes, 255 ignored
    dataset.py                          a config: classes, palette, data loaders; base a config of yours on it

MMSegmentation ignores 255 in the loss and in the score.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tag2mask.data.index_png import voc_palette, write_mask
from tag2mask.export.folders import new_folder, picture_ending, place_image, write_text
from tag2mask.export.mask_set import MaskSet

CONFIG = "dataset.py"


def export_mmseg(masks: MaskSet, out: Path, *, val: Collection[str] = (), overwrite: bool = False) -> Path:
    """Writes images, masks and `out`/dataset.py, and returns its path.

    val: names of the images for validation; all others are for training. Masks made from tags are no truth: a score on
    them says how well a network repeats them. All images must have one ending there: they are copied if they have, else
    written as PNG. Raises UserError if `out` holds something else, or an export and not `overwrite`.
    """
    ending = picture_ending(masks)
    with new_folder(out, "mmseg", overwrite) as folder:
        for item, mask in masks.read("mmseg"):
            split = "val" if item.name in val else "train"
            place_image(item, folder / "img_dir" / split / item.name, ending)
            write_mask(folder / "ann_dir" / split / f"{item.name}.png", mask)
        splits = [split for split in ("train", "val") if (folder / "ann_dir" / split).is_dir()]
        write_text(folder / CONFIG, config(masks.classes, ending or ".png", splits))
    return out / CONFIG


def config(classes: tuple[str, ...], ending: str, splits: Collection[str]) -> str:
    """The text of the config: a data loader for each of the splits "train" and "val"."""
    names = ("background", *classes)
    palette = voc_palette()[: len(names)].tolist()
    lines = [
        "# Masks made from image-level tags. Run where the folder is the current one, or set data_root.",
        "dataset_type = 'BaseSegDataset'",
        "data_root = '.'",
        f"metainfo = dict(\n    classes={names!r},\n    palette={palette!r})",
        f"num_classes = {len(names)}  # for decode_head and auxiliary_head",
    ]
    for split in splits:
        train = split == "train"
        pipeline = ["dict(type='LoadImageFromFile')", "dict(type='LoadAnnotations')"]
        if train:
            pipeline += [
                "dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True)",
                "dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75)",
                "dict(type='RandomFlip', prob=0.5)",
                "dict(type='PhotoMetricDistortion')",
            ]
        steps = ",\n    ".join([*pipeline, "dict(type='PackSegInputs')"])
        sampler = "InfiniteSampler" if train else "DefaultSampler"
        lines += [
            f"{split}_pipeline = [\n    {steps},\n]",
            f"{split}_dataloader = dict(",
            f"    batch_size={4 if train else 1},",
            "    num_workers=2,",
            f"    sampler=dict(type='{sampler}', shuffle={train}),",
            "    dataset=dict(",
            "        type=dataset_type,",
            "        data_root=data_root,",
            "        metainfo=metainfo,",
            f"        data_prefix=dict(img_path='img_dir/{split}', seg_map_path='ann_dir/{split}'),",
            f"        img_suffix='{ending}',",
            "        seg_map_suffix='.png',",
            "        reduce_zero_label=False,",
            f"        pipeline={split}_pipeline))",
        ]
    if "val" in splits:
        lines.append("val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])")
    return "\n".join(lines) + "\n"
