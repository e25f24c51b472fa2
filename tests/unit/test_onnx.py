"""The ONNX file of a segmenter: onnxruntime computes what PyTorch computes, on images of any size."""

import json
import sys

import numpy as np
import onnx
import pytest
import torch
from test_predict import CLASSES, photo, save, stored
from typer.testing import CliRunner

from tag2mask import cli_export, schema
from tag2mask.data.augment import normalise
from tag2mask.data.images import read_mask
from tag2mask.data.index_png import voc_palette
from tag2mask.errors import Interrupted, UserError
from tag2mask.predicting import export_onnx, load_segmenter, predict
from tag2mask.segment import SEGMENTERS
from tag2mask.segment import predict as probabilities
from tag2mask.segment.onnx_graph import Graph, onnx_graph, rounded
from tag2mask.segment.onnx_model import OnnxModel
from tag2mask.stages.segmenter import OnnxSegmenter

SIZES = ((64, 96), (75, 53), (20, 41))  # the last is smaller than what the network is shown


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A segmenter's folder, its ONNX file, and what the command said: an export takes some seconds."""
    root = tmp_path_factory.mktemp("onnx")
    folder, path = stored(root / "segment-0"), root / "deep/model.onnx"
    done = CliRunner().invoke(cli_export.app, ["onnx", str(folder), "--out", str(path)], catch_exceptions=False)
    assert done.exit_code == 0
    return folder, path, done.stdout


def expected(folder, pixels, scales=(1.0,), flip=False):
    net = load_segmenter(folder, device="cpu").net
    return probabilities(net, normalise(torch.from_numpy(pixels).permute(2, 0, 1))[None], scales=scales, flip=flip)


@pytest.mark.parametrize("size", SIZES)
def test_probabilities_and_masks_are_those_of_torch(made, size):
    folder, path, _ = made
    pixels = photo(1, size)
    scores, mask = OnnxModel(path).outputs(np.ascontiguousarray(pixels.transpose(2, 0, 1))[None])
    own = expected(folder, pixels).numpy()
    assert scores.dtype == np.float32 and mask.dtype == np.uint8
    assert scores.shape == (1, 3, *size) and mask.shape == (1, *size)
    assert np.abs(scores - own).max() < 1e-4
    first, second = np.sort(own, axis=1)[:, -1], np.sort(own, axis=1)[:, -2]
    sure = first - second > 2e-4
    assert (mask == own.argmax(axis=1))[sure].all() and sure.mean() > 0.99 and len(np.unique(mask)) > 1


def test_what_the_file_says_of_itself(made):
    folder, path, said = made
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    wanted = {"image": [1, 3, "height", "width"], "scores": [1, 3, "height", "width"], "mask": [1, "height", "width"]}
    assert shapes == wanted
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert tuple(json.loads(facts["classes"])) == CLASSES
    assert json.loads(facts["palette"]) == voc_palette()[:3].tolist()
    assert (json.loads(facts["scales"]), json.loads(facts["flip"])) == ([1.0], False) and facts["tag2mask"]
    assert str(folder) not in str(model) and __file__ not in str(model) and "/site-packages/" not in str(model)
    assert said.startswith(f"{path}: {path.stat().st_size / 2**20:.1f} MB; scales 1, without mirror image; differs")
    assert 0 <= float(said.split()[-1]) < 1e-4
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_predict_takes_the_file(made, tmp_path):
    folder, path, _ = made
    for index, size in enumerate([(40, 56), (40, 56), (33, 47)]):
        save(tmp_path, f"in/{index}.png", photo(index, size))
    found = predict(path, tmp_path / "in", tmp_path / "out", soft=True, workers=0)
    assert found.images == found.made == 3 and [row["class"] for row in found.classes] == ["background", *CLASSES]
    for index, size in enumerate([(40, 56), (40, 56), (33, 47)]):
        own = expected(folder, photo(index, size))[0].numpy()
        differs = read_mask(tmp_path / f"out/masks/{index}.png", 2) != own.argmax(axis=0)
        assert (np.ptp(np.sort(own, axis=0)[-2:], axis=0)[differs] < 2e-4).all()
        with np.load(tmp_path / f"out/scores/{index}.npz") as file:
            assert np.abs(file["scores"] - own).max() < 1e-3


def test_the_same_function_in_python(made):
    folder, path, _ = made
    segmenter = load_segmenter(path)
    assert isinstance(segmenter, OnnxSegmenter) and segmenter.classes == CLASSES
    scores = segmenter.scores(photo(3))
    assert np.abs(scores - expected(folder, photo(3))[0].numpy()).max() < 1e-4
    assert np.array_equal(segmenter(photo(3)), scores.argmax(axis=0))


