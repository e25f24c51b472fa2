"""How compact the features of a class are: figure 3 of CPAL, with numbers.

The picture is a t-SNE (van der Maaten and Hinton: Visualizing Data using t-SNE, JMLR 2008), which keeps neighbours and
no distances. So the numbers are taken from the features themselves, L2-normalised: see `compactness`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tag2mask import progress
from tag2mask.analyse.svg import scatter
from tag2mask.analyse.work import Work
from tag2mask.core import CamOutput, Objective
from tag2mask.data.augment import normalise
from tag2mask.data.same_size import same_size_batches
from tag2mask.data.source import Mask, Samples, Split
from tag2mask.engine import Devices
from tag2mask.errors import UserError
from tag2mask.export import voc_palette
from tag2mask.methods.cpal import CPAL
from tag2mask.ops.cams import best_class, max_norm, resize
from tag2mask.ops.seed import seed_of
from tag2mask.pipeline import write_json

FEWEST = 5  # points of which a picture can be made
EACH = 10  # pixels of an image and class


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which features are looked at.

    of: "instances", one for each image and tagged class: the mean feature of the class's pixels; or "pixels", up to 10
    of each image and class, drawn. features: "last", what the classifier reads (without what RCA adds); "projected", z
    of CPAL; "aligned", z + delta of CPAL. regions: which pixels are a class's: "cam", where its map is the largest of
    the tagged ones and at least `above`; or "truth". split: of which images. images: at most so many, spread evenly.
    points: at most so many, an equal share of each class. seed: of the drawing and of the t-SNE.
    """

    of: Literal["instances", "pixels"] = "instances"
    features: Literal["last", "projected", "aligned"] = "last"
    regions: Literal["cam", "truth"] = "cam"
    above: float = 0.3
    split: Split = "score"
    images: int = 500
    points: int = 1000
    seed: int = 0


def embedding(
    work: Work, out: Path, *, choice: Choice, devices: Devices, stage: str | None = None, workers: int = 2
) -> dict[str, Any]:
    """Draw the features of tagged classes and measure how compact they are; writes embedding.json and embedding.svg.

    stage: which classifier; the last one if not given. Returns `compactness` and {"points", "classifier", ...}.
    Raises UserError where scikit-learn is missing, where features or truth are asked for that are not there, and where
    fewer than 5 points are found.
    """
    t_sne = _t_sne()
    samples = work.source.split(choice.split)
    if choice.regions == "truth" and samples.mask is None:
        raise UserError(f"--regions truth: split {choice.split!r} has no truth masks; use --regions cam")
    name, objective = work.classifier(stage, devices)
    vectors, labels = _gather(objective, samples, choice, devices, workers)
    kept = _even(labels, choice.points)
    vectors, labels = vectors[kept], labels[kept]
    if len(labels) < FEWEST:
        raise UserError(f"embedding: only {len(labels)} points were found; lower --above, or take more --images")
    found = compactness(vectors, labels, work.classes)
    perplexity = min(30.0, (len(labels) - 1) / 3)
    fit = t_sne(n_components=2, perplexity=perplexity, init="pca", random_state=choice.seed)
    places = fit.fit_transform(F.normalize(vectors, dim=1).numpy())
    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in voc_palette()[1:].tolist()]
    title = f"{choice.of}, {choice.features} features of {name}"
    points = [(float(x), float(y)) for x, y in places]
    scatter(out / "embedding.svg", points, labels.tolist(), work.classes, colours, title)
    result = {"classifier": name, **vars(choice), "points": len(labels), **found}
    write_json(out / "embedding.json", result | {"labels": labels.tolist(), "places": points})
    return result


