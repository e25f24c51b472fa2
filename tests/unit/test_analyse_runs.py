"""`tag2mask analyse` on small finished runs, against what their stages gave and against loops."""

import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tag2mask import api, cli
from tag2mask.analyse.embedding import Choice, embedding
from tag2mask.analyse.prototypes import cpal_affinity, rca_affinity
from tag2mask.analyse.work import open_work
from tag2mask.data.augment import normalise
from tag2mask.engine import Devices
from tag2mask.errors import UserError
from tag2mask.metrics import Confusion
from tag2mask.ops.cams import max_norm
from tag2mask.stages.cams import multi_scale

RECIPE = """
title: Small
data: {name: scenes, images: 16, test: 8, size: 48}
stages:
  classify:
    do: classify
    net: {name: cam, backbone: {name: test_resnet, weights: null, output_stride: 16}}
    train: {epochs: 3, batch: 8, optimizer: adamw, lr: 0.001, lr_new: 1}
    augment: {crop: 32, long: [32, 48]}
  tags: {do: evaluate_classifier, of: classify}
  half: {do: cams, of: classify, scales: [0.5], flip: true}
  seeds-half: {do: evaluate_maps, of: half}
  whole: {do: cams, of: classify, scales: [1.0], flip: true}
  seeds-whole: {do: evaluate_maps, of: whole}
  both: {do: cams, of: classify, scales: [0.5, 1.0], flip: true}
  seeds-both: {do: evaluate_maps, of: both}
"""
CPAL = "classify.methods={cpal: {dim: 16, bank: 40, prototypes: 4, neighbours: 2}}"
RCA = "classify.methods={rca: {clusters: 3, gate: 0.0}}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: work folder}: plain, another seed, cpal, rca, and rca on other data and too short for prototypes."""
    root = tmp_path_factory.mktemp("runs")
    recipe = root / "small.yaml"
    recipe.write_text(RECIPE)
    settings = {
        "plain": [], "seed": ["classify.train.seed=3"], "cpal": [CPAL], "rca": [RCA],
        "other": ["data.seed=1", RCA, "classify.train.epochs=1"],
    }  # fmt: skip
    for name, overrides in settings.items():
        api.run(recipe, overrides, work=root / name, options=api.Options("cpu", workers=0))
    return {name: root / name for name in settings}


