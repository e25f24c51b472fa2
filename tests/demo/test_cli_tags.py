"""`tag2mask tags`: what it prints, what it writes, what it refuses, and tags of other tools in the other commands."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from commands import TAG2MASK

from tag2mask.recipe import load


def task(identity, image, *choices):
    """A task as Label Studio exports it."""
    result = {"value": {"choices": [*choices]}, "from_name": "choice", "to_name": "image", "type": "choices"}
    entry = {"id": identity, "result": [result] if choices else [], "was_cancelled": False, "ground_truth": False}
    return {"id": identity, "annotations": [entry], "data": {"image": image}, "predictions": []}


@pytest.fixture
def drawn(drawn_once, tmp_path):
    """A copy of the drawn folder, and the same tags as Label Studio exports them."""
    root = tmp_path / "drawn"
    shutil.copytree(drawn_once.root, root)
    tasks = [
        task(n, f"/data/upload/1/{n:08x}-{name}.png", *drawn_once.tags[name])
        for n, name in enumerate(drawn_once.names, start=1)
    ]
    (root / "export.json").write_text(json.dumps(tasks))
    return root


def first_line(outcome):
    assert outcome.code == 2 and "Traceback" not in outcome.err
    return outcome.err.splitlines()[0]


def test_check_is_one_command_under_two_names(tag2mask, drawn, drawn_once):
    images = drawn / "images"
    both = [
        tag2mask(*words, images, "--tags", drawn / "tags.csv", "--json") for words in (["check"], ["tags", "check"])
    ]
    assert both[0].code == both[1].code == 0 and both[0].out == both[1].out
    ours, theirs = (json.loads(tag2mask("check", images, "--tags", drawn / name, "--json").out)
                    for name in ("tags.csv", "export.json"))  # fmt: skip
    present = {name: counts for name, counts in ours["classes"].items() if counts["train"]}
    assert theirs["classes"] == present and theirs["negatives"] == ours["negatives"]


def test_check_tells_every_fault(tag2mask, drawn):
    tasks = json.loads((drawn / "export.json").read_text())
    tasks[0]["data"]["image"] = "/data/upload/1/8ab3c4d5-nobody.png"
    tasks[1]["annotations"].append({"id": 99, "result": [], "was_cancelled": False})
    (drawn / "export.json").write_text(json.dumps(tasks))
    outcome = tag2mask("tags", "check", drawn / "images", "--tags", drawn / "export.json")
    assert outcome.code == 2 and "tag2mask: 3 kinds of fault" in outcome.err and outcome.out == ""
    for said in (
        "task 1: nobody.png",
        "mark one as ground truth",
        "where they were made (Label Studio)",
        "images without tags (1)",
    ):
        assert said in outcome.err


@pytest.mark.parametrize("name", ["t.csv", "t.json"])
def test_convert_gives_the_tags_that_were_drawn(tag2mask, drawn, drawn_once, name):
    outcome = tag2mask("tags", "convert", drawn / "export.json", drawn / name, "--images", drawn / "images",
                       "--classes", ",".join(drawn_once.classes))  # fmt: skip
    assert outcome.code == 0 and outcome.out.startswith(
        f"{len(drawn_once.names)} images, {len(drawn_once.classes)} classes"
    )
    read = json.loads(tag2mask("tags", "stats", drawn / name, "--json").out)
    known = json.loads(tag2mask("tags", "stats", drawn_once.csv, "--json").out)
    if name == "t.csv":
        assert read == known
    assert read["images"] == len(drawn_once.names) and read["tags_per_image"] == known["tags_per_image"]
    summary = json.loads(tag2mask("check", drawn / "images", "--tags", drawn / name, "--json").out)
    assert summary["images"] == len(drawn_once.names)


def test_convert_never_overwrites(tag2mask, drawn):
    before = (drawn / "tags.csv").read_bytes()
    said = first_line(tag2mask("tags", "convert", drawn / "export.json", drawn / "tags.csv"))
    assert said.endswith("tags.csv: exists, and nothing is written over it. Give another name or move it away.")
    assert (drawn / "tags.csv").read_bytes() == before


def test_convert_writes_nothing_where_there_is_a_fault(tag2mask, drawn):
    (drawn / "images/train_0000.png").unlink()
    outcome = tag2mask("tags", "convert", drawn / "export.json", drawn / "t.csv", "--images", drawn / "images")
    assert first_line(outcome).startswith("tag2mask: 1 kind of fault") and "task 1: train_0000.png" in outcome.err
    assert not list(drawn.glob("*t.csv*"))


def test_masks_become_tags_and_say_so(tag2mask, drawn, drawn_once):
    classes = ["--classes", ",".join(drawn_once.classes)]
    outcome = tag2mask("tags", "convert", drawn / "masks", drawn / "t.csv", "--images", drawn / "images", *classes)
    assert outcome.code == 0 and "note: tags are derived from masks" in outcome.err
    summary = json.loads(tag2mask("check", drawn / "images", "--tags", drawn / "masks", *classes, "--json").out)
    assert summary["tags_derived_from"] == "masks"
    assert first_line(tag2mask("tags", "stats", drawn / "masks")).endswith("in order (`classes`, --classes).")


def test_a_pickle_is_read_only_when_asked_for(tag2mask, drawn, drawn_once):
    labels = {
        name: np.array([c in drawn_once.tags[name] for c in drawn_once.classes], np.float32)
        for name in drawn_once.names
    }
    np.save(drawn / "cls_labels.npy", labels)
    classes = ["--classes", ",".join(drawn_once.classes)]
    given = ["tags", "convert", drawn / "cls_labels.npy", drawn / "t.csv"]
    assert "tags convert --legacy-npy" in first_line(tag2mask(*given, *classes))
    assert "has no names of classes" in first_line(tag2mask(*given, "--legacy-npy"))
    assert "are named (--classes)" in first_line(tag2mask(*given, "--legacy-npy", "--classes", "a,b"))
    assert tag2mask(*given, "--legacy-npy", *classes).code == 0
    assert (drawn / "t.csv").read_bytes() == drawn_once.csv.read_bytes().replace(b"\r\n", b"\n")


def test_stats_for_people(tag2mask, tmp_path):
    path = tmp_path / "tags.csv"
    path.write_text("image,cat,dog,ant\na,1,1,0\nb,1,0,0\nc,0,0,0\nd,1,1,0\n")
    lines = tag2mask("tags", "stats", path).out.splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "images 4", "without tag 1", "tags per image 1 with 0, 1 with 1, 2 with 2", "mean tags 1.25", "",
        "class images % alone together with", "cat 3 75.0 1 dog 2", "dog 2 50.0 0 cat 2", "ant 0 0.0 0 -",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("t.xml", "<!DOCTYPE a><annotations/>", "has a document type"),
        ("t.jsonl", "{", "line 1 is not valid JSON"),
        ("t.parquet", "PAR1", "parquet is not read"),
        ("t.json", '{"images": [{"id": 1}], "annotations": [], "categories": []}', "is no COCO file"),
        ("t.zip", "PK", "Unpack it"),
    ],
)
def test_one_line_for_what_cannot_be_read(tag2mask, tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    outcome = tag2mask("tags", "stats", tmp_path / name)
    assert said in first_line(outcome) and outcome.err.count("\n") == 1


def test_a_recipe_takes_such_tags_as_they_are(drawn):
    recipe = load("folder", [f"data.images={drawn / 'images'}", f"data.tags={drawn / 'export.json'}"])
    assert recipe.source().split("train").tags.sum() > 0


def test_help_is_there():
    done = subprocess.run([*TAG2MASK, "tags", "--help"], capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in ("check", "convert", "stats"))
