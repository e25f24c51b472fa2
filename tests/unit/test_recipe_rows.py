"""The built-in recipes that give rows of the papers' tables: what they say they give is there, and each row once."""

import re
from collections import Counter

import pytest
import yaml

from tag2mask.recipe import load, load_text, names

WRITTEN = {name: yaml.safe_load(load_text(name)) for name in names()}
WITH_ROWS = [name for name, tree in WRITTEN.items() if "paper" in tree]
IN_NAMES = {"PPC": "ppc", "RCM+MAM": "rcm-mam", "HSC": "hsc", "RCA": "rca", "CPAL": "cpal"}
ON_COCO = {("RCA", "4"): "always", ("CPAL", "5"): "too"}  # tables; all others are of VOC
ABLATED = {name: found[1] for name in WITH_ROWS if (found := re.match(r"# Ablation of ([\w-]+):", load_text(name)))}
SCORED = {  # kind of the stage that is scored -> kind of the evaluation, and its split
    "cams": ("evaluate_maps", "score"),
    "clip_es": ("evaluate_maps", "score"),
    "pacam": ("evaluate_maps", "score"),
    "attention": ("evaluate_maps", "score"),
    "amn_maps": ("evaluate_maps", "score"),
    "walk": ("evaluate_maps", "score"),
    "labels": ("evaluate_masks", "score"),
    "crf": ("evaluate_masks", "score"),
    "predict": ("evaluate_masks", "test"),
}


@pytest.fixture(scope="module")
def recipes():
    return {name: load(name, ["data.root=somewhere"]) for name in WITH_ROWS}


def test_there_are_recipes_for_every_paper(recipes):
    assert {recipe.paper.name for recipe in recipes.values()} == set(IN_NAMES)
    assert len(recipes) > 80


@pytest.mark.parametrize("name", WITH_ROWS)
def test_what_is_expected_is_scored_as_papers_do_it(name, recipes):
    stages = recipes[name].stages
    for row in recipes[name].paper.rows:
        for stage in row.expected:
            scored = stages[stages[stage]["of"]]
            assert (stages[stage]["do"], stages[stage]["split"]) == SCORED[scored["do"]], stage
            assert scored.get("split", "train") == ("test" if scored["do"] == "predict" else "train")


@pytest.mark.parametrize("name", WITH_ROWS)
def test_the_name_tells_data_and_paper(name, recipes):
    recipe = recipes[name]
    data, rest = name.split("-", 1)
    assert recipe.data["name"] == data and data in ("voc12", "coco14")
    assert rest.startswith(IN_NAMES[recipe.paper.name])
    assert recipe.title.startswith({"voc12": "VOC 2012, ", "coco14": "COCO 2014, "}[data])


@pytest.mark.parametrize("name", WITH_ROWS)
def test_tables_are_of_the_data_set(name, recipes):
    paper, data = recipes[name].paper, recipes[name].data["name"]
    kinds = {ON_COCO.get((paper.name, row.table), "never") for row in paper.rows}
    assert kinds <= ({"always", "too"} if data == "coco14" else {"never", "too"})


def test_a_row_is_given_once_by_the_paper_and_once_by_its_code(recipes):
    given = Counter(
        (recipe.data["name"], recipe.paper.name, row.table, row.row, stage, name.endswith("-released"))
        for name, recipe in recipes.items()
        for row in recipe.paper.rows
        for stage in row.expected
    )
    assert [entry for entry, times in given.items() if times > 1] == []


def test_a_score_stands_in_one_row_of_a_table_with_one_number_only(recipes):
    """One stage gives one number: rows of a table that are the same pipeline must agree, unless they are of OAA+."""
    for name, recipe in recipes.items():
        if "oaa-plus" in name:  # its rows differ in saliency maps, which are not used here
            continue
        for table in {row.table for row in recipe.paper.rows}:
            rows = [row.expected for row in recipe.paper.rows if row.table == table]
            for stage in {stage for row in rows for stage in row}:
                assert len({row[stage] for row in rows if stage in row}) == 1, (name, table, stage)


@pytest.mark.parametrize("name", ABLATED)
def test_an_ablation_changes_its_method_alone(name, recipes):
    whole, ablated = recipes[ABLATED[name]].stages, recipes[name].stages
    assert set(ablated) < set(whole) or list(ablated) == list(whole)
    method = list(whole["classify"]["methods"])
    assert list(ablated["classify"]["methods"]) == method != []
    assert ablated["classify"]["methods"] != whole["classify"]["methods"]
    for stage, settings in ablated.items():
        assert settings | {"methods": None} == whole[stage] | {"methods": None}, stage


def test_no_two_recipes_of_a_paper_are_the_same_run(recipes):
    """Nothing is run twice under two names: what is the same pipeline is one recipe with several rows."""
    runs: dict[tuple[str, str, str], str] = {}
    for name, recipe in recipes.items():
        run = recipe.paper.name, recipe.data["name"], str(recipe.stages)
        assert run not in runs, (name, runs[run])
        runs[run] = name