@pytest.fixture
def analyse(tmp_path):
    """`analyse("scales", work, ...)` -> what was printed; files are in tmp_path."""

    def call(command, *arguments):
        done = CliRunner().invoke(cli.app, ["analyse", command, *map(str, arguments), "--out", str(tmp_path)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    return call


def result(work, stage):
    record = json.loads((work / "small.run.json").read_text())
    return json.loads((work / record["stages"][stage]["folder"] / "result.json").read_text())


def trained(work):
    _, objective = open_work(work).classifier(None, Devices("cpu"))
    return objective


def seen(work, name):
    """(output for one image, its tags)."""
    samples, index = open_work(work).find_image(name)
    image = normalise(torch.from_numpy(samples.image(index)).permute(2, 0, 1))[None]
    with torch.no_grad():
        return trained(work).look(image), torch.from_numpy(samples.tags[index])


class TestScales:
    def test_are_those_of_the_stages(self, runs, analyse, tmp_path):
        said = analyse("scales", runs["plain"], "--scales", "0.5,1", "--cpu", "--workers", 0)
        found = json.loads((tmp_path / "scales.json").read_text())
        stages = [result(runs["plain"], f"seeds-{name}") for name in ("half", "whole")]
        assert [row["miou"] for row in found["scales"]] == [stage["miou"] for stage in stages]
        assert [row["threshold"] for row in found["scales"]] == [stage["threshold"] for stage in stages]
        together = result(runs["plain"], "seeds-both")
        assert found["together"] == {"scales": [0.5, 1], "miou": together["miou"], "threshold": together["threshold"]}
        means = np.mean([stage["curve"]["miou"] for stage in stages], axis=0)
        common = int(means.argmax())
        assert found["threshold_common"] == stages[0]["curve"]["threshold"][common]
        assert [row["miou_common"] for row in found["scales"]] == [stage["curve"]["miou"][common] for stage in stages]
        assert found["mean_common"] == pytest.approx(means[common])
        assert found["images"] == 16 and found["split"] == "score" and found["threshold_by"] == "oracle"
        assert f"{100 * stages[0]['miou']:.1f}" in said and "mean ± spread" in said and "scales.svg" in said
        assert "scale 0.5" in (tmp_path / "scales.svg").read_text()

    @pytest.mark.parametrize("given", ["a,b", "1,1", "", "0", "-1", "nan", "1,inf"])
    def test_bad_scales(self, runs, analyse, given):
        with pytest.raises(UserError, match="--scales") as fault:
            analyse("scales", runs["plain"], "--scales", given, "--cpu")
        assert "\n" not in str(fault.value)


class TestThresholds:
    def test_every_evaluated_map_has_a_curve(self, runs, analyse, tmp_path):
        analyse("thresholds", runs["plain"])
        found = json.loads((tmp_path / "thresholds.json").read_text())
        assert [entry["stage"] for entry in found] == ["seeds-half", "seeds-whole", "seeds-both"]
        for entry in found:
            stage = result(runs["plain"], entry["stage"])
            assert (entry["threshold"], entry["miou"]) == (stage["threshold"], stage["miou"])
            values = dict(zip(stage["curve"]["threshold"], stage["curve"]["miou"], strict=True))
            first, last = entry["plateau"]
            assert all(v >= entry["miou"] - 0.01 for t, v in values.items() if first <= t <= last)
            beside = [v for t, v in values.items() if 0 < first - t < 0.0101 or 0 < t - last < 0.0101]
            assert all(v < entry["miou"] - 0.01 for v in beside)
            assert entry["width"] == pytest.approx(last - first)
        assert (tmp_path / "thresholds.svg").read_text().count("within 1 point") == 3

    def test_runs_over_the_setting_in_which_they_differ(self, runs, analyse, tmp_path):
        said = analyse("thresholds", "--runs", runs["seed"], runs["plain"])
        found = json.loads((tmp_path / "sensitivity.json").read_text())
        assert found["setting"] == "classify.train.seed"
        assert [run["value"] for run in found["runs"]] == [0, 3]  # sorted
        for run, name in zip(found["runs"], ("plain", "seed"), strict=True):
            assert run["work"] == str(runs[name])
            expected = {
                stage: result(runs[name], stage)["miou"] for stage in ("seeds-half", "seeds-whole", "seeds-both")
            }
            assert run["numbers"] == {"tags": result(runs[name], "tags")["map"], **expected}
        assert "classify.train.seed" in said
        drawn = (tmp_path / "sensitivity.svg").read_text()
        assert "seeds-half" in drawn and "tags" not in drawn

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (("plain",), "at least two"),
            (("plain", "plain"), "are the same"),
            (("cpal", "rca"), "differ in"),
        ],
    )
    def test_runs_that_do_not_compare(self, runs, analyse, names, message):
        with pytest.raises(UserError, match=message) as fault:
            analyse("thresholds", "--runs", *(runs[name] for name in names))
        assert "\n" not in str(fault.value)

    def test_one_work_folder_without_runs(self, runs, analyse):
        with pytest.raises(UserError, match="add --runs"):
            analyse("thresholds", runs["plain"], runs["seed"])


def tagged(work):
    samples = open_work(work).source.split("train")
    return samples.names[int(samples.tags.any(axis=1).argmax())]


