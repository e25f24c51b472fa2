"""timm CNNs as backbones: taps, strides, frozen norms, weights, and what is said when something does not fit."""

import pickle

import pytest
import timm
import timm.models
import torch
from safetensors.torch import save_file
from torch import nn

from tag2mask.backbones import BackboneSettings, TimmCNN
from tag2mask.errors import UserError

NAMES = ["test_resnet", "test_convnext", "test_efficientnet", "test_byobnet", "test_nfnet"]


def backbone(name="test_resnet", weights=None, **settings):
    return TimmCNN(BackboneSettings(name=name, weights=weights, **settings))


def fault(name="test_resnet", weights=None, **settings):
    with pytest.raises(UserError) as caught:
        backbone(name, weights, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestTaps:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("stride", [8, 16, 32])
    def test_channels_and_strides(self, name, stride):
        body = backbone(name, output_stride=stride).eval()
        with torch.no_grad():
            features = body(torch.randn(2, 3, 96, 64))
        assert list(features) == ["c2", "c3", "c4", "c5", "last"] == list(body.dims)
        for tap, nominal in zip(features, (4, 8, 16, 32, 32), strict=True):
            step = min(nominal, stride)
            assert features[tap].shape == (2, body.dims[tap], 96 // step, 64 // step)

    @pytest.mark.parametrize("name", NAMES)
    def test_last_is_what_the_classifier_would_pool(self, name):
        body, images = backbone(name).eval(), torch.randn(1, 3, 61, 47)
        with torch.no_grad():
            assert torch.allclose(body(images)["last"], body.body.forward_features(images), atol=1e-5)

    @pytest.mark.parametrize("size", [(32, 32), (33, 65), (1, 1), (7, 100)])
    def test_images_of_any_size(self, size):
        with torch.no_grad():
            last = backbone().eval()(torch.randn(1, 3, *size))["last"]
        assert last.shape[2:] == (-(-size[0] // 16), -(-size[1] // 16))

    def test_every_part_gets_a_gradient(self):
        body = backbone()
        features = body(torch.randn(2, 3, 64, 64))
        sum(x.square().mean() for x in features.values()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in body.parameters())

    def test_is_marked_as_the_trunk(self):
        assert backbone().trunk is True


class TestNorms:
    def states(self, body):
        norms = [m for m in body.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        before = [m.running_mean.clone() for m in norms]
        body.train()(torch.randn(2, 3, 64, 64) + 3)
        moved = [not torch.equal(m.running_mean, old) for m, old in zip(norms, before, strict=True)]
        trained = [p.requires_grad for m in norms for p in m.parameters()]
        assert len(set(moved)) == len(set(trained)) == 1
        return moved[0], trained[0]

    @pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
    @pytest.mark.parametrize(("freeze", "moves"), [(None, True), (True, False), (False, True)])
    def test_from_scratch(self, name, freeze, moves):
        assert self.states(backbone(name, freeze_norm=freeze)) == (moves, moves)

    @pytest.mark.parametrize(("freeze", "moves"), [(None, False), (True, False), (False, True)])
    def test_with_weights(self, tmp_path, freeze, moves):
        path = tmp_path / "w.safetensors"
        save_file(timm.create_model("test_resnet").state_dict(), path)
        assert self.states(backbone(weights=str(path), freeze_norm=freeze)) == (moves, moves)

    def test_the_rest_is_trained(self):
        body = backbone(freeze_norm=True)
        assert body.training
        convolutions = [m for m in body.modules() if isinstance(m, nn.Conv2d)]
        assert all(m.training and m.weight.requires_grad for m in convolutions)

    def test_measuring_leaves_no_trace(self):
        assert backbone().training
        assert all(
            m.running_mean.eq(0).all() and m.num_batches_tracked == 0
            for m in backbone().modules()
            if isinstance(m, nn.BatchNorm2d)
        )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return timm.create_model("test_resnet")  # with its classifier


class TestWeightsFiles:
    def holds(self, body, model):
        wanted = model.state_dict()
        return all(torch.equal(x, wanted[name]) for name, x in body.body.state_dict().items())

    def test_safetensors(self, tmp_path, model):
        save_file(model.state_dict(), tmp_path / "w.safetensors")
        assert self.holds(backbone(weights=str(tmp_path / "w.safetensors"), output_stride=8), model)

    def test_pth(self, tmp_path, model):
        torch.save(model.state_dict(), tmp_path / "w.pth")
        assert self.holds(backbone(weights=str(tmp_path / "w.pth")), model)

    def test_pth_with_a_state_dict_and_other_plain_values(self, tmp_path, model):
        state = {"state_dict": model.state_dict() | {"epoch": 3}, "arch": "test_resnet", "best": 0.7}
        torch.save(state, tmp_path / "w.pth.tar")
        assert self.holds(backbone(weights=str(tmp_path / "w.pth.tar")), model)

    def test_counters_of_the_norms_may_be_missing(self, tmp_path, model):
        state = {name: x for name, x in model.state_dict().items() if not name.endswith("num_batches_tracked")}
        torch.save(state, tmp_path / "w.pth")
        assert self.holds(backbone(weights=str(tmp_path / "w.pth")), model)

    def test_no_file(self, tmp_path):
        path = tmp_path / "w.pth"
        assert fault(weights=str(path)) == (
            f'backbone.weights: no file {path}; give an existing file, "hub", or null (from scratch)'
        )
        assert f"no file {tmp_path};" in fault(weights=str(tmp_path))

    @pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02garbage", b"\x00" * 100])
    def test_a_file_of_something_else(self, tmp_path, name, content):
        path = tmp_path / name
        path.write_bytes(content)
        assert fault(weights=str(path)).startswith(f"backbone.weights: {path} is broken or holds more than tensors")

    @pytest.mark.parametrize("value", [torch.zeros(3), [torch.zeros(3)], {"state_dict": [1, 2]}, 5])
    def test_tensors_without_names(self, tmp_path, value):
        path = tmp_path / "w.pth"
        torch.save(value, path)
        assert fault(weights=str(path)).startswith(f"backbone.weights: {path} is broken or holds more than tensors")

    @pytest.mark.parametrize("legacy", [False, True])
    def test_a_pickled_object_is_refused_and_not_run(self, tmp_path, legacy):
        path, trace = tmp_path / "w.pth", tmp_path / "trace"

        class Evil:
            def __reduce__(self):
                return (open, (str(trace), "w"))

        if legacy:
            path.write_bytes(pickle.dumps({"x": Evil()}, protocol=2))
        else:
            torch.save({"x": Evil()}, path)
        message = fault(weights=str(path))
        assert "holds more than tensors, it is not loaded (UnpicklingError)" in message
        assert message.endswith("save the model's state_dict as .safetensors")
        assert not trace.exists()

    def test_another_architecture(self, tmp_path):
        path = tmp_path / "w.safetensors"
        save_file(timm.create_model("test_convnext").state_dict(), path)
        message = fault(weights=str(path))
        assert message.startswith(f"backbone.weights: {path} does not fit ResNet: ")
        assert message.endswith("the first is conv1.0.weight; is it of another model?")

    def test_another_width(self, tmp_path, model):
        state = model.state_dict()
        state["layer1.0.conv1.weight"] = torch.zeros(5, 5)
        torch.save(state, tmp_path / "w.pth")
        assert "1 of " in fault(weights=str(tmp_path / "w.pth"))
        assert "the first is layer1.0.conv1.weight" in fault(weights=str(tmp_path / "w.pth"))


class TestHub:
    def test_offline(self, monkeypatch):
        def offline(*_, **__):
            raise OSError("a\nlong\nstory")

        monkeypatch.setattr(timm.models, "load_pretrained", offline)
        message = fault(weights="hub")
        assert message.startswith(
            "backbone.weights: cannot download the weights of test_resnet (OSError); get model.saf"
        )
        assert "https://huggingface.co/timm/test_resnet.r160_in1k" in message
        assert message.endswith("or set weights to null")

    def test_is_the_default_and_freezes_the_norms(self, monkeypatch):
        monkeypatch.setattr(
            timm.models, "load_pretrained", lambda model, num_classes: model.conv1[0].weight.data.fill_(7)
        )
        body = TimmCNN(BackboneSettings(name="test_resnet"))
        assert body.body.conv1[0].weight.eq(7).all()
        assert body.freeze_norm

    def test_a_model_without_weights(self, monkeypatch):
        model = timm.create_model("test_resnet", output_stride=16)
        model.pretrained_cfg = {"url": "", "hf_hub_id": None}
        monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
        monkeypatch.setattr(timm.models, "load_pretrained", lambda *_, **__: pytest.fail("there is nothing to load"))
        assert fault(weights="hub") == (
            "backbone.weights: timm has no weights for test_resnet; use null (from scratch) or a file"
        )


class TestModels:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("resnet5O", "backbone.name: timm has no model 'resnet5O'; did you mean resnet50?"),
            ("zzz", "backbone.name: timm has no model 'zzz'; see `timm.list_models()`"),
            ("", "backbone.name: timm has no model ''; see `timm.list_models()`"),
            (
                "test_resnet.r1",
                "backbone.name: Invalid pretrained tag (r1) for test_resnet. See `timm.list_pretrained()`",
            ),
        ],
    )
    def test_an_unknown_name(self, name, message):
        assert fault(name) == message

    def test_a_tag_is_part_of_a_name(self):
        assert backbone("test_resnet.r160_in1k").dims == backbone().dims

    @pytest.mark.parametrize("name", ["test_vit", "test_mambaout"])
    def test_a_stride_that_is_not_available(self, name):
        assert fault(name, output_stride=8) == (
            f"backbone: {name} cannot be built with output stride 8; set output_stride: 32 or take another model"
        )

    def test_stages_that_are_none(self):
        assert fault("test_vit", output_stride=32) == (
            "backbone: the last stages of test_vit have strides [16, 16, 16, 16], needed are [4, 8, 16, 32]; "
            "take a ResNet, a ConvNeXt or an EfficientNet"
        )

    def test_images_of_one_size_only(self):
        message = fault("test_maxvit", output_stride=32)
        assert message.startswith("backbone.name: test_maxvit cannot look at images of any size (")
        assert message.endswith("take a ResNet, a ConvNeXt or an EfficientNet")

    def test_a_layout_of_its_own(self):
        assert "test_mambaout lays out its last features in a way of its own" in fault(
            "test_mambaout", output_stride=32
        )
