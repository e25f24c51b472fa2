"""Which images are meant, what a segmenter makes of a photo, and what is left in a folder of predictions."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import tag2mask
from tag2mask import schema, tables
from tag2mask.data.augment import normalise
from tag2mask.data.images import read_mask
from tag2mask.data.inputs import find_images, natural
from tag2mask.errors import UserError
from tag2mask.export import overlay
from tag2mask.pipeline import MANIFEST, read_json, write_json
from tag2mask.predicting import Prediction, find_model, load_segmenter, predict
from tag2mask.refine.crf import PRESETS, DenseCRF
from tag2mask.segment import SEGMENTERS
from tag2mask.segment import predict as probabilities
from tag2mask.stages.classify import MODEL, WEIGHTS, save_weights

NET = {
    "name": "deeplab", "width": 8, "dilation": 2,
    "backbone": {"name": "test_resnet", "weights": None, "output_stride": 16},
}  # fmt: skip
CLASSES = ("cat", "dog")


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def photo(seed, size=(40, 56)):
    """Noise with a flat patch."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels[5:20, 8:30] = (200, 30, 30 * seed % 255)
    return pixels


def save(root, name, pixels):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)
    return path


def stored(folder, seed=0):
    """The folder of a segmenter of two classes whose masks show all of them."""
    torch.manual_seed(seed)
    net = schema.make(SEGMENTERS["deeplab"], schema.check(SEGMENTERS["deeplab"], body(), "net"), num_classes=2)
    last = net.eval().head.layers[-1]
    with torch.no_grad():
        scores = net(normalise(torch.from_numpy(np.stack([photo(index) for index in range(4)])).movedim(-1, 1)))
        spread = 3 / scores.std(dim=(0, 2, 3))
        last.bias.copy_((last.bias - scores.mean(dim=(0, 2, 3))) * spread)
        last.weight.mul_(spread[:, None, None, None])
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(net, folder / WEIGHTS)
    write_json(folder / MODEL, {"net": NET, "classes": list(CLASSES), "scales": [1.0, 1.5], "flip": True})
    write_json(folder / MANIFEST, {"finished": f"2000-01-0{1 + seed}"})
    return folder


def body():
    return {key: value for key, value in NET.items() if key != "name"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("work") / "segment-0")


@pytest.fixture
def shots(tmp_path):
    for index in range(5):
        save(tmp_path / "in", f"{'b/' if index > 2 else ''}shot_{index + 8}.png", photo(index))
    return tmp_path / "in"


