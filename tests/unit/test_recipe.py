"""Recipes: the YAML, the overrides, and one line with its path for each mistake."""

import json

import pytest
import yaml

from tag2mask.errors import UserError
from tag2mask.recipe import Recipe, built_in, input_names, load, load_text, override
from tag2mask.stages import STAGES

KINDS = ", ".join(sorted(STAGES))
SOURCES_THERE = "there is scenes, folder, voc12, coco14"
TITLES = built_in()
PLACES = {"scenes": [], "folder": ["data.images"], "voc12": ["data.root"], "coco14": ["data.root"]}

SMALL = """
title: A small one
data: {name: scenes, images: 8, test: 1, size: 32}
stages:
  classify:
    do: classify
    net: {name: cam, backbone: {name: test_resnet, weights: null}}
    train: {steps: 4}
  cams: {do: cams, of: classify, scales: [1.0], flip: false, batch: 2}
  masks: {do: labels, of: cams, background: {score: 0.3}}
  quality: {do: evaluate_masks, of: masks}
"""


@pytest.fixture
def write(tmp_path):
    def write(text=SMALL, name="small.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def faults(path, *overrides):
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    return str(caught.value).splitlines()


def placed(name, where):
    """The overrides that say where the data of a built-in recipe lies."""
    return [f"{key}={where}" for key in PLACES[yaml.safe_load(load_text(name))["data"]["name"]]]


class TestBuiltIn:
    @pytest.mark.parametrize("name", TITLES)
    def test_every_recipe_is_sound_and_can_be_planned(self, name):
        recipe = load(name, placed(name, "somewhere"))
        assert recipe.name == name
        assert recipe.title == TITLES[name]
        stages = recipe.plan("data")
        assert len({stage.key for stage in stages}) == len(stages)
        json.dumps([stage.settings for stage in stages])

    def test_an_unknown_name(self):
        assert faults("dmeo") == ["no recipe 'dmeo'; did you mean demo?, or give a path ending in .yaml"]
        with pytest.raises(UserError, match="no recipe"):
            load_text("dmeo")


class TestFile:
    def test_is_read(self, write):
        recipe = load(write())
        assert (recipe.name, recipe.title) == ("small", "A small one")
        assert list(recipe.stages) == ["classify", "cams", "masks", "quality"]
        assert recipe.stages["cams"] == {"do": "cams", "of": "classify", "scales": (1.0,), "flip": False, "batch": 2}
        assert recipe.stages["classify"]["train"]["lr"] == 0.01
        assert recipe.source().classes == ("fox", "cat", "sheep", "boat", "mushroom")
        assert load(str(write(name="other.yml"))).name == "other"

    def test_a_title_is_not_needed(self, write):
        assert load(write(SMALL.replace("title: A small one", ""))).title == "small"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "a recipe is a mapping with title, data and stages"),
            ("- a\n- b", "a recipe is a mapping with title, data and stages"),
            ("data: [", "not valid YAML"),
            ("data: {a: 1}\ndata: {b: 2}", "not valid YAML: data is given twice .* line 1"),
            (SMALL + "  cams: {do: cams, of: classify}\n", "not valid YAML: cams is given twice"),
            (SMALL.replace("flip: false", "flip: false, flip: true"), "not valid YAML: flip is given twice"),
            ("x: !!python/object:os.system {}", "not valid YAML: could not determine a constructor"),
            (SMALL.replace("stages:", "stage:"), "stage: unknown; a recipe has title, data and stages"),
            ("data: {name: scenes}\nstages: [classify]", r"stages: must be a mapping .*, not \['classify'\]"),
            ("data: {name: scenes}\nstages: classify", "stages: must be a mapping .*, not 'classify'"),
        ],
    )
    def test_that_is_no_recipe(self, write, text, message):
        with pytest.raises(UserError, match=rf"small.*: {message}") as caught:
            load(write(text))
        assert "\n" not in str(caught.value)

    def test_that_cannot_be_read(self, tmp_path):
        assert faults(tmp_path / "no.yaml") == [f"{tmp_path}/no.yaml: cannot be read (No such file or directory)"]
        (tmp_path / "folder.yaml").mkdir()
        assert faults(tmp_path / "folder.yaml") == [f"{tmp_path}/folder.yaml: cannot be read (Is a directory)"]
        (tmp_path / "latin.yaml").write_bytes("title: Füchse".encode("latin-1"))
        assert faults(tmp_path / "latin.yaml") == [f"{tmp_path}/latin.yaml: cannot be read (not UTF-8)"]


