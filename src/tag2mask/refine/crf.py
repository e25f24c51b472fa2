"""Dense CRF: soft maps or labels follow the edges of the image. Arrays in, arrays out.

Kraehenbuehl and Koltun: Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials, NIPS 2011,
arXiv:1210.5644.

    crf = DenseCRF(image, **PRESETS["psa"])           # image [H W 3] in 0..255; what depends on it is made here, once
    marginals = crf(maps)                             # scores [L H W], background among them -> [L H W], sum 1
    marginals = crf.from_labels(mask, 21)             # labels [H W] in 0..20
    marginals = crf.from_unary(unary_from_softmax(probabilities), steps=5)

    E(x) = sum_i U_i(x_i) + sum_{i<j} [x_i != x_j] k(i, j)                                    (eq. 1 and 2, Potts)
    k(i, j) = w1 exp(-|p_i - p_j|^2 / 2 sxy^2) + w2 exp(-|p_i - p_j|^2 / 2 sxy^2 - |I_i - I_j|^2 / 2 srgb^2)     (eq. 3)

The usual conventions hold: kernels are normalised symmetrically and filtered on the permutohedral lattice, `compat` is
the weight w. Labels with equal unaries have equal marginals for ever: they are computed once, with their number in the
softmax, which is exact. 21 labels of which 3 occur cost what 4 cost.

Two back ends compute the same: `numba` on the CPU, one image at a time, which releases Python's lock, so that threads
work on several images at once; `torch` on any device, a batch at a time (`dense_crf`), and where numba is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tag2mask.errors import UserError
from tag2mask.ops import mean_field
from tag2mask.refine.unary import (
    Floats,
    checked_labels,
    equal_rows,
    label_energies,
    unary_from_labels,
    unary_from_softmax,
)

__all__ = [
    "PRESETS", "Backend", "Bilateral", "DenseCRF", "Gaussian", "compile_for", "dense_crf", "unary_from_labels",
    "unary_from_softmax",
]  # fmt: skip

Backend = Literal["auto", "numba", "torch"]
STEPS = 10


@dataclass(frozen=True)
class Gaussian:
    """Nearby pixels: standard deviation `sxy` in pixels, weight `compat`."""

    sxy: float = 3.0
    compat: float = 3.0


@dataclass(frozen=True)
class Bilateral:
    """Pixels that are near and look alike: standard deviations `sxy` in pixels, `srgb` in 0..255, weight `compat`."""

    sxy: float = 80.0
    srgb: float = 13.0
    compat: float = 10.0


class Kernels(TypedDict):
    """The kernels of a CRF, as arguments."""

    gaussian: Gaussian | None
    bilateral: Bilateral | None


# As the field uses them, all with 10 steps: PSA, SEAM, EPS and what follows them on scores of maps; IRN and HSC on
# labels with gt_prob 0.7; DeepLab (and its like) on the softmax of a trained segmenter.
PRESETS: dict[str, Kernels] = {
    "psa": {"gaussian": Gaussian(3, 3), "bilateral": Bilateral(80.0, 13.0, 10.0)},
    "irn": {"gaussian": Gaussian(3, 3), "bilateral": Bilateral(50, 5, 10)},
    "deeplab": {"gaussian": Gaussian(1, 3), "bilateral": Bilateral(67, 3, 4)},
}


class DenseCRF:
    """A dense CRF on one image, to be called for as many unaries as there are.

    image: array [H W C], values as in 0..255 for which `srgb` is meant. gaussian, bilateral: the kernels; one may be
    None. backend: "auto" is numba where it can be imported.
    Raises UserError for an image that is none, or a kernel that is not positive.
    """

    def __init__(
        self,
        image: ArrayLike,
        *,
        gaussian: Gaussian | None = PRESETS["psa"]["gaussian"],
        bilateral: Bilateral | None = PRESETS["psa"]["bilateral"],
        backend: Backend = "auto",
    ) -> None:
        colours = _numbers(image, 3, "the image must be an array [H W channels]")
        _check_finite(colours, "the image")
        self.size = (colours.shape[0], colours.shape[1])
        _check(gaussian, bilateral)
        self._filters: Any
        if _uses_numba(backend):
            self._filters = _compiled().Filters(colours, _kernels(gaussian, bilateral, colours.shape[2]))
        else:
            self._filters = _TorchFilters(torch.from_numpy(colours)[None], gaussian, bilateral)

    def __call__(
        self, scores: ArrayLike, *, steps: int = STEPS, counts: Sequence[int] | None = None, clip: float = 1e-5
    ) -> Floats:
        """Marginals [L H W] of scores [L H W] in 0..1, which need not sum to 1 (maps, with a background score).

        steps: of mean field. counts: label l stands for counts[l] labels alike, and the result is of one of them.
        clip: what a score counts at least. Raises UserError for scores that do not fit the image.
        """
        return self.from_unary(unary_from_softmax(scores, clip=clip), steps=steps, counts=counts)

    def from_labels(
        self, labels: ArrayLike, count: int, *, gt_prob: float = 0.7, unsure: int | None = None, steps: int = STEPS
    ) -> Floats:
        """Marginals [count H W] of labels [H W]; see `unary_from_labels`."""
        given, unknown = checked_labels(labels, count, gt_prob, unsure)
        there = np.bincount(given.ravel() if unknown is None else given[~unknown], minlength=count)
        names = np.flatnonzero(there)
        rows = names if len(names) == count else np.append(names, there.argmin())  # one for all that do not occur
        counts = np.ones(len(rows), np.float32)
        counts[len(names) :] = count - len(names)
        found = self._marginals(label_energies(given, unknown, rows, count, gt_prob), counts, steps)
        if len(rows) == count:
            return found
        row_of = np.full(count, len(names))
        row_of[names] = np.arange(len(names))
        every: Floats = found[row_of]
        return every

    def from_unary(self, unary: ArrayLike, *, steps: int = STEPS, counts: Sequence[int] | None = None) -> Floats:
        """Marginals [L H W] of energies [L H W], minus the logarithm of a probability up to a constant."""
        energies = _numbers(unary, 3, "scores must be an array [labels H W] with at least one label, the background")
        if counts is not None:
            several, group = _counts(counts, len(energies)), None
        else:
            first, group = equal_rows(energies)
            several = np.bincount(group).astype(np.float32)
            energies = energies if len(first) == len(energies) else energies[first]
        _check_finite(energies, "scores")
        found = self._marginals(energies, several, steps)
        return found if group is None or len(group) == len(found) else found[group]

    def _marginals(self, unary: Floats, counts: Floats, steps: int) -> Floats:
        if unary.shape[1:] != self.size:
            raise UserError(
                f"crf: scores of {unary.shape[1]} x {unary.shape[2]} pixels for an image of {self.size[0]} x "
                f"{self.size[1]}; bring them to the size of the image"
            )
        if steps < 0:
            raise UserError(f"crf: steps {steps} is negative")
        found: Floats = self._filters.marginals(unary, counts, steps)
        return found


def dense_crf(
    images: Tensor,
    unary: Tensor,
    *,
    counts: Tensor | None = None,
    gaussian: Gaussian | None = PRESETS["psa"]["gaussian"],
    bilateral: Bilateral | None = PRESETS["psa"]["bilateral"],
    steps: int = STEPS,
    backend: Backend = "auto",
) -> Tensor:
    """Marginals [B L H W] of a batch of images [B H W C] in 0..255 and energies [B L H W], on their device.

    counts [B L]: see `DenseCRF.from_unary`; 0 is a label that this image does not have. On a GPU the whole batch goes
    through together; on the CPU numba, if there is one, does one image per thread of torch's.
    Raises UserError for sizes that differ.
    """
    _check(gaussian, bilateral)
    if images.dim() != 4 or unary.dim() != 4 or images.shape[:3] != (len(unary), *unary.shape[2:]):
        raise UserError(
            f"crf: images {list(images.shape)} and unary {list(unary.shape)} do not fit; they must be [B H W channels] "
            "and [B labels H W]"
        )
    if counts is not None and counts.shape != unary.shape[:2]:
        raise UserError(f"crf: counts {list(counts.shape)} must be [B labels] = {list(unary.shape[:2])}")
    if unary.device.type == "cpu" and _uses_numba(backend):

        def one(index: int) -> Tensor:
            crf = DenseCRF(images[index].numpy(), gaussian=gaussian, bilateral=bilateral, backend="numba")
            own = None if counts is None else counts[index].tolist()
            return torch.from_numpy(crf.from_unary(unary[index].numpy(), steps=steps, counts=own))

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            found = list(pool.map(one, range(len(images))))
        return torch.stack(found) if found else torch.empty_like(unary)
    if not bool(unary.isfinite().all()) or not bool(images.isfinite().all()):
        raise UserError("crf: images or unary hold NaN or infinite values; correct what made them")
    filters = _TorchFilters(images.float(), gaussian, bilateral)
    return mean_field.mean_field(unary.float().flatten(2), filters.messages, steps, counts).view(unary.shape)


def compile_for(labels: Iterable[int]) -> None:
    """Compile, or read from disk, what numba needs for images with so many labels, so that it does not happen later."""
    if _compiled() is not None:
        for count in sorted({_compiled().lanes(number) for number in labels}):
            DenseCRF(np.zeros((2, 2, 3)))(np.ones((count, 2, 2)), counts=[1] * count)


class _TorchFilters:
    """The torch back end; of one image it offers what `Filters` does."""

    def __init__(self, images: Tensor, gaussian: Gaussian | None, bilateral: Bilateral | None) -> None:
        near, alike = mean_field.positions(images.movedim(-1, 1))
        points = {2: near, alike.shape[2]: alike}
        kernels = _kernels(gaussian, bilateral, images.shape[-1])
        self.messages = mean_field.Messages([(points[len(s)], s, weight) for s, weight in kernels], compact=True)

    def marginals(self, unary: Floats, counts: Floats, steps: int) -> Floats:
        energies = torch.from_numpy(unary).flatten(1)[None]
        several = torch.from_numpy(counts)[None]
        found: Floats = mean_field.mean_field(energies, self.messages, steps, several).view(unary.shape).numpy()
        return np.ascontiguousarray(found)


@cache
def _compiled() -> Any:
    """The numba back end, imported when it is first needed; None where numba does not run.

    It lags behind new releases of Python and numpy. Torch does the work then.
    """
    try:
        return import_module("tag2mask.refine.mean_field_numba")
    except ImportError:
        return None


def _uses_numba(backend: Backend) -> bool:
    if backend == "numba" and _compiled() is None:
        raise UserError("crf: numba cannot be imported here; install it, or take backend='torch'")
    return backend != "torch" and _compiled() is not None


def _kernels(
    gaussian: Gaussian | None, bilateral: Bilateral | None, channels: int
) -> list[tuple[tuple[float, ...], float]]:
    found: list[tuple[tuple[float, ...], float]] = []
    if gaussian is not None:
        found.append(((float(gaussian.sxy),) * 2, float(gaussian.compat)))
    if bilateral is not None:
        sigmas = (bilateral.sxy, bilateral.sxy, *[bilateral.srgb] * channels)
        found.append((tuple(map(float, sigmas)), float(bilateral.compat)))
    return found


def _check(gaussian: Gaussian | None, bilateral: Bilateral | None) -> None:
    if gaussian is None and bilateral is None:
        raise UserError("crf: no kernel; give gaussian or bilateral")
    for kernel in (gaussian, bilateral):
        for name, value in vars(kernel).items() if kernel else ():
            if not 0 < value < math.inf:
                raise UserError(f"crf: {name} {value} is not positive")


def _numbers(values: ArrayLike, dims: int, what: str) -> Floats:
    """A contiguous float32 array of `dims` dimensions, none of them empty."""
    try:
        found = np.ascontiguousarray(values, np.float32)
    except (TypeError, ValueError):
        raise UserError(f"crf: {what}, not {type(values).__name__}") from None
    if found.ndim != dims or 0 in found.shape:
        raise UserError(f"crf: {what}, not {list(found.shape)}")
    return found


def _check_finite(values: Floats, what: str) -> None:
    if not math.isfinite(float(values.sum(dtype=np.float64))):
        raise UserError(f"crf: {what} hold NaN or infinite values; correct what made them")


def _counts(counts: Sequence[int], labels: int) -> Floats:
    if len(counts) != labels or min(counts) < 0 or sum(counts) < 1:
        raise UserError(f"crf: counts {list(counts)} must be {labels} numbers, not negative, not all 0")
    return np.asarray(counts, np.float32)
