"""Times RCA's contrast and its writes to the memory against loops over regions: `python benchmarks/rca.py`.

Both get the same features, maps, memory and draws, and must give the same loss and gradients, and the same memory; the
ratios are of one run on one machine, of CPU time if there is one thread, as by default. The loops do what one writes
first: for every region draw a partner, mix the two, compare with all that is remembered, which is normalised for that,
and take positives and negatives by masks; for every image and every class of it mix the vector into the class's next
slot. RCA computes as many regions for each image as the image with most classes has (5 on VOC), whether they are there
or not; on a CPU that is most of its time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from tag2mask.core import Baseline
from tag2mask.methods.rca import RCA
from tag2mask.ops.memory import Memory
from tag2mask.ops.regions import Regions

SEED, SLOTS = 1, 500


class Features(Baseline):
    """Tells RCA how many channels there are."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.dims = {"last": channels}
        self.classifier = torch.nn.Conv2d(channels, classes, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--most", type=int, default=5, help="classes of the image that has most; all others have two")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    method = RCA(capacity=SLOTS)
    method.bind(Features(args.channels, args.classes), args.classes)
    method = method.to(args.device)
    method.memory.rows.normal_()
    method.memory.writes.fill_(3)
    print(f"{args.classes} x {SLOTS} x {args.channels} remembered, two regions an image")
    print(f"device {args.device}, {torch.get_num_threads()} threads, median of {args.repeats}")

    tags, regions = synthetic(args.images, args.classes, args.channels, args.most, args.device)
    vectors = regions.vectors.requires_grad_()

    def contrast(loss: Tensor) -> list[Tensor]:
        return [loss, *torch.autograd.grad(loss, vectors)]

    compare(
        f"contrast, {int(tags.sum())} regions, forward and backward",
        lambda: contrast(loop_contrast(method, regions, tags)),
        lambda: contrast(method._contrast(regions, tags, SEED)),
        method.memory,
        args.repeats,
    )
    for images in (args.images, 8 * args.images):
        tags, regions = synthetic(images, args.classes, args.channels, args.most, args.device)
        write_all(method.memory, regions, tags, args.repeats)


def write_all(memory: Memory, regions: Regions, tags: Tensor, repeats: int) -> None:
    index = torch.arange(len(tags), device=tags.device)

    def looped() -> list[Tensor]:
        loop_write(memory, regions, tags)
        return [memory.rows, memory.writes, memory.cursor]

    def at_once() -> list[Tensor]:
        memory.stage(regions.vectors, regions.exist, index, regions.classes)
        memory.write()
        return [memory.rows, memory.writes, memory.cursor]

    compare(f"writes, {int(tags.sum())} regions", looped, at_once, memory, repeats)


def synthetic(images: int, classes: int, channels: int, most: int, device: str) -> tuple[Tensor, Regions]:
    """Two tags an image, [B K], and their regions among `most` places, [B M ...]."""
    tags = torch.zeros(images, classes).scatter_(1, torch.rand(images, classes).argsort(1)[:, :2], 1).to(device)
    exist, chosen = tags.topk(most, dim=1)
    vectors = torch.randn(images, most, channels, device=device)
    return tags, Regions(vectors, chosen, exist > 0, torch.full_like(chosen, -1))


def compare(
    title: str, slow: Callable[[], list[Tensor]], fast: Callable[[], list[Tensor]], memory: Memory, repeats: int
) -> None:
    """Time both from the same memory, in turns, and check that results are the same."""
    before = {name: x.clone() for name, x in memory.state_dict().items()}
    clock = time.perf_counter if memory.rows.is_cuda or torch.get_num_threads() > 1 else time.thread_time
    seconds: dict[str, list[float]] = {"loops": [], "RCA": []}
    results = {}
    for turn in range(repeats + 2):  # the first two warm up
        for name, work in (("loops", slow), ("RCA", fast)):
            memory.load_state_dict(before)
            synchronise(memory.rows)
            start = clock()
            found = work()
            synchronise(memory.rows)
            if turn >= 2:
                seconds[name].append(clock() - start)
            results[name] = [x.clone() for x in found]
    for plain, mine in zip(results["loops"], results["RCA"], strict=True):
        if not torch.allclose(plain.float(), mine.float(), rtol=1e-4, atol=1e-5 * plain.abs().max().item()):
            raise SystemExit(f"{title}: the two differ")
    memory.load_state_dict(before)
    loops, rca = (median(times) for times in seconds.values())
    print(f"{title}: loops {1e3 * loops:.2f} ms, RCA {1e3 * rca:.2f} ms, ratio {loops / rca:.1f} x")


def synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


# --- the loops --------------------------------------------------------------------------------------------------------


def loop_contrast(o: RCA, regions: Regions, tags: Tensor) -> Tensor:
    """Equations 4 to 6, region by region."""
    images, most = regions.classes.shape
    draws = torch.Generator(device=tags.device).manual_seed(SEED)
    uniform = torch.rand(images, most, 2 * o.mix - 1, generator=draws, device=tags.device)
    to_image = torch.rand(images, most, images, generator=draws, device=tags.device).tolist()
    to_class = torch.rand(images, most, most, generator=draws, device=tags.device).tolist()
    omega = uniform.median(dim=2).values.tolist()
    classes, exist = regions.classes.tolist(), regions.exist.tolist()
    tagged, class_of = tags.tolist(), o.memory.class_of
    losses = []
    for i in range(images):
        mine = []
        for m in range(most):
            if not exist[i][m]:
                continue
            own, vector = classes[i][m], regions.vectors[i, m]
            choice = {
                j: possible
                for j in range(images)
                if j != i and (possible := [n for n in range(most) if exist[j][n] and not tagged[i][classes[j][n]]])
            }
            j = max(choice, key=lambda j: to_image[i][m][j])
            n = max(choice[j], key=lambda n: to_class[i][m][n])
            w = omega[i][m]
            mixed = F.normalize(w * vector + (1 - w) * regions.vectors[j, n], dim=0)
            similarity = torch.exp(F.normalize(o.memory.rows, dim=1) @ mixed / o.temperature)
            terms = []
            for k in (own, classes[j][n]):
                positive, negative = similarity[class_of == k], similarity[class_of != k]
                terms.append(-torch.log(positive / (positive + negative.sum())).mean())
            mine.append(w * terms[0] + (1 - w) * terms[1])
        losses.append(torch.stack(mine).mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def loop_write(memory: Memory, regions: Regions, tags: Tensor) -> None:
    """Equation 3, region by region."""
    place = [{k: m for m, k in enumerate(row)} for row in regions.classes.tolist()]
    for b in range(len(tags)):
        for k in range(tags.shape[1]):
            if tags[b, k] == 1:
                slot, new = k * SLOTS + memory.cursor[k], regions.vectors[b, place[b][k]]
                memory.rows[slot] = memory.momentum * memory.rows[slot] + (1 - memory.momentum) * new
                memory.writes[slot] += 1
                memory.cursor[k] = (memory.cursor[k] + 1) % SLOTS


if __name__ == "__main__":
    main()
