"""A training step of SEAM + PPC at the papers' size: where its time goes, and its memory.

    python benchmarks/full_size.py                                # ResNet38, 448 px, one image; about a minute on a CPU
    python benchmarks/full_size.py --device cuda --batch 8 --bf16

The trunk is the backbone over both views; the PCM and the losses are what comes after it; backward is of everything.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peak import peak_megabytes
from step import random_batch, synchronise
from torch import nn

from tag2mask import schema
from tag2mask.baselines import BASELINES
from tag2mask.core import Batch, Objective, Progress
from tag2mask.methods import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet38")
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="forward passes in bfloat16")
    options = parser.parse_args()
    torch.manual_seed(0)
    batch, model = random_batch(options), objective(options)
    parts = Split(model, batch)
    runs = [parts.step(number) for number in range(options.repeats + 1)][1:]  # the first one warms up
    best = min(runs, key=lambda run: sum(run.values()))
    total = sum(best.values())
    print(
        f"SEAM + PPC, {options.backbone}, {options.batch} images of {options.size} px, {options.classes} classes, "
        f"{options.device}, {torch.get_num_threads()} threads, {'bfloat16' if options.bf16 else 'float32'}, "
        f"the best of {options.repeats}"
    )
    for name, seconds in best.items():
        print(f"  {name:<9} {1000 * seconds:8.0f} ms  {100 * seconds / total:5.1f} %")
    print(f"  {'step':<9} {1000 * total:8.0f} ms  {options.batch / total:.2f} images/s")
    del model, parts
    peak = peak_megabytes(whole_step, options) if options.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    print(f"  peak      {peak:8.0f} MB, network and two steps, without an optimiser's state")


def objective(options: argparse.Namespace) -> Objective:
    network = {"name": options.backbone, "weights": None, "output_stride": 8}
    net = schema.check(BASELINES["seam"], {"backbone": network, "size": 128}, "net")
    ppc = schema.make(METHODS["ppc"], schema.check(METHODS["ppc"], {}, "ppc"))
    made = schema.make(BASELINES["seam"], net, num_classes=options.classes)
    model = Objective(made, {"ppc": ppc}, num_classes=options.classes, bf16=options.bf16)
    return model.to(options.device).train()


def whole_step(options: argparse.Namespace) -> None:
    parts = Split(objective(options), random_batch(options))
    for number in range(2):
        parts.step(number)


class Split:
    """Times the parts of a step by watching the calls of encode and of the PCM."""

    def __init__(self, model: Objective, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.seconds: dict[str, float] = {}
        net: Any = model.net
        net.encode = self._watched("trunk", net.encode)
        pcm: nn.Module = net.pcm
        pcm.forward = self._watched("PCM", pcm.forward)

    def step(self, number: int) -> dict[str, float]:
        """Seconds by part."""
        self.seconds = {"trunk": 0.0, "PCM": 0.0}
        with self._clock("forward"):
            losses = torch.stack(list(self.model(self.batch, Progress(1.0, 0.5, seed=number)).values())).sum()
        self.model.zero_grad()
        with self._clock("backward"):
            losses.backward()
        found = self.seconds
        rest = found["forward"] - found["trunk"] - found["PCM"]
        return {"trunk": found["trunk"], "PCM": found["PCM"], "losses": rest, "backward": found["backward"]}

    def _watched(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            with self._clock(name):
                return work(*given)

        return timed

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        synchronise(self.batch)
        start = time.perf_counter()
        yield
        synchronise(self.batch)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


if __name__ == "__main__":
    main()
