"""Stage: soft maps -> index masks, by a background score and a dense CRF on every image."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from tag2mask import progress
from tag2mask.data.maps import Maps
from tag2mask.data.same_size import ahead, same_size_batches
from tag2mask.data.source import IGNORE, Mask, Samples
from tag2mask.export import write_mask
from tag2mask.ops.cams import to_mask
from tag2mask.refine.crf import (
    PRESETS,
    Bilateral,
    DenseCRF,
    Gaussian,
    Kernels,
    compile_for,
    dense_crf,
    unary_from_labels,
    unary_from_softmax,
)
from tag2mask.schema import Input
from tag2mask.stages.affinity import maps_of
from tag2mask.stages.background import Background, settled
from tag2mask.stages.context import BatchSize, Context
from tag2mask.stages.labels import mask_path

Preset = Literal["psa", "irn", "deeplab"]
Unary = Literal["scores", "labels"]
UNARY: dict[Preset, Unary] = {"psa": "scores", "irn": "labels", "deeplab": "scores"}
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Refinement:
    """What a CRF is made with, besides an image and its maps."""

    background: Background
    unary: Unary
    gt_prob: float
    steps: int
    kernels: Kernels
    sure: float = 0.0

    def energies(self, stored: Maps) -> NDArray[np.float32]:
        """Energies [1+P H W] of the background and the P tagged classes."""
        maps = stored.full()
        ground = torch.as_tensor(self.background(maps))
        if self.unary == "labels":
            seeds = to_mask(maps, torch.arange(len(maps)), ground)
            return unary_from_labels(seeds.numpy(), 1 + len(maps), gt_prob=self.gt_prob)
        return unary_from_softmax(torch.cat([ground.expand(1, *maps.shape[1:]), maps]).numpy())

    def mask(self, best: NDArray[np.intp], share: NDArray[np.float32], stored: Maps) -> Mask:
        """Places among background and tagged classes [H W] and their probabilities -> index mask."""
        names = np.concatenate([[0], stored.classes + 1]).astype(np.uint8)
        return np.where(share < self.sure, np.uint8(IGNORE), names[best])


def crf(
    ctx: Context,
    *,
    of: Annotated[Path, Input(("cams", "clip_es", "pacam", "attention", "amn_maps", "walk"))],
    background: Background,
    preset: Preset = "psa",
    unary: Unary | None = None,
    gt_prob: Annotated[float, Field(gt=0, lt=1)] = 0.7,
    steps: Annotated[int, Field(ge=0)] = 10,
    gaussian: tuple[Positive, Positive] | None = None,
    bilateral: tuple[Positive, Positive, Positive] | None = None,
    sure: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    batch: BatchSize = 8,
) -> None:
    """Pseudo-masks: labels that follow the edges of the image, found by mean field in a dense CRF.

    of: the soft maps. background: the background score, or how it is chosen. preset: kernels and unary as in PSA
    (scores), IRN (labels) or DeepLab (scores). unary: "scores" of background and maps, or the "labels" that win, each
    with probability gt_prob. steps: of mean field. gaussian: other numbers than the preset's, [pixels, weight];
    bilateral: [pixels, colours, weight]. sure: pixels whose label is less probable get 255, which no training learns
    from and every score counts as missed. batch: images of the same size that go through a GPU together; a CPU does one
    image per core.
    """
    kernels = Kernels(
        gaussian=PRESETS[preset]["gaussian"] if gaussian is None else Gaussian(*gaussian),
        bilateral=PRESETS[preset]["bilateral"] if bilateral is None else Bilateral(*bilateral),
    )
    refine = Refinement(background, unary or UNARY[preset], gt_prob, steps, kernels, sure)
    samples = ctx.source.split("train")
    outputs = [mask_path(ctx.out, name) for name in samples.names]
    mine = ctx.devices.share(len(samples))
    missing = [index for index in mine if not outputs[index].exists()]

    def make(refine: Refinement, among: Sequence[int], wanted: Sequence[int]) -> Iterator[tuple[int, Mask]]:
        if ctx.devices.device.type in ("cpu", "mps"):
            _compile(1 + samples.tags[list(wanted)].sum(axis=1))
            return _on_cores(ctx, of, refine, samples, wanted)
        return _on_device(ctx, of, refine, samples, among, frozenset(wanted), batch)

    def at_score(score: float, few: Sequence[int]) -> Iterator[tuple[int, Mask]]:
        return make(replace(refine, background=Background(score=score), sure=0.0), few, few)

    with _one_thread_each():
        refine = replace(refine, background=settled(ctx, of, background, at_score))
        if not missing:
            return
        made = make(refine, mine, missing)
        done = len(mine) - len(missing)
        for index, mask in progress.track(made, "crf", len(mine), done, show=ctx.devices.main):
            write_mask(outputs[index], mask)


def _on_cores(
    ctx: Context, of: Path, refine: Refinement, samples: Samples, missing: Sequence[int]
) -> Iterator[tuple[int, Mask]]:
    """One image per core; what is compiled releases Python's lock."""

    def one(index: int) -> tuple[int, Mask]:
        image = samples.image(index)
        stored = maps_of(of, samples.names[index], (image.shape[0], image.shape[1]))
        if len(stored.classes) == 0:
            return index, np.zeros(image.shape[:2], np.uint8)
        found = DenseCRF(image, **refine.kernels)
        energies = refine.energies(stored)
        marginals = found.from_unary(energies, steps=refine.steps, counts=[1] * len(energies))
        return index, refine.mask(marginals.argmax(axis=0), marginals.max(axis=0), stored)

    return ahead(one, missing, _cores(ctx.devices.world) if ctx.workers else 0)


def _on_device(
    ctx: Context, of: Path, refine: Refinement, samples: Samples, mine: Sequence[int], missing: Set[int], batch: int
) -> Iterator[tuple[int, Mask]]:
    """Batches of one size, the same whatever is missing; classes that an image does not have count zero times."""
    for indices, pixels in same_size_batches(samples.image, mine, batch, ctx.workers):
        if missing.isdisjoint(indices):
            continue
        size = pixels.shape[1], pixels.shape[2]
        stored = [maps_of(of, samples.names[index], size) for index in indices]
        labels = 1 + max(len(maps.classes) for maps in stored)
        energies, counts = torch.zeros(len(indices), labels, *size), torch.zeros(len(indices), labels)
        for row, maps in enumerate(stored):
            energies[row, : 1 + len(maps.classes)] = torch.from_numpy(refine.energies(maps))
            counts[row, : 1 + len(maps.classes)] = 1
        images, energies, counts = (x.to(ctx.devices.device) for x in (torch.from_numpy(pixels), energies, counts))
        marginals = dense_crf(images, energies, counts=counts, steps=refine.steps, backend="torch", **refine.kernels)
        shares, best = (x.cpu().numpy() for x in marginals.max(dim=1))
        for row, (index, maps) in enumerate(zip(indices, stored, strict=True)):
            if index in missing:
                yield index, refine.mask(best[row], shares[row], maps)


def _compile(labels: NDArray[np.integer]) -> None:
    """Compile before the progress bar starts: what takes seconds once must not count as images."""
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(compile_for, labels.tolist())
        try:
            job.result(timeout=3)
        except TimeoutError:
            progress.say("crf: start compiling, which happens once")
            job.result()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Images are the parallel work here; threads within torch would only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cores(processes: int) -> int:
    """The cores that this process may use, its share if there are several processes."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // processes)