class TestWhichImages:
    def names(self, *given, skip=()):
        return list(find_images(given, skip))

    def test_a_folder_in_the_order_of_people(self, tmp_path):
        touch(tmp_path, "f_10.jpg", "f_9.JPG", "f_1.png", "sub/2.tif", "sub/11.webp", "notes.txt", ".hidden.png")
        assert self.names(tmp_path) == ["f_1", "f_9", "f_10", "sub/2", "sub/11"]

    def test_numbers_count_as_numbers(self):
        names = ["a10", "a9", "a", "10", "9", "a9b2", "a9b10", "A1", "a09", "x1.5", "x1.10", ""]
        ordered = sorted(names, key=natural)

        def before(one, other):
            """Part by part, numbers before words."""
            for left, right in zip(*(re.findall(r"\d+|\D+", name) for name in (one, other)), strict=False):
                if left != right and (left.isdigit(), right.isdigit()) != (True, True):
                    return left.isdigit() or (not right.isdigit() and left < right)
                if left != right and int(left) != int(right):
                    return int(left) < int(right)
            return len(re.findall(r"\d+|\D+", one)) <= len(re.findall(r"\d+|\D+", other))

        assert all(before(one, other) for one, other in itertools.pairwise(ordered))
        assert ordered.index("a9") < ordered.index("a10") and ordered.index("x1.5") < ordered.index("x1.10")

    @pytest.mark.parametrize(
        "pattern, names",
        [
            ("in/*.jpg", ["a", "b"]),
            ("in/**/*.jpg", ["a", "b", "x/c", "x/y/d"]),
            ("in/x/**/*", ["c", "y/d", "y/e"]),
            ("in/[a]*", ["a"]),
            ("in/*/c.jpg", ["x/c"]),
            ("in/x/y/?.png", ["e"]),
            ("./in//x/*.jpg", ["c"]),
        ],
    )
    def test_patterns(self, tmp_path, monkeypatch, pattern, names):
        touch(tmp_path, "in/a.jpg", "in/b.jpg", "in/x/c.jpg", "in/x/y/d.jpg", "in/x/y/e.png", "in/t.txt", "in/.h.jpg")
        monkeypatch.chdir(tmp_path)
        assert self.names(pattern) == names
        if not pattern.startswith("."):
            assert self.names(str(tmp_path / pattern)) == names

    def test_files_that_look_like_patterns(self, tmp_path):
        touch(tmp_path, "x[1 0].png", "x1.png")
        assert self.names(tmp_path / "x[1 0].png") == ["x[1 0]"]

    def test_several_at_once(self, tmp_path):
        touch(tmp_path, "a/1.png", "b/2.png", "c.jpg")
        assert self.names(tmp_path / "a", tmp_path / "b", str(tmp_path / "*.jpg")) == ["1", "2", "c"]
        assert self.names(tmp_path / "a", tmp_path / "a/1.png", str(tmp_path / "a/*")) == ["1"]

    def test_what_is_written_is_not_read(self, tmp_path):
        touch(tmp_path, "a.png", "out/masks/a.png")
        assert self.names(tmp_path, skip=[tmp_path / "out"]) == ["a"]
        assert self.names(str(tmp_path / "**/*.png"), skip=[tmp_path / "out"]) == ["a"]

    def test_a_folder_linked_into_itself_is_seen_once(self, tmp_path):
        touch(tmp_path, "in/a.png")
        (tmp_path / "in/again").symlink_to(tmp_path / "in")
        assert self.names(tmp_path / "in") == self.names(str(tmp_path / "in/**/*.png")) == ["a"]

    @pytest.mark.parametrize(
        "given, words",
        [
            (["nothing"], "nothing: there is no such file or folder"),
            (["none"], "none: no images here"),
            (["a/*.gif"], "gif: matches no image"),
            (["t.txt"], "t.txt: is no image that is read"),
            (["clip.mp4"], "clip.mp4: is a video; take it apart (ffmpeg -i clip.mp4 frames/%06d.png)"),
            (["a/*/../*.png"], ".. behind a wildcard"),
            (["a", "b"], "b/1.jpg: would have the same mask as a/1.png, 1.png"),
            (["a/1.png", "b/1.jpg"], "b/1.jpg: would have the same mask as a/1.png"),
            (["c"], "c/2.png: would have the same mask as c/2.jpg"),
        ],
    )
    def test_mistakes_are_one_line(self, tmp_path, monkeypatch, given, words):
        touch(tmp_path, "a/1.png", "a/x/3.png", "b/1.jpg", "c/2.png", "c/2.jpg", "t.txt", "clip.mp4", "none/t.txt")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError) as caught:
            find_images(given)
        assert words in str(caught.value) and "\n" not in str(caught.value)


