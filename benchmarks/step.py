"""What a method adds to a training step, beside its baseline: time and memory.

    python benchmarks/step.py --backbone mobilenetv2_100 --size 224 --batch 8

Time is of forward, losses, backward and after_step. "state" are the parameters and buffers, "peak" is what making the
model and two steps take at most. Memories of past batches are as large as VOC's training set of 1,464 images makes them
(`--remembered`), a second view has 128 pixels, as in PPC and HSC, RCM + MAM has scales 0.5, 1 and 2, as in the paper.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from peak import peak_megabytes

from tag2mask import schema
from tag2mask.baselines import BASELINES
from tag2mask.core import Batch, Objective, Progress
from tag2mask.methods import METHODS

Parts = Mapping[str, Mapping[str, object]]
HALF = 128  # side of the second view, as in PPC and HSC

BASES: Mapping[str, Mapping[str, object]] = {
    "cam": {},
    "seam": {"size": HALF, "resolution": "grid"},
    "eps": {"pcm": True, "size": HALF},
    "oaa": {},
}


def objective(base: str, methods: Parts, options: argparse.Namespace) -> Objective:
    network = {"name": options.backbone, "weights": None, "output_stride": 16}
    net = schema.check(BASELINES[base], {"backbone": network, **BASES[base]}, "net")
    parts = {name: schema.make(METHODS[name], schema.check(METHODS[name], s, name)) for name, s in methods.items()}
    made = schema.make(BASELINES[base], net, num_classes=options.classes)
    model = Objective(made, parts, num_classes=options.classes).to(options.device).train()
    model.remember(random_tags(options.remembered, options.classes))
    return model


def random_tags(count: int, classes: int) -> torch.Tensor:
    """Class 0 and one other for every image."""
    tags = F.one_hot(torch.arange(count) % classes, classes).float()
    tags[:, 0] = 1
    return tags


def random_batch(options: argparse.Namespace) -> Batch:
    count, size = options.batch, options.size
    one = torch.ones(count, 1, size, size)
    images = F.interpolate(torch.randn(count, 3, 16, 16), size=(size, size), mode="bicubic")
    place = torch.eye(2, 3).expand(count, 2, 3)
    side = {"saliency": torch.rand(count, 1, size, size)}
    batch = Batch(images, random_tags(count, options.classes), torch.arange(count), one, side, place=place)
    return batch.to(torch.device(options.device))


def step_seconds(model: Objective, batch: Batch, step: int) -> float:
    synchronise(batch)
    start = time.perf_counter()
    losses = model(batch, Progress(10.0, 0.5, seed=step))
    model.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    model.after_step()
    synchronise(batch)
    return time.perf_counter() - start


def synchronise(batch: Batch) -> None:
    if batch.images.is_cuda:
        torch.cuda.synchronize()


def two_steps(base: str, methods: Parts, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    batch, model = random_batch(options), objective(base, methods, options)
    for step in range(2):
        step_seconds(model, batch, step)


def peak(base: str, methods: Parts, options: argparse.Namespace) -> float:
    """Megabytes at most: of the device, or of a process of its own."""
    if options.device == "cpu":
        return peak_megabytes(two_steps, base, methods, options)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    two_steps(base, methods, options)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def state_megabytes(model: Objective) -> float:
    return sum(x.numel() * x.element_size() for x in model.state_dict().values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--remembered", type=int, default=1464)
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    batch = random_batch(options)
    print(f"{options.backbone}, {options.batch} images of {options.size} px, {options.classes} classes, ", end="")
    print(f"{options.device}, {torch.get_num_threads()} threads, the best of {options.repeats}")
    for base in options.bases:
        rivals: Mapping[str, Parts] = {base: {}, **{f"{base} + {name}": {name: {}} for name in METHODS}}
        models = {name: objective(base, parts, options) for name, parts in rivals.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(options.repeats + 1):  # taking turns, so that a busy machine slows all; the first warms up
            for name, model in models.items():
                seconds = step_seconds(model, batch, repeat)
                times[name] += [seconds] if repeat else []
        best = {name: min(values) for name, values in times.items()}
        states = {name: state_megabytes(model) for name, model in models.items()}
        del models
        peaks = {name: peak(base, parts, options) for name, parts in rivals.items()}
        for name in rivals:
            print(
                f"  {name:<14}{1000 * best[name]:7.0f} ms {best[name] / best[base]:5.2f} x"
                f"{states[name] - states[base]:+9.1f} MB{peaks[name] - peaks[base]:+9.0f} MB"
                if name != base
                else f"  {name:<14}{1000 * best[name]:7.0f} ms        {states[name]:9.1f} MB{peaks[name]:9.0f} MB"
            )


if __name__ == "__main__":
    main()
