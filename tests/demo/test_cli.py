"""Every command on tiny data: what it writes, what it prints, and what it leaves alone when it is given again."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml
from commands import DEMO, ENVIRONMENT, NETS, TAG2MASK, draw, settings, shell
from safetensors.numpy import load_file

from tag2mask import collect
from tag2mask.data.scenes import Scenes
from tag2mask.pipeline import MANIFEST, read_json
from tag2mask.recipe import built_in

STAGES = ["classify", "tags", "cams", "seeds", "masks", "mask-quality", "segment", "predict", "segmenter-quality"]
EVALUATIONS = ["tags", "seeds", "mask-quality", "segmenter-quality"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A tiny demo that was run in a process of its own: its work folder and what it printed."""
    work = tmp_path_factory.mktemp("demo") / "work"
    done = shell(*DEMO, "--work", work, "--json")
    assert done.code == 0, done.err
    return work, done


def stages_in(work, name="demo"):
    return {stage: work / entry["folder"] for stage, entry in read_json(work / f"{name}.run.json")["stages"].items()}


def everything(work):
    """When each file of the stages was last written."""
    return {path: path.stat().st_mtime_ns for path in work.glob("*-*/**/*") if path.is_file()}


def mask(path):
    with PIL.Image.open(path) as picture:
        assert picture.mode == "P"
        return np.array(picture)


def test_demo_leaves_the_files_of_every_stage(demo):
    work, _ = demo
    folders = stages_in(work)
    assert list(folders) == STAGES
    for name, folder in folders.items():
        manifest = read_json(folder / MANIFEST)
        assert manifest["stage"] == name and manifest["seconds"] >= 0 and manifest["device"].startswith("cpu")
        assert {"tag2mask", "torch"} <= manifest["versions"].keys()
        files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, ".lock")]
        assert manifest["files"] == len(files) > 0
    for stage in ("classify", "segment"):
        assert {p.name for p in folders[stage].iterdir()} >= {"model.json", "model.safetensors", "train.jsonl"}
        assert not (folders[stage] / "last.ckpt").exists()
        assert read_json(folders[stage] / "model.json")["classes"] == list(Scenes.classes)
    scenes = Scenes(images=24, test=8, size=48)
    train, test = scenes.split("train"), scenes.split("test")
    assert len(list(folders["cams"].glob("maps/train/*.npz"))) == 24
    for index, name in enumerate(train.names):
        found = np.unique(mask(folders["masks"] / f"masks/{name}.png"))
        assert set(found) <= {0, *(np.flatnonzero(train.tags[index]) + 1)}  # tagged classes and background alone
    assert [mask(folders["predict"] / f"masks/{name}.png").shape for name in test.names] == [(48, 48)] * 8


def test_json_on_stdout_and_plain_lines_on_stderr(demo):
    work, done = demo
    outcome = json.loads(done.out)
    assert [result["stage"] for result in outcome["results"]] == EVALUATIONS
    for result in outcome["results"]:
        stored = read_json(stages_in(work)[result["stage"]] / "result.json")
        assert result.items() >= stored.items()
    assert [Path(path).is_dir() for path in outcome["masks"] + outcome["models"]] == [True, True]
    assert "\x1b" not in done.out + done.err and "\r" not in done.err
    assert "Warning" not in done.err and "Traceback" not in done.err
    for line in done.err.splitlines():
        assert re.match(r"[\w -]+: (\d+/\d+|start|resuming|already done|0\.\d\d, no-mask)", line), line


