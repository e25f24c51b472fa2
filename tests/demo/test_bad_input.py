"""Everything that people get wrong: one clear message, exit code 2, and nothing trained before it is said."""

import csv
import errno
import json
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from commands import DEMO, NETS, SCENES, settings, shell, write_tags
from safetensors.torch import save_file

from tag2mask import runner
from tag2mask.data.faults import Kind
from tag2mask.engine import Devices

# Damage to a sound folder: what is done to it, and what else the command is given. Each is found and named.


def read(path):
    return np.array(PIL.Image.open(path))


def write(path, picture):
    PIL.Image.fromarray(picture).save(path)


def one_row_a_tag(drawn, rename=lambda name, tags: tags):
    """tags.csv as image,tags."""
    with drawn.csv.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "tags"])
        rows.writerows([name, ";".join(rename(name, drawn.tags[name]))] for name in drawn.names)


def add_row(drawn, *cells):
    with drawn.csv.open("a") as file:
        file.write(",".join(cells) + "\n")


def every_mask(drawn, change):
    for path in sorted((drawn.root / "masks").iterdir()):
        write(path, change(read(path)))


def unreadable(drawn):
    path = drawn.images / "train_0003.png"
    path.write_bytes(path.read_bytes()[:300])


def same_name(drawn):
    write(drawn.images / "train_0003.bmp", read(drawn.images / "train_0003.png"))


def unlisted(drawn):
    (drawn.root / "test.txt").write_text("test_0000\ntest_0077\n")
    return ["--test", drawn.root / "test.txt"]


def leak(drawn):
    (drawn.root / "list.txt").write_text("".join(f"{name}\n" for name in [*drawn.names[:8], drawn.tested[2]]))
    return ["--test", drawn.root / "test.txt", "--list", drawn.root / "list.txt"]


def not_trained(drawn):
    (drawn.root / "list.txt").write_text("".join(f"{name}\n" for name in drawn.names[:8]))
    (drawn.root / "score.txt").write_text(f"{drawn.names[9]}\n")
    return ["--list", drawn.root / "list.txt", "--score", drawn.root / "score.txt"]


def no_tags(drawn):
    write_tags(replace(drawn, names=drawn.names[:-1]))


def no_folder(drawn):
    for name in drawn.names[:-1]:
        folder = drawn.images / (drawn.tags[name] or ["background"])[0]
        folder.mkdir(exist_ok=True)
        (drawn.images / f"{name}.png").rename(folder / f"{name}.png")
    drawn.csv.unlink()


def no_image(drawn):
    add_row(drawn, "train_0099", *"10000")


def repeated(drawn):
    add_row(drawn, "train_0003.png", *"10000")


def bad_cell(drawn):
    drawn.csv.write_text(drawn.csv.read_text().replace("\ntrain_0003,1", "\ntrain_0003,maybe"))


def bad_tags(drawn):
    one_row_a_tag(drawn, lambda name, tags: ["fox, cat"] if name == "train_0003" else tags)


def background(drawn):
    write_tags(replace(drawn, classes=(*drawn.classes, "background")))


def unknown_class(drawn):
    return ["--classes", ",".join(name for name in drawn.classes if name != "sheep")]


def misspelt(drawn):
    one_row_a_tag(drawn, lambda name, tags: ["Fox" if tag == "fox" and name == "train_0003" else tag for tag in tags])


def rare(drawn):
    write_tags(replace(drawn, classes=(*drawn.classes, "unicorn")))


def everywhere(drawn):
    write_tags(replace(drawn, tags={name: list({*tags, "sheep"}) for name, tags in drawn.tags.items()}))


def dark(drawn):
    for name in drawn.names:
        write(drawn.images / f"{name}.png", read(drawn.images / f"{name}.png")[..., 0].astype(np.uint16) * 8)


def no_mask(drawn):
    (drawn.root / "masks" / f"{drawn.tested[1]}.png").unlink()
    return ["--masks", drawn.root / "masks", "--test", drawn.root / "test.txt"]


def mask_size(drawn):
    path = drawn.root / "masks/train_0003.png"
    write(path, read(path)[:-4])
    return ["--masks", drawn.root / "masks"]


