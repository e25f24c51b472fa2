"""What a method adds to a training step: seconds of forward, losses, backward and after_step, beside its baseline's.

python benchmarks/step.py --backbone mobilenetv2_100 --size 224 --batch 8
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

import torch
import torch.nn.functional as F

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
}


def objective(base: str, methods: Parts, backbone: str, classes: int) -> Objective:
    network = {"name": backbone, "weights": None, "output_stride": 16}
    net = schema.check(BASELINES[base], {"backbone": network, **BASES[base]}, "net")
    parts = {name: schema.make(METHODS[name], schema.check(METHODS[name], s, name)) for name, s in methods.items()}
    return Objective(schema.make(BASELINES[base], net, num_classes=classes), parts, num_classes=classes).train()


def random_batch(count: int, size: int, classes: int) -> Batch:
    tags = F.one_hot(torch.arange(count) % classes, classes).float()
    tags[:, 0] = 1
    one = torch.ones(count, 1, size, size)
    images = F.interpolate(torch.randn(count, 3, 16, 16), size=(size, size), mode="bicubic")
    return Batch(images, tags, torch.arange(count), one, {"saliency": torch.rand(count, 1, size, size)})


def step_seconds(model: Objective, batch: Batch, step: int) -> float:
    start = time.perf_counter()
    losses = model(batch, Progress(1.0, 0.5, seed=step))
    model.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    model.after_step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    batch = random_batch(options.batch, options.size, options.classes)
    print(f"{options.backbone}, {options.batch} images of {options.size} px, {options.classes} classes, ", end="")
    print(f"{torch.get_num_threads()} threads, the best of {options.repeats}")
    for base in BASES:
        rivals: Mapping[str, Parts] = {base: {}, **{f"{base} + {name}": {name: {}} for name in METHODS}}
        models = {name: objective(base, parts, options.backbone, options.classes) for name, parts in rivals.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(options.repeats + 1):  # taking turns, so that a busy machine slows all; the first warms up
            for name, model in models.items():
                seconds = step_seconds(model, batch, repeat)
                times[name] += [seconds] if repeat else []
        best = {name: min(values) for name, values in times.items()}
        for name, seconds in best.items():
            print(f"  {name:<12} {1000 * seconds:7.0f} ms   {seconds / best[base]:.2f} x {base}")


if __name__ == "__main__":
    main()