class TestFaults:
    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("name: scenes", "name: scene", f"data.name: 'scene' is unknown; {SOURCES_THERE}"),
            ("name: scenes", "name: [scenes]", f"data.name: ['scenes'] is unknown; {SOURCES_THERE}"),
            ("{name: scenes, images: 8, test: 1, size: 32}", "", f"data.name: None is unknown; {SOURCES_THERE}"),
            ("size: 32", "sise: 32", "data.sise: unknown; did you mean size?"),
            ("size: 32", "size: big", "data.size: should be a valid integer, unable to parse string as an integer "
             "(got 'big')"),
            ("do: cams", "do: cam", "cams.do: 'cam' is no kind of stage; did you mean cams?"),
            ("do: cams, ", "", f"cams.do: None is no kind of stage; there is {KINDS}"),
            ("do: cams", "do: [cams]", "cams.do: ['cams'] is no kind of stage; did you mean cams?"),
            ("of: classify", "of: clasify", "cams.of: no earlier stage 'clasify'; did you mean classify?"),
            ("of: classify", "of: [classify]", "cams.of: no earlier stage ['classify']; did you mean classify?"),
            ("of: classify", "of: masks", "cams.of: no earlier stage 'masks'; there is classify"),  # Input order
            ("of: classify", "of: cams", "cams.of: no earlier stage 'cams'; there is classify"),
            ("of: classify, ", "", "cams.of: missing; give it in the recipe or as -s cams.of=VALUE"),
            ("of: masks", "of: cams", "quality.of: cams is a cams stage, this needs labels or crf or predict"),
            (
                "of: masks", "of: classify",
                "quality.of: classify is a classify stage, this needs labels or crf or predict",
            ),
            ("name: cam,", "name: kam,", "classify.net: no 'kam'; did you mean cam?"),
            ("train: {steps: 4}", "train: {steps: 4, bacth: 2}", "classify.train.bacth: unknown; did you mean batch?"),
            ("train: {steps: 4}", "train: {}", "classify.train: give either epochs or steps"),
            ("train: {steps: 4}", "train: {steps: 4, lr: -1}", "classify.train: lr: -1.0 must be a number from 0"),
            ("train: {steps: 4}", "", "classify.train: missing; give it in the recipe or as -s classify.train=VALUE"),
            ("weights: null", "weights: null, output_stride: 4",
             "classify.net.backbone.output_stride: should be 8, 14, 16 or 32 (got 4)"),
            ("train: {steps: 4}", "train: {steps: 4}\n    augment: {crop: 4}",
             "classify.augment: crop must be at least 8 and long must be [smallest, largest], at least 8"),
            ("train: {steps: 4}", "train: {steps: 4}\n    methods: {ppcc: {}}",
             "classify.methods.ppcc: no 'ppcc'; did you mean ppc?"),
            ("background: {score: 0.3}", "background: {score: 0.3, alpha: 4}",
             "masks.background: give either score (a constant in 0..1) or alpha (a power)"),
            ("scales: [1.0]", "scales: []", "cams.scales: Tuple should have at least 1 item after validation, not 0 "
             "(got [])"),
            ("scales: [1.0]", "scales: [1, 0]", "cams.scales: should be greater than 0 (got [1, 0])"),
            ("batch: 2", "batch: 0", "cams.batch: should be greater than or equal to 1 (got 0)"),
            ("  cams:", "  on:", "stages: True cannot be the name of a stage; take a word (in quotes if it is a "
             "number, yes, no, on or off)"),
        ],
    )  # fmt: skip
    def test_are_lines_with_their_path(self, write, old, new, message):
        assert SMALL.count(old) == 1
        assert faults(write(SMALL.replace(old, new)))[0] == message

    def test_the_first_stage_has_no_earlier_one(self, write):
        text = "data: {name: scenes}\nstages:\n  cams: {do: cams, of: classify}"
        assert faults(write(text)) == ["cams.of: no earlier stage 'classify'; it is the first one"]

    @pytest.mark.parametrize("stages", ["", "stages:", "stages: {}"])
    def test_no_stages(self, write, stages):
        text = f"data: {{name: scenes}}\n{stages}"
        assert faults(write(text)) == ["stages: missing; a recipe needs at least one stage"]

    def test_are_told_all_at_once(self, write):
        text = SMALL.replace("size: 32", "sise: 32").replace("steps: 4", "stesp: 4").replace("of: masks", "of: mask")
        assert [line.split(":")[0] for line in faults(write(text))] == [
            "data.sise", "classify.train.stesp", "quality.of",
        ]  # fmt: skip