def bad_mask(drawn):
    path = drawn.root / "masks/train_0003.png"
    write(path, np.where(read(path) == 0, 77, 0).astype(np.uint8))
    return ["--masks", drawn.root / "masks"]


def no_class_in_masks(drawn):
    every_mask(drawn, lambda mask: np.where(mask > 0, 255, 0).astype(np.uint8))
    return ["--masks", drawn.root / "masks"]


def contradiction(drawn):
    every_mask(drawn, lambda mask: np.where((mask > 0) & (mask < 255), mask % 5 + 1, mask).astype(np.uint8))
    return ["--masks", drawn.root / "masks"]


def no_map(drawn):
    (drawn.root / "saliency/train_0003.png").unlink()
    return settings(f"data.saliency={drawn.root}/saliency")


def bad_map(drawn):
    (drawn.root / "saliency/train_0003.png").write_bytes(b"no picture")
    return settings(f"data.saliency={drawn.root}/saliency")


DAMAGE = {
    Kind.UNREADABLE: (unreadable, "train_0003.png"),
    Kind.SAME_NAME: (same_name, "train_0003.bmp"),
    Kind.UNLISTED: (unlisted, "test_0077"),
    Kind.LEAK: (leak, "test_0002"),
    Kind.NOT_TRAINED: (not_trained, "train_0009"),
    Kind.NO_TAGS: (no_tags, "test_0003"),
    Kind.NO_FOLDER: (no_folder, "test_0003"),
    Kind.NO_IMAGE: (no_image, "train_0099"),
    Kind.REPEATED: (repeated, "row 5 and row 18"),
    Kind.BAD_CELL: (bad_cell, "'maybe'"),
    Kind.BAD_TAGS: (bad_tags, "'fox, cat'"),
    Kind.BACKGROUND: (background, "'background'"),
    Kind.UNKNOWN_CLASS: (unknown_class, "'sheep'"),
    Kind.MISSPELT: (misspelt, "'Fox'"),
    Kind.RARE: (rare, "'unicorn'"),
    Kind.EVERYWHERE: (everywhere, "'sheep'"),
    Kind.DARK: (dark, "test_0003.png"),
    Kind.NO_MASK: (no_mask, "test_0001"),
    Kind.MASK_SIZE: (mask_size, "48 x 44"),
    Kind.BAD_MASK: (bad_mask, "77"),
    Kind.NO_CLASS_IN_MASKS: (no_class_in_masks, "test_0003.png"),
    Kind.CONTRADICTION: (contradiction, "tagged"),
    Kind.NO_MAP: (no_map, "train_0003"),
    Kind.BAD_MAP: (bad_map, "train_0003.png"),
}


@pytest.fixture
def drawn(drawn_once, tmp_path):
    """A folder of images of this test's own, to be damaged."""
    shutil.copytree(drawn_once.root, tmp_path / "drawn")
    return replace(drawn_once, root=tmp_path / "drawn")


def masks_of(drawn, *more):
    tags = ["--tags", drawn.csv] if drawn.csv.exists() else []
    where = ["--work", drawn.root.parent / "work", "--device", "cpu", "--workers", "0", "--recipe", "folder-scratch"]
    return ["masks", drawn.images, *tags, *where, *settings(*NETS), *more]


def trained(work):
    return [*work.glob("classify-*")]


def test_every_kind_of_fault_is_tried():
    assert set(DAMAGE) == set(Kind)


@pytest.mark.parametrize("kind", DAMAGE, ids=lambda kind: kind.name)
def test_fault_in_the_data(kind, drawn, tag2mask):
    damage, offender = DAMAGE[kind]
    done = tag2mask(*masks_of(drawn, *(damage(drawn) or [])))
    assert (done.code, done.out) == (2, "")
    message = done.err[done.err.index("tag2mask: ") :]
    first, *rest = message.splitlines()
    assert str(drawn.images) in first and kind.title in first
    assert any(offender in line for line in rest), rest
    assert "  Remedy: " in message and kind.remedy in message
    assert "Traceback" not in done.err and not trained(drawn.root.parent / "work")


