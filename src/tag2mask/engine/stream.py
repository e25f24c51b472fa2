"""Batches as a pure function of (seed, step): any number of processes, any restart, the same data."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler


class StepSampler(Sampler[list[tuple[int, int]]]):
    """This process's share [(epoch, index), ...] of the global batches of steps start..total-1.

    The data are an endless stream of shuffled epochs cut into batches: every image comes once an epoch, none is
    dropped, and a batch may be larger than the data set.
    """

    def __init__(
        self, length: int, batch: int, *, start: int, total: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.length, self.batch, self.start, self.total = length, batch, start, total
        self.seed, self.rank, self.world = seed, rank, world

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        @lru_cache(maxsize=1)  # places only go up
        def order(epoch: int) -> NDArray[np.int64]:
            return np.random.default_rng((self.seed, epoch)).permutation(self.length)

        for step in range(self.start, self.total):
            places = range(step * self.batch + self.rank, (step + 1) * self.batch, self.world)
            yield [(place // self.length, int(order(place // self.length)[place % self.length])) for place in places]


def stream(
    dataset: Dataset[Any], sampler: StepSampler, collate: Callable[[list[Any]], Any], *, workers: int, pin: bool
) -> DataLoader[Any]:
    """A data loader over the sampler's batches; `dataset[(epoch, index)]` is one augmented sample."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=_signals_of_a_worker if workers else None,
        persistent_workers=workers > 0,
    )


def _signals_of_a_worker(_worker: int) -> None:
    """Ctrl-C is the main process's to handle: workers that also die of it bury its message. SIGTERM ends a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
