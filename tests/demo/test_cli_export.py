"""`tag2mask export`: from a work folder or from two folders, what is left out, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from commands import ENVIRONMENT, TAG2MASK
from finished import BORDER, finished
from pycocotools.coco import COCO

import tag2mask as package
from tag2mask.api import folder_recipe
from tag2mask.data.decisions import Decision, append_decision, decisions_path, reviewed_mask
from tag2mask.errors import UserError
from tag2mask.export import write_mask
from tag2mask.recipe import load

FORMS = ("palette", "coco", "cvat", "label-studio", "labelme", "mmseg", "huggingface")
SCENES = ["data.images=8", "data.test=3", "data.size=48"]


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The work folder of a finished demo; not to be changed."""
    work = tmp_path_factory.mktemp("once") / "work"
    return finished(load("demo", SCENES), work)


@pytest.fixture
def run(once, tmp_path):
    """A copy of it."""
    shutil.copytree(once.work, tmp_path / "work")
    return type(once)(once.recipe, once.source, once.stages, tmp_path / "work")


def read_coco(path):
    """name -> mask."""
    read, found = COCO(str(path)), {}
    for image in read.loadImgs(read.getImgIds()):
        mask = np.zeros((image["height"], image["width"]), np.uint8)
        for note in read.loadAnns(read.getAnnIds(imgIds=[image["id"]])):
            mask[read.annToMask(note).astype(bool)] = note["category_id"]
        found[image["file_name"].rpartition(".")[0]] = mask
    return found