def test_many_faults_are_one_report(drawn, tag2mask):
    for damage in (unreadable, no_image, repeated, bad_cell):
        damage(drawn)
    done = tag2mask(*masks_of(drawn))
    assert done.code == 2 and "tag2mask: 4 kinds of fault in" in done.err
    assert done.err.count("  Remedy: ") == 4


# One line each: the command, and what the message must hold (where, what, remedy).

SETTINGS = [
    ("classify.train.lrr=1", "classify.train.lrr: unknown; did you mean lr?"),
    ("classify.train.batch=many", "classify.train.batch: should be a valid integer", "'many'"),
    ("classify.train.batch=0", "classify.train", "batch", "positive"),
    ("classify.train.steps=5", "classify.train: give either epochs or steps"),
    ("classify.train.epochs=null", "classify.train: give either epochs or steps"),
    ("classify.train.lr=-1", "classify.train: lr: -1.0 must be a number from 0"),
    ("classify.train.seed=-1", "classify.train: seed: -1 must be a number from 0"),
    ("classify.train.optimizer=lion", "classify.train.optimizer: should be 'sgd', 'adam' or 'adamw'", "'lion'"),
    ("classify.augment.crop=2", "classify.augment: crop must be at least 8"),
    ("classify.augment.jitter=5", "classify.augment: jitter must be in 0..1"),
    ("classify.net.name=camm", "classify.net: no 'camm'; did you mean cam?"),
    ("classify.net=null", "classify.net: needs a name, one of cam"),
    ("classify.net.dropout=2", "classify", "dropout", "between 0 and 1"),
    ("segment.net.dropout=-1", "segment", "dropout", "between 0 and 1"),
    ("classify.methods.pcc={}", "classify.methods.pcc: no 'pcc'; did you mean ppc?"),
    ("classify.methods=7", "classify.methods: must be a mapping of names to settings, not 7"),
    ("classify.do=clasify", "classify.do: 'clasify' is no kind of stage; did you mean classify?"),
    ("cams.of=clasify", "cams.of: no earlier stage 'clasify'; did you mean classify?"),
    ("cams.of=tags", "cams.of: tags is a evaluate_classifier stage, this needs classify"),
    ("cams.scales=[0]", "cams.scales: should be greater than 0"),
    ("cams.scales=[]", "cams.scales: ", "at least 1"),
    ("cams.batch=0", "cams.batch: should be greater than or equal to 1 (got 0)"),
    ("masks.background.score=2", "masks.background: score 2.0 is not in 0..1"),
    ("masks.background.alpha=2", "masks.background: give either score (a constant in 0..1) or alpha (a power)"),
    ("predict.split=val", "predict.split: should be 'train', 'score' or 'test' (got 'val')"),
    ("seeds.split=test", "seeds: split: cams is made for the images in 'train'", "test/0000", "set split: train"),
    ("mask-quality.split=test", "mask-quality: split: masks is made for the images in 'train'", "set split: train"),
    ("segmenter-quality.split=score", "segmenter-quality: split: predict is made for", "set split: test"),
    ("classify.net.backbone.name=test_resnett", "classify: backbone.name: ", "did you mean test_resnet?"),
    ("segment.net.backbone.name=test_resnett", "segment: backbone.name: ", "did you mean test_resnet?"),
    (
        "classify.net.backbone.name=test_mambaout",
        "classify: backbone: test_mambaout cannot be built with output stride 16",
        "32",
    ),
    ("classify.net.backbone.output_stride=7", "classify.net.backbone.output_stride: should be 8, 14, 16 or 32 (got 7)"),
    ("classify.net.backbone.weights=none.pth", "classify: backbone.weights: no file none.pth", '"hub"', "null"),
    ("classify.net.backbone.weights=hub", "classify: backbone.weights: cannot download", "huggingface.co", "null"),
    ("data.name=imagenet", "data.name: 'imagenet' is unknown; there is scenes, folder, voc12, coco14"),
    ("data.imagess=9", "data.imagess: unknown; did you mean images?"),
    ("data.images=2", ".images: 2 does not work; give a whole number of 8 or more"),
    ("data.part=2", ".part: 2.0 does not work; give a number from 0 to 1"),
    ("nonsense", "-s nonsense: must be key=value, such as classify.train.lr=0.02"),
    ("clasify.train.lr=1", "-s clasify.train.lr=1: no stage 'clasify'; did you mean classify?"),
    ("classify.train.lr.deep=1", "-s classify.train.lr.deep=1: lr is a value, it has no settings inside"),
    ("classify.train.lr=[", "-s classify.train.lr=[: the value is not valid YAML; quote it"),
]