def test_a_signal_is_no_fault_of_the_file(made, monkeypatch):
    """Ctrl-C arrives as an exception in whatever computes just then."""
    model = OnnxModel(made[1])

    class Session:
        def run(self, *_):
            raise Interrupted(130)

    monkeypatch.setattr(model, "_session", Session())
    with pytest.raises(Interrupted):
        model.scores(np.zeros((1, 3, 32, 32), np.uint8))


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0])
def test_sides_are_rounded_as_python_does(scale):
    assert [rounded(side, scale) for side in range(1, 3000)] == [round(side * scale) for side in range(1, 3000)]


@pytest.mark.parametrize("scales, flip", [((1.0,), True), ((0.5, 1.0, 1.75), False), ((0.75, 1.25), True)])
def test_the_graph_is_the_prediction(made, scales, flip):
    """Before anything is exported: in PyTorch, with scales and mirror images."""
    net = load_segmenter(made[0], device="cpu").net
    for size in SIZES:
        image = torch.from_numpy(photo(2, size)).permute(2, 0, 1)[None]
        with torch.no_grad():
            scores, mask = Graph(net, scales, flip)(image)
        own = expected(made[0], photo(2, size), scales, flip)
        assert torch.allclose(scores, own, atol=1e-5) and torch.equal(mask, scores.argmax(dim=1).to(torch.uint8))


@pytest.mark.slow
def test_scales_and_mirror_images_in_the_file(made, tmp_path):
    said = export_onnx(made[0], tmp_path / "m.onnx", scales=(0.75, 1.0, 1.25), flip=True)
    assert said["difference"] < 1e-4
    segmenter = load_segmenter(tmp_path / "m.onnx")
    for size in SIZES:
        own = expected(made[0], photo(4, size), (0.75, 1.0, 1.25), True)[0].numpy()
        assert np.abs(segmenter.scores(photo(4, size)) - own).max() < 1e-4


class TestMistakes:
    def test_nothing_is_overwritten(self, made):
        folder, path, _ = made
        before = path.read_bytes()
        with pytest.raises(UserError, match=r"model.onnx: exists and is kept; give another name"):
            export_onnx(folder, path)
        assert path.read_bytes() == before

    @pytest.mark.parametrize(
        "name, scales, words",
        [("m.pt", (1.0,), "must end in .onnx"), ("m.onnx", (0.0,), "--scales: 0.0; give numbers")],
    )
    def test_before_long_work(self, made, tmp_path, name, scales, words):
        with pytest.raises(UserError, match=words):
            export_onnx(made[0], tmp_path / name, scales=scales)
        assert not list(tmp_path.iterdir())

    def test_files_that_are_none(self, made, tmp_path):
        other = onnx.load(made[1])
        del other.metadata_props[:]
        (tmp_path / "other.onnx").write_bytes(other.SerializeToString())
        (tmp_path / "cut.onnx").write_bytes(made[1].read_bytes()[:5000])
        (tmp_path / "empty.onnx").touch()
        for name, words in [
            ("other", "is no ONNX model of ours"), ("cut", "damaged"), ("empty", "damaged"), ("none", "cannot be"),
        ]:  # fmt: skip
            with pytest.raises(UserError, match=rf"{name}.onnx: .*{words}") as caught:
                load_segmenter(tmp_path / f"{name}.onnx")
            assert "\n" not in str(caught.value)

    def test_it_computes_on_the_cpu(self, made):
        with pytest.raises(UserError, match=r"--device cuda: an ONNX model computes on the CPU"):
            load_segmenter(made[1], device="cuda")

    @pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
    def test_a_missing_extra_is_one_line(self, made, tmp_path, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)  # as Python marks what cannot be imported
        with pytest.raises(UserError, match=rf"ONNX needs {package}, .*: pip install 'tag2mask\[onnx\]'"):
            export_onnx(made[0], tmp_path / "m.onnx")
        assert not list(tmp_path.iterdir())

    def test_a_vit_is_refused(self):
        backbone = {"name": "test_vit", "weights": None, "output_stride": 16}
        settings = schema.check(SEGMENTERS["deeplab"], {"backbone": backbone, "width": 8}, "net")
        net = schema.make(SEGMENTERS["deeplab"], settings, num_classes=2).eval()
        with pytest.raises(UserError, match="a segmenter on a ViT cannot be exported"):
            onnx_graph(net, CLASSES, scales=(1.0,), flip=False, version="0")

    @pytest.mark.parametrize("step", [0.01, np.nan])
    def test_a_file_that_computes_something_else_is_not_written(self, made, tmp_path, monkeypatch, step):
        """A fault of an exporter or of onnxruntime: here, one weight of the graph is another."""
        model = onnx.load(made[1])
        bias = [node for node in model.graph.node if node.op_type == "Conv"][-1].input[2]
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == bias]
        changed = onnx.numpy_helper.to_array(tensor) + np.array([0, step, 0], np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(changed, bias))
        monkeypatch.setattr("tag2mask.predicting.onnx_graph", lambda *given, **named: model.SerializeToString())
        with pytest.raises(UserError, match="onnxruntime computes other probabilities"):
            export_onnx(made[0], tmp_path / "m.onnx")
        assert not list(tmp_path.iterdir())
