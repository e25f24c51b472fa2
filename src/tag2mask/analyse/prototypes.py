"""Which pixels of an image are like which prototype: figure 3 of RCA, figure 5a of CPAL.

RCA     S = F Q^T (eq. 7), the features of every pixel times each prototype of a class
CPAL    cos(z + delta, p) (eq. 13), the projected and aligned features and each of the context prototypes that are
        soft positive neighbours of the image's instance prototype
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tag2mask import schema
from tag2mask.analyse.panels import write_grid
from tag2mask.analyse.work import Work
from tag2mask.core import CamOutput, Objective
from tag2mask.data.augment import normalise
from tag2mask.data.source import Image
from tag2mask.engine import Devices
from tag2mask.errors import UserError
from tag2mask.export import heatmap
from tag2mask.methods.cpal import CPAL
from tag2mask.methods.rca import RCA
from tag2mask.ops.cams import max_norm
from tag2mask.ops.projection import cosine_maps
from tag2mask.pipeline import write_json
from tag2mask.report import Panel


@dataclass(frozen=True)
class Affinity:
    """One prototype of a class: its number, its map [h w] over the image, and w (CPAL; None for RCA)."""

    number: int
    map: NDArray[np.float32]
    weight: float | None


def prototype_maps(
    work: Work, out: Path, *, image: str, devices: Devices, only: str | None = None, most: int = 10,
    stage: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Affinity maps of an image with the prototypes of its tagged classes, or of class `only`.

    image: its name as in the data. most: prototypes of a class that are shown, those with the largest weight (CPAL) or
    the largest affinity anywhere in the image (RCA) first. stage: which classifier; the last one if not given. Writes
    prototypes-<image>.png, a row for each class: the image, its map, and each prototype's affinity, in colours from its
    smallest value, or 0 if that is negative, to its largest; and the numbers as .json beside it. Returns {"image",
    "classifier", "method", "classes": {class: [{"prototype", "low", "high", "weight"}]}, "picture": its path}.

    Raises UserError for an unknown image or class, an image without tags, a classifier that has neither method, and
    where no class has prototypes.
    """
    samples, index = work.find_image(image)
    if only is not None and only not in work.classes:
        raise UserError(f"--class {only}: no such class; {schema.meant(only, dict.fromkeys(work.classes))}")
    tags = torch.from_numpy(samples.tags[index])
    wanted = [work.classes.index(only)] if only is not None else tags.nonzero().flatten().tolist()
    if not wanted:
        raise UserError(f"--image {image}: has no tags; name a class with --class")
    name, objective = work.classifier(stage, devices)
    method, affinity = _reader(objective, name)
    picture = samples.image(index)
    looked = normalise(torch.from_numpy(picture).permute(2, 0, 1))[None].to(devices.device)
    with torch.no_grad():
        seen = objective.look(looked)
        asked = tags.clone()
        asked[wanted] = 1
        exported = max_norm(objective.infer(looked, asked[None].to(devices.device, torch.float32))[0])[0]
        found = {k: affinity(seen, k) for k in wanted}
    if not any(found.values()):
        names = ", ".join(work.classes[k] for k in wanted)
        raise UserError(f"{name}: {method} has no prototypes of {names}; train for more epochs")
    rows, numbers = [], {}
    for k, prototypes in found.items():
        ranked = sorted(prototypes, key=lambda p: -(p.map.max() if p.weight is None else p.weight))
        rows.append(_row(picture, work.classes[k], exported[k].cpu().numpy(), ranked[:most]))
        numbers[work.classes[k]] = [
            {"prototype": p.number, "low": float(p.map.min()), "high": float(p.map.max()), "weight": p.weight}
            for p in ranked
        ]
    result = {"image": image, "classifier": name, "method": method, "classes": numbers}
    stem = "prototypes-" + image.replace("/", "-")
    write_json(out / f"{stem}.json", result)
    write_grid(out / f"{stem}.png", rows)
    return result | {"picture": str(out / f"{stem}.png")}


def table(found: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """Rows for people."""
    return [
        {
            "class": name,
            "prototype": p["prototype"],
            "affinity": _range(p["low"], p["high"]),
            "weight": None if p["weight"] is None else f"{p['weight']:.3f}",
        }
        for name, prototypes in found["classes"].items()
        for p in prototypes[:most]
    ]


def rca_affinity(method: RCA, out: CamOutput, k: int) -> list[Affinity]:
    """Column k of S: dot products of the features of one image with every prototype of class k (eq. 7).

    `aggregation: released` compares learned queries and keys.
    """
    features, prototypes = out.features["plain"], method.prototypes[k]
    if method.attention is not None:
        features, prototypes = method.attention.query(features), method.attention.key(prototypes)
    maps = F.conv2d(features, prototypes[:, :, None, None])[0]
    return _listed(maps, method.found[k], None)


def cpal_affinity(method: CPAL, out: CamOutput, k: int) -> list[Affinity]:
    """Cosines of the aligned features of one image with the soft positive neighbours of class k (eq. 13)."""
    z, shift, weights = method.explain(out)
    row = k + method.ground
    contexts = F.normalize(method.contexts[row], dim=1)
    maps = cosine_maps(z, contexts[None], shift[row].expand_as(contexts))[0]
    return _listed(maps, method.found[row] & (weights[0, row] > 0), weights[0, row])


def _listed(maps: Tensor, there: Tensor, weights: Tensor | None) -> list[Affinity]:
    return [
        Affinity(i, maps[i].float().cpu().numpy(), None if weights is None else float(weights[i]))
        for i in there.nonzero().flatten().tolist()
    ]


def _reader(objective: Objective, name: str) -> tuple[str, Callable[[CamOutput, int], list[Affinity]]]:
    """(name of the method, its affinities of a class). Raises UserError if no method of the classifier has any."""
    for key, method in objective.methods.items():
        if isinstance(method, RCA) and method.aggregation != "none":
            return key, partial(rca_affinity, method)
        if isinstance(method, CPAL):
            return key, partial(cpal_affinity, method)
    raise UserError(f"{name}: has no prototypes to show; train it with rca (aggregation not none) or cpal")


def _row(picture: Image, name: str, exported: NDArray[np.float32], shown: Sequence[Affinity]) -> list[Panel]:
    """The image, the map of the class, and every affinity in colours from its smallest value to its largest.

    Negative affinities, which a ReLU would take away, have no colour; the captions tell the whole range.
    """
    row = [Panel(name, picture), Panel("map of the class", heatmap(picture, exported))]
    for p in shown:
        low, high = float(p.map.min()), float(p.map.max())
        least = max(low, 0.0)
        scaled = (p.map - least) / (high - least) if high > least else np.zeros_like(p.map)
        first = f"prototype {p.number}" + ("" if p.weight is None else f", w {p.weight:.2f}")
        row.append(Panel(f"{first}\n{_range(low, high)}", heatmap(picture, scaled)))
    return row


def _range(low: float, high: float) -> str:
    """0.31 to 0.94; 25.1 to 1430."""
    return " to ".join(f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}" for value in (low, high))
