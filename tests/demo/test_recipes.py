"""Every built-in recipe for a benchmark: planned on miniature data, and (slow) run to its end with tiny networks."""

import json

import pytest
from commands import settings
from miniature import draw_coco, draw_voc
from small import shrunk

from tag2mask import api, recipe
from tag2mask.stages import STAGES

DATA = {"voc12": draw_voc, "coco14": draw_coco}
RECIPES = [name for name in recipe.names() if recipe.written(name)["data"]["name"] in DATA]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Overrides that say where the data of a recipe lies: name -> ["data.root=...", ...]."""
    roots = {data: tmp_path_factory.mktemp(data) for data in DATA}
    for data, draw in DATA.items():
        draw(roots[data])

    def found(name):
        tree = recipe.written(name)
        root = roots[tree["data"]["name"]]
        saliency = [f"data.saliency={root / 'saliency'}"] if "saliency maps" in tree.get("supervision", []) else []
        return [f"data.root={root}", *saliency]

    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """One for all: recipes share what they have in common."""
    return tmp_path_factory.mktemp("work")


def test_there_are_recipes_for_both_benchmarks():
    assert {recipe.written(name)["data"]["name"] for name in RECIPES} == set(DATA)


@pytest.mark.parametrize("name", RECIPES)
def test_it_can_be_planned(name, places, work):
    """The data have what it needs: its lists, masks of what is scored, saliency maps where it learns from them."""
    loaded = recipe.load(name, places(name))
    prepared = api.prepare(loaded, work)
    assert [stage.name for stage in prepared.stages] == list(loaded.stages)
    for stage in prepared.stages:
        if stage.kind.startswith("evaluate_m"):
            STAGES[stage.kind].preflight(prepared.source, stage)
            assert prepared.source.split(stage.settings["split"]).mask is not None


def run(tag2mask, name, places, work):
    words = settings(*places(name), *shrunk(name))
    done = tag2mask("run", name, *words, "--work", work, "--device", "cpu", "--workers", "0", "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_it_runs_to_its_end(name, tag2mask, places, work):
    outcome = run(tag2mask, name, places, work)
    numbers = {result["stage"]: result["miou"] for result in outcome["results"] if result["kind"] != "classifier"}
    loaded = recipe.load(name, places(name))
    scored = {stage for stage, given in loaded.stages.items() if given["do"] in ("evaluate_maps", "evaluate_masks")}
    assert numbers.keys() == scored and all(0 <= number <= 1 for number in numbers.values())
    assert outcome["supervision"][: 1 + len(loaded.supervision)] == ["image tags", *loaded.supervision]

    rows = json.loads(tag2mask("table", loaded.data["name"], "--work", work, "--json").out)
    ours = [row for row in rows if row["recipe"] == name]
    expected = [stage for row in (loaded.paper.rows if loaded.paper else ()) for stage in row.expected]
    assert sorted(row["stage"] for row in ours) == sorted(expected)
    assert all(row["ours"] == pytest.approx(100 * numbers[row["stage"]]) for row in ours)


def test_the_seeds_of_one_run_to_their_end(tag2mask, places, tmp_path):
    """The quickest one, so that something of this is tested each time."""
    name = "voc12-ppc-seam-top-4"
    outcome = run(tag2mask, name, places, tmp_path)
    assert [result["stage"] for result in outcome["results"]] == ["tags", "seeds"]
    text = tag2mask("table", "voc12", "--work", tmp_path).out
    (line,) = [line for line in text.splitlines() if name in line]
    assert " 60.02 " in line and f" {100 * outcome['results'][1]['miou']:.1f} " in line
    assert "(oracle), best of 0..0.59 step 0.01" in line and "image tags" in line
    assert "with classify." in line and "classify.methods.ppc.size=32" in line and "seed" not in line.split("with")[1]
