"""What a background score chosen without masks costs: `python benchmarks/threshold.py [WORK | RECIPE=MAPS ...]`.

Regret: mean IoU at the best score for these maps (the oracle) minus mean IoU at the score of a rule, in points. The
rule is `score: auto`; its rivals are constants, Otsu's threshold and a fixed share of foreground. For the soft maps of
finished work folders, or of a folder MAPS with data as in RECIPE, where the data have masks: once for seeds, once for
masks refined by a CRF (on some images, at scores 0.05 apart, between which numbers are taken as linear). Without
arguments, plain CAM, PPC and RCA are trained on the built-in scenes first, which takes minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tag2mask import api, progress
from tag2mask.analyse.work import open_work
from tag2mask.data.maps import map_path, read_maps
from tag2mask.data.source import IGNORE, Samples, Source
from tag2mask.metrics import Confusion, ThresholdCurve
from tag2mask.ops.cams import best_class
from tag2mask.ops.threshold import SPREAD, moments, spread_score
from tag2mask.recipe import load
from tag2mask.refine.crf import PRESETS, DenseCRF
from tag2mask.stages.background import FEW, TRIED, Background, evenly
from tag2mask.stages.crf import UNARY, Refinement

KINDS = ("cams", "attention", "walk", "clip_es", "pacam", "amn_maps")
RECIPES = ("scenes-cam", "scenes-ppc-cam", "scenes-rca-cam")
SPREADS = (0.0, 0.25, 0.5, 0.75, 1.0)
FINE = np.arange(1, 100) / 100
Floats = NDArray[np.float64]


@dataclass
class Maps:
    """Soft maps of one run and what there is to know about them; N tagged images, of which n were refined."""

    data: str
    name: str
    moments: list[tuple[float, float]]  # of N images
    values: Floats  # [N 100] histogram of best values
    seeds: Floats  # [99] mean IoU of the seeds at FINE
    refined: Floats  # [99] mean IoU of refined masks
    seeds_cover: Floats  # [n 99] share of foreground in the seeds
    refined_cover: Floats  # [n 99] share of foreground in refined masks
    thirds: list[tuple[list[int], Floats]]  # places among N, seeds: by the true share of foreground, smallest first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", help="finished work folders, or RECIPE=MAPS")
    parser.add_argument("--work", type=Path, default=Path("work/threshold"), help="where to train without any")
    parser.add_argument("--images", type=int, default=100, help="how many to refine with a CRF")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="deeplab")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.works:
        for recipe in RECIPES:
            api.run(recipe, work=args.work / recipe)
    works = args.works or [str(args.work / recipe) for recipe in RECIPES]
    found = [
        look(data, name, folder, source, args.images, args.preset)
        for work in works
        for data, name, folder, source in maps_in(work)
        if source.split("score").mask is not None
    ]
    print("seeds\n" + table(found, seeds_rules(), lambda maps: maps.seeds))
    print(f"\nmasks refined by a CRF ({args.preset})\n" + table(found, refined_rules(), lambda maps: maps.refined))
    print("\nseeds of the third of the images with the smallest, middle, largest true foreground, mean over the maps")
    print(by_size(found))
    print("\nthe spread that is best on the other data sets\n" + left_out(found))
    print("\n`auto` on random images, 20 times: standard deviation of the score, largest regret\n" + stability(found))


def maps_in(work: str) -> Iterator[tuple[str, str, Path, Source]]:
    """(name of the data, name of the maps, their folder, data) of an argument."""
    recipe, equals, folder = work.partition("=")
    if equals:
        loaded = load(recipe)
        yield data_name(loaded.data), loaded.name, Path(folder), loaded.source()
        return
    run = open_work(Path(work))
    for stage, entry in run.record["stages"].items():
        if entry["kind"] in KINDS and run.manifest(stage):
            yield data_name(run.record["data"]), f"{Path(work).name}/{stage}", run.folder(stage), run.source


def data_name(data: dict[str, object]) -> str:
    """Of folders, the name of the folder above the images."""
    return Path(str(data["images"])).parent.name if data["name"] == "folder" else str(data["name"])


def look(data: str, name: str, folder: Path, source: Source, images: int, preset: str) -> Maps:
    """Everything that the tables need, in one pass over the maps and one over a part of the images."""
    samples = source.split("score")
    assert samples.mask is not None
    total = ThresholdCurve(len(source.classes), FINE.tolist())
    seen, values, curves, sizes = [], [], [], []
    for index in progress.track(range(len(samples)), name, len(samples)):
        stored = read_maps(map_path(folder, samples.names[index]))
        position, value = best_class(stored.full())
        best = torch.from_numpy(stored.classes)[position] if len(stored.classes) else position
        truth, curve = samples.mask(index), ThresholdCurve(len(source.classes), FINE.tolist())
        curve.update(best.to(torch.uint8).numpy(), value.numpy(), truth)
        total.merge(curve)
        if len(stored.classes):
            curves.append(curve)
            sizes.append(float(((truth > 0) & (truth < IGNORE)).mean()))
            small = torch.from_numpy(stored.maps).float()
            seen.append(moments(small))
            values.append(np.histogram(small.amax(dim=0).numpy(), 100, (0, 1))[0] / small[0].numel())
    some = evenly(np.flatnonzero(samples.tags.any(axis=1)).tolist(), images)
    refined, cover, refined_cover = refine(folder, samples, len(source.classes), some, preset)
    parts = [places.tolist() for places in np.array_split(np.argsort(sizes, kind="stable"), 3)]
    thirds = [(places, miou_of(len(source.classes), [curves[place] for place in places])) for places in parts]
    seeds = np.array([scores.miou for scores in total.scores()])
    return Maps(data, name, seen, np.array(values), seeds, refined, cover, refined_cover, thirds)


def miou_of(num_classes: int, curves: Sequence[ThresholdCurve]) -> Floats:
    """Mean IoU [99] of several images together."""
    total = ThresholdCurve(num_classes, FINE.tolist())
    for curve in curves:
        total.merge(curve)
    return np.array([scores.miou for scores in total.scores()])


def refine(
    folder: Path, samples: Samples, num_classes: int, some: Sequence[int], preset: str
) -> tuple[Floats, Floats, Floats]:
    """Of refined masks of some images: mean IoU [99], share of foreground in their seeds and in them [n 99]."""
    assert samples.mask is not None
    totals = [Confusion(num_classes) for _ in TRIED]
    cover, refined_cover = [], []
    for index in progress.track(some, "crf", len(some)):
        image, stored = samples.image(index), read_maps(map_path(folder, samples.names[index]))
        truth, crf, own = samples.mask(index), DenseCRF(image, **PRESETS[preset]), []
        for score, total in zip(TRIED, totals, strict=True):
            made = Refinement(Background(score=score), UNARY[preset], 0.7, 10, PRESETS[preset])
            energies = made.energies(stored)
            marginals = crf.from_unary(energies, counts=[1] * len(energies))
            mask = made.mask(marginals.argmax(axis=0), marginals.max(axis=0), stored)
            total.update(mask, truth)
            own.append(float((mask > 0).mean()))
        value = best_class(stored.full())[1].numpy()
        cover.append([float((value > score).mean()) for score in FINE])
        refined_cover.append(np.interp(FINE, TRIED, own))
    miou = np.interp(FINE, TRIED, [total.scores().miou for total in totals])
    return miou, np.array(cover), np.array(refined_cover)


def spread_of(maps: Maps, spread: float = SPREAD) -> float:
    """The score of all tagged images."""
    return spread_score(maps.moments, spread)


def otsu(maps: Maps) -> float:
    """The score between two groups of values with the largest variance between their means, over all pixels."""
    share, middle = maps.values.mean(axis=0), (np.arange(100) + 0.5) / 100
    below, weighted = share.cumsum()[:-1], (share * middle).cumsum()[:-1]
    between = ((share * middle).sum() * below - weighted) ** 2 / np.maximum(below * (1 - below), 1e-12)
    return float(between.argmax() + 1) / 100


def covering(maps: Maps, share: float) -> float:
    """The score whose seeds cover a share of all pixels."""
    above = maps.values.mean(axis=0)[::-1].cumsum()[::-1]
    return float((above > share).sum()) / 100


def carried_over(maps: Maps, score: float, some: Sequence[int] | None = None) -> float:
    """The score whose refined masks cover as much as seeds at `score`."""
    few = list(some) if some is not None else evenly(range(len(maps.seeds_cover)), FEW)
    target = maps.seeds_cover[few].mean(axis=0)[place(score)]
    return float(FINE[np.append(np.flatnonzero(maps.refined_cover[few].mean(axis=0) <= target), 98)[0]])


def place(score: float) -> int:
    """Where a score is in FINE."""
    return int(np.clip(round(100 * score), 1, 99)) - 1


Rule = Callable[[Maps], float]


def seeds_rules() -> dict[str, Rule]:
    """Name -> rule for the seeds."""
    found: dict[str, Rule] = {f"{c} for all": lambda maps, c=c: c for c in (0.2, 0.3, 0.4, 0.5)}
    found |= {"Otsu": otsu, "25 % foreground": lambda maps: covering(maps, 0.25)}
    return found | {rule_name(k): lambda maps, k=k: spread_of(maps, k) for k in SPREADS}


def rule_name(spread: float) -> str:
    """The rule with this spread, in words."""
    return f"mean + {spread} std" + (" (auto)" if spread == SPREAD else "")


def refined_rules() -> dict[str, Rule]:
    """Name -> rule for refined masks."""
    seeds = seeds_rules()
    kept = {name: rule for name, rule in seeds.items() if name.endswith("for all")}
    return (
        kept
        | {"auto of the seeds": spread_of}
        | {
            f"{name}, same area": lambda maps, rule=rule: carried_over(maps, rule(maps))
            for name, rule in seeds.items()
            if name not in kept
        }
    )


def regret(curve: Floats, score: float) -> float:
    """Points of mean IoU that a score loses."""
    return float(100 * (np.nanmax(curve) - curve[place(score)]))


def table(found: Sequence[Maps], rules: dict[str, Rule], of: Callable[[Maps], Floats]) -> str:
    """One line a rule, one column a set of maps; in each: regret and score."""
    lines = [["", *(maps.data for maps in found), "mean", "largest"], ["", *(maps.name for maps in found), "", ""]]
    best = [of(maps) for maps in found]
    lines.append(["oracle", *(f"{100 * np.nanmax(c):.1f} at {FINE[np.nanargmax(c)]:.2f}" for c in best), "", ""])
    for name, rule in rules.items():
        scores = [rule(maps) for maps in found]
        lost = [regret(curve, score) for curve, score in zip(best, scores, strict=True)]
        cells = [f"{value:.1f} at {score:.2f}" for value, score in zip(lost, scores, strict=True)]
        lines.append([name, *cells, f"{np.mean(lost):.2f}", f"{max(lost):.1f}"])
    return aligned(lines)


def by_size(found: Sequence[Maps]) -> str:
    """Mean regret of the rules on thirds of the images: what happens to data with smaller or larger objects."""
    lines = [["", "smallest", "middle", "largest"]]
    for name, rule in seeds_rules().items():
        lost = []
        for place in range(3):
            parts = [(maps, *maps.thirds[place]) for maps in found]
            own = [
                replace(maps, moments=[maps.moments[i] for i in places], values=maps.values[places], seeds=miou)
                for maps, places, miou in parts
            ]
            lost.append(np.mean([regret(maps.seeds, rule(maps)) for maps in own]))
        lines.append([name, *(f"{value:.2f}" for value in lost)])
    return aligned(lines)


def left_out(found: Sequence[Maps]) -> str:
    """Per data set: the spread with the smallest mean regret on the others, and what it costs here."""
    lines = [["left out", "spread", "seeds", "refined"]]
    for data in dict.fromkeys(maps.data for maps in found):
        others = [maps for maps in found if maps.data != data]
        if not others:
            return "needs maps of two data sets"
        spread = min(SPREADS, key=lambda k: sum(sum(both(maps, k)) for maps in others))
        mean = np.mean([both(maps, spread) for maps in found if maps.data == data], axis=0)
        lines.append([data, f"{spread}", *(f"{value:.2f}" for value in mean)])
    return aligned(lines)


def both(maps: Maps, spread: float) -> tuple[float, float]:
    """Regret of the seeds and of refined masks."""
    score = spread_of(maps, spread)
    return regret(maps.seeds, score), regret(maps.refined, carried_over(maps, score))


def stability(found: Sequence[Maps]) -> str:
    """What `auto` says of few images, measured on all."""
    lines = [["data", "maps", "images", "seeds", "", "refined", ""]]
    random = np.random.default_rng(0)
    for maps in found:
        for count in (50, 100):
            drawn = [random.permutation(len(maps.moments))[:count] for _ in range(20)]
            seeds = [spread_score([maps.moments[i] for i in some]) for some in drawn]
            few = [random.permutation(len(maps.seeds_cover))[: min(count, FEW)].tolist() for _ in drawn]
            refined = [carried_over(maps, score, some) for score, some in zip(seeds, few, strict=True)]
            worst = [max(regret(c, s) for s in said) for c, said in ((maps.seeds, seeds), (maps.refined, refined))]
            cells = [f"{np.std(seeds):.3f}", f"{worst[0]:.1f}", f"{np.std(refined):.3f}", f"{worst[1]:.1f}"]
            lines.append([maps.data, maps.name, str(count), *cells])
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    main()
