"""The segmenter: its loss on masks with unlabelled pixels, its predictions, and how it is stored."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tag2mask import schema
from tag2mask.core import Batch, Progress
from tag2mask.data.augment import normalise, pixels_of
from tag2mask.data.images import read_mask
from tag2mask.engine import Devices
from tag2mask.engine.training import Training, make_optimizer
from tag2mask.errors import UserError
from tag2mask.pipeline import Stage, write_json
from tag2mask.refine.crf import PRESETS, DenseCRF
from tag2mask.segment import SEGMENTERS, DeepLab, SegmentObjective, deeplab, predict
from tag2mask.segment.heads import ASPPConcat, ASPPSum, LargeFOV
from tag2mask.stages.classify import MODEL, WEIGHTS, save_weights
from tag2mask.stages.segment import Segmenter, check_segmenter, load_segmenter, predict_masks

NOW = Progress(0, 0)
BACKBONE = {"name": "test_resnet", "weights": None, "output_stride": 16, "freeze_norm": None}
NET = {"name": "deeplab", "backbone": BACKBONE, "width": 8, "dilation": 2, "dropout": 0.0}


SMALL = {
    "deeplab": {"width": 8, "dilation": 2},
    "deeplab_v2": {"dilations": [2, 3]},
    "deeplab_v3_like": {"width": 8, "dilations": [2, 3]},
}


def network(classes=2, stride=16, kind="deeplab", **given):
    torch.manual_seed(0)
    backbone = {"name": "test_resnet", "weights": None, "output_stride": stride}
    settings = schema.check(SEGMENTERS[kind], {"backbone": backbone} | SMALL[kind] | given, "net")
    net = schema.make(SEGMENTERS[kind], settings, num_classes=classes)
    assert isinstance(net, DeepLab)
    return net


class Scores(nn.Module):
    """A "network" whose scores are given, and one weight to send gradients to."""

    def __init__(self, scores, align_corners=False):
        super().__init__()
        self.align_corners = align_corners
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
    @pytest.mark.parametrize("kind", SEGMENTERS)
    @pytest.mark.parametrize("stride", [8, 16, 32])
    @pytest.mark.parametrize("classes", [1, 5])
    def test_scores(self, classes, stride, kind):
        net = network(classes, stride, kind)
        scores = net(torch.randn(2, 3, 64, 96))
        assert scores.shape == (2, classes + 1, 64 // stride, 96 // stride)
        scores.square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())

    def test_the_backbone_is_the_trunk_and_the_head_is_new(self):
        net = network()
        assert net.backbone.trunk
        assert not any(getattr(m, "trunk", False) for m in net.head.modules())


def loop_convolve(x, weight, bias, dilation):
    """A zero-padded dilated convolution of one image [D h w], pixel by pixel."""
    outputs, _, size, _ = weight.shape
    _, height, width = x.shape
    found = torch.zeros(outputs, height, width, dtype=x.dtype)
    reach = size // 2
    for y, z in itertools.product(range(height), range(width)):
        total = torch.zeros(outputs, dtype=x.dtype) if bias is None else bias.clone()
        for i, j in itertools.product(range(-reach, reach + 1), repeat=2):
            row, column = y + i * dilation, z + j * dilation
            if 0 <= row < height and 0 <= column < width:
                total = total + weight[:, :, i + reach, j + reach] @ x[:, row, column]
        found[:, y, z] = total
    return found


def loop_block(x, layers, dilation=1):
    """Convolution without bias, batch norm by its running statistics, ReLU."""
    convolution, norm, _ = layers
    y = loop_convolve(x, convolution.weight, None, dilation)
    p = [v[:, None, None] for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    return ((y - p[0]) / (p[1] + norm.eps).sqrt() * p[2] + p[3]).clamp(min=0)


def shaken(head):
    for norm in (m for m in head.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
    return head.double().eval()


class TestHeads:
    features = torch.randn(2, 4, 5, 7, dtype=torch.float64)

    def agree(self, head, expected):
        torch.testing.assert_close(head(self.features), expected, rtol=1e-9, atol=1e-9)

    def test_large_fov_against_a_loop(self):
        head = shaken(LargeFOV(4, 3, width=6, dilation=2, dropout=0.5))
        first, second, last = head.layers[:3], head.layers[3:6], head.layers[7]
        expected = []
        for x in self.features:
            y = loop_block(loop_block(x, first, 2), second)
            expected.append(loop_convolve(y, last.weight, last.bias, 1))
        self.agree(head, torch.stack(expected))

    def test_the_sum_of_classifiers_against_a_loop(self):
        head = ASPPSum(4, 3, dilations=(1, 2, 6)).double()
        nn.init.normal_(head.branches[0].bias)
        expected = [
            sum(loop_convolve(x, b.weight, b.bias, d) for b, d in zip(head.branches, (1, 2, 6), strict=True))
            for x in self.features
        ]
        self.agree(head, torch.stack(expected))

    def test_concatenated_branches_against_a_loop(self):
        head = shaken(ASPPConcat(4, 3, width=6, dilations=(1, 3), dropout=0.5))
        last = head.classify[1]
        expected = []
        for x in self.features:
            parts = [loop_block(x, branch, d) for branch, d in zip(head.branches, (1, 3), strict=True)]
            whole = loop_block(x.mean(dim=(1, 2), keepdim=True), head.whole)
            parts.append(whole.repeat(1, 5, 7))
            mixed = loop_block(torch.cat(parts), head.mix[:3])
            expected.append(loop_convolve(mixed, last.weight, last.bias, 1))
        self.agree(head, torch.stack(expected))

    def test_sizes_as_published(self):
        """On the 2048 channels of a ResNet101, for 21 outputs."""

        def count(head):
            return sum(p.numel() for p in head.parameters())

        classes = 3 * 7
        with torch.device("meta"):
            large = LargeFOV(2048, classes, width=512, dilation=12, dropout=0.5)
            summed = ASPPSum(2048, classes, dilations=(6, 12, 18, 24))
            joined = ASPPConcat(2048, classes, width=256, dilations=(6, 12, 18, 24), dropout=0.5)
        assert count(large) == 2048 * 512 * 9 + 512 * 512 + 4 * 512 + 512 * classes + classes
        assert count(summed) == 4 * (2048 * classes * 9 + classes)
        mixing = 5 * 256 * 256 + 2 * 256 + 256 * classes + classes
        assert count(joined) == 4 * (2048 * 256 * 9 + 2 * 256) + 2048 * 256 + 2 * 256 + mixing

    def test_initial_weights(self):
        torch.manual_seed(0)
        summed = ASPPSum(64, 32, dilations=(1,)).branches[0]
        assert summed.weight.std().item() == pytest.approx(0.01, rel=0.05) and not summed.bias.any()
        first = ASPPConcat(64, 3, width=32, dilations=(1,), dropout=0.0).branches[0][0]
        assert first.weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05)

    def test_dropout_twice(self):
        head = ASPPConcat(4, 3, width=6, dilations=(1,), dropout=0.3)
        assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [0.3, 0.3]

    def test_one_image_has_no_batch_statistics(self):
        head = ASPPConcat(4, 3, width=6, dilations=(1,), dropout=0.0)
        with pytest.raises(UserError, match=r"train\.batch: .* give each process 2 or more"):
            head(torch.zeros(1, 4, 3, 3))
        assert head.eval()(torch.zeros(1, 4, 3, 3)).shape == (1, 3, 3, 3)


class TestReleasedTraining:
    """Scale and shift of all norms are in no group of the optimiser; those of the head follow the data slowly."""

    @pytest.mark.parametrize("kind", ["deeplab", "deeplab_v3_like"])
    def test_norms_keep_scale_and_shift(self, kind):
        net = network(
            kind=kind, norm={"affine": False, "momentum": 0.0003}, backbone=BACKBONE | {"freeze_norm": "affine"}
        )
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        before = [m.running_mean.clone() for m in norms]
        optimizer = make_optimizer(net, Training(steps=1, lr_new=10, lr_bias=2))
        factors = {id(p): group["factor"] for group in optimizer.param_groups for p in group["params"]}
        assert not any(id(p) in factors for m in norms for p in m.parameters())
        assert {m.momentum for m in net.head.modules() if isinstance(m, nn.BatchNorm2d)} == {0.0003}
        assert {factors[id(p)] for p in net.backbone.parameters() if id(p) in factors} == {1}
        assert {factors[id(p)] for p in net.head.parameters() if id(p) in factors} == {10, 20}
        net.train()(torch.randn(2, 3, 64, 64) + 2)
        assert all(not torch.equal(m.running_mean, old) for m, old in zip(norms, before, strict=True))

    def test_by_default_they_learn(self):
        net = network(kind="deeplab_v3_like")
        assert all(p.requires_grad for p in net.parameters())
        assert {m.momentum for m in net.head.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}

    @pytest.mark.parametrize(
        ("kind", "given", "message"),
        [
            ("deeplab_v3_like", {"norm": {"momentum": 2}}, "net.norm.momentum: should be less than or equal to 1"),
            ("deeplab_v2", {"dilations": []}, "net.dilations: Tuple should have at least 1 item"),
            ("deeplab_v2", {"dilations": [0]}, "net.dilations: should be greater than or equal to 1"),
            ("deeplab_v2", {"width": 3}, "net.width: unknown"),
        ],
    )
    def test_faults(self, kind, given, message):
        with pytest.raises(UserError, match=message):
            network(kind=kind, **given)


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

    @pytest.mark.parametrize("align", [False, True])
    def test_scores_are_resized_to_the_mask(self, align):
        scores, target = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 16, 17))
        resized = F.interpolate(scores, size=(16, 17), mode="bilinear", align_corners=align)
        found = SegmentObjective(Scores(scores, align))(batch_of(target), NOW)["ce"]
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
        align = net.align_corners
        total = total + F.interpolate(scores, size=(height, width), mode="bilinear", align_corners=align)
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

    def test_scores_are_resized_as_in_training(self):
        net, images = network(align_corners=True).eval(), torch.randn(1, 3, 48, 33)
        found = predict(net, images, scales=(1.0, 1.5), flip=True)
        with torch.no_grad():
            expected = loop_predict(net, images[0], (1.0, 1.5), True)
        assert torch.allclose(found[0], expected, atol=1e-5)
        net.align_corners = False
        assert not torch.allclose(predict(net, images, scales=(1.0, 1.5), flip=True)[0], expected, atol=1e-3)

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
    @pytest.mark.parametrize("kind", ["deeplab_v2", "deeplab_v3_like"])
    def test_every_kind_is_read_as_it_was_written(self, tmp_path, kind):
        net = network(kind=kind)
        save_weights(net, tmp_path / WEIGHTS)
        settings = {"name": kind, "backbone": BACKBONE} | SMALL[kind]
        write_json(tmp_path / MODEL, {"net": settings, "classes": ["a", "b"], "scales": [1.0], "flip": False})
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(load_segmenter(tmp_path).net(images), net.eval()(images))

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


@pytest.mark.parametrize("preset", ["deeplab", "irn"])
def test_masks_by_a_crf_over_the_probabilities(tmp_path, preset):
    devices, size = Devices("cpu"), (30, 42)
    pixels = [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i in range(3)]
    model = Segmenter(network(classes=3).eval(), ("a", "b", "c"), [1.0, 1.5], flip=True)
    outputs = {crf: [tmp_path / f"{crf}/{i}.png" for i in range(3)] for crf in (None, preset)}
    for crf, paths in outputs.items():
        predict_masks(model, pixels.__getitem__, paths, devices, workers=0, batch=2, crf=crf)
    changed = 0
    for index, image in enumerate(pixels):
        images = normalise(torch.from_numpy(image).permute(2, 0, 1))[None]
        found = predict(model.net, images, scales=model.scales, flip=True)[0].numpy()
        plain, refined = (read_mask(outputs[crf][index], 3) for crf in (None, preset))
        assert np.array_equal(plain, found.argmax(axis=0))
        expected = dense(image, found, preset)
        best = np.sort(expected, axis=0)
        assert np.array_equal(refined[best[-1] - best[-2] > 1e-4], expected.argmax(axis=0)[best[-1] - best[-2] > 1e-4])
        changed += (refined != plain).sum()
    assert changed > 0


def dense(image, scores, preset):
    return DenseCRF(image, **PRESETS[preset], backend="torch")(scores)


def test_normalised_pixels_come_back():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(3, 16, 16)[None]
    assert torch.equal(pixels_of(normalise(pixels)), pixels.permute(0, 2, 3, 1).float())
