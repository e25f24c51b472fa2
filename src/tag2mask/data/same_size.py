"""Images for inference: decoded ahead by threads, batched with others of exactly their size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
R = TypeVar("R")


def ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`map(function, items)` computed by threads a little ahead of its reader, in order, with bounded memory."""
    if threads < 1:
        yield from map(function, items)
        return
    waiting = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        queue = [pool.submit(function, item) for item in islice(waiting, 2 * threads)]
        while queue:
            yield queue.pop(0).result()
            queue += [pool.submit(function, item) for item in islice(waiting, 1)]


def same_size_batches(
    image: Callable[[int], NDArray[np.uint8]], indices: Iterable[int], batch: int, threads: int
) -> Iterator[tuple[list[int], NDArray[np.uint8]]]:
    """(indices [n], images [n H W 3]) with n <= batch; every index comes once.

    At most 4 batches of images wait for others of their size; beyond that, the oldest group goes as it is. The batches
    depend on the images alone, never on what has been finished before: a resumed run forms the same ones, so its
    results are bit-identical.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = {}
    for index, pixels in ahead(lambda i: (i, image(i)), indices, threads):
        group = waiting.setdefault(pixels.shape, [])
        group.append((index, pixels))
        if len(group) == batch:
            yield _joined(waiting.pop(pixels.shape))
        elif sum(map(len, waiting.values())) > 4 * batch:
            yield _joined(waiting.pop(next(iter(waiting))))
    for group in waiting.values():
        yield _joined(group)


def _joined(group: list[tuple[int, NDArray[np.uint8]]]) -> tuple[list[int], NDArray[np.uint8]]:
    return [index for index, _ in group], np.stack([pixels for _, pixels in group])