class TestPrototypes:
    def test_rca_is_the_dot_product(self, runs):
        out, tags = seen(runs["rca"], tagged(runs["rca"]))
        method = trained(runs["rca"]).methods["rca"]
        k = int(tags.nonzero()[0])
        found = rca_affinity(method, out, k)
        assert found
        features = out.features["plain"][0]
        for one in found:
            for y in range(features.shape[1]):
                for x in range(features.shape[2]):
                    dot = sum(
                        float(a * b) for a, b in zip(features[:, y, x], method.prototypes[k, one.number], strict=True)
                    )
                    assert one.map[y, x] == pytest.approx(dot, rel=1e-4, abs=1e-4)

    def test_cpal_maps_make_up_the_exported_one(self, runs):
        out, tags = seen(runs["cpal"], tagged(runs["cpal"]))
        method = trained(runs["cpal"]).methods["cpal"]
        exported = method.cams(out, tags[None])[0]
        for k in tags.nonzero().flatten().tolist():
            found = cpal_affinity(method, out, k)
            assert 1 <= len(found) <= 2  # neighbours
            assert sum(one.weight for one in found) == pytest.approx(1, abs=1e-5)
            assert all(np.abs(one.map).max() <= 1 + 1e-5 for one in found)
            mixed = sum(one.weight * torch.from_numpy(one.map) for one in found)
            torch.testing.assert_close(max_norm(mixed), exported[k], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("run", ["rca", "cpal"])
    def test_picture_and_numbers(self, runs, analyse, tmp_path, run):
        name = tagged(runs[run])
        said = analyse("prototypes", runs[run], "--image", name, "--cpu", "--most", 1)
        stem = "prototypes-" + name.replace("/", "-")
        found = json.loads((tmp_path / f"{stem}.json").read_text())
        samples, index = open_work(runs[run]).find_image(name)
        classes = [c for c, tag in zip(open_work(runs[run]).classes, samples.tags[index], strict=True) if tag]
        assert found["method"] == run and list(found["classes"]) == classes
        assert Image.open(tmp_path / f"{stem}.png").size[0] == 8 + 3 * 208  # image, map, one prototype
        assert classes[0] in said

    def test_a_class_that_is_asked_for(self, runs, analyse, tmp_path):
        name = tagged(runs["rca"])
        analyse("prototypes", runs["rca"], "--image", name, "--class", "boat", "--cpu")
        found = json.loads((tmp_path / f"prototypes-{name.replace('/', '-')}.json").read_text())
        assert list(found["classes"]) == ["boat"]
        highs = [p["high"] for p in found["classes"]["boat"]]
        assert highs == sorted(highs, reverse=True)

    @pytest.mark.parametrize(
        ("run", "arguments", "message"),
        [
            ("plain", [], "train it with rca"),
            ("other", [], "rca has no prototypes of .*; train for more epochs"),
            ("rca", ["--class", "bost"], "did you mean boat"),
            ("rca", ["--stage", "half"], "no classify or integrate stage of this run; there is classify"),
        ],
    )
    def test_faults(self, runs, analyse, run, arguments, message):
        with pytest.raises(UserError, match=message) as fault:
            analyse("prototypes", runs[run], "--image", tagged(runs[run]), "--cpu", *arguments)
        assert "\n" not in str(fault.value)

    def test_an_unknown_image(self, runs, analyse):
        with pytest.raises(UserError, match=r"--image train/00O1: .* look like train/00\d\d$"):
            analyse("prototypes", runs["rca"], "--image", "train/00O1", "--cpu")


@pytest.mark.skipif(find_spec("sklearn") is None, reason="the extra `analyse` is not installed")
class TestEmbedding:
    def test_instances_are_means_over_regions(self, runs, tmp_path):
        work = open_work(runs["plain"])
        found = embedding(work, tmp_path, choice=Choice(above=0.4), devices=Devices("cpu"), workers=0)
        samples = work.source.split("score")
        points = {}
        for index, name in enumerate(samples.names):
            tags = torch.from_numpy(samples.tags[index])
            out, _ = seen(runs["plain"], name)
            maps = max_norm(out.cams)[0]
            for k in tags.nonzero().flatten().tolist():
                rivals = maps[tags > 0].amax(dim=0)
                region = (maps[k] == rivals) & (maps[k] > 0.4)
                if region.any():
                    mean = out.features["last"][0][:, region].mean(dim=1)
                    points.setdefault(k, []).append(mean / mean.norm())
        sizes = {work.classes[k]: len(own) for k, own in points.items()}
        assert {name: entry["points"] for name, entry in found["by_class"].items()} == sizes
        for k, own in points.items():
            pairs = [float((a - b).norm()) for i, a in enumerate(own) for b in own[:i]]
            if pairs:
                assert found["by_class"][work.classes[k]]["within"] == pytest.approx(np.mean(pairs), rel=1e-3)
        kept = json.loads((tmp_path / "embedding.json").read_text())
        assert len(kept["places"]) == len(kept["labels"]) == found["points"] == sum(sizes.values())
        assert (tmp_path / "embedding.svg").read_text().count('r="3"') == found["points"]

    def test_pixels_of_the_truth(self, runs, analyse, tmp_path):
        said = analyse("embedding", runs["plain"], "--of", "pixels", "--regions", "truth", "--points", 40, "--cpu")
        found = json.loads((tmp_path / "embedding.json").read_text())
        assert 5 <= found["points"] <= 40 and found["regions"] == "truth"
        assert "mean of classes" in said

    def test_aligned_features_are_moved_by_delta(self, runs, tmp_path):
        work, found = open_work(runs["cpal"]), {}
        for features in ("projected", "aligned"):
            choice = Choice(features=features, above=0.1)
            found[features] = embedding(work, tmp_path, choice=choice, devices=Devices("cpu"), workers=0)
        assert found["projected"]["points"] == found["aligned"]["points"]
        assert found["projected"]["within"] != found["aligned"]["within"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--features", "aligned"], "trained with cpal"),
            (["--above", "1"], "only 0 points"),
        ],
    )
    def test_faults(self, runs, analyse, arguments, message):
        with pytest.raises(UserError, match=message) as fault:
            analyse("embedding", runs["plain"], "--cpu", *arguments)
        assert "\n" not in str(fault.value)