@pytest.mark.parametrize("setting, parts", [(s, parts) for s, *parts in SETTINGS], ids=[s for s, *_ in SETTINGS])
def test_wrong_setting(setting, parts, tmp_path, tag2mask):
    done = tag2mask(*DEMO, "--work", tmp_path, "-s", setting)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("tag2mask: ") and done.err.count("\n") == 1, done.err
    assert [part for part in parts if part not in done.err] == [], done.err
    assert not trained(tmp_path)


RECIPES = [
    ("stages: [", "own.yaml: not valid YAML", "line 1"),
    ("- 1", "own.yaml: a recipe is a mapping with title, data and stages"),
    ("", "own.yaml: a recipe is a mapping with title, data and stages"),
    ("data: {name: scenes}\nstage: {}", "own: stage: unknown; a recipe has title, data and stages"),
    ("data: {name: scenes}", "stages: missing"),
    ("data: {name: scenes}\nstages: [a, b]", "own: stages: must be a mapping of names to stages"),
    ("data: {name: scenes}\nstages: {a: {do: clasify}}", "a.do: 'clasify' is no kind of stage; did you mean classify?"),
    ("data: {name: scenes}\nstages: {a: 3}", "a.do: None is no kind of stage; there is amn, "),
    ("data: {name: scenes}\nstages: {a: {do: cams, of: b}}", "a.of: no earlier stage 'b'"),
    ("data: {name: scenes}\nstages: {a: {do: cams}}", "a.of: missing"),
    ("stages: {a: {do: cams, of: a}}", "data.name: None is unknown; there is scenes, folder"),
    ("data: {name: scenes}\nstages: {a: {do: cams}, a: {do: cams}}", "own.yaml: ", "a is given twice"),
]


@pytest.mark.parametrize("command", [["run"], ["masks", "images", "--recipe"]], ids=["run", "masks"])
@pytest.mark.parametrize("text, parts", [(t, parts) for t, *parts in RECIPES])
def test_wrong_recipe(command, text, parts, tmp_path, tag2mask):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    done = tag2mask(*command, path, "--work", tmp_path / "work", "--device", "cpu")
    assert done.code == 2 and "Traceback" not in done.err and done.err.startswith("tag2mask: ")
    if command == ["run"]:
        assert [part for part in parts if part not in done.err] == [], done.err
    assert not (tmp_path / "work").exists()


def harmful(path):
    path.write_bytes(pickle.dumps(print))


WEIGHTS = [
    ("x.safetensors", lambda path: path.write_bytes(b"no tensors"), "holds more than tensors or is broken|is broken"),
    ("x.pth", lambda path: path.write_bytes(b"no tensors"), "is broken"),
    ("harmful.pth", harmful, "holds more than tensors"),
    ("other.pth", lambda path: torch.save({"a": torch.ones(1)}, path), "does not fit ResNet"),
    ("other.safetensors", lambda path: save_file({"a": torch.ones(1)}, path), "does not fit ResNet"),
]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name, make, says", WEIGHTS, ids=[name for name, *_ in WEIGHTS])
@pytest.mark.parametrize("stage", ["classify", "segment"])
def test_wrong_weights(stage, name, make, says, tmp_path, tag2mask):
    make(tmp_path / name)
    done = tag2mask(*DEMO, "--work", tmp_path, "-s", f"{stage}.net.backbone.weights={tmp_path / name}")
    assert done.code == 2 and f"tag2mask: {stage}: backbone.weights: {tmp_path / name} " in done.err
    assert any(part in done.err for part in says.split("|")) and "Traceback" not in done.err
    assert not trained(tmp_path)


