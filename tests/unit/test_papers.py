"""What a recipe says of a paper's tables and of its supervision, and our numbers beside the paper's."""

import json
import shutil
from typing import get_args, get_type_hints

import pytest
import yaml
from miniature import draw_voc
from small import shrunk

from tag2mask import api, collect, compare, tables
from tag2mask import recipe as recipes
from tag2mask.baselines import BASELINES
from tag2mask.cli_table import table
from tag2mask.errors import UserError
from tag2mask.papers import PAPERS, Paper, Row
from tag2mask.pipeline import read_json, write_json
from tag2mask.recipe import load
from tag2mask.runner import Options, record_path

BUILT_IN = recipes.names()
ROWS = [
    {"table": "1", "row": "Ours", "expected": {"seeds": 61.5}},
    {"table": "2", "row": "K = 4", "expected": {"seeds": 60}},
]
PAPER = {"name": "PPC", "rows": ROWS}
NO_STAGE = "no stage that scores maps or masks; there is seeds"
ONE = "voc12-ppc-seam-top-4"


def scenes(path, **head):
    """The recipe scenes-cam with more at its head, as a file."""
    path.write_text(yaml.safe_dump(head) + recipes.load_text("scenes-cam"))
    return path


def row(**changes):
    return {"name": "PPC", "rows": [ROWS[0] | changes]}


class TestHead:
    def test_it_is_read_and_written_again(self, tmp_path):
        path = scenes(tmp_path / "a.yaml", paper=PAPER, supervision=["saliency maps", "language"])
        recipe = load(path)
        assert recipe.paper == Paper("PPC", [Row("1", "Ours", {"seeds": 61.5}), Row("2", "K = 4", {"seeds": 60.0})])
        assert recipe.supervision == ("saliency maps", "language")
        path.write_text(recipe.as_yaml())
        assert load(path) == recipe

    def test_it_changes_no_stage(self, tmp_path):
        stages = load(scenes(tmp_path / "a.yaml", paper=PAPER, supervision=["saliency maps"])).plan("data")
        assert [stage.key for stage in stages] == [stage.key for stage in load("scenes-cam").plan("data")]

    def test_it_may_be_missing(self):
        recipe = load("scenes-cam")
        assert (recipe.paper, recipe.supervision) == (None, ())
        assert "paper" not in recipe.as_yaml() and "supervision" not in recipe.as_yaml()

    @pytest.mark.parametrize(
        ("head", "fault"),
        [
            ({"paper": 3}, "paper: must be a mapping, not 3"),
            ({"paper": PAPER | {"name": "PPO"}}, "paper.name: should be 'PPC', 'RCM+MAM', 'HSC', 'RCA' or 'CPAL' (got"),
            ({"paper": {"name": "PPC"}}, "paper.rows: missing"),
            ({"paper": {"name": "PPC", "rows": []}}, "paper.rows: is empty"),
            ({"paper": {"name": "PPC", "rows": 1}}, "paper.rows: must be a list, not 1"),
            ({"paper": PAPER | {"year": 2022}}, "paper.year: unknown; a paper has name and rows, a row has table"),
            ({"paper": row(note="x")}, "paper.rows.0.note: unknown"),
            ({"paper": row(table=2)}, "paper.rows.0.table: must be text (got 2); put it in quotes"),
            ({"paper": row(row="")}, "paper.rows.0.row: is empty"),
            ({"paper": row(expected={})}, "paper.rows.0.expected: is empty"),
            ({"paper": row(expected={"seeds": "61.5"})}, "paper.rows.0.expected.seeds: should be a valid number"),
            ({"paper": row(expected={"seeds": True})}, "paper.rows.0.expected.seeds: should be a valid number"),
            ({"paper": row(expected={"seeds": 0.615})}, "should be greater than or equal to 1 (got 0.615)"),
            ({"paper": row(expected={"seeds": 615})}, "should be less than or equal to 100 (got 615)"),
            ({"paper": row(expected={"seed": 61.5})}, f"paper.rows.0.expected.seed: {NO_STAGE}"),
            ({"paper": row(expected={"cams": 61.5})}, f"paper.rows.0.expected.cams: {NO_STAGE}"),
            ({"paper": row(expected={"tags": 61.5})}, f"paper.rows.0.expected.tags: {NO_STAGE}"),
            ({"supervision": "saliency maps"}, "supervision: must be a list, not 'saliency maps'"),
            ({"supervision": [3]}, "supervision.0: must be text (got 3); put it in quotes"),
            ({"supervision": [""]}, "supervision.0: is empty"),
        ],
    )  # fmt: skip
    def test_faults(self, tmp_path, head, fault):
        with pytest.raises(UserError) as caught:
            load(scenes(tmp_path / "a.yaml", **head))
        assert fault in str(caught.value) and len(str(caught.value).splitlines()) == 1

    def test_faults_come_all_at_once(self, tmp_path):
        paper = {"name": "PPC", "rows": [ROWS[0] | {"table": 1}, {"table": "1"}]}
        with pytest.raises(UserError) as caught:
            load(scenes(tmp_path / "a.yaml", paper=paper), ["classify.train.lr=-1"])
        assert len(str(caught.value).splitlines()) == 4

    def test_a_row_without_any_stage_to_score(self, tmp_path):
        path = tmp_path / "a.yaml"
        classify = "{do: classify, net: {name: cam, backbone: {name: resnet18}}, train: {epochs: 1}}"
        path.write_text(yaml.safe_dump({"paper": PAPER}) + f"data: {{name: scenes}}\nstages: {{classify: {classify}}}")
        with pytest.raises(UserError, match="there is none, add one"):
            load(path)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_recipe_declares_what_it_learns_from(name):
    """Saliency maps among its data, or in a network that reads them, stand under `supervision`."""
    tree = recipes.written(name)
    nets = [stage["net"]["name"] for stage in tree["stages"].values() if "net" in stage]
    needed = {f"{need} maps" for net in nets if net in BASELINES for need in BASELINES[net].needs}
    needed |= {"saliency maps"} if tree["data"].get("saliency") else set()
    assert set(tree.get("supervision", [])) >= needed