class TestOverrides:
    @pytest.mark.parametrize(
        ("setting", "path", "value"),
        [
            ("classify.train.lr=0.02", ("classify", "train", "lr"), 0.02),
            ("stages.classify.train.lr=0.02", ("classify", "train", "lr"), 0.02),
            (" classify.train.lr = 0.02 ", ("classify", "train", "lr"), 0.02),
            ("classify.train.lr=1e-3", ("classify", "train", "lr"), 0.001),
            ("classify.train.lr=1.0e-3", ("classify", "train", "lr"), 0.001),
            ("classify.train.lr=1E5", ("classify", "train", "lr"), 100000.0),
            ("classify.train.weight_decay=0", ("classify", "train", "weight_decay"), 0.0),
            ("cams.scales=[0.5, 1, 1e0]", ("cams", "scales"), (0.5, 1.0, 1.0)),
            ("cams.flip=yes", ("cams", "flip"), True),
            ("cams.flip=off", ("cams", "flip"), False),
            ("classify.net.backbone.weights=null", ("classify", "net", "backbone", "weights"), None),
            ("classify.net.backbone.weights=/a=b.pth", ("classify", "net", "backbone", "weights"), "/a=b.pth"),
            ("classify.augment.long=[64, 96]", ("classify", "augment", "long"), (64, 96)),
            ("classify.bf16=true", ("classify", "bf16"), True),
            ("masks.background={alpha: 4}", ("masks", "background"), {"score": None, "alpha": 4.0}),
            ("quality.split=test", ("quality", "split"), "test"),
        ],
    )
    def test_replace_a_leaf(self, write, setting, path, value):
        found = load(write(), [setting]).stages
        for key in path:
            found = found[key]
        assert found == value
        assert type(found) is type(value)

    def test_of_data_and_title(self, write):
        recipe = load(write(), ["data.images=9", "title=Another"])
        assert (recipe.data["images"], recipe.title) == (9, "Another")

    def test_the_last_one_counts(self, write):
        assert load(write(), ["cams.batch=2", "cams.batch=3"]).stages["cams"]["batch"] == 3

    def test_can_add_a_stage(self, write):
        recipe = load(write(), ["stages.more.do=evaluate_maps", "more.of=cams"])
        swept = {"first": 0.0, "last": 0.99, "step": 0.01}
        assert recipe.stages["more"] == {"do": "evaluate_maps", "of": "cams", "split": "score", "thresholds": swept}

    def test_of_settings_that_the_file_leaves_empty(self, write):
        text = SMALL.replace("train: {steps: 4}", "train:")
        assert load(write(text), ["classify.train.steps=3"]).stages["classify"]["train"]["steps"] == 3

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("classify.train.lr", "-s classify.train.lr: must be key=value, such as classify.train.lr=0.02"),
            ("=3", "-s =3: must be key=value, such as classify.train.lr=0.02"),
            ("cams..batch=3", "-s cams..batch=3: must be key=value, such as classify.train.lr=0.02"),
            ("clasify.bf16=1", "-s clasify.bf16=1: no stage 'clasify'; did you mean classify?"),
            ("x.y=1", "-s x.y=1: no stage 'x'; there is cams, classify, data, masks, quality"),
            ("cams.batch.size=1", "-s cams.batch.size=1: batch is a value, it has no settings inside"),
            ("cams.scales=[1", "-s cams.scales=[1: the value is not valid YAML; quote it"),
            ("cams.scale=[1]", "cams.scale: unknown; did you mean scales?"),
            ("classify.net.backbone.nmae=x", "classify.net.backbone.nmae: unknown; did you mean name?"),
            ("classify.train.lr=", "classify.train.lr: should be a valid number (got None)"),
            ("classify.train.lr=fast", "classify.train.lr: should be a valid number, unable to parse string as a "
             "number (got 'fast')"),
            ("cams.scales=0.5", "cams.scales: should be a valid tuple (got 0.5)"),
            ("cams.scales=0.5,1", "cams.scales: should be a valid tuple (got '0.5,1')"),
            ("classify.net.backbone.name=no", "classify.net.backbone.name: should be a valid string (got False)"),
            ("classify=3", f"classify.do: None is no kind of stage; there is {KINDS}"),
            ("stages=3", "small: stages: must be a mapping of names to stages, not 3"),
            ("data=3", f"data.name: None is unknown; {SOURCES_THERE}"),
        ],
    )  # fmt: skip
    def test_that_are_wrong_say_so(self, write, setting, message):
        assert faults(write(), setting)[0] == message

    def test_leave_the_rest_alone(self):
        tree = {"stages": {"a": {"x": 1, "y": {"z": 2}}}}
        assert override(tree, ["a.y.w=[3]"]) == {"stages": {"a": {"x": 1, "y": {"z": 2, "w": [3]}}}}


