"""A work folder as a finished run leaves it, without training: the masks are the true ones, some pixels ignored."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tag2mask import runner
from tag2mask.export import write_mask
from tag2mask.pipeline import MANIFEST, write_json
from tag2mask.recipe import Recipe
from tag2mask.runner import Run

BORDER = 3  # the uppermost rows of every mask are ignored


def finished(recipe: Recipe, work: Path) -> Run:
    """The record of a run, and the masks and manifests of its stages that make masks."""
    run = runner.prepare(recipe, work)
    runner.remember(run)
    for stage in run.stages:
        if stage.kind not in ("labels", "crf", "predict"):
            continue
        folder = stage.folder(work)
        samples = run.source.split(stage.settings.get("split", "train"))
        assert samples.mask is not None
        for index, name in enumerate(samples.names):
            mask = np.array(samples.mask(index))
            mask[:BORDER] = 255
            write_mask(folder / "masks" / f"{name}.png", mask)
        write_json(folder / MANIFEST, {"settings": stage.settings, "data": stage.data, "stage": stage.name})
    return run
