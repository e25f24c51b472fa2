"""`tag2mask predict` and `tag2mask export onnx` as somebody types them."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

from tag2mask import schema
from tag2mask.pipeline import MANIFEST, write_json
from tag2mask.segment import SEGMENTERS
from tag2mask.stages.classify import MODEL, WEIGHTS, save_weights

BACKBONE = {"name": "test_resnet", "weights": None, "output_stride": 16}
NET = {"backbone": BACKBONE, "width": 8, "dilation": 2}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder with a segmenter of three classes that was trained on nothing."""
    root = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    net = schema.make(SEGMENTERS["deeplab"], schema.check(SEGMENTERS["deeplab"], NET, "net"), num_classes=3)
    folder = root / "segment-0123456789"
    folder.mkdir()
    save_weights(net, folder / WEIGHTS)
    facts = {"net": NET | {"name": "deeplab"}, "classes": ["cat", "dog", "fox"], "scales": [1.0], "flip": False}
    write_json(folder / MODEL, facts)
    write_json(folder / MANIFEST, {"finished": "2000-01-01"})
    return root


@pytest.fixture
def here(drawn_once, tmp_path, monkeypatch):
    """A current folder with images in two sub-folders and frames of a video."""
    for number, name in enumerate(sorted(drawn_once.names)[:6]):
        place = tmp_path / ("shots/night" if number % 2 else "shots") / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(drawn_once.images / f"{name}.png", place)
        (tmp_path / "frames").mkdir(exist_ok=True)
        shutil.copy(drawn_once.images / f"{name}.png", tmp_path / f"frames/clip_{number + 7}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICK = ("--device", "cpu", "--workers", 0)


def masks(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))


def test_folders_files_and_patterns(work, here, tag2mask):
    done = tag2mask("predict", work, "frames", "shots/**/*.png", "--out", "out", *QUICK)
    assert done.code == 0, done.err
    shots = ["0.png", "2.png", "4.png", "night/1.png", "night/3.png", "night/5.png"]
    assert masks(here / "out/masks") == sorted([*shots, *(f"clip_{number}.png" for number in range(7, 13))])
    assert masks(here / "out/overlays") == masks(here / "out/masks") and not (here / "out/scores").exists()
    head, *rows, speed, where = done.out.splitlines()
    assert head.split() == ["class", "%", "in", "images"]
    assert [row.split()[0] for row in rows] == ["background", "cat", "dog", "fox"]
    assert sum(float(row.split()[1]) for row in rows) == pytest.approx(100, abs=0.3)
    assert "images/s on cpu" in speed and where == "12 masks in out/masks, pictures in out/overlays"
    with PIL.Image.open(here / "out/masks/night/1.png") as picture:
        assert picture.mode == "P" and picture.size == (48, 48)

    one = tag2mask("predict", work, "shots/night/3.png", "--out", "one", "--no-overlays", *QUICK)
    assert one.code == 0 and masks(here / "one") == ["masks/3.png"]
    assert (here / "one/masks/3.png").read_bytes() == (here / "out/masks/night/3.png").read_bytes()

    again = tag2mask("predict", work, "frames", "--out", "out", *QUICK)
    assert again.code == 0 and again.out.splitlines()[-2:] == [
        "all there already",
        "6 masks in out/masks, pictures in out/overlays",
    ]


def test_json_and_probabilities(work, here, tag2mask):
    done = tag2mask("predict", work, "shots", "--out", "out", "--soft", "--no-overlays", "--json", *QUICK)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["images"], found["made"], found["overlays"]) == (6, 6, None)
    assert [row["class"] for row in found["classes"]] == ["background", "cat", "dog", "fox"]
    assert sum(row["pixels"] for row in found["classes"]) == pytest.approx(1)
    with np.load(here / found["scores"] / "night/5.npz", allow_pickle=False) as file:
        assert file["scores"].shape == (4, 48, 48) and file["scores"].dtype == np.float16
        assert np.abs(file["scores"].astype(np.float32).sum(axis=0) - 1).max() < 5e-3


@pytest.mark.slow  # half a minute for an export; tests/unit/test_onnx.py has one, too
def test_onnx(work, here, tag2mask):
    done = tag2mask("export", "onnx", work, "--out", "model.onnx")
    assert done.code == 0, done.err
    assert done.out.startswith("model.onnx: ") and "scales 1, without mirror image; differs" in done.out
    fast = tag2mask("predict", "model.onnx", "shots", "--out", "fast", *QUICK)
    slow = tag2mask("predict", work, "shots", "--out", "slow", *QUICK)
    assert fast.code == slow.code == 0, fast.err + slow.err
    assert masks(here / "fast") == masks(here / "slow")
    same = [
        np.mean(np.array(PIL.Image.open(here / "fast" / name)) == np.array(PIL.Image.open(here / "slow" / name)))
        for name in masks(here / "fast")
        if name.startswith("masks")
    ]
    assert min(same) > 0.99
    mixed = tag2mask("predict", "model.onnx", "shots", "--out", "slow", *QUICK)
    assert mixed.code == 2 and "slow: holds masks made by another model; give another folder" in mixed.err


@pytest.mark.parametrize(
    "words, said",
    [
        ("predict {work} nothing.jpg", "nothing.jpg: there is no such file or folder"),
        ("predict {work} shots/*.gif", "shots/*.gif: matches no image"),
        ("predict {work} shots {other}", "would have the same mask as"),
        ("predict {work}/no.onnx shots", "no.onnx: cannot be opened"),
        ("predict {work} shots --out file", "--out file: cannot make this folder"),
        ("predict {work} shots --device mps", "--device mps: no Apple GPU"),
        ("export onnx {work} --out model.pt", "--out model.pt: must end in .onnx"),
        ("export onnx {work} --out m.onnx --scales 1;2", "--scales 1;2: are no numbers; write them as 0.75,1,1.25"),
        ("export onnx {work} --out m.onnx --scales 0", "--scales: 0.0; give numbers above 0"),
        ("export onnx shots --out m.onnx", "shots: no trained segmenter here"),
    ],
)
def test_mistakes_are_one_line(work, here, tag2mask, words, said):
    (here / "file").touch()
    (here / "other").mkdir()
    shutil.copy(here / "shots/0.png", here / "other/0.png")
    done = tag2mask(*[word.format(work=work, other="other") for word in words.split()])
    assert done.code == 2 and done.out == "" and said in done.err
    assert len(done.err.splitlines()) == 1 and done.err.startswith("tag2mask: ")
    assert not (here / "predicted/masks").exists() and not (here / "m.onnx").exists()
