"""The random walk against dense powers: CPU seconds, memory, and how many labels are the same.

The rival is what is usually done, on the CPU: a dense matrix of all pairs of cells, squared eight times (256 steps),
applied to the maps. IRN: boundaries on a grid of stride 4, radius 5, beta 10. PSA: 448 features a cell on a grid of
stride 8, radius 5, beta 8, 21 rows; there making the affinities counts, too. Inputs come from a drawn scene: its edges,
its colours, and its blurred mask in place of CAMs.

The dense powers of IRN's grid take minutes and 2 GB, so by default they are measured on a grid of half the sides, and
for the whole grid only estimated: they grow with the cube of the number of cells. `--rival dense` measures them.

    python benchmarks/walk.py                    # about 20 s
    python benchmarks/walk.py --rival dense      # some minutes
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from peak import peak_megabytes
from torch import Tensor

from tag2mask.data.scenes import Scenes
from tag2mask.refine.pairs import pairs_of, path
from tag2mask.refine.walk import Affinity

HEIGHT, WIDTH, CHANNELS, ROWS = 375, 500, 448, 21
STEPS, SQUARINGS, RADIUS = 256, 8, 5
IRN, SMALL, PSA = "IRN 94 x 125", "IRN 47 x 63", "PSA 47 x 63"
Case = tuple[Tensor, Tensor]


def inputs(name: str) -> Case:
    """(boundaries [h w] or features [D h w], maps [C h w])."""
    size = tuple(int(word) for word in name.split()[1::2])
    samples = Scenes(images=8, test=1, size=WIDTH).split("train")
    image = torch.from_numpy(samples.image(0)[:HEIGHT]).permute(2, 0, 1)[None].float() / 255
    mask = torch.from_numpy(samples.mask(0)[:HEIGHT])  # type: ignore[misc]
    present = [int(c) for c in mask.unique() if c]
    truth = torch.stack([mask == c for c in present])[None].float()
    blurred = F.interpolate(F.avg_pool2d(truth, 41, 1, 20, count_include_pad=False), size, mode="area")[0]
    small = F.interpolate(image, size, mode="area")
    if not name.startswith("PSA"):
        step = F.pad(small, (1, 1, 1, 1), mode="replicate")
        across = (step[..., 1:-1, 2:] - step[..., 1:-1, :-2]).abs().amax(dim=1)
        down = (step[..., 2:, 1:-1] - step[..., :-2, 1:-1]).abs().amax(dim=1)
        return (3 * torch.maximum(across, down)[0]).clamp(0.001, 0.999), blurred
    mixer = torch.randn(CHANNELS, 3, generator=torch.Generator().manual_seed(0))
    features = torch.einsum("dc,chw->dhw", mixer, small[0] - small.mean())
    rows = torch.rand(ROWS, *size, generator=torch.Generator().manual_seed(1)) / 10
    rows[0], rows[1 : 1 + len(blurred)] = (1 - blurred.amax(dim=0)) ** 4, blurred
    return features, rows


def ours(name: str, case: Case) -> Tensor:
    given, maps = case
    if name.startswith("PSA"):
        return Affinity.from_features(given, radius=RADIUS, border="psa").propagate(maps, beta=8, steps=STEPS)
    return Affinity.from_edges(given, radius=RADIUS).propagate(maps, beta=10, steps=STEPS)


def dense(name: str, case: Case) -> Tensor:
    given, maps = case
    size, count = (maps.shape[1], maps.shape[2]), maps.shape[1] * maps.shape[2]
    cells = torch.arange(count).reshape(size)
    matrix = torch.eye(count)
    psa = name.startswith("PSA")
    for each in pairs_of(size, RADIUS, "psa" if psa else "all"):
        first, second = each.first(cells).flatten(), each.second(cells).flatten()
        if psa:
            vectors = given.flatten(1)
            affinity = (-(vectors[:, first] - vectors[:, second]).abs().mean(dim=0)).exp()
        else:
            way = [y * size[1] + x + n for y, x, length in path(each.dy, each.dx) for n in range(length)]
            affinity = 1 - given.flatten()[first[:, None] + torch.tensor(way)].amax(dim=1)
        matrix[first, second] = matrix[second, first] = affinity
    matrix = matrix ** (8 if psa else 10)
    matrix /= matrix.sum(dim=0)
    for _ in range(SQUARINGS):
        matrix = matrix @ matrix
    return (maps.flatten(1) @ matrix).reshape(maps.shape)


def labels(name: str, walked: Tensor) -> Tensor:
    if name.startswith("PSA"):
        return walked.argmax(dim=0)
    ground = torch.full_like(walked[:1], 0.25)
    return torch.cat([ground, walked / walked.amax()]).argmax(dim=0)


def cpu_seconds(work: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        found = work()
        times.append(time.process_time() - start)
    return min(times), found


def megabytes(name: str, case: Case, work: Callable[[str, Case], Tensor]) -> float:
    """The peak of the work without its inputs."""
    return peak_megabytes(work, name, case, warm_up=partial(_tiny, work))


def _tiny(work: Callable[[str, Case], Tensor], name: str, case: Case) -> None:
    given, maps = case
    torch.stack([given.sum(), maps.sum()])  # from here on they are in memory
    work(name, (given[..., :12, :12], maps[..., :12, :12]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rival", choices=["scaled", "dense"], default="scaled")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{STEPS} steps, radius {RADIUS}, one thread, CPU seconds, ours the best of {options.repeats}")
    per_cube = 0.0
    for name in (SMALL, IRN, PSA):
        case = inputs(name)
        ours(name, case)
        mine, walked = cpu_seconds(partial(ours, name, case), options.repeats)
        print(f"{name}: ours {1000 * mine:.0f} ms, {_mb(megabytes(name, case, ours))}")
        if name == IRN and options.rival == "scaled":
            theirs = per_cube * walked[0].numel() ** 3
            print(
                f"  dense powers: about {theirs:.0f} s, {theirs / mine:.0f} x ours: scaled from {SMALL}, not measured"
            )
            continue
        theirs, rival = cpu_seconds(partial(dense, name, case), 1)
        per_cube = theirs / walked[0].numel() ** 3
        same = (labels(name, walked) == labels(name, rival)).double().mean()
        apart = ((walked - rival).abs().amax(dim=(1, 2)) / rival.amax(dim=(1, 2))).max()
        print(f"  dense powers: {theirs:.1f} s, {theirs / mine:.0f} x ours, {_mb(megabytes(name, case, dense))}")
        print(
            f"  labels the same: {100 * same:.4f} %, largest difference of values, over the map's largest, {apart:.1e}"
        )


def _mb(value: float) -> str:
    return "memory unknown here" if math.isnan(value) else f"{value:.0f} MB"


if __name__ == "__main__":
    main()
