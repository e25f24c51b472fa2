"""The segmenter: its loss on masks with unlabelled pixels, its predictions, and how it is stored."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tag2mask.backbones import BackboneSettings
from tag2mask.core import Batch, Progress
from tag2mask.data.images import read_mask
from tag2mask.engine import Devices
from tag2mask.errors import UserError
from tag2mask.pipeline import Stage, write_json
from tag2mask.segment import DeepLab, SegmentObjective, deeplab, predict
from tag2mask.stages.classify import MODEL, WEIGHTS, save_weights
from tag2mask.stages.segment import Segmenter, check_segmenter, load_segmenter, predict_masks

NOW = Progress(0, 0)
BACKBONE = {"name": "test_resnet", "weights": None, "output_stride": 16, "freeze_norm": None}
NET = {"name": "deeplab", "backbone": BACKBONE, "width": 8, "dilation": 2, "dropout": 0.0}


def network(classes=2, stride=16):
    torch.manual_seed(0)
    settings = BackboneSettings(name="test_resnet", weights=None, output_stride=stride)
    return DeepLab(classes, backbone=settings, width=8, dilation=2)


class Scores(nn.Module):
    """A "network" whose scores are given, and one weight to send gradients to."""

    def __init__(self, scores):
        super().__init__()
        self.scores, self.gain = scores, nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scores * self.gain


def batch_of(target):
    count, *size = target.shape
    return Batch(torch.zeros(count, 3, *size), torch.zeros(count, 1), torch.arange(count), torch.ones(count, 1, *size),
                 target=target)  # fmt: skip


def loop_cross_entropy(scores, target):
    total, labelled = 0.0, 0
    for b, y, x in itertools.product(*map(range, target.shape)):
        label = int(target[b, y, x])
        if label != 255:
            values = scores[b, :, y, x].tolist()
            total -= values[label] - math.log(sum(math.exp(v) for v in values))
            labelled += 1
    return total / labelled


class TestNetwork:
    @pytest.mark.parametrize("stride", [8, 16, 32])
    @pytest.mark.parametrize("classes", [1, 5])
    def test_scores(self, classes, stride):
        net = network(classes, stride)
        scores = net(torch.randn(2, 3, 64, 96))
        assert scores.shape == (2, classes + 1, 64 // stride, 96 // stride)
        scores.square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())

    def test_the_backbone_is_the_trunk_and_the_head_is_new(self):
        net = network()
        assert net.backbone.trunk
        assert not any(getattr(m, "trunk", False) for m in net.head.modules())


class TestLoss:
    @pytest.mark.parametrize(("images", "classes", "size"), [(2, 3, (6, 7)), (1, 1, (5, 5)), (3, 2, (1, 1))])
    def test_against_a_loop(self, images, classes, size):
        scores = torch.randn(images, classes + 1, *size, dtype=torch.float64)
        target = torch.randint(0, classes + 1, (images, *size))
        target[torch.rand(target.shape) < 0.3] = 255
        target[0, 0, 0] = 0
        objective = SegmentObjective(Scores(scores))
        losses = objective(batch_of(target), NOW)
        assert list(losses) == ["ce"]
        assert losses["ce"].item() == pytest.approx(loop_cross_entropy(scores, target), rel=1e-5)

    def test_scores_are_resized_to_the_mask(self):
        scores, target = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 16, 17))
        resized = F.interpolate(scores, size=(16, 17), mode="bilinear", align_corners=False)
        found = SegmentObjective(Scores(scores))(batch_of(target), NOW)["ce"]
        assert found.item() == pytest.approx(loop_cross_entropy(resized, target), rel=1e-5)

    def test_a_crop_that_is_all_ignored_is_0_with_gradients_of_0(self):
        objective = SegmentObjective(Scores(torch.randn(2, 3, 4, 4)))
        loss = objective(batch_of(torch.full((2, 4, 4), 255)), NOW)["ce"]
        loss.backward()
        assert loss == 0
        assert objective.net.gain.grad == 0

    def test_an_ignored_image_does_not_weigh(self):
        scores, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
        target[1] = 255
        both = SegmentObjective(Scores(scores))(batch_of(target), NOW)["ce"]
        alone = SegmentObjective(Scores(scores[:1]))(batch_of(target[:1]), NOW)["ce"]
        assert torch.allclose(both, alone)

    def test_mean_over_processes_is_the_loss_of_the_global_batch(self, monkeypatch):
        scores, target = torch.randn(4, 3, 5, 5), torch.randint(0, 3, (4, 5, 5))
        target[0] = 255  # the processes hold different numbers of labelled pixels
        whole = SegmentObjective(Scores(scores))(batch_of(target), NOW)["ce"]
        mean = (target != 255).sum() / 2
        monkeypatch.setattr(deeplab, "mean_over_processes", lambda x: mean)
        monkeypatch.setattr(deeplab, "processes", lambda: 2)
        shares = [SegmentObjective(Scores(scores[r::2]))(batch_of(target[r::2]), NOW)["ce"] for r in range(2)]
        assert torch.allclose(torch.stack(shares).mean(), whole)

    def test_of_a_real_network(self):
        objective = SegmentObjective(network(), bf16=True)
        batch = batch_of(torch.randint(0, 3, (2, 64, 64)))
        loss = objective(batch, NOW)["ce"]
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in objective.parameters())

    def test_needs_a_target(self):
        batch = batch_of(torch.zeros(1, 4, 4, dtype=torch.long))
        batch.target = None
        with pytest.raises(ValueError, match="target"):
            SegmentObjective(Scores(torch.zeros(1, 2, 4, 4)))(batch, NOW)


def loop_predict(net, image, scales, flip):
    """One image at a time, one scale at a time, one mirror image at a time."""
    height, width = image.shape[1:]
    total = 0
    for scale in scales:
        size = max(32, round(height * scale)), max(32, round(width * scale))
        scaled = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)
        looks = [net(scaled)]
        if flip:
            looks.append(torch.flip(net(torch.flip(scaled, [3])), [3]))
        scores = torch.stack(looks).mean(dim=0)
        total = total + F.interpolate(scores, size=(height, width), mode="bilinear", align_corners=False)
    return (total / len(scales))[0].softmax(dim=0)


class TestPredict:
    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.5), (0.75,)])
    @pytest.mark.parametrize("size", [(48, 33), (1, 1), (1, 37), (31, 64)])
    def test_against_a_loop(self, flip, scales, size):
        net, images = network().eval(), torch.randn(3, 3, *size)
        with torch.no_grad():
            found = predict(net, images, scales=scales, flip=flip)
            expected = torch.stack([loop_predict(net, image, scales, flip) for image in images])
        assert found.shape == (3, 3, *size)
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(found.sum(dim=1), torch.ones(3, *size), atol=1e-5)

    def test_a_mirror_image_has_the_mirrored_mask(self):
        net, images = network().eval(), torch.randn(2, 3, 64, 64)
        plain = predict(net, images, scales=(1.0,), flip=True)
        mirrored = predict(net, images.flip(-1), scales=(1.0,), flip=True)
        assert torch.allclose(plain, mirrored.flip(-1), atol=1e-5)

    def test_needs_a_scale(self):
        with pytest.raises(ValueError, match="scales"):
            predict(network(), torch.zeros(1, 3, 32, 32), scales=(), flip=False)


@pytest.fixture
def folder(tmp_path):
    """The folder of a segmenter of two classes."""
    net = network()
    save_weights(net, tmp_path / WEIGHTS)
    write_json(tmp_path / MODEL, {"net": NET, "classes": ["a", "b"], "scales": [1.0, 1.5], "flip": True})
    return tmp_path


class TestStored:
    def test_is_read_as_it_was_written(self, folder):
        model = load_segmenter(folder)
        assert (model.classes, model.scales, model.flip) == (("a", "b"), (1.0, 1.5), True)
        assert not model.net.training
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(model.net(images), network().eval()(images))

    def broken(self, folder, kind):
        match kind:
            case "no model":
                (folder / MODEL).unlink()
            case "no weights":
                (folder / WEIGHTS).unlink()
            case "cut weights":
                (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
            case "no weights at all":
                (folder / WEIGHTS).write_bytes(b"")
            case "no json":
                (folder / MODEL).write_text("{")
            case "a classifier":
                write_json(folder / MODEL, {"net": NET | {"name": "cam"}, "methods": {}, "classes": ["a", "b"]})
            case "other classes":
                write_json(folder / MODEL, {"net": NET, "classes": ["a"], "scales": [1.0], "flip": True})

    @pytest.mark.parametrize(
        "kind",
        ["no model", "no weights", "cut weights", "no weights at all", "no json", "a classifier", "other classes"],
    )
    def test_a_folder_that_is_none(self, folder, kind):
        self.broken(folder, kind)
        with pytest.raises(UserError, match=rf"^{folder}: not the folder of a trained segmenter") as caught:
            load_segmenter(folder)
        assert "\n" not in str(caught.value)

    def test_weights_appear_whole_or_not_at_all(self, folder):
        assert sorted(p.name for p in folder.iterdir()) == [MODEL, WEIGHTS]

    def test_the_preflight_builds_the_network(self):
        class Source:
            classes = ("a", "b")

        def check(net):
            check_segmenter(Source(), Stage("segment", "segment", 1, {"net": net}, {}, "data"))

        check(NET)
        with pytest.raises(UserError, match="timm has no model"):
            check(NET | {"backbone": BACKBONE | {"name": "test_resent"}})


def test_masks_are_written_once(tmp_path):
    torch.manual_seed(0)
    devices, sizes = Devices("cpu"), [(33, 40), (33, 40), (1, 50), (33, 40)]
    pixels = [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i, size in enumerate(sizes)]
    outputs = [tmp_path / f"sub/{i}.png" for i in range(4)]
    model = Segmenter(network().eval(), ("a", "b"), [1.0], flip=True)
    predict_masks(model, pixels.__getitem__, outputs, devices, workers=0, batch=2)
    masks = [read_mask(path, 2) for path in outputs]
    assert [mask.shape for mask in masks] == sizes

    changed = [path.stat().st_mtime_ns for path in outputs]
    outputs[2].unlink()
    predict_masks(model, pixels.__getitem__, outputs, devices, workers=2, batch=2)
    assert [path.stat().st_mtime_ns == time for path, time in zip(outputs, changed, strict=True)] == [
        True,
        True,
        False,
        True,
    ]
    assert all(np.array_equal(read_mask(path, 2), mask) for path, mask in zip(outputs, masks, strict=True))
