"""The curve of few masks: a finished run's segmenter, trained again on a few true masks, to set beside the tags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tag2mask import recipe as recipes
from tag2mask.collect import FEW_MASKS, find_record
from tag2mask.errors import UserError
from tag2mask.recipe import Recipe
from tag2mask.runner import Options, Run, run


def run_few_masks(
    work: Path, name: str | None, counts: Sequence[int], options: Options = Options()  # noqa: B008
) -> tuple[Run, str]:  # fmt: skip
    """Train and measure the last segmenter of a run on true masks in `work`; returns the run and its model's name.

    counts: how many masks. Every setting is that of the run as it was made, with as many steps. Finished trainings are
    skipped and stopped ones go on. The name is that of the run that was looked at, for its report.
    Raises UserError if the run has no segmenter that was measured, or there are not enough masks.
    """
    if not counts or min(counts) < 1:
        raise UserError("--counts: give whole numbers from 1, such as 5,10,20,50")
    record = find_record(work, name)
    made = recipes.load(work / f"{record['name']}.recipe.yaml")
    return run(_recipe(str(record["name"]), made, sorted(set(counts))), work, options), str(record["name"])


def _recipe(name: str, made: Recipe, counts: Sequence[int]) -> Recipe:
    """The recipe that trains the segmenter of `made` on masks instead of what it was trained on."""
    trained, predicted, measured = _segmenter(name, made)
    stages: dict[str, dict[str, Any]] = {}
    shared = {key: value for key, value in made.stages[trained].items() if key != "of"}
    for count in counts:
        stages[f"masks-{count}"] = shared | {"do": "few_masks", "count": count}
        stages[f"predict-{count}"] = made.stages[predicted] | {"of": f"masks-{count}"}
        stages[f"quality-{count}"] = made.stages[measured] | {"of": f"predict-{count}"}
    title = f"{made.title}: its segmenter on few true masks"
    return Recipe(f"{name}{FEW_MASKS}", title, made.data, stages, supervision=made.supervision)


def _segmenter(name: str, made: Recipe) -> tuple[str, str, str]:
    """The stages that train, apply and measure the last segmenter of a recipe that has all three."""
    for measured in reversed(made.stages):
        if made.stages[measured]["do"] == "evaluate_masks":
            predicted = made.stages[measured]["of"]
            trained = made.stages[predicted].get("of", "")
            if made.stages[predicted]["do"] == "predict" and made.stages[trained]["do"] == "segment":
                if made.source().split(made.stages[measured]["split"]).mask is None:
                    raise UserError(f"run {name!r} has no true masks to measure its segmenter with; give data.masks")
                return trained, predicted, measured
    raise UserError(f"run {name!r} has no segmenter that is measured; few-masks needs segment, predict, evaluate_masks")