def test_without_scikit_learn_it_says_so(runs, analyse, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(UserError, match=r"pip install 'tag2mask\[analyse\]'"):
        analyse("embedding", runs["plain"], "--cpu")


class TestCompare:
    def test_scores_are_those_of_the_seeds(self, runs, analyse, tmp_path):
        said = analyse("compare", runs["plain"], runs["seed"], "--stage", "whole", "--images", 4)
        found = json.loads((tmp_path / "compare.json").read_text())
        work, name = open_work(runs["seed"]), next(iter(found["images"]))
        samples, index = work.find_image(name)
        tags = torch.from_numpy(samples.tags[index])
        image = normalise(torch.from_numpy(samples.image(index)).permute(2, 0, 1))[None]
        maps = multi_scale(trained(runs["seed"]), image, tags[None], scales=(1.0,), flip=True)[0][0].float()
        maps = torch.nn.functional.interpolate(maps[None], size=samples.image(index).shape[:2], mode="bilinear")[0]
        threshold = result(runs["seed"], "seeds-whole")["threshold"]
        seed = torch.where(maps.amax(dim=0) > threshold, tags.nonzero().flatten()[maps.argmax(dim=0)] + 1, 0)
        own = Confusion(len(work.classes))
        own.update(seed.to(torch.uint8).numpy(), samples.mask(index))
        assert found["images"][name]["second"] == pytest.approx(own.scores().miou, abs=0.01)
        gains = [score["gain"] for score in found["images"].values()]
        assert found["images"][found["shown"][0]]["gain"] == max(gains)
        assert found["images"][found["shown"][-1]]["gain"] == min(gains)
        assert (found["gained"], found["lost"]) == (sum(g > 0 for g in gains), sum(g < 0 for g in gains))
        assert len(found["shown"]) == 4 and all(shown in said for shown in found["shown"])
        assert Image.open(tmp_path / "compare.png").size[0] == 8 + 4 * 208  # image, two maps, truth

    def test_other_data_do_not_compare(self, runs, analyse):
        with pytest.raises(UserError, match="was made from other data than") as fault:
            analyse("compare", runs["plain"], runs["other"])
        assert "\n" not in str(fault.value)

    def test_an_unknown_stage(self, runs, analyse):
        with pytest.raises(UserError, match=r"--stage hole: no cams or .*attention.* stage of this run; there is half"):
            analyse("compare", runs["plain"], runs["seed"], "--stage", "hole")


class TestWork:
    def test_no_run(self, analyse, tmp_path):
        with pytest.raises(UserError, match="no run here"):
            analyse("scales", tmp_path / "nowhere")

    def test_data_that_have_changed(self, runs, tmp_path):
        record = json.loads((runs["plain"] / "small.run.json").read_text())
        for stage in record["stages"].values():
            (tmp_path / stage["folder"]).mkdir()
            manifest = (runs["plain"] / stage["folder"] / "manifest.json").read_text()
            (tmp_path / stage["folder"] / "manifest.json").write_text(manifest)
        record["data"]["seed"] = 7
        (tmp_path / "small.run.json").write_text(json.dumps(record))
        with pytest.raises(UserError, match="the data have changed since run 'small'"):
            open_work(tmp_path)

    def test_an_unfinished_stage(self, runs, tmp_path):
        record = (runs["plain"] / "small.run.json").read_text()
        (tmp_path / "small.run.json").write_text(record)
        with pytest.raises(UserError, match="no finished classify or integrate stage of run 'small'"):
            open_work(tmp_path).classifier(None, Devices("cpu"))

    def test_pictures_are_beside_the_run_by_default(self, runs):
        done = CliRunner().invoke(cli.app, ["analyse", "thresholds", str(runs["plain"])])
        assert done.exit_code == 0
        assert (runs["plain"] / "analysis" / "thresholds.svg").exists()
