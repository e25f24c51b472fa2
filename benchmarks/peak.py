"""How much memory a piece of work takes: for the benchmarks, imported by them."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch

RESET = Path("/proc/self/clear_refs")


def peak_megabytes(work: Callable[..., object], *given: object, warm_up: Callable[..., object] | None = None) -> float:
    """What `work(*given)` adds to the memory of a fresh process at its peak; nan where the system does not tell.

    warm_up: gets the same arguments first, so that what is loaded on first use is not counted. Both must be functions
    of a module.
    """
    if not RESET.exists():
        return float("nan")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (work, given, warm_up))


def _peak(work: Callable[..., object], given: tuple[object, ...], warm_up: Callable[..., object] | None) -> float:
    torch.set_num_threads(1)
    if warm_up is not None:
        warm_up(*given)
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")  # the peak starts again here
    before = _high_water()
    work(*given)
    return _high_water() - before


def _high_water() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