def compactness(vectors: Tensor, labels: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Mean Euclidean distances of vectors [N D], L2-normalised first, with class indices [N].

    "within": over all pairs of a class, then over the classes with at least two; "between": over all pairs of two
    classes, then over the pairs of classes; "ratio": within / between, smaller is more compact. None where there is
    nothing to average. "by_class": {name: {"points", "within"}}. Every class counts the same, however many points it
    has.
    """
    units = F.normalize(vectors.double(), dim=1)
    distances = torch.cdist(units, units, compute_mode="donot_use_mm_for_euclid_dist")
    members = F.one_hot(labels, len(names)).double()
    counts = members.sum(dim=0)
    sums = members.T @ distances @ members
    pairs = counts[:, None] * counts - counts.diag()  # the distance of a point to itself is none
    means = sums / pairs  # NaN where there is no pair
    within, apart = means.diagonal(), means[~torch.eye(len(names), dtype=torch.bool)]
    near, far = (_mean(values[~values.isnan()]) for values in (within, apart))
    return {
        "within": near,
        "between": far,
        "ratio": near / far if near is not None and far else None,
        "by_class": {
            name: {"points": int(count), "within": None if value.isnan() else float(value)}
            for name, count, value in zip(names, counts, within, strict=True)
            if count
        },
    }


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for people."""
    rows: list[dict[str, Any]] = [
        {"class": name, "points": entry["points"], "within": _number(entry["within"]), "between": "", "ratio": ""}
        for name, entry in found["by_class"].items()
    ]
    overall = {key: _number(found[key]) for key in ("within", "between", "ratio")}
    return [*rows, {"class": "mean of classes", "points": found["points"], **overall}]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def _even(labels: Tensor, most: int) -> Tensor:
    """Positions of at most `most` points, the same share of each class, spread evenly over those of the class."""
    there = labels.unique().tolist()
    kept = []
    for k in there:
        own = (labels == k).nonzero().flatten()
        kept.append(own[_spread(len(own), max(1, most // len(there)))])
    return torch.cat(kept) if kept else labels


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the positions 0..count-1, evenly."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


@torch.no_grad()
def _gather(
    objective: Objective, samples: Samples, choice: Choice, devices: Devices, workers: int
) -> tuple[Tensor, Tensor]:
    """(vectors [N D], class indices [N]) of the images that are looked at."""
    tagged = np.flatnonzero(samples.tags.any(axis=1))
    chosen = tagged[_spread(len(tagged), choice.images)].tolist()
    vectors: list[Tensor] = []
    labels: list[int] = []
    with progress.bar("features", len(chosen)) as advance:
        for indices, pixels in same_size_batches(samples.image, chosen, 4, workers):
            images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2)).to(devices.device)
            tags = torch.from_numpy(samples.tags[indices]).to(devices.device, torch.float32)
            features, shift = _features(objective, objective.look(images), choice.features)
            size = int(features.shape[-2]), int(features.shape[-1])
            maps = resize(max_norm(objective.infer(images, tags)[0]), size).cpu()
            for own, own_maps, index in zip(features.cpu(), maps, indices, strict=True):
                classes = np.flatnonzero(samples.tags[index])
                if choice.regions == "cam":
                    region = _cam_region(own_maps, torch.from_numpy(classes), choice.above)
                else:
                    assert samples.mask is not None
                    region = _truth_region(samples.mask(index), size)
                for k in classes.tolist():
                    found = own[:, region == k].T
                    if len(found) and choice.of == "instances":
                        found = found.mean(dim=0, keepdim=True)
                    elif len(found):
                        draws = torch.Generator().manual_seed(seed_of(choice.seed, index, k))
                        found = found[torch.randperm(len(found), generator=draws)[:EACH]]
                    vectors.append(found + shift[k].cpu())
                    labels += [k] * len(found)
            advance(len(indices))
    return (torch.cat(vectors) if vectors else torch.zeros(0, 1)), torch.tensor(labels, dtype=torch.long)


def _features(objective: Objective, out: CamOutput, which: str) -> tuple[Tensor, Tensor]:
    """(features [B D h w], what is added to those of each class [K D]). Raises UserError if there are no such ones."""
    if which == "last":
        features = out.features.get("plain", out.features["last"])
        return features, features.new_zeros(out.logits.shape[1], features.shape[1])
    method = next((m for m in objective.methods.values() if isinstance(m, CPAL)), None)
    if method is None:
        raise UserError(f"--features {which}: only a classifier trained with cpal has these; use --features last")
    if which == "aligned" and not method.shift_features:
        raise UserError("--features aligned: this cpal aligns no features (align); use --features projected")
    z, shift, _ = method.explain(out)
    shift = shift[method.ground :]
    return z, shift if which == "aligned" else torch.zeros_like(shift)


def _cam_region(maps: Tensor, classes: Tensor, above: float) -> Tensor:
    """The best of the tagged classes [P] at every pixel of maps [K h w], -1 where it is not above `above`."""
    position, value = best_class(maps[classes])
    return torch.where(value > above, classes[position], -1)


def _truth_region(mask: Mask, size: tuple[int, int]) -> Tensor:
    """The class at every pixel of the grid, from an index mask [H W]: -1 for background, 254 for ignore."""
    pixels = torch.from_numpy(mask.astype(np.float32))[None, None]
    return F.interpolate(pixels, size=size, mode="nearest-exact")[0, 0].long() - 1


def _t_sne() -> Any:
    """scikit-learn's class. Raises UserError if it is not installed."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("embedding: needs scikit-learn; install it with: pip install 'tag2mask[analyse]'") from None
    return TSNE
