"""Times PPC's contrast against a loop over classes, forward and backward: `python benchmarks/ppc.py`.

Both get the same features, maps and draws and must return the same losses and gradients; the ratio is of one run on one
machine. The loop does what one writes first: for every class its pixels by a mask, its negatives by picking prototypes
for each pixel, its sample by sorting, and each of the six losses on its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from tag2mask.core import Baseline, Batch, CamOutput, Progress, View
from tag2mask.methods.ppc import PPC
from tag2mask.ops.cams import min_max_norm

SEED = 1


class Features(Baseline):
    """Tells PPC how many channels there are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dims = {"last": channels}
        self.weight = torch.nn.Parameter(torch.zeros(()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--classes", type=int, default=20, help="foreground classes; background is one more")
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    method = PPC(size=8 * args.grid)
    method.bind(Features(128), args.classes)
    method.project = torch.nn.Identity()  # type: ignore[assignment]  # what is timed starts at the projected features
    batch, outs = synthetic(method, args.images, args.classes, args.grid, torch.device(args.device))
    inputs = [out.features["last"] for out in outs.values()]
    pair: list[tuple[str, Callable[[], Tensor]]] = [
        ("loop over classes", lambda: loop(method, batch, outs)),
        ("PPC", lambda: torch.stack(list(method.losses(batch, outs, Progress(0, 0, SEED)).values())).sum()),
    ]
    seconds: dict[str, list[float]] = {name: [] for name, _ in pair}
    results = {}
    for turn in range(args.repeats + 2):  # the first two warm up
        for name, work in pair:
            synchronise(args.device)
            start = time.perf_counter()
            value = work()
            results[name] = [value, *torch.autograd.grad(value, inputs)]
            synchronise(args.device)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    for mine, plain in zip(results["PPC"], results["loop over classes"], strict=True):
        if not torch.allclose(mine, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item()):
            raise SystemExit("the two differ")
    plain, mine = (median(seconds[name]) for name, _ in pair)
    print(f"{args.images} images, {args.grid}x{args.grid} pixels, {args.classes + 1} classes, forward and backward")
    print(f"device {args.device}, {torch.get_num_threads()} threads, median of {args.repeats}")
    print(f"loop over classes  {1e3 * plain:9.1f} ms")
    print(f"PPC                {1e3 * mine:9.1f} ms")
    print(f"ratio              {plain / mine:9.1f} x, same losses and gradients")


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def synthetic(
    method: PPC, images: int, classes: int, grid: int, device: torch.device
) -> tuple[Batch, dict[View, CamOutput]]:
    """Two or three tags an image, smooth maps, features that follow them a little."""
    tags = torch.zeros(images, classes).scatter_(1, torch.rand(images, classes).argsort(1)[:, :3], 1)
    size = 8 * grid
    valid = torch.ones(images, 1, size, size)
    batch = Batch(torch.zeros(images, 3, size, size), tags, torch.arange(images), valid).to(device)
    outs = {}
    for view in method.views:
        cams = F.interpolate(torch.randn(images, classes, 4, 4), size=(grid, grid), mode="bicubic").to(device)
        last = torch.einsum("bkhw,kd->bdhw", cams, torch.randn(classes, 128, device=device)) * 0.1
        last = (last + torch.randn_like(last)).requires_grad_()
        outs[view] = CamOutput(cams.mean((2, 3)), cams, {"last": last})
    return batch, outs


# --- the loop ---------------------------------------------------------------------------------------------------------


def loop(o: PPC, batch: Batch, outs: dict[View, CamOutput]) -> Tensor:
    """The same three losses, class by class."""
    one, two = (look(o, batch, outs[view]) for view in o.views)
    draws = torch.Generator(device=batch.tags.device).manual_seed(SEED)
    total = torch.zeros((), device=batch.tags.device)
    for (v, y, p), (_, other_y, other_p) in ((one, two), (two, one)):
        shape = (len(batch.tags), len(v) // len(batch.tags))
        pick = torch.rand(*shape, batch.tags.shape[1] + 1, generator=draws, device=v.device).flatten(0, 1)
        sample = torch.rand(*shape, generator=draws, device=v.device).flatten()
        total = total + o.alpha * contrast(o, v, y, other_p) + o.alpha * contrast(o, v, other_y, p)
        total = total + o.beta * intra(o, v, y, p, pick, sample)
    return total


def look(o: PPC, batch: Batch, out: CamOutput) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Unit pixel vectors [P D], labels [P], prototypes by class."""
    features = o.project(out.features["last"]).relu().permute(0, 2, 3, 1).flatten(0, 2)
    maps = min_max_norm(out.cams)
    scores = torch.cat([torch.full_like(maps[:, :1], o.background), maps * batch.tags[:, :, None, None]], dim=1)
    labels = scores.argmax(dim=1).flatten()
    prototypes = {}
    for c in labels.unique().tolist():
        mask = labels == c
        vectors = features[mask].detach()
        if c == 0:
            mean = vectors.mean(dim=0)
        else:
            weights = maps[:, c - 1].flatten()[mask]
            weights, best = weights.topk(min(o.top, len(weights)))
            mean = (weights[:, None] * vectors[best]).sum(dim=0) / weights.sum()
        prototypes[c] = F.normalize(mean, dim=0)
    return F.normalize(features, dim=1), labels, prototypes


def contrast(o: PPC, pixels: Tensor, labels: Tensor, prototypes: dict[int, Tensor]) -> Tensor:
    """Equations 6 and 7, and 4 in them."""
    losses = []
    for c in labels.unique().tolist():
        if c in prototypes:
            mine = pixels[labels == c]
            others = torch.stack([p for d, p in prototypes.items() if d != c]).expand(len(mine), -1, -1)
            losses.append(nce(mine, prototypes[c], others, o.temperature))
    return torch.cat(losses).mean()


def intra(
    o: PPC, pixels: Tensor, labels: Tensor, prototypes: dict[int, Tensor], pick: Tensor, sample: Tensor
) -> Tensor:
    """Equation 9 with semi-hard prototypes and hard pixels."""
    losses = []
    for c in labels.unique().tolist():
        mask = labels == c
        mine, half = pixels[mask], int(mask.sum().item()) // 2
        others = torch.stack([p for d, p in prototypes.items() if d != c])
        hard = max(1, int(o.hard_negatives * len(others) + 0.5))
        kept = max(1, int(o.kept_negatives * hard + 0.5))
        order = (mine.detach() @ others.T).argsort(dim=1, descending=True)[:, :hard]
        chosen = order.gather(1, pick[mask][:, :hard].argsort(dim=1)[:, :kept])
        terms = nce(mine, prototypes[c], others[chosen], o.temperature)
        losses.append(terms[sample[mask].argsort()[:half]])
        losses.append(terms[(mine.detach() @ prototypes[c]).argsort()[:half]])
    return torch.cat(losses).mean()


def nce(pixels: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Pixels [n D], positive [D], negatives [n M D] -> [n]."""
    near = torch.exp(pixels @ positive / temperature)
    far = torch.exp(torch.bmm(negatives, pixels.unsqueeze(2)).squeeze(2) / temperature)
    return -torch.log(near / (near + far.sum(dim=1)))


if __name__ == "__main__":
    main()
