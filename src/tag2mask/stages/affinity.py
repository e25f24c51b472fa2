"""Stages: networks that learn from soft maps which pixels belong together (PSA) or where boundaries are (IRN)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from tag2mask import progress
from tag2mask.data.augment import Augment, Crops, collate
from tag2mask.data.images import read_mask
from tag2mask.data.maps import Maps, map_path, read_maps
from tag2mask.data.same_size import ahead
from tag2mask.data.source import Mask, Source
from tag2mask.engine import Training, fit
from tag2mask.errors import UserError
from tag2mask.export import write_mask
from tag2mask.ops.seed import seed_of
from tag2mask.pipeline import Stage, read_json, write_json
from tag2mask.refine import AFFINITY_NETS, BOUNDARY_NETS
from tag2mask.refine import irn as boundaries
from tag2mask.refine import psa as affinities
from tag2mask.refine.crf import compile_for
from tag2mask.refine.grid import Size
from tag2mask.refine.pairs import pairs_of
from tag2mask.schema import Input, OneOf, Settings, make
from tag2mask.stages.classify import MODEL, WEIGHTS, save_weights, without_weights
from tag2mask.stages.context import Context

Labeller = Callable[[NDArray[np.uint8], Tensor, Tensor], NDArray[np.uint8]]  # image, maps, classes -> index mask
NETS = {**AFFINITY_NETS, **BOUNDARY_NETS}


def psa(
    ctx: Context,
    *,
    of: Annotated[Path, Input(("cams", "clip_es", "pacam", "attention", "amn_maps"))],
    net: Annotated[Settings, OneOf(AFFINITY_NETS)],
    train: Training,
    augment: Augment = Augment(),  # noqa: B008  (frozen)
    alpha_low: float = 4.0,
    alpha_high: float = 32.0,
    bf16: bool = False,
) -> None:
    """Train an AffinityNet on what is sure in the soft maps; its folder keeps that as labels/*.png.

    of: the soft maps. net: the network. train, augment: as in classify. alpha_low, alpha_high: a pixel is surely a
    class where a CRF with background (1 - largest map)^alpha_low says so, surely background where one with alpha_high
    says so (SEAM: 4 and 24). bf16: forward passes in bfloat16.
    """
    train_on_sure_labels(
        ctx, "psa", of, net, train, augment,
        label=partial(affinities.confident_labels, low=alpha_low, high=alpha_high),
        build=partial(make, NETS[net["name"]], net),
        objective=partial(affinities.AffinityObjective, bf16=bf16),
    )  # fmt: skip


def irn(
    ctx: Context,
    *,
    of: Annotated[Path, Input(("cams", "clip_es", "pacam", "attention", "amn_maps"))],
    net: Annotated[Settings, OneOf(BOUNDARY_NETS)],
    train: Training,
    augment: Augment = Augment(),  # noqa: B008  (frozen)
    foreground: float = 0.3,
    background: float = 0.05,
    bf16: bool = False,
) -> None:
    """Train IRN's boundary network on what is sure in the soft maps; its folder keeps that as labels/*.png.

    of: the soft maps. net: the network. train, augment: as in classify. foreground, background: a pixel is surely a
    class where seeds with the background score `foreground`, after a CRF, say so, surely background where those with
    the score `background` say so, too. As a rule the best score for seeds lies between them, 0.1 from either.
    bf16: forward passes in bfloat16.
    """
    train_on_sure_labels(
        ctx, "irn", of, net, train, augment,
        label=partial(boundaries.confident_labels, foreground=foreground, background=background),
        build=partial(make, NETS[net["name"]], net),
        objective=partial(boundaries.IRNObjective, bf16=bf16),
    )  # fmt: skip


def check_psa(source: Source, stage: Stage) -> None:
    """Build the network once, before anything runs. Raises UserError if that or the labels or the crops cannot work."""
    affinities.check_alphas(stage.settings["alpha_low"], stage.settings["alpha_high"])
    _check_crop(make(NETS[stage.settings["net"]["name"]], stage.settings["net"]), stage)


def check_irn(source: Source, stage: Stage) -> None:
    """The same for IRN. Raises UserError also where a backbone from scratch is not to be trained."""
    net = stage.settings["net"]
    boundaries.check_scores(stage.settings["foreground"], stage.settings["background"])
    if net["freeze"] and net["backbone"]["weights"] is None:
        raise UserError("net.freeze: a backbone from scratch has to learn; set net.freeze: false or give it weights")
    _check_crop(make(NETS[net["name"]], net), stage)


def load_affinity(folder: Path) -> affinities.AffinityNet | boundaries.IRNet:
    """The trained network of a psa or irn stage, in evaluation mode on the CPU."""
    model = read_json(folder / MODEL)
    net: affinities.AffinityNet | boundaries.IRNet = make(NETS[model["net"]["name"]], without_weights(model["net"]))
    net.load_state_dict(load_file(folder / WEIGHTS))
    return net.eval()


def label_path(folder: Path, name: str) -> Path:
    """The file of the confident labels of an image."""
    return folder / "labels" / f"{name}.png"


def maps_of(folder: Path, name: str, size: Size) -> Maps:
    """The soft maps of an image of size (H, W). Raises UserError if they are missing, damaged, or of another size."""
    path = map_path(folder, name)
    stored = read_maps(path)
    if stored.size != size:
        raise UserError(
            f"{path}: made of {stored.size[0]} x {stored.size[1]} pixels, the image has {size[0]} x {size[1]}; "
            "delete the file and run the recipe again"
        )
    if not np.isfinite(stored.maps).all():
        raise UserError(f"{path}: has values that are not finite; delete the file and run the recipe again")
    return stored


def train_on_sure_labels(
    ctx: Context,
    name: str,
    of: Path,
    settings: Settings,
    train: Training,
    augment: Augment,
    *,
    label: Labeller,
    build: Callable[[], nn.Module],
    objective: Callable[[nn.Module], nn.Module],
) -> None:
    """Train what `build` makes of the settings on what is sure in the soft maps `of`, which stays as labels/*.png.

    label: what is sure. objective: of the network.
    """
    weights = ctx.out / WEIGHTS
    if not weights.exists():
        targets = _label_images(ctx, of, label)
        torch.manual_seed(seed_of(train.seed))
        net = build()
        target = partial(_confident, targets, len(ctx.source.classes))
        crops = Crops(ctx.source.split("train"), augment, seed=train.seed, target=target)
        fit(
            objective(net), crops, collate, train, ctx.out, ctx.devices,
            label=name, workers=ctx.workers, save_every=ctx.save_every, log_every=ctx.log_every,
        )  # fmt: skip
        if ctx.devices.main:
            write_json(ctx.out / MODEL, {"net": settings, "classes": list(ctx.source.classes)})
            save_weights(net, weights)
    ctx.devices.wait()
    if ctx.devices.main:
        (ctx.out / "last.ckpt").unlink(missing_ok=True)


def _label_images(ctx: Context, of: Path, label: Labeller) -> list[Path]:
    """Write the confident labels of every image that has none yet, images in parallel; all paths."""
    samples = ctx.source.split("train")
    paths = [label_path(ctx.out, name) for name in samples.names]
    mine = ctx.devices.share(len(samples))
    missing = [index for index in mine if not paths[index].exists()]

    compile_for(samples.tags[missing].sum(axis=1, dtype=int) + 1)  # not while the progress bar runs

    def one(index: int) -> None:
        image = samples.image(index)
        stored = maps_of(of, samples.names[index], (image.shape[0], image.shape[1]))
        write_mask(paths[index], label(image, stored.full(), torch.from_numpy(stored.classes)))

    made = ahead(one, missing, ctx.workers)
    for _ in progress.track(made, "sure labels", len(mine), len(mine) - len(missing), show=ctx.devices.main):
        pass
    ctx.devices.wait()
    return paths


def _confident(paths: list[Path], num_classes: int, index: int) -> Mask:
    return read_mask(paths[index], num_classes)


def _check_crop(net: affinities.AffinityNet | boundaries.IRNet, stage: Stage) -> None:
    side = stage.settings["augment"]["crop"] // net.stride
    if not pairs_of((side, side), net.radius, net.border):
        raise UserError(
            f"augment.crop: {stage.settings['augment']['crop']} pixels are {side} cells, too few for pairs; "
            f"take {net.stride * (2 * net.radius + 1)} or more"
        )