class TestSegmenter:
    def test_scores_are_those_of_the_network(self, model):
        segmenter, pixels = load_segmenter(model, device="cpu"), photo(1, (37, 50))
        images = normalise(torch.from_numpy(pixels).permute(2, 0, 1))[None]
        expected = probabilities(segmenter.net, images, scales=(1.0, 1.5), flip=True)[0].numpy()
        scores = segmenter.scores(pixels)
        assert scores.dtype == np.float32 and np.array_equal(scores, expected)
        mask = segmenter(pixels)
        assert mask.dtype == np.uint8 and np.array_equal(mask, expected.argmax(axis=0)) and len(np.unique(mask)) > 1
        assert segmenter.classes == CLASSES

    def test_a_crf_goes_over_them(self, model):
        segmenter, pixels = load_segmenter(model, device="cpu"), photo(2)
        crf = DenseCRF(pixels, **PRESETS["deeplab"])
        expected = crf.from_unary(-np.log(np.clip(segmenter.scores(pixels), 1e-5, None)))
        assert np.allclose(segmenter.scores(pixels, crf="deeplab"), expected, atol=1e-4)
        assert not np.allclose(expected, segmenter.scores(pixels), atol=1e-2)

    def test_whatever_a_photo_is(self, model, tmp_path):
        segmenter, pixels = load_segmenter(model, device="cpu"), photo(3)
        mask = segmenter(pixels)
        path = save(tmp_path, "a.png", pixels)
        assert np.array_equal(segmenter(path), mask) and np.array_equal(segmenter(str(path)), mask)
        assert np.array_equal(segmenter(PIL.Image.fromarray(pixels)), mask)
        assert np.array_equal(segmenter(pixels[:, ::-1][:, ::-1]), mask)  # any strides
        grey = pixels[..., 0]
        assert np.array_equal(segmenter(grey), segmenter(np.stack([grey] * 3, axis=-1)))
        assert np.array_equal(segmenter(PIL.Image.fromarray(grey)), segmenter(grey))

    def test_a_photo_is_turned_upright(self, model):
        segmenter, picture = load_segmenter(model, device="cpu"), PIL.Image.fromarray(photo(4))
        picture.getexif()[0x0112] = 6
        assert segmenter(picture).shape == (56, 40)

    @pytest.mark.parametrize("shape, kind", [((8, 8, 4), np.uint8), ((8, 8, 3), np.float32), ((0, 8), np.uint8)])
    def test_what_is_no_photo(self, model, shape, kind):
        with pytest.raises(UserError, match=r"a photo must be a path, a PIL image, or a uint8 array"):
            load_segmenter(model, device="cpu")(np.zeros(shape, kind))

    def test_the_newest_finished_one_of_a_work_folder(self, tmp_path):
        for seed in (0, 2, 1):
            stored(tmp_path / f"segment-{seed}", seed)
        assert find_model(tmp_path) == tmp_path / "segment-2"
        (tmp_path / "segment-2" / MANIFEST).unlink()
        assert find_model(tmp_path) == tmp_path / "segment-1"