def test_report_is_one_file_with_all_results(demo):
    _, done = demo
    page = Path(json.loads(done.out)["report"]).read_text()
    assert page.startswith("<!doctype html>") and "http://" not in page and 'src="data:' in page
    for word in (*STAGES, *Scenes.classes, "image tags"):
        assert word in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.(?!data:|#)", page)


def test_recipe_as_it_was_run_is_kept_and_runs_again(demo, tag2mask):
    work, _ = demo
    kept = yaml.safe_load((work / "demo.recipe.yaml").read_text())
    assert kept["data"]["images"] == 24 and kept["stages"]["classify"]["train"]["batch"] == 16
    before = everything(work)
    shutil.copy(work / "demo.recipe.yaml", work.parent / "again.yaml")
    done = tag2mask("run", work.parent / "again.yaml", "--work", work, "--device", "cpu")
    assert done.code == 0 and done.err.count("already done") == len(STAGES)
    assert everything(work) == before
    (work / "again.run.json").unlink()


def test_second_run_writes_nothing_again(demo):
    work, first = demo
    before = everything(work)
    done = shell(*DEMO, "--work", work, "--json")
    assert done.code == 0
    assert [line for line in done.err.splitlines() if "already done" not in line] == []
    assert everything(work) == before
    assert json.loads(done.out) == json.loads(first.out)


def test_changed_setting_makes_a_new_folder_beside_the_old_one(demo, tag2mask):
    work, first = demo
    before = everything(work)
    done = tag2mask(*DEMO, "--work", work, "-s", "masks.background.score=0.6")
    assert done.code == 0
    assert [line.split(":")[0] for line in done.err.splitlines() if "already done" in line] == STAGES[:4]
    after = everything(work)
    assert {path: after[path] for path in before} == before
    assert len({path.parent for path in after if path.name == MANIFEST}) == len(STAGES) + 5
    same = tag2mask(*DEMO, "--work", work, "--json")  # and back
    assert same.err.count("already done") == len(STAGES) and json.loads(same.out) == json.loads(first.out)


def test_what_cannot_change_the_numbers_changes_no_folder(demo, tag2mask):
    work, _ = demo
    words = [word if word != "0" else "1" for word in DEMO]  # --workers
    assert tag2mask(*words, "--work", work, "--save-every", 3).err.count("already done") == len(STAGES)


def test_table_for_people(demo, tag2mask):
    work, _ = demo
    out = tag2mask(*DEMO, "--work", work).out
    assert "\x1b" not in out and [line for line in out.splitlines() if line != line.rstrip()] == []
    assert re.search(r"tags +tag scores, mean AP +classify +\d+\.\d +test, 8 images", out)
    assert re.search(r"seeds +CAM seeds, mIoU +cams +\d+\.\d +score, 24 images +threshold 0\.\d\d \(oracle\)", out)
    folders = stages_in(work)
    for line in (f"masks   {folders['masks'] / 'masks'}", f"model   {folders['segment']}", "report  "):
        assert f"\n{line}" in out


def test_status_plan_and_report_of_a_run(demo, tag2mask):
    work, _ = demo
    rows = json.loads(tag2mask("status", work, "--json").out)
    assert [row["stage"] for row in rows] == STAGES and {row["state"] for row in rows} == {"done"}
    assert [row["stage"] for row in rows if row["result"] is not None] == EVALUATIONS
    text = tag2mask("status", work).out.splitlines()
    assert text[0].split() == ["stage", "state", "seconds", "result", "folder"] and len(text) == 1 + len(STAGES)

    words = ["plan", "demo", "--work", work, *DEMO[5:]]
    planned = json.loads(tag2mask(*words, "--json").out)
    assert {row["stage"]: work / row["folder"] for row in planned} == stages_in(work)
    assert {row["state"] for row in planned} == {"done"}
    changed = json.loads(tag2mask(*words, "-s", "cams.flip=false", "--json").out)
    assert [row["state"] for row in changed] == ["done"] * 2 + ["to do"] * 7
    assert "evaluate_masks" in tag2mask(*words).out

    page = Path(tag2mask("report", work).out.strip())
    assert page == work / "demo-report.html"
    assert tag2mask("report", work, "--name", "demo").code == 0


def test_plan_runs_nothing(tmp_path, tag2mask):
    words = ["plan", "demo", "--work", tmp_path, "-s", "classify.train.epochs=1000"]
    rows = json.loads(tag2mask(*words, "--json").out)
    assert {row["state"] for row in rows} == {"to do"} and not [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert rows[0]["gpu_seconds"] > rows[6]["gpu_seconds"] > 0 and rows[4]["cpu_seconds"] > 0 and rows[0]["bytes"] > 1e6
    slow = json.loads(tag2mask(*words, "--json", "--tflops", "1.5").out)
    assert slow[0]["gpu_seconds"] == pytest.approx(10 * rows[0]["gpu_seconds"])
    text = tag2mask(*words).out.splitlines()
    assert text[0].split()[-3:] == ["GPU", "CPU", "disk"] and "together" in text[-2] and "15 TFLOP/s" in text[-1]
    plain = tag2mask(*words, "--no-cost").out.splitlines()
    assert len(plain) == 1 + len(rows) and plain[0].split()[-1] == "folder"


@pytest.fixture(scope="module")
def folder_run(drawn_once, tmp_path_factory):
    """`masks` on somebody's own images, with masks and a test list, in a process of its own."""
    work = tmp_path_factory.mktemp("folder") / "work"
    lists = ["--masks", drawn_once.root / "masks", "--test", drawn_once.root / "test.txt"]
    network = ["--backbone", "test_resnet", "--weights", "none", "--epochs", "2"]
    where = ["--work", work, "--device", "cpu", "--workers", "1"]
    quick = settings(*(setting for setting in NETS if "backbone" not in setting and "classify.train" not in setting))
    done = shell("masks", drawn_once.images, "--tags", drawn_once.csv, *lists, *network, *where, *quick, "--json")
    assert done.code == 0, done.err
    return work, json.loads(done.out)


def test_masks_for_a_folder(folder_run, drawn_once):
    work, outcome = folder_run
    trained_on = [name for name in drawn_once.names if name not in drawn_once.tested]
    folders = stages_in(work, "folder")
    assert sorted(p.stem for p in folders["masks"].glob("masks/*.png")) == sorted(trained_on)
    assert sorted(p.stem for p in folders["predict"].glob("masks/*.png")) == sorted(drawn_once.tested)
    for name in trained_on:
        tagged = {drawn_once.classes.index(tag) + 1 for tag in drawn_once.tags[name]}
        assert set(np.unique(mask(folders["masks"] / f"masks/{name}.png"))) <= {0, *tagged}
    results = {result["stage"]: result for result in outcome["results"]}
    assert [results[stage]["images"] for stage in EVALUATIONS] == [4, 12, 12, 4]
    assert all(0 <= results[stage]["miou"] <= 1 for stage in EVALUATIONS[1:])
    recipe = read_json(folders["classify"] / MANIFEST)["settings"]
    assert recipe["net"]["backbone"]["name"] == "test_resnet" and recipe["net"]["backbone"]["weights"] is None
    assert recipe["train"]["epochs"] == 2
    assert load_file(folders["classify"] / "model.safetensors")["net.classifier.weight"].shape[0] == 5


def test_a_folder_per_tag_needs_no_tag_file_and_no_masks(tmp_path, drawn_once, tag2mask):
    for name in drawn_once.names:
        single = drawn_once.tags[name][0] if len(drawn_once.tags[name]) == 1 else "background"
        (tmp_path / "in" / single).mkdir(parents=True, exist_ok=True)
        shutil.copy(drawn_once.images / f"{name}.png", tmp_path / "in" / single / f"{name}.png")
    for tag in drawn_once.classes:  # there must be two of each
        for extra in range(2):
            (tmp_path / "in" / tag).mkdir(exist_ok=True)
            shutil.copy(drawn_once.images / "train_0000.png", tmp_path / "in" / tag / f"{extra}.png")
    where = ["--work", tmp_path / "work", "--device", "cpu", "--workers", 0]
    done = tag2mask("masks", tmp_path / "in", "--recipe", "folder-scratch", *where, *settings(*NETS), "--json")
    assert done.code == 0, done.err
    folders = stages_in(tmp_path / "work", "folder-scratch")
    assert (folders["masks"] / "masks/fox/0.png").exists()
    for result in json.loads(done.out)["results"][1:]:
        assert result["skipped"] in ("there are no truth masks for this split", "there are no images in this split")
    assert "there are no truth masks" in Path(json.loads(done.out)["report"]).read_text()


def test_predict_on_untagged_images(folder_run, drawn_once, tmp_path, tag2mask):
    work, outcome = folder_run
    shutil.copytree(drawn_once.images, tmp_path / "in/deep")
    out = tmp_path / "out"
    done = tag2mask("predict", work, tmp_path / "in", "--out", out, "--device", "cpu", "--workers", 0)
    assert done.code == 0 and done.out.endswith(f"16 masks in {out / 'masks'}, pictures in {out / 'overlays'}\n")
    predicted = stages_in(work, "folder")["predict"]
    for name in drawn_once.tested:  # the same network on the same images as in the recipe
        assert (mask(out / f"masks/deep/{name}.png") == mask(predicted / f"masks/{name}.png")).all()
    assert len(list((out / "overlays/deep").glob("*.png"))) == 16

    before = {path: path.stat().st_mtime_ns for path in (out / "masks").rglob("*.png")}
    (out / "masks/deep/test_0000.png").unlink()
    again = tag2mask("predict", outcome["models"][0], tmp_path / "in", "--out", out, "--no-overlays", "--device", "cpu")
    after = {path: path.stat().st_mtime_ns for path in (out / "masks").rglob("*.png")}
    assert again.code == 0 and before.keys() == after.keys()
    assert len([path for path in before if before[path] != after[path]]) < 16


def test_evaluate_gives_exact_numbers(tmp_path, tag2mask):
    truth = np.array([[0, 0, 1, 1], [2, 2, 2, 255]], np.uint8)
    found = np.array([[0, 1, 1, 1], [2, 2, 0, 1]], np.uint8)
    for name, picture in (("truth", truth), ("found", found)):
        (tmp_path / name).mkdir()
        PIL.Image.fromarray(picture).save(tmp_path / name / "a.png")
        PIL.Image.fromarray(np.zeros((1, 3), np.uint8)).save(tmp_path / name / "b.png")
    PIL.Image.fromarray(found).save(tmp_path / "found/not-asked-for.png")
    words = ["evaluate", tmp_path / "found", tmp_path / "truth", "--classes", "cat, dog"]
    scores = json.loads(tag2mask(*words, "--json").out)
    # background: 1 + 3 right, 2 taken for it or missed; cat: 2 right, 1 too many; dog: 2 right, 1 missed
    assert scores["iou"] == {
        "background": pytest.approx(4 / 6),
        "cat": pytest.approx(2 / 3),
        "dog": pytest.approx(2 / 3),
    }
    assert scores["precision"] == {"background": 0.8, "cat": pytest.approx(2 / 3), "dog": 1.0}
    assert scores["recall"] == {"background": 0.8, "cat": 1.0, "dog": pytest.approx(2 / 3)}
    assert scores["miou"] == pytest.approx(2 / 3) and scores["images"] == 2
    text = tag2mask(*words).out.splitlines()
    assert text[0].split() == ["class", "iou", "precision", "recall"]
    assert [line.split() for line in text[1:4]] == [
        ["background", "66.7", "80.0", "80.0"], ["cat", "66.7", "66.7", "100.0"], ["dog", "66.7", "100.0", "66.7"],
    ]  # fmt: skip
    assert text[4] == "mean IoU 66.7 over 2 images"


def test_check_sums_up_a_sound_folder(drawn_once, tag2mask):
    words = ["check", drawn_once.images, "--tags", drawn_once.csv, "--masks", drawn_once.root / "masks"]
    found = json.loads(tag2mask(*words, "--test", drawn_once.root / "test.txt", "--json").out)
    assert found["images"] == 16 and found["splits"] == {"train": 12, "score": 12, "test": 4}
    positives = {c: sum(c in drawn_once.tags[n] for n in drawn_once.names[:12]) for c in drawn_once.classes}
    assert {name: counts["train"] for name, counts in found["classes"].items()} == positives
    text = tag2mask(*words).out
    assert re.search(r"^images +16$", text, re.M) and re.search(r"^splits +train 16, score 16, test 0$", text, re.M)


def test_everything_that_is_listed_is_described(tag2mask):
    there = json.loads(tag2mask("ls", "--json").out)
    assert set(there["recipes"]) == set(built_in())
    listed = tag2mask("ls").out
    for section, names in there.items():
        assert f"{section}\n" in listed
        for name, line in names.items():
            assert line and re.search(rf"^  {re.escape(name)} +{re.escape(line)}$", listed, re.M)
            found = json.loads(tag2mask("describe", name, "--json").out)
            assert found["name"] == name and line in found["text"]
            text = tag2mask("describe", name).out
            assert text.startswith(found["text"].split("\n")[0])
            for setting in found.get("settings", []):
                assert re.search(rf"^{setting['setting']} +\S", text, re.M)


def test_a_recipe_and_a_data_set_of_one_name_are_both_described(tag2mask):
    text = tag2mask("describe", "folder").out
    assert text.startswith("# ") and "do: classify" in text and "saliency" in text and "required" in text


def test_help_imports_nothing_heavy():
    words = [sys.executable, "-X", "importtime", *TAG2MASK[1:], "--help"]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported  # this is the list that we take it for
    assert not imported & {"torch", "numpy", "pydantic", "accelerate", "timm", "PIL", "yaml", "scipy"}


@pytest.mark.parametrize(
    "command", ["demo", "run", "masks", "predict", "evaluate", "report", "plan", "status", "check"]
)
def test_every_option_has_a_help_text(command, tag2mask, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = tag2mask(command, "--help").out
    options = re.findall(r"^│ [* ]*(--?[\w-]+).*?  (\S[^│]*?) *│$", text, re.M)
    assert len(options) >= 2 and "\x1b" not in text
    assert [option for option, about in options if " " not in about.strip()] == []


def test_closed_pipe_is_no_error(demo):
    work, _ = demo
    words = " ".join([*TAG2MASK, "status", str(work), "--json"])
    done = subprocess.run(["bash", "-c", f"{words} | head -c 1"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "["
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_an_unfinished_run_is_reported_as_such(tmp_path, tag2mask):
    recipe = tmp_path / "two.yaml"
    net = {"name": "cam", "backbone": {"name": "test_resnet", "weights": None}}
    train, augment = {"steps": 1, "batch": 4}, {"crop": 32, "long": [32, 48]}
    stages = {
        "classify": {"do": "classify", "net": net, "train": train, "augment": augment},
        "tags": {"do": "evaluate_classifier", "of": "classify"},
    }
    recipe.write_text(
        yaml.safe_dump({"data": {"name": "scenes", "images": 8, "test": 1, "size": 48}, "stages": stages})
    )
    assert tag2mask("run", recipe, "--work", tmp_path / "work", "--device", "cpu", "--workers", 0).code == 0
    folder = stages_in(tmp_path / "work", "two")["tags"]
    (folder / MANIFEST).unlink()
    states = [row["state"] for row in json.loads(tag2mask("status", tmp_path / "work", "--json").out)]
    assert states == ["done", "partial"]
    assert "Stage tags is not finished." in Path(tag2mask("report", tmp_path / "work").out.strip()).read_text()
    assert collect.results(tmp_path / "work", read_json(tmp_path / "work/two.run.json")) == []


def test_images_of_many_sizes_and_modes(tmp_path, tag2mask):
    drawn = draw(tmp_path / "drawn")
    for number, name in enumerate(drawn.names):
        path = drawn.images / f"{name}.png"
        with PIL.Image.open(path) as picture:
            changed = picture.resize((40 + 3 * number, 70 - 2 * number)).convert(["RGB", "L", "RGBA", "P"][number % 4])
        path.unlink()
        changed.convert("RGB").save(path.with_suffix(".jpg")) if number % 4 == 0 else changed.save(path)
    words = ["masks", drawn.images, "--tags", drawn.csv, "--recipe", "folder-scratch", "--work", tmp_path / "work"]
    done = tag2mask(*words, "--device", "cpu", "--workers", 0, *settings(*NETS))
    assert done.code == 0, done.err
    masks = stages_in(tmp_path / "work", "folder-scratch")["masks"] / "masks"
    for number, name in enumerate(drawn.names):
        assert mask(masks / f"{name}.png").shape == (70 - 2 * number, 40 + 3 * number)