def truth(source, split="train"):
    samples = source.split(split)
    found = {name: np.array(samples.mask(index)) for index, name in enumerate(samples.names)}
    for mask in found.values():
        mask[:BORDER] = 0
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, mask in wanted.items():
        np.testing.assert_array_equal(found[name], mask, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_work_folder(tag2mask, once, tmp_path, form):
    out = tmp_path / "out"
    done = tag2mask("export", form, once.work, "--out", out)
    assert done.code == 0 and done.out.startswith(f"8 masks in {out}") and f"{form}: 8/8" in done.err
    written = Path(done.out.strip().removeprefix("8 masks in "))
    assert written.exists()
    again = tag2mask("export", form, once.work, "--out", out)
    assert (again.code, again.err.count("\n")) == (2, 1) and "--overwrite" in again.err
    assert tag2mask("export", form, once.work, "--out", out, "--overwrite").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_masks_are_those_of_the_stage(tag2mask, once, tmp_path):
    assert tag2mask("export", "coco", once.work, "--out", tmp_path / "a").code == 0
    assert_same(read_coco(tmp_path / "a/annotations.json"), truth(once.source))
    done = tag2mask("export", "coco", once.work, "--stage", "predict", "--shapes", "polygons", "--out", tmp_path / "b")
    assert done.code == 0
    assert_same(read_coco(tmp_path / "b/annotations.json"), truth(once.source, "test"))


def test_drawn_images_are_written_with_copy_images(tag2mask, once, tmp_path):
    for form in ("coco", "cvat", "label-studio"):
        assert tag2mask("export", form, once.work, "--copy-images", "--out", tmp_path / form).code == 0
        for index, name in enumerate(once.source.split("train").names):
            with PIL.Image.open(tmp_path / form / "images" / f"{name}.png") as picture:
                np.testing.assert_array_equal(np.asarray(picture), once.source.split("train").image(index))


def test_a_run_on_a_folder_leads_to_its_files(tag2mask, drawn_once, tmp_path):
    """labelme finds the images where they are, COCO calls them as they are called."""
    data = {
        "tags": str(drawn_once.csv),
        "masks": str(drawn_once.root / "masks"),
        "test": str(drawn_once.root / "test.txt"),
    }
    run = finished(folder_recipe(drawn_once.images, data), tmp_path / "work")
    assert tag2mask("export", "labelme", run.work, "--out", tmp_path / "deep/er/out").code == 0
    paths = sorted((tmp_path / "deep/er/out").rglob("*.json"))
    assert [path.stem for path in paths] == sorted(set(drawn_once.names) - set(drawn_once.tested))
    for path in paths:
        image = (path.parent / json.loads(path.read_text())["imagePath"]).resolve()
        assert image == (drawn_once.images / f"{path.stem}.png").resolve()
    assert tag2mask("export", "coco", run.work, "--out", tmp_path / "coco").code == 0
    images = json.loads((tmp_path / "coco/annotations.json").read_text())["images"]
    assert {image["file_name"] for image in images} == {f"{path.stem}.png" for path in paths}


def test_two_folders(tag2mask, drawn_once, tmp_path):
    """As `predict` leaves masks: in masks/ of its folder, beside overlays."""
    shutil.copytree(drawn_once.root / "masks", tmp_path / "predicted/masks")
    (tmp_path / "predicted/masks" / f"{drawn_once.names[0]}.png").unlink()
    words = [
        "--images",
        drawn_once.images,
        "--masks",
        tmp_path / "predicted",
        "--classes",
        ",".join(drawn_once.classes),
    ]
    done = tag2mask("export", "coco", *words, "--out", tmp_path / "out")
    assert done.code == 0 and "1 of 16 images have no mask" in done.err
    found = read_coco(tmp_path / "out/annotations.json")
    assert found.keys() == set(drawn_once.names[1:])
    for name, mask in found.items():
        np.testing.assert_array_equal(mask, np.asarray(PIL.Image.open(drawn_once.root / "masks" / f"{name}.png")))


def test_python(drawn_once, tmp_path):
    path = package.export_masks(
        "cvat", tmp_path / "out", images=drawn_once.images, masks=drawn_once.root / "masks", classes=drawn_once.classes
    )
    with zipfile.ZipFile(path) as archive:
        assert len([name for name in archive.namelist() if name.startswith("SegmentationClass/")]) == 16


def test_python_refuses_an_unknown_form(once, tmp_path):
    with pytest.raises(UserError, match=r"'coc'.*coco"):
        package.export_masks("coc", tmp_path / "out", once.work)
    assert list(tmp_path.iterdir()) == []


def test_rejected_masks_are_left_out_and_changed_ones_count(tag2mask, run, tmp_path):
    names = list(run.source.split("train").names)
    (run.work / "review").mkdir()
    path = decisions_path(run.work)
    for name, decision in (
        (names[0], Decision("rejected")),
        (names[1], Decision("accepted", {"fox": 0.5})),
        (names[2], Decision("rejected")),
        (names[2], Decision("flagged")),
        (names[3], Decision("accepted", {"fox": 0.5})),
        (names[3], Decision("accepted")),  # back to the mask of the run
        (names[4], Decision("accepted")),
        (names[4], Decision("undecided")),
    ):
        append_decision(path, name, decision)
    changed = np.full((48, 48), 2, np.uint8)
    for name in (names[1], names[3], names[5]):
        write_mask(reviewed_mask(run.work, name), changed)
    wanted = truth(run.source) | {names[1]: changed, names[5]: changed}
    rejected = wanted.pop(names[0])

    def exported(*words):
        done = tag2mask("export", "coco", *words, "--out", tmp_path / "out", "--overwrite")
        assert done.code == 0, done.err
        return read_coco(tmp_path / "out/annotations.json")

    assert_same(exported(run.work), wanted)
    assert_same(exported(run.work, "--accepted-only"), {name: wanted[name] for name in (names[1], names[3])})
    assert_same(exported(run.work, "--no-review"), truth(run.source))
    only = tmp_path / "only.txt"
    only.write_text("# these\n" + "\n".join(f"{name}.jpg" for name in names[:3]))
    assert_same(exported(run.work, "--only", only), {name: wanted[name] for name in names[1:3]})
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"image": names[1], "decision": "rejected"}) + "\n")
    left = wanted | {names[0]: rejected}
    del left[names[1]]
    assert_same(exported(run.work, "--decisions", other), left)


