"""What every stage is given besides its settings, and the verbs that several stages share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from tag2mask import progress
from tag2mask.data.augment import normalise
from tag2mask.data.same_size import same_size_batches
from tag2mask.data.source import Source
from tag2mask.engine import Devices

BatchSize = Annotated[int, Field(ge=1)]
Scales = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=1)]


@dataclass(frozen=True)
class Context:
    """out: the stage's folder. source: the data set. The rest cannot change the numbers: devices; workers for
    loading; save_every and log_every in steps."""

    out: Path
    source: Source
    devices: Devices
    workers: int = 2
    save_every: int = 200
    log_every: int = 10


def images_to_do(
    label: str,
    image: Callable[[int], NDArray[np.uint8]],
    outputs: Sequence[Path],
    devices: Devices,
    *,
    workers: int,
    batch: int,
) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, normalised images [n 3 H W] on the device) of batches that still lack an output file.

    Image i is wanted if outputs[i] does not exist. Each process gets its own share. Finished batches are skipped;
    a batch of which only a part was written is done again, so that results do not depend on kills.
    """
    mine = devices.share(len(outputs))
    finished = sum(outputs[i].exists() for i in mine)
    if finished == len(mine):
        return
    with progress.bar(label, len(mine), 0, devices.main) as advance:
        for indices, pixels in same_size_batches(image, mine, batch, workers):
            if not all(outputs[i].exists() for i in indices):
                stacked = torch.from_numpy(pixels).permute(0, 3, 1, 2)
                yield indices, normalise(stacked).to(devices.device)
            advance(len(indices))
