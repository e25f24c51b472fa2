"""The baseline: pooling its maps is the linear classifier on pooled features, and the loss is the sum it stands for."""

import math

import pytest
import torch
import torch.nn.functional as F

from tag2mask.backbones import BackboneSettings
from tag2mask.baselines.cam import CAM
from tag2mask.core import FULL, Batch, CamOutput, Objective, Progress


def net(classes=3, dropout=0.0):
    torch.manual_seed(0)
    settings = BackboneSettings(name="test_resnet", weights=None)
    return CAM(classes, backbone=settings, dropout=dropout)


def batch_of(images, tags):
    return Batch(images, tags, torch.arange(len(images)), torch.ones(len(images), 1, *images.shape[2:]))


class TestMaps:
    @pytest.mark.parametrize(("images", "classes", "size"), [(2, 3, (64, 48)), (1, 1, (33, 33)), (3, 20, (16, 16))])
    def test_pooling_the_maps_is_the_classifier_on_pooled_features(self, images, classes, size):
        model = net(classes).eval()
        pixels = torch.randn(images, 3, *size)
        with torch.no_grad():
            features = model.encode(pixels)
            out = model.classify(features, pixels)
        weight = model.classifier.weight[:, :, 0, 0]
        assert out.logits.shape == (images, classes)
        assert torch.allclose(out.logits, F.linear(features["last"].mean((2, 3)), weight), atol=1e-5)
        assert torch.allclose(out.cams, torch.einsum("kd,bdhw->bkhw", weight, features["last"]), atol=1e-5)
        assert out.refined is None
        assert out.background is None
        assert out.best is out.cams
        assert out.features.keys() == model.dims.keys()

    def test_maps_against_the_sum_of_equation_2(self):
        model = net(2).eval()
        features = {"last": torch.randn(1, model.dims["last"], 2, 3)}
        out = model.classify(features, torch.zeros(1, 3, 8, 8))
        for c, y, x in [(0, 0, 0), (1, 1, 2), (0, 1, 1)]:
            expected = sum(
                model.classifier.weight[c, k, 0, 0].item() * features["last"][0, k, y, x].item()
                for k in range(model.dims["last"])
            )
            assert out.cams[0, c, y, x].item() == pytest.approx(expected, abs=1e-5)

    def test_maps_are_differentiable_down_to_the_first_layer(self):
        model = net()
        out = model.classify(model.encode(torch.randn(2, 3, 48, 48)), torch.zeros(2, 3, 48, 48))
        out.cams[:, 1].sum().backward()
        assert next(model.backbone.parameters()).grad.abs().sum() > 0
        assert model.classifier.weight.grad[0].eq(0).all()
        assert model.classifier.weight.grad[1].abs().sum() > 0

    def test_dropout_is_for_training(self):
        model, features = net(dropout=0.5), {"last": torch.randn(2, 96, 3, 3)}
        images = torch.zeros(2, 3, 8, 8)
        assert not torch.equal(model.classify(features, images).cams, model.classify(features, images).cams)
        model.eval()
        assert torch.equal(model.classify(features, images).cams, net().eval().classify(features, images).cams)


def loop_loss(logits, tags):
    """Mean over images and classes of the binary cross-entropy of sigmoid(logit) and tag."""
    total = 0.0
    for row, wanted in zip(logits.tolist(), tags.tolist(), strict=True):
        for s, t in zip(row, wanted, strict=True):
            p = 1 / (1 + math.exp(-s))
            total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    return total / logits.numel()


class TestLoss:
    @pytest.mark.parametrize(("images", "classes"), [(1, 1), (4, 3), (2, 20)])
    def test_against_a_loop(self, images, classes):
        logits = torch.randn(images, classes, dtype=torch.float64, requires_grad=True)
        tags = (torch.rand(images, classes) > 0.5).double()
        tags[0] = 0  # an untagged image
        out = CamOutput(logits, logits[:, :, None, None], {})
        loss = net(classes).losses(batch_of(torch.zeros(images, 3, 8, 8), tags), {FULL: out}, Progress(0, 0))
        assert list(loss) == ["cls"]
        assert loss["cls"].item() == pytest.approx(loop_loss(logits, tags))
        loss["cls"].backward()
        assert torch.allclose(logits.grad, (torch.sigmoid(logits) - tags) / logits.numel())

    def test_certain_scores_stay_finite(self):
        logits = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
        out = CamOutput(logits, logits[:, :, None, None], {})
        for tags in ([[1.0, 0.0]], [[0.0, 1.0]]):
            logits.grad = None
            loss = net(2).losses(batch_of(torch.zeros(1, 3, 8, 8), torch.tensor(tags)), {FULL: out}, Progress(0, 0))[
                "cls"
            ]
            loss.backward()
            assert torch.isfinite(loss)
            assert torch.isfinite(logits.grad).all()

    def test_one_step_trains_every_parameter(self):
        objective = Objective(net(), num_classes=3)
        loss = objective(batch_of(torch.randn(2, 3, 48, 48), torch.eye(2, 3)), Progress(0, 0))
        assert list(loss) == ["net/cls"]
        loss["net/cls"].backward()
        assert all(p.grad is not None for p in objective.parameters())
