"""What to try next: rules of thumb, each with the measured number that sets it off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tag2mask.report.areas import in_its_images
from tag2mask.report.beside import few_plot, spread
from tag2mask.report.results import describe
from tag2mask.report.summary import Result, RunSummary, StageRow
from tag2mask.report.suspicions import strong
from tag2mask.report.words import number, percent

WEAK_CLASSIFIER = 0.8  # mean average precision below which maps cannot be good
GAP = 0.15  # between the classifier's precision on training and on other images
FEW_IMAGES = 20  # of a class
FEW_STEPS = 300  # of a training; with that few, a segmenter may give background alone
LOST, SWALLOWED = 0.005, 0.6  # share that a class has in the images tagged with it
OUT_OF_SIZE = 2.0  # times the area of the true masks
OFF = 0.02  # mIoU lost by the background score in use


@dataclass(frozen=True)
class Advice:
    """`seen`: what was measured. `do`: what may help. `change`: settings or a command, empty if there is none."""

    seen: str
    do: str
    change: str = ""


def advice(summary: RunSummary) -> list[Advice]:
    """What the numbers of this run suggest, what comes first in the pipeline first."""
    rules: tuple[Callable[[RunSummary], Iterator[Advice]], ...] = (
        _few_images, _few_steps, _suspicious_tags, _weak_classifier, _overfitting, _from_scratch, _below_plain,
        _end_of_range, _fixed_score, _areas, _no_crf, _few_masks,
    )  # fmt: skip
    return [found for rule in rules for found in rule(summary)]


def _few_images(summary: RunSummary) -> Iterator[Advice]:
    counts: Mapping[str, Mapping[str, int]] = summary.data.get("classes") or {}
    few = {name: n["train"] for name, n in counts.items() if n.get("train", FEW_IMAGES) < FEW_IMAGES}
    if few:
        shown = _listed([f"{name} ({n})" for name, n in sorted(few.items(), key=lambda item: item[1])])
        yield Advice(
            f"Fewer than {FEW_IMAGES} training images: {shown}.",
            "Tag more images of these classes; tags are cheap, and no setting makes up for them.",
        )


def _few_steps(summary: RunSummary) -> Iterator[Advice]:
    images = (summary.data.get("splits") or {}).get("train", 0)
    for stage in _of_kind(summary, "classify", "segment"):
        train: Mapping[str, Any] = stage.settings.get("train") or {}
        if not images or not train.get("epochs"):  # steps were somebody's choice
            continue
        steps = round(train["epochs"] * images / train["batch"])
        if steps < FEW_STEPS:
            enough = math.ceil(FEW_STEPS * train["batch"] / images)
            yield Advice(
                f"{stage.name} was trained for {steps} steps: {images} images, {train['epochs']:g} epochs.",
                "On few images let it see each more often.",
                f"-s {stage.name}.train.epochs={enough}",
            )


def _suspicious_tags(summary: RunSummary) -> Iterator[Advice]:
    if summary.tags is None:
        return
    images = len({s.image for s in strong(summary.tags.suspects)})
    if images and images >= 0.01 * summary.tags.images:
        yield Advice(
            f"{images} of {summary.tags.images} images have a tag that the classifier strongly contradicts.",
            f"Look through {summary.tags.file or 'the suspicious tags'}, correct what is wrong and run again.",
        )


def _weak_classifier(summary: RunSummary) -> Iterator[Advice]:
    for result in _measured(summary, "classifier"):
        if result["map"] < WEAK_CLASSIFIER:
            worst = min((v, k) for k, v in result["ap"].items() if v is not None)
            key = f"{result['of']}.train.epochs"
            yield Advice(
                f"The classifier reaches {percent(result['map'])} % mean AP on “{result['split']}”, "
                f"{percent(worst[0])} % for {worst[1]}.",
                "What it cannot tell it cannot find: check the tags, train longer, or take a larger network first; "
                "all later steps build on it.",
                _doubled(summary, result["of"], key),
            )


def _overfitting(summary: RunSummary) -> Iterator[Advice]:
    trained = summary.tags.map if summary.tags else None
    tested = [r for r in _measured(summary, "classifier") if r["split"] == "test"]
    if trained is not None and tested and trained - tested[-1]["map"] > GAP:
        yield Advice(
            f"The classifier knows the training tags by heart: {percent(trained)} % mean AP there, "
            f"{percent(tested[-1]['map'])} % on “test”.",
            "More images, stronger augmentation, or fewer epochs.",
            f"-s {tested[-1]['of']}.augment.jitter=0.5",
        )


def _from_scratch(summary: RunSummary) -> Iterator[Advice]:
    for stage in _of_kind(summary, "classify"):
        backbone = stage.settings["net"].get("backbone") or {}
        images = (summary.data.get("splits") or {}).get("train", 0)
        if "weights" in backbone and backbone["weights"] is None and 0 < images < 10_000:
            yield Advice(
                f"{stage.name} started from random weights on {images} images.",
                "Start from weights that were trained on many photos.",
                f"-s {stage.name}.net.backbone.weights=hub",
            )


def _below_plain(summary: RunSummary) -> Iterator[Advice]:
    for compared in summary.compared:
        ours, plain = spread(compared.runs), spread(compared.plain)
        if ours is None or plain is None or compared.runs[0]["kind"] == "classifier" or ours.mean >= plain.mean:
            continue
        known = ours.deviation is not None and plain.deviation is not None
        noise = (ours.deviation or 0) + (plain.deviation or 0)
        within = " That is within the spread of the seeds." if known and plain.mean - ours.mean < noise else ""
        yield Advice(
            f"{describe(compared.runs[0], summary.stages)}: {ours.mean:.1f} % mIoU with the methods, "
            f"{plain.mean:.1f} % with {summary.plain}.{within}",
            "Give the method less weight or a later start, or leave it out.",
            "-s classify.methods=null",
        )


def _end_of_range(summary: RunSummary) -> Iterator[Advice]:
    for result in _measured(summary, "maps"):
        tried, at = result.get("thresholds"), result.get("threshold")
        if not tried or at is None or tried["first"] < at < tried["last"] - tried["step"] / 2:
            continue
        low = at <= tried["first"]
        room = tried["first"] > 0 if low else tried["last"] < 0.99
        wider = f"-s {result['stage']}.thresholds.{'first=0' if low else 'last=0.99'}" if room else ""
        yield Advice(
            f"The best threshold of {result['of']} is {number(at)}, the {'lowest' if low else 'highest'} one tried.",
            "Try a wider range."
            if room
            else ("The maps hardly tell classes from background; mind the classifier first."),
            wider,
        )


def _fixed_score(summary: RunSummary) -> Iterator[Advice]:
    """Plain seeds whose fixed score is not the best, and refined ones whose score nobody has chosen."""
    curves = {r["of"]: r["curve"] for r in _measured(summary, "maps") if r.get("curve")}
    inputs = {r["of"]: r for r in summary.results if r["kind"] == "masks"}
    for stage in _of_kind(summary, "labels", "crf"):
        score = (stage.settings.get("background") or {}).get("score")
        if not isinstance(score, float | int) or stage.name not in inputs:
            continue
        if not curves and "skipped" in inputs[stage.name]:
            yield Advice(
                f"The background score of {stage.name} is {number(score)}, fixed in the recipe.",
                "Let it be chosen from your maps, or from a few masks of yours (val-masks n=20).",
                f"-s {stage.name}.background.score=auto",
            )
        curve = curves.get(str(stage.inputs.get("of", "")))
        if stage.do != "labels" or curve is None:
            continue
        known = [(v, t) for t, v in zip(curve["threshold"], curve["miou"], strict=True) if v is not None]
        here = min(known, key=lambda point: abs(point[1] - score))[0]
        best, at = max(known)
        if best - here > OFF:
            yield Advice(
                f"{stage.name} has a background score of {number(score)}, which costs {100 * (best - here):.1f} points "
                f"of mIoU against {number(at)}.",
                "Take a score that fits these maps.",
                f"-s {stage.name}.background.score={number(at)}",
            )


def _areas(summary: RunSummary) -> Iterator[Advice]:
    """Classes that take far too little or too much: against the truth if there is some, else of their own images."""
    for result in summary.results:
        if result["kind"] != "masks" or describe(result, summary.stages) != "Pseudo-masks":
            continue
        names = [name for name in result.get("shares") or {} if name != "background"]
        if truth := result.get("truth_shares"):
            ratios = {
                n: result["shares"][n] / truth[n] for n in names if truth.get(n) and result["shares"][n] is not None
            }
            small = [f"{n} ({number(r)} times)" for n, r in ratios.items() if r < 1 / OUT_OF_SIZE]
            large = [f"{n} ({number(r)} times)" for n, r in ratios.items() if r > OUT_OF_SIZE]
            than = "the area of the true masks"
        else:
            shares = {n: s for n in names if (s := in_its_images(summary, result, n)) is not None}
            small = [f"{n} ({percent(s)} %)" for n, s in shares.items() if s < LOST]
            large = [f"{n} ({percent(s)} %)" for n, s in shares.items() if s > SWALLOWED]
            than = "their share of the images that are tagged with them"
        for word, step, listed in (("small", -0.1, small), ("large", 0.1, large)):
            if listed:
                yield Advice(
                    f"In “{result['of']}” some classes are very {word}, by {than}: {_listed(listed)}.",
                    f"Try a {'lower' if step < 0 else 'higher'} background score, or another method.",
                    _moved_score(summary, result["of"], step),
                )


def _moved_score(summary: RunSummary, stage: str, step: float) -> str:
    """The setting for a background score that is larger by `step`."""
    background = next((s.settings.get("background") or {} for s in summary.stages if s.name == stage), {})
    score = background.get("score")
    if not isinstance(score, float | int) or not 0 < score + step < 1:
        return ""
    return f"-s {stage}.background.score={score + step:.2g}"


def _no_crf(summary: RunSummary) -> Iterator[Advice]:
    done = {stage.do for stage in summary.stages}
    plain = _of_kind(summary, "labels")
    if plain and not done & {"crf", "walk"}:
        yield Advice(
            f"The masks of {plain[-1].name} are maps cut at a threshold: they do not follow the edges of the image.",
            "A dense CRF mends that in seconds, without training.",
            f"-s {plain[-1].name}.do=crf",
        )


def _few_masks(summary: RunSummary) -> Iterator[Advice]:
    found = few_plot(summary.few_masks)
    if found is not None and found.equal.startswith("fewer"):
        yield Advice(
            f"{found.equal.capitalize()} give more than all tags: {found.points[0][1]} % mIoU with "
            f"{found.points[0][0]}, {found.tags} % with tags.",
            "Here drawing a few masks pays more than tuning; tags may still help beside them.",
        )


def _measured(summary: RunSummary, kind: str) -> list[Result]:
    key = "map" if kind == "classifier" else "miou"
    return [r for r in summary.results if r["kind"] == kind and r.get(key) is not None]


def _of_kind(summary: RunSummary, *kinds: str) -> list[StageRow]:
    return [stage for stage in summary.stages if stage.do in kinds]


def _doubled(summary: RunSummary, stage: str, key: str) -> str:
    train: Mapping[str, Any] = next((s.settings.get("train") or {} for s in summary.stages if s.name == stage), {})
    return f"-s {key}={2 * train['epochs']:g}" if train.get("epochs") else ""


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