COMMANDS = [
    ("run nosuch", "no recipe 'nosuch'; see `tag2mask ls`", "give a path ending in .yaml"),
    ("run demoo", "no recipe 'demoo'; did you mean demo?"),
    ("run nowhere.yaml", "nowhere.yaml: cannot be read (No such file or directory)"),
    ("run folder --work work", "data.images: missing; give it in the recipe or as -s data.images=VALUE"),
    ("run folder --work work -s data.images=nowhere", "images: nowhere is no folder"),
    ("demo --work file", "--work file: cannot make this folder (File exists); give another one"),
    ("demo --work file/deeper", "--work file/deeper: cannot make this folder"),
    ("masks nowhere --work work", "images: nowhere is no folder"),
    ("masks file --work work", "images: file is a file, not a folder"),
    ("masks empty --work work", "images: holds no image|empty: holds no image", ".png"),
    ("masks {images} --work work", "no tags. Give a tag file (`tags`), or sort the images into a sub-folder per tag."),
    ("masks {images} --tags nowhere.csv --work work", "nowhere.csv: cannot be opened (No such file or directory)"),
    ("masks {images} --tags {images} --work work", "is a folder, not a tag file"),
    ("masks {images} --tags file --work work", "file: tags are read from .csv and .json"),
    ("masks {images} --tags {tags} --masks nowhere --work work", "masks: nowhere is no folder"),
    ("masks {images} --tags {tags} --masks empty --work work", "masks: empty holds no file that can be read"),
    ("masks {images} --tags {tags} --list nowhere --work work", "nowhere: cannot be opened"),
    ("masks {images} --tags {tags} --test file --work work", "test: file names no image. Write one name a line."),
    ("masks {images} --tags {tags} --classes fox,fox --work work", "must name each class once"),
    ("masks {images} --tags {tags} --epochs 0 --work work", "classify.train", "epochs", "positive"),
    ("masks {images} --tags {tags} --weights none --backbone rasnet50 --work work", "did you mean resnet50?"),
    ("masks {images} --tags {tags} --weights nowhere.pth --work work", "backbone.weights: no file nowhere.pth"),
    ("masks {images} --tags {tags} --recipe nosuch --work work", "no recipe 'nosuch'; see `tag2mask ls`"),
    ("masks {images} --tags {tags} --recipe folder-scratch -s classify.net.name=eps --work work", "give data.saliency"),
    ("check nowhere", "images: nowhere is no folder"),
    ("check {images}", "no tags. Give a tag file"),
    ("plan nosuch", "no recipe 'nosuch'"),
    ("plan demo --work work -s classify.train.lrr=1", "classify.train.lrr: unknown; did you mean lr?"),
    ("predict nowhere {images} --out out", "nowhere: no trained segmenter here; give a work folder or one of"),
    ("predict empty {images} --out out", "empty: no trained segmenter here"),
    ("predict damaged {images} --out out", "damaged: not the folder of a trained segmenter"),
    ("predict list {images} --out out", "list: not the folder of a trained segmenter"),
    ("predict cam {images} --out out", "cam: not the folder of a trained segmenter"),
    ("evaluate nowhere {truth} --classes a,b,c,d,e", "nowhere: 16 of 16 masks are missing, the first is test_0000.png"),
    ("evaluate {truth} empty --classes a", "empty: no masks (.png) here"),
    ("evaluate {truth} {truth} --classes a", "test_0000.png: holds the values 3, 5, which are no class; save masks as"),
    ("evaluate {images} {truth} --classes a,b,c,d,e", "is a colour picture (mode RGB) where an index mask is needed"),
    ("report empty", "empty: no run here; give the folder that was used as --work"),
    ("report torn", "torn/demo.run.json: is damaged; run the recipe again"),
    ("status nowhere", "nowhere: no run here; give the folder that was used as --work"),
    ("status torn --name folder", "torn: no run of 'folder' here"),
    ("describe camm", "nothing is called 'camm'; did you mean cam?"),
    ("describe nosuch", "nothing is called 'nosuch'; see `tag2mask ls`"),
    ("demo --device mps --work work", "--device mps: no Apple GPU is visible to PyTorch; use --device auto or cpu"),
    ("demo --device cuda --work work", "--device cuda: no CUDA GPU is visible to PyTorch; use --device auto or cpu"),
]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with things that are not what they should be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (tmp_path / "file").write_text("")
    for name in ("empty", "damaged", "list", "cam", "torn"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged/model.json").write_text("{")
    (tmp_path / "list/model.json").write_text("[1]")
    (tmp_path / "cam/model.json").write_text(json.dumps({"net": {"name": "cam"}, "classes": ["a"]}))
    (tmp_path / "torn/demo.run.json").write_text('{"title": ')
    return tmp_path


@pytest.mark.parametrize("command, parts", [(c, parts) for c, *parts in COMMANDS], ids=[c for c, *_ in COMMANDS])
def test_wrong_command(command, parts, place, drawn_once, tag2mask):
    where = {"{images}": drawn_once.images, "{tags}": drawn_once.csv, "{truth}": drawn_once.root / "masks"}
    done = tag2mask(*(where.get(word, word) for word in command.split()))
    assert (done.code, done.out) == (2, "") and "Traceback" not in done.err
    message = done.err.splitlines()[-1]
    assert message.startswith("tag2mask: "), done.err
    for part in parts:
        assert any(one in message for one in part.split("|")), message
    assert not trained(place / "work")


@pytest.mark.parametrize("words", ["demo --device tpu", "demo --workers -1", "demo --save-every 0", "nosuch", "run"])
def test_wrong_usage_is_explained(words, tag2mask):
    done = tag2mask(*words.split())
    assert done.code == 2 and "Usage: tag2mask" in done.err and "Traceback" not in done.err


def test_a_batch_must_divide_over_the_processes(tmp_path, monkeypatch, tag2mask):
    class Three(Devices):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.world = 3

    monkeypatch.setattr(runner, "Devices", Three)
    done = tag2mask(*DEMO, "--work", tmp_path, *settings("classify.train.batch=6", "segment.train.batch=7"))
    assert done.code == 2 and "tag2mask: segment.train.batch: 7 does not divide over 3 processes" in done.err
    assert not trained(tmp_path)


def test_a_loss_that_is_no_number_ends_the_training(tmp_path, tag2mask):
    wild = settings("classify.train.lr=1e30", "classify.train.optimizer=sgd", "classify.train.epochs=6")
    done = tag2mask(*DEMO, "--work", tmp_path, *wild)
    assert done.code == 2 and "tag2mask: classify: the loss is " in done.err and "lower train.lr" in done.err
    assert not list(tmp_path.glob("*/model.safetensors"))


def test_a_full_disk_is_no_bug_of_ours(tmp_path, monkeypatch, tag2mask):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.modules["tag2mask.stages.crf"], "write_mask", full)
    done = tag2mask(*DEMO, "--work", tmp_path)
    assert done.code == 2 and "No space left on device; make room" in done.err and "Traceback" not in done.err


def test_a_bug_of_ours_keeps_its_traceback(tmp_path, monkeypatch, tag2mask):
    def bug(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["tag2mask.stages.crf"], "write_mask", bug)
    with pytest.raises(ZeroDivisionError):
        tag2mask(*DEMO, "--work", tmp_path)


def test_the_same_in_a_process_of_its_own(drawn, tmp_path):
    unreadable(drawn)
    done = shell(*masks_of(drawn))
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    assert "tag2mask: 1 kind of fault in" in done.err and "train_0003.png" in done.err
    assert not trained(tmp_path / "work")


def test_a_demo_that_is_sound_passes(tmp_path, tag2mask):
    """All of the above start from these commands: without the mistake they end well."""
    assert SCENES and tag2mask(*DEMO, "--work", tmp_path).code == 0
    assert Path(trained(tmp_path)[0] / "model.safetensors").exists()


def test_a_folder_that_is_sound_passes(drawn, tag2mask):
    lists = ["--test", drawn.root / "test.txt", "--masks", drawn.root / "masks"]
    assert tag2mask(*masks_of(drawn, *lists, *settings(f"data.saliency={drawn.root}/saliency"))).code == 0
