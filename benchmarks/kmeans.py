"""Times k-means within 20 classes at once against scikit-learn, class by class: `python benchmarks/kmeans.py`.

1000 entries of 256 numbers into 50 clusters: what CPAL does at the start of an epoch. Both get the same entries, take
turns in one run, start by greedy k-means++ with one start, and end when no entry changes its cluster; starts are drawn
differently, so the sums of squared distances (inertia) are compared over several seeds. Needs
`pip install tag2mask[bench]`; without it only ours is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import mean, median

import torch
from torch import Tensor

from tag2mask.ops.kmeans import kmeans

try:
    from sklearn.cluster import KMeans
except ImportError:
    KMeans = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--entries", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=7, help="another seed each time")
    parser.add_argument("--device", default="cpu", help="of ours; scikit-learn is on the CPU")
    args = parser.parse_args()

    torch.manual_seed(0)
    points = entries(args.classes, args.entries, args.dim)
    there = points.to(args.device)
    present = torch.ones(args.classes, args.entries, dtype=torch.bool, device=args.device)

    def ours(seed: int) -> Tensor:
        return kmeans(there, present, args.clusters, seed=seed)[0].cpu()

    def theirs(seed: int) -> Tensor:
        one = [KMeans(args.clusters, n_init=1, tol=0, random_state=seed).fit(rows.numpy()) for rows in points]
        return torch.stack([torch.from_numpy(found.cluster_centers_) for found in one])

    rivals: dict[str, Callable[[int], Tensor]] = {"at once": ours}
    if KMeans is not None:
        rivals["class by class"] = theirs
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    inertia: dict[str, list[float]] = {name: [] for name in rivals}
    for seed in range(args.repeats + 1):  # the first warms up
        for name, work in rivals.items():
            start = time.perf_counter()
            centres = work(seed)
            taken = time.perf_counter() - start
            if seed:
                seconds[name].append(taken)
                inertia[name].append(torch.cdist(points, centres).amin(dim=2).square().sum().item())
    print(f"{args.classes} classes x {args.entries} entries x {args.dim} into {args.clusters}, ", end="")
    print(f"device {args.device}, {torch.get_num_threads()} threads, median of {args.repeats} seeds")
    for name in rivals:
        print(f"  {name:<15} {1000 * median(seconds[name]):8.1f} ms   inertia {mean(inertia[name]):.6g}")
    if KMeans is None:
        print("  scikit-learn is not installed: pip install tag2mask[bench]")
        return
    print(f"  ratio           {median(seconds['class by class']) / median(seconds['at once']):8.2f} x faster, ", end="")
    print(f"inertia {mean(inertia['at once']) / mean(inertia['class by class']):.4f} of theirs")


def entries(classes: int, count: int, dim: int) -> Tensor:
    """[classes count dim]: more groups than clusters, and wide ones, as attributes of things are."""
    groups = torch.randn(classes, 80, dim)
    own = torch.randint(80, (classes, count, 1)).expand(-1, -1, dim)
    return groups.gather(1, own) + 0.8 * torch.randn(classes, count, dim)


if __name__ == "__main__":
    main()
