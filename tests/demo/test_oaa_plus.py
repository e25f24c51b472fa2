"""OAA+ from tags to scores through the command line, on a few scenes: two networks, and maps between and after them."""

import numpy as np
import pytest
from commands import EACH, SCENES, settings, shell

from tag2mask.data.maps import map_path, read_maps
from tag2mask.data.scenes import Scenes
from tag2mask.pipeline import read_json

WORDS = ["run", "scenes-oaa-plus", "--device", "cpu", "--workers", "0"]
WORDS += settings(*(f"{stage}.{setting}" for stage in ("classify", "integrate") for setting in EACH), *SCENES)
WORDS += settings("classify.train.epochs=3", "classify.net.width=16", "integrate.net.width=16", "cams.scales=[1]")
SAMPLES = Scenes(images=24, test=8, size=48).split("train")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder of a run in a process of its own."""
    folder = tmp_path_factory.mktemp("oaa") / "work"
    done = shell(*WORDS, "--work", folder)
    assert done.code == 0, done.err
    return folder


def folder(work, stage):
    return work / read_json(work / "scenes-oaa-plus.run.json")["stages"][stage]["folder"]


def test_both_stages_leave_maps_and_scores(work):
    for stage in ("accumulated-seeds", "seeds"):
        result = read_json(folder(work, stage) / "result.json")
        assert result["kind"] == "maps" and 0 <= result["miou"] <= 1
    for stage in ("attention", "cams"):
        stored = [read_maps(map_path(folder(work, stage), name)) for name in SAMPLES.names]
        assert [maps.classes.tolist() for maps in stored] == [np.flatnonzero(tags).tolist() for tags in SAMPLES.tags]
        assert all(maps.maps.shape[1:] == (12, 12) and maps.size == (48, 48) for maps in stored)
        assert all(maps.maps.min() >= 0 and maps.maps.max() <= 1 for maps in stored if len(maps.maps))
    seen = [read_maps(map_path(folder(work, "attention"), name)).maps for name in SAMPLES.names]
    assert np.mean([maps.max() > 0.9 for maps in seen if len(maps)]) > 0.5


def test_nothing_is_done_twice(work, tag2mask):
    done = tag2mask(*WORDS, "--work", work)
    assert done.code == 0 and done.err.count("already done") == 7, done.err


def test_another_second_network_needs_no_new_first_one(work, tag2mask):
    done = tag2mask(*WORDS, "--work", work, *settings("integrate.train.steps=2", "integrate.train.epochs=null"))
    assert done.code == 0, done.err
    assert "attention: already done" in done.err and "integrate: start" in done.err


def test_a_network_that_accumulates_nothing_is_refused_before_it_is_trained(tmp_path, tag2mask):
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(
        "data: {name: scenes, images: 8, test: 1, size: 48}\n"
        "stages:\n"
        "  classify:\n"
        "    do: classify\n"
        "    net: {name: cam, backbone: {name: test_resnet, weights: null}}\n"
        "    train: {steps: 9}\n"
        "  attention: {do: attention, of: classify}\n"
    )
    done = tag2mask("run", recipe, "--work", tmp_path / "work", "--device", "cpu")
    assert done.code == 2 and "start" not in done.err
    expected = "attention: of: classify trains cam, which accumulates no attention; set classify.net.name: oaa"
    assert expected in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    "name, expected",
    [
        ("cam", "integrate.of: classify is a classify stage, this needs attention"),
        ("seam", "integrate.net: no 'seam'; there is cam, oaa"),
    ],
)
def test_integrate_reads_attention_and_trains_maps_alone(name, expected, tmp_path, tag2mask):
    recipe = tmp_path / "wrong.yaml"
    settings = f"net: {{name: {name}, backbone: {{name: test_resnet, weights: null}}}}, train: {{steps: 9}}"
    recipe.write_text(
        "data: {name: scenes}\n"
        "stages:\n"
        f"  classify: {{do: classify, {settings}}}\n"
        f"  integrate: {{do: integrate, of: classify, {settings}}}\n"
    )
    done = tag2mask("run", recipe, "--work", tmp_path / "work", "--device", "cpu")
    assert done.code == 2 and done.err.strip() == f"tag2mask: {expected}"