@pytest.mark.parametrize(
    "words, said",
    [
        (["{work}", "--images", "x"], "either a work folder, or"),
        ([], "give a work folder, or"),
        (["--images", "{masks}"], "give a work folder, or"),
        (["{work}", "--stage", "classify"], "there is masks, predict"),
        (["{work}", "--name", "other"], "no run of 'other'"),
        (["{out}"], "no run here"),
        (["{work}", "--only", "{lost}"], "cannot be opened"),
        (["{work}", "--only", "{strangers}"], "mean no image"),
        (["{work}", "--only", "{empty}"], "one name a line"),
        (["{work}", "--decisions", "{lost}"], "there is no such file"),
        (["{work}", "--decisions", "{others}"], "none of these images"),
        (["{work}", "--accepted-only"], "there are no decisions"),
        (["{work}", "--val", "{strangers}"], "mean no image"),
        (["--images", "{lost}", "--masks", "{masks}", "--classes", "a"], "is no folder"),
        (["--images", "{masks}", "--masks", "{masks}", "--classes", "a"], "folder of its own"),
        (["--images", "{small}", "--masks", "{masks}", "--classes", "a"], "have no image in"),
        (
            ["--images", "{masks}", "--masks", "{small}", "--classes", "a"],
            "has 5 x 4 pixels, but its image has 48 x 48",
        ),
        (["--images", "{masks}", "--masks", "{good}", "--classes", "a,a"], "twice"),
        (
            ["--images", "{masks}", "--masks", "{good}", "--classes", "a", "--stage", "b"],
            "only a work folder has stages",
        ),
    ],
)
def test_mistakes_are_one_line(tag2mask, once, tmp_path, words, said):
    name = once.source.split("train").names[0]
    places = {key: tmp_path / key for key in ("out", "lost", "strangers", "empty", "others", "masks", "small", "good")}
    places["out"].mkdir()
    places["strangers"].write_text("nobody.jpg\nno one.jpg\n")
    places["empty"].write_text("\n")
    places["others"].write_text('{"image": "nobody", "decision": "accepted"}\n')
    for key, size in (("masks", (48, 48)), ("small", (4, 5)), ("good", (48, 48))):
        write_mask(places[key] / f"{name}.png", np.zeros(size, np.uint8))
    write_mask(places["masks"] / "another.png", np.zeros((48, 48), np.uint8))
    before = sorted(tmp_path.rglob("*"))
    given = [word.format(work=once.work, **places) for word in words]
    done = tag2mask("export", "mmseg", *given, "--out", tmp_path / "new")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
    assert said in done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mask_that_is_missing_or_damaged(tag2mask, run, tmp_path):
    name = run.source.split("train").names[-1]
    path = run.folder("masks") / "masks" / f"{name}.png"
    path.write_bytes(path.read_bytes()[:60])
    done = tag2mask("export", "coco", run.work, "--out", tmp_path / "out")
    assert done.code == 2 and str(path) in done.err and not (tmp_path / "out").exists()
    path.unlink()
    done = tag2mask("export", "coco", run.work, "--out", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (2, 1) and "1 of 8 masks are missing" in done.err


def test_a_stage_that_is_not_finished(tag2mask, run, tmp_path):
    (run.folder("masks") / "manifest.json").unlink()
    for words in ([], ["--stage", "masks"]):
        done = tag2mask("export", "coco", run.work, *words, "--out", tmp_path / "out")
        assert (done.code, done.err.count("\n")) == (2, 1) and "finished" in done.err


def test_a_folder_where_nothing_can_be_written(tag2mask, once, tmp_path):
    (tmp_path / "file").write_text("x")
    done = tag2mask("export", "coco", once.work, "--out", tmp_path / "file/out")
    assert (done.code, done.err.count("\n")) == (2, 1) and "--out" in done.err


def test_a_stopped_export_leaves_what_was_there(tmp_path):
    """SIGTERM in the middle: the old export stays whole, and nothing else is left."""
    rng = np.random.default_rng(0)
    for index in range(150):
        name = f"{index:03d}.png"
        write_mask(tmp_path / "masks" / name, rng.integers(0, 2, (160, 160)).astype(np.uint8))
        (tmp_path / "images").mkdir(exist_ok=True)
        PIL.Image.new("RGB", (160, 160)).save(tmp_path / "images" / name)
    words = ["export", "labelme", "--images", tmp_path / "images", "--masks", tmp_path / "masks", "--classes", "a"]
    out = tmp_path / "here/out"
    package.export_masks(
        "palette", out, images=tmp_path / "images", masks=tmp_path / "masks", classes=["a"],
        only=_list(tmp_path / "few.txt", ["000"]),
    )  # fmt: skip
    before = sorted(out.rglob("*"))
    process = subprocess.Popen(
        [*TAG2MASK, *map(str, words), "--out", str(out), "--overwrite"],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(out.parent.glob(".out.*.part/*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert sorted(out.rglob("*")) == before and [path.name for path in out.parent.iterdir()] == ["out"]


def _list(path, names):
    path.write_text("\n".join(names))
    return path