@pytest.mark.parametrize("data", ["voc12", "coco14"])
def test_no_two_recipes_say_the_same(data):
    """Two recipes may share a row, but then they differ in a stage."""
    loaded = [load(name, ["data.root=."]) for name in BUILT_IN if recipes.written(name)["data"]["name"] == data]
    scores = {}
    for recipe in loaded:
        keys = {stage.name: stage.key for stage in recipe.plan("data")}
        for line in recipe.paper.rows if recipe.paper else ():
            for stage in line.expected:
                scores.setdefault((recipe.paper.name, line.table, line.row, keys[stage]), []).append(recipe.name)
    assert [names for names in scores.values() if len(names) > 1] == []


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A recipe run with two seeds on a miniature VOC, and on a folder of images; in three work folders."""
    here = tmp_path_factory.mktemp("ran")
    voc, options = draw_voc(here / "voc"), Options("cpu", 0)
    for seed in (0, 1):
        where = [f"data.root={voc.root}", "seeds.thresholds.first=0.1"][: 1 + seed]
        api.run(ONE, [*where, *shrunk(ONE, seed=seed)], work=here / f"seed-{seed}", options=options)
    photos = here / "photos"
    for place, name in enumerate(voc.lists["train"]):
        label = photos / ("one", "two")[place % 2]
        label.mkdir(parents=True, exist_ok=True)
        shutil.copy(voc.root / f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg", label)
    api.run(api.folder_recipe(photos, {}, shrunk(ONE), recipe=ONE), work=here / "folder", options=options)
    return here


def compared(*works):
    (line,) = [line for line in compare.comparison("voc12", works, "PPC") if line["recipe"] == ONE]
    return line


class TestComparison:
    def test_blanks_where_nothing_was_run(self, tmp_path):
        lines = compare.comparison("voc12", [tmp_path])
        assert lines == compare.comparison("voc12", []) and all(
            line["ours"] is None and not line["runs"] for line in lines
        )
        papers = [line["paper"] for line in lines]
        assert papers == sorted(papers, key=PAPERS.index) and set(papers) == set(PAPERS)
        assert {line["paper"] for line in compare.comparison("voc12", [], "HSC")} == {"HSC"}
        shown = compare.shown(lines)
        assert {(line["ours %"], line["threshold"], line["note"]) for line in shown} == {("", "", "")}
        (eps,) = [line for line in shown if (line["table"], line["recipe"]) == ("4", "voc12-ppc-eps-aspp")]
        assert (eps["paper %"], eps["supervision"]) == ("72.6", "image tags, saliency maps")

    def test_one_run(self, ran):
        line = compared(ran / "seed-0")
        record = read_json(record_path(ran / "seed-0", ONE))
        (seeds,) = [r for r in collect.results(ran / "seed-0", record) if r["stage"] == "seeds"]
        assert (line["paper"], line["table"], line["row"], line["stage"]) == ("PPC", "6", "K = 4", "seeds")
        assert (line["expected"], line["spread"]) == (60.02, None)
        assert line["ours"] == pytest.approx(100 * seeds["miou"])
        (made,) = line["runs"]
        assert (made["threshold"], made["threshold_by"]) == (seeds["threshold"], "oracle")
        (shown,) = compare.shown([line])
        assert shown["threshold"] == f"{seeds['threshold']:.2f} (oracle), best of 0..0.59 step 0.01"
        assert (shown["ours %"], shown["on"]) == (f"{100 * seeds['miou']:.1f}", "score, 5 images")

    def test_what_was_changed_is_said_but_for_seeds_and_places(self, ran):
        zero, one = compared(ran / "seed-0", ran / "seed-1")["runs"]
        changed = {text.split("=")[0] for text in zero["changed"]}
        assert {"classify.net.backbone.name", "classify.methods.ppc.size", "cams.scales"} <= changed
        assert not changed & {"classify.train.seed", "data.root", "classify.methods.ppc.top", "seeds.do", "seeds.of"}
        assert sorted(set(one["changed"]) - set(zero["changed"])) == ["seeds.thresholds.first=0.1"]
        assert not any(text.startswith("tags.") for text in zero["changed"])  # no part of the way to the seeds

    def test_seeds_have_a_mean_and_a_spread(self, ran):
        works = [ran / "seed-0", ran / "seed-1", ran / "seed-0"]  # given twice, counted once
        line = compared(*works)
        zero, one = (run["miou"] for run in line["runs"])
        assert line["ours"] == pytest.approx((zero + one) / 2)
        assert line["spread"] == pytest.approx(abs(zero - one) / 2**0.5)
        assert compare.shown([line])[0]["ours %"] == f"{line['ours']:.1f} ± {line['spread']:.1f} (n=2)"

    def test_the_images_of_somebody_else_do_not_count(self, ran):
        assert record_path(ran / "folder", ONE).exists()
        assert compared(ran / "folder")["runs"] == []

    def test_a_run_that_is_not_finished_does_not_count(self, ran, tmp_path):
        shutil.copytree(ran / "seed-0", tmp_path / "half")
        for manifest in (tmp_path / "half").glob("evaluate_maps-*/manifest.json"):
            manifest.unlink()
        assert compared(tmp_path / "half")["runs"] == []

    def test_a_record_of_another_version_of_the_recipe(self, ran, tmp_path):
        """A stage that it does not have is blank; it has no supervision written down."""
        shutil.copytree(ran / "seed-0", tmp_path / "old")
        record = read_json(record_path(tmp_path / "old", ONE))
        del record["stages"]["seeds"], record["supervision"]
        write_json(record_path(tmp_path / "old", ONE), record)
        assert compared(tmp_path / "old")["runs"] == []
        assert collect.supervision(tmp_path / "old", record) == ["image tags"]

    def test_a_folder_that_is_not_there(self, ran, tmp_path):
        with pytest.raises(UserError, match="nowhere: no such folder; give one that was used as --work"):
            compare.comparison("voc12", [ran / "seed-0", tmp_path / "nowhere"])

    def test_the_command_knows_every_paper(self):
        assert get_args(get_args(get_type_hints(table)["paper"])[0]) == PAPERS

    def test_it_is_json(self, ran):
        lines = compare.comparison("voc12", [ran / "seed-0"], "PPC")
        assert json.loads(json.dumps(lines)) == lines


class TestSupervision:
    @pytest.fixture
    def eps(self, tmp_path_factory):
        """EPS on a few scenes, by a recipe that does not say that it reads saliency maps but learns from words."""
        here = tmp_path_factory.mktemp("eps")
        text = recipes.load_text("scenes-eps").replace("[saliency maps]", "[language]")
        (here / "own.yaml").write_text(text)
        small = ["classify.train.epochs=1", "classify.train.batch=4", "cams.scales=[1.0]"]
        data = ["data.images=8", "data.test=2", "data.size=48", "classify.augment={crop: 48, long: [48, 64]}"]
        return api.run(here / "own.yaml", [*small, *data], work=here / "work", options=Options("cpu", 0))

    def test_it_stands_with_every_number(self, eps):
        page = api.write_report(eps.work, "own")
        outcome = tables.outcome(eps, page)
        assert outcome["supervision"] == ["image tags", "language", "saliency maps"]
        assert "learnt from image tags, language, saliency maps" in tables.outcome_text(outcome).splitlines()
        text = page.read_text(encoding="utf-8")
        assert "<b>image tags</b>, <b>language</b> and <b>saliency maps</b>, and from nothing else" in " ".join(
            text.split()
        )