class TestFolder:
    def test_masks_pictures_probabilities_and_counts(self, model, shots, tmp_path):
        out, segmenter = tmp_path / "out", load_segmenter(model, device="cpu")
        found = predict(model, shots, out, overlays=True, soft=True, device="cpu", workers=0)
        files = {path.relative_to(shots).with_suffix(""): path for path in shots.rglob("*.png")}
        total, shown = np.zeros(3, int), np.zeros(3, int)
        for name, path in files.items():
            pixels = np.array(PIL.Image.open(path))
            mask = read_mask((out / "masks" / name).with_suffix(".png"), 2)
            with np.load((out / "scores" / name).with_suffix(".npz"), allow_pickle=False) as file:
                assert file["scores"].dtype == np.float16 and file["classes"].tolist() == ["background", *CLASSES]
                assert np.allclose(file["scores"], segmenter.scores(pixels), atol=2e-3)
                best = np.take_along_axis(file["scores"], mask[None].astype(int), 0)[0]
                assert (best == file["scores"].max(axis=0)).all()
            with PIL.Image.open((out / "overlays" / name).with_suffix(".png")) as picture:
                assert np.array_equal(np.array(picture), overlay(pixels, mask))
            for value in range(3):
                total[value] += (mask == value).sum()
                shown[value] += (mask == value).any()
        assert [row["class"] for row in found.classes] == ["background", *CLASSES]
        assert [row["pixels"] for row in found.classes] == pytest.approx(total / total.sum())
        assert [row["images"] for row in found.classes] == shown.tolist()
        assert (found.images, found.made) == (5, 5)
        assert found.images_per_second == pytest.approx(5 / found.seconds, rel=0.2)  # seconds are rounded
        assert found.device.startswith("cpu") and (found.masks, found.scores) == (
            str(out / "masks"),
            str(out / "scores"),
        )
        assert not [path for path in out.rglob("*") if path.name.endswith((".tmp", ".part"))]

    def test_goes_on_where_it_was(self, model, shots, tmp_path):
        out = tmp_path / "out"
        first = predict(model, shots, out, overlays=True, device="cpu", workers=0, batch=1)
        assert first.overlays and first.scores is None
        times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
        whole = (out / "masks/shot_8.png").read_bytes()
        (out / "masks/shot_8.png").unlink()
        (out / "overlays/shot_9.png").unlink()
        second = predict(model, shots, out, overlays=True, device="cpu", workers=0, batch=1)
        assert (second.images, second.made, second.classes) == (5, 1, first.classes)
        assert (out / "masks/shot_8.png").read_bytes() == whole
        again = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
        changed = {path.relative_to(out).as_posix() for path in times if times[path] != again[path]}
        assert changed == {"masks/shot_8.png", "overlays/shot_9.png"}
        third = predict(model, shots, out, device="cpu", workers=0)
        assert (third.made, third.images_per_second, third.classes) == (0, None, first.classes)
        soft = predict(model, shots, out, soft=True, device="cpu", workers=0)
        assert soft.made == 5 and len(list((out / "scores").rglob("*.npz"))) == 5

    def test_masks_of_two_models_are_never_mixed(self, model, shots, tmp_path):
        out = tmp_path / "out"
        predict(model, shots, out, device="cpu", workers=0)
        before = {path: path.read_bytes() for path in (out / "masks").rglob("*.png")}
        other = stored(tmp_path / "other", seed=1)
        for given, crf, words in ((other, None, "by another model"), (model, "deeplab", "made without --crf")):
            with pytest.raises(UserError, match=rf"^--out {out}: holds masks .*{words}"):
                predict(given, shots, out, crf=crf, device="cpu", workers=0)
        assert {path: path.read_bytes() for path in (out / "masks").rglob("*.png")} == before
        (out / "predict.json").unlink()
        with pytest.raises(UserError, match="exists, and nothing says which model made it"):
            predict(model, shots, out, device="cpu", workers=0)
        (out / "predict.json").write_text("{")
        with pytest.raises(UserError, match=r"predict.json: is damaged"):
            predict(model, shots, out, device="cpu", workers=0)

    def test_damaged_images_are_named_before_anything_is_made(self, model, shots, tmp_path):
        whole = (shots / "shot_9.png").read_bytes()
        for name in ("shot_9.png", "b/shot_12.png"):
            (shots / name).write_bytes(whole[:-200])
        with pytest.raises(UserError, match=r"b/shot_12.png: .*truncated.* and 1 more of 5 images") as caught:
            predict(model, shots, tmp_path / "out", device="cpu", workers=0)
        assert "\n" not in str(caught.value) and not (tmp_path / "out/masks").exists()

    def test_one_image_in_a_second_folder_of_the_same(self, model, shots, tmp_path):
        found = predict(model, [shots / "shot_8.png"], tmp_path / "one", device="cpu", workers=0)
        assert found.images == 1 and [p.name for p in (tmp_path / "one/masks").iterdir()] == ["shot_8.png"]
        assert json.loads(json.dumps(found.classes)) == found.classes
        assert read_json(tmp_path / "one/predict.json")["classes"] == list(CLASSES)


@pytest.mark.parametrize(("images", "said"), [(0, True), (1, False)])
def test_masks_of_background_alone_are_remarked_upon(images, said):
    shares = [{"class": "background", "pixels": 1.0, "images": 3}, {"class": "cat", "pixels": 0.0, "images": images}]
    text = tables.prediction(Prediction(3, 3, 1.0, 3.0, "cpu", shares, "masks", None, None))
    assert ("no class in any image" in text) is said


def test_the_example_in_the_readme_runs(model, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_segmenter" in block]
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 10
    (tmp_path / "work").mkdir()
    (tmp_path / "work/segment-0").symlink_to(model)
    PIL.Image.fromarray(photo(5)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(CLASSES)
    with PIL.Image.open("overlay.png") as picture:
        assert picture.size == (56, 40)


def test_the_package_stays_light():
    code = "import sys, tag2mask; print({'torch', 'numpy', 'PIL', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert {"load_segmenter", "export_onnx", "predict"} <= set(tag2mask.__all__)