class TestAsYaml:
    def test_comes_back_as_the_same_recipe(self, write):
        recipe = load(write(), ["classify.train.lr=1e-5", "classify.augment.long=[64, 96]", "title=yes"])
        again = load(write(recipe.as_yaml()))
        assert again == recipe
        assert [stage.key for stage in again.plan("d")] == [stage.key for stage in recipe.plan("d")]

    @pytest.mark.parametrize("name", TITLES)
    def test_of_every_built_in_recipe(self, name, write):
        recipe = load(name, placed(name, "'Füchse: alle'"))
        again = load(write(recipe.as_yaml(), name=f"{name}.yaml"))
        assert again == recipe

    def test_is_plain_yaml_with_all_defaults(self, write):
        tree = yaml.safe_load(load(write()).as_yaml())
        assert list(tree) == ["title", "data", "stages"]
        assert tree["stages"]["classify"]["train"]["momentum"] == 0.9
        assert tree["stages"]["cams"]["scales"] == [1.0]


class TestPlan:
    def test_stages_know_their_inputs(self, write):
        classify, cams, masks, quality = load(write()).plan("fingerprint")
        assert (classify.name, classify.kind, dict(classify.inputs)) == ("classify", "classify", {})
        assert cams.inputs == {"of": classify}
        assert masks.inputs == {"of": cams}
        assert quality.inputs == {"of": masks}
        assert cams.settings == {"scales": (1.0,), "flip": False, "batch": 2}
        assert {stage.data for stage in (classify, cams, masks, quality)} == {"fingerprint"}

    def test_a_setting_changes_the_keys_from_its_stage_on(self, write):
        before, after = load(write()).plan("d"), load(write(), ["cams.flip=true"]).plan("d")
        assert [one.key == other.key for one, other in zip(before, after, strict=True)] == [True, False, False, False]

    def test_names_and_titles_do_not(self, write):
        renamed = SMALL.replace("cams:", "maps:").replace("of: cams", "of: maps").replace("A small one", "Another")
        before, after = load(write()).plan("d"), load(write(renamed, "x.yaml")).plan("d")
        assert [stage.key for stage in before] == [stage.key for stage in after]
        assert [stage.name for stage in after] == ["classify", "maps", "masks", "quality"]

    def test_how_a_value_is_written_does_not(self, write):
        written = load(write(), ["classify.train.lr=1e-2", "cams.scales=[1]", "cams.flip=no"]).plan("d")
        assert [stage.key for stage in written] == [stage.key for stage in load(write()).plan("d")]

    def test_the_content_of_weights_does(self, write, tmp_path):
        weights, keys = tmp_path / "w.pth", []
        for content in (b"one", b"two", b"two"):
            weights.write_bytes(content)
            (first, *_) = load(write(), [f"classify.net.backbone.weights={weights}"]).plan("d")
            assert list(first.files) == [str(weights)]
            keys.append(first.key)
        assert keys[0] != keys[1] == keys[2]

    def test_input_names(self):
        assert input_names("cams") == ["of"]
        assert input_names("classify") == []


def test_a_recipe_can_be_built_by_hand():
    recipe = Recipe("x", "X", {"name": "scenes", "images": 8}, {})
    assert recipe.source().images == 8
    assert recipe.plan("d") == []
