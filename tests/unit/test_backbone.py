"""timm CNNs as backbones: taps, strides, frozen norms, weights, and what is said when something does not fit."""

import pickle

import pytest
import timm
import timm.models
import torch
from safetensors.torch import save_file
from torch import nn

from tag2mask.backbones import PUBLISHED, VGG16, BackboneSettings, TimmCNN, build_backbone
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


def frozen(body):
    return {name for name, p in body.named_parameters() if not p.requires_grad}


PARTS = {"c1": ("conv1", "bn1"), "c2": ("layer1",), "c3": ("layer2",), "c4": ("layer3",), "c5": ("layer4",)}


class TestFreeze:
    @pytest.mark.parametrize("level", ["nothing", "c1", "c2", "c3", "c4", "c5"])
    def test_everything_up_to_a_level_and_nothing_behind_it(self, level):
        body = backbone(freeze=level, freeze_norm=False).train()
        levels = list(PARTS)[: 0 if level == "nothing" else int(level[1])]
        parts = tuple(f"body.{part}." for name in levels for part in PARTS[name])
        names = [name for name, _ in body.named_parameters()]
        assert frozen(body) == {name for name in names if name.startswith(parts)}
        still = {name for name, m in body.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.training}
        norms = {name for name, m in body.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert still == {name for name in norms if f"{name}.".startswith(parts)}

    def test_no_gradient_goes_further_down_and_statistics_do_not_move(self):
        """As in the networks of the IRN family, where the output of layer2 is detached."""
        body = backbone(freeze="c3", freeze_norm="statistics").train()
        before = {name: x.clone() for name, x in body.named_buffers()}
        features = body(torch.randn(2, 3, 64, 64) + 3)
        assert [tap for tap, x in features.items() if not x.requires_grad] == ["c2", "c3"]
        features["last"].square().mean().backward()
        reached = {name for name, p in body.named_parameters() if p.grad is not None}
        assert reached == {name for name, _ in body.named_parameters() if "layer3" in name or "layer4" in name}
        assert any("bn" in name for name in reached)
        assert all(torch.equal(x, before[name]) for name, x in body.named_buffers())

    @pytest.mark.parametrize("name", NAMES)
    def test_of_other_models(self, name):
        body = backbone(name, freeze="c3").eval()
        features = body(torch.randn(1, 3, 64, 64))
        assert [features[tap].requires_grad for tap in ("c2", "c3", "c4")] == [False, False, True]
        assert frozen(body)

    def test_finding_out_leaves_no_trace(self):
        body = backbone(freeze="c2")
        assert body.training and all(p.grad is None for p in body.parameters())
        assert all(x.eq(0).all() for name, x in body.named_buffers() if "running_mean" in name)

    def test_a_model_without_a_stem_of_its_own(self):
        assert fault("test_convnext", freeze="c1") == (
            "backbone.freeze: this model has no level c1 of its own; take a later one or leave it out"
        )

    def test_affine_alone(self):
        body = backbone(freeze_norm="affine").train()
        norms = {name: m for name, m in body.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert all(m.training for m in norms.values())
        assert frozen(body) == {f"{name}.{end}" for name in norms for end in ("weight", "bias")}

    def test_survives_the_exchange_of_norms(self):
        """Data-parallel training on GPUs puts a SyncBatchNorm in the place of every batch norm."""
        from timm.layers import convert_sync_batchnorm

        body = convert_sync_batchnorm(backbone(freeze="c2", freeze_norm="statistics")).train()
        norms = [m for m in body.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert norms and not any(m.training for m in norms)


class TestDilation:
    def layers(self, **settings):
        body = backbone("resnet50", **settings)
        return {name: getattr(body.body, name) for name in ("layer1", "layer2", "layer3", "layer4")}

    def test_resnet50_of_the_irn_family(self):
        """Strides 2, 2, 2, 1 after the stem's 2, and no dilation."""
        layers = self.layers(output_stride=16, dilate=False)
        assert [layers[name][0].conv2.stride[0] for name in layers] == [1, 2, 2, 1]
        convolutions = [m for layer in layers.values() for m in layer.modules() if isinstance(m, nn.Conv2d)]
        assert all(m.dilation == (1, 1) and m.padding[0] == m.kernel_size[0] // 2 for m in convolutions)

    def test_is_the_default_and_keeps_sizes(self):
        plain, dilated = (backbone(output_stride=8, **given).eval() for given in ({"dilate": False}, {}))
        for norm in (m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.ones_(norm.weight)  # timm starts residual branches at zero
        dilated.load_state_dict(plain.state_dict())
        images = torch.randn(1, 3, 61, 47)
        with torch.no_grad():
            one, two = plain(images), dilated(images)
        assert {tap: x.shape for tap, x in one.items()} == {tap: x.shape for tap, x in two.items()}
        assert torch.equal(one["c3"], two["c3"]) and not torch.allclose(one["last"], two["last"])

    @pytest.mark.parametrize(("name", "stem"), [("resnet101", (64, 3, 7, 7)), ("resnet101s", (64, 3, 3, 3))])
    def test_resnet101_of_the_segmenters(self, name, stem):
        with torch.device("meta"):
            body = timm.create_model(name, num_classes=0, global_pool="", output_stride=8)
        state = body.state_dict()
        first = "conv1.weight" if name == "resnet101" else "conv1.0.weight"
        assert state[first].shape == stem and "fc.weight" not in state
        assert ("conv1.6.weight" in state) == (name == "resnet101s")
        blocks = [[block.conv2.dilation[0] for block in getattr(body, f"layer{i}")] for i in (1, 2, 3, 4)]
        assert blocks == [[1] * 3, [1] * 4, [1] + [2] * 22, [2, 4, 4]]
        assert [getattr(body, f"layer{i}")[0].conv2.stride[0] for i in (1, 2, 3, 4)] == [1, 2, 1, 1]


class TestVGG16:
    SETTINGS = BackboneSettings(name="vgg16", weights=None, output_stride=8)

    def test_layers(self):
        net = build_backbone(self.SETTINGS)
        assert isinstance(net, VGG16) and net.trunk is True
        assert sum(p.numel() for p in net.parameters()) == 14_714_688
        published = {name: x.shape for name, x in timm_state("vgg16").items() if name.startswith("features.")}
        assert {name: x.shape for name, x in net.state_dict().items()} == published
        convolutions = [m for m in net.features if isinstance(m, nn.Conv2d)]
        assert [m.dilation[0] for m in convolutions] == [1] * 10 + [2] * 3
        pools = [(m.kernel_size, m.stride, m.padding) for m in net.features if isinstance(m, nn.MaxPool2d)]
        assert pools == [(2, 2, 0)] * 3 + [(3, 1, 1)]

    @pytest.mark.parametrize(("side", "cells"), [(368, 46), (16, 2), (9, 2), (1, 1)])
    def test_taps(self, side, cells):
        net = build_backbone(self.SETTINGS).eval()
        with torch.no_grad():
            features = net(torch.randn(1, 3, side, 8))
        assert {tap: x.shape[1] for tap, x in features.items()} == net.dims
        assert net.dims == {"c2": 128, "c3": 256, "c4": 512, "c5": 512, "last": 512}
        sides = {tap: x.shape[2] for tap, x in features.items()}
        assert (sides["c2"], sides["c3"]) == (-(-side // 2), -(-side // 4))
        assert sides["c4"] == sides["c5"] == sides["last"] == cells
        assert features["last"].min() >= 0

    def test_values_are_those_of_timm_up_to_the_fourth_pooling(self):
        net, images = build_backbone(self.SETTINGS).eval(), torch.randn(1, 3, 32, 48)
        with torch.device("meta"):
            rival = timm.create_model("vgg16", num_classes=0, global_pool="").features
        rival = rival.to_empty(device="cpu").eval()
        rival.load_state_dict(net.features.state_dict())
        with torch.no_grad():
            features = net(images)
            torch.testing.assert_close(features["c4"], rival[:23](images), rtol=1e-4, atol=1e-5)
            x = nn.functional.max_pool2d(features["c4"], 3, 1, 1)
            for index in (24, 26, 28):
                weight, bias = rival[index].weight, rival[index].bias
                x = nn.functional.conv2d(x, weight, bias, padding=2, dilation=2).relu()
            torch.testing.assert_close(features["last"], x, rtol=1e-4, atol=1e-5)

    def test_what_is_frozen(self):
        net = build_backbone(self.SETTINGS)
        assert frozen(net) == set()
        net(torch.randn(1, 3, 16, 16))["last"].square().mean().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
        half = build_backbone(BackboneSettings(name="vgg16", weights=None, output_stride=8, freeze="c2"))
        assert frozen(half) == {f"features.{i}.{end}" for i in (0, 2, 5, 7) for end in ("weight", "bias")}

    def test_weights(self, tmp_path, monkeypatch):
        published = build_backbone(self.SETTINGS).state_dict()
        torch.save(published | {"classifier.0.weight": torch.zeros(2)}, tmp_path / "vgg.pth")
        settings = {"name": "vgg16", "output_stride": 8}
        net = build_backbone(BackboneSettings(weights=str(tmp_path / "vgg.pth"), **settings))
        assert torch.equal(net.features[28].bias, published["features.28.bias"])

        def load_pretrained(model, source, *, num_classes, filter_fn):
            assert source["hf_hub_id"] == "timm/vgg16.tv_in1k"
            model.load_state_dict(filter_fn(published | {"pre_logits.fc1.weight": torch.zeros(2)}, model))

        monkeypatch.setattr(timm.models, "load_pretrained", load_pretrained)
        net = build_backbone(BackboneSettings(weights="hub", **settings))
        assert torch.equal(net.features[28].bias, published["features.28.bias"])

        message = fault_of(BackboneSettings(weights=str(tmp_path / "vgg16-397923af.pth"), **settings))
        assert "https://download.pytorch.org/models/vgg16-397923af.pth (BSD-3-Clause" in message
        assert message.endswith("and put it there, or set weights: hub with name: vgg16.tv_in1k")

    def test_at_stride_32_it_is_timms(self):
        with pytest.raises(UserError, match="vgg16 cannot be built with output stride 16"):
            build_backbone(BackboneSettings(name="vgg16", weights=None, output_stride=16))
        assert fault_of(BackboneSettings(name="vgg16", weights=None, output_stride=8, dilate=False)) == (
            "backbone: the dilated vgg16 has stride 8; leave dilate out"
        )


def timm_state(name):
    with torch.device("meta"):
        return timm.create_model(name).state_dict()


def fault_of(settings, **options):
    with pytest.raises(UserError) as caught:
        build_backbone(settings, **options)
    return str(caught.value)


class TestBuild:
    def test_by_name(self):
        assert isinstance(build_backbone(BackboneSettings(name="test_resnet", weights=None)), TimmCNN)
        assert "c1" in build_backbone(BackboneSettings(name="test_resnet", weights=None), stem=True).dims

    def test_what_has_no_stem_of_stride_2(self):
        for name in ("resnet38", "vgg16"):
            settings = BackboneSettings(name=name, weights=None, output_stride=8)
            assert fault_of(settings, stem=True) == (
                f"backbone.name: {name} has no levels of strides 2, 4, 8 and 16; take resnet50"
            )

    @pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: p.file)
    def test_the_table_of_weights(self, published):
        method, digits = published.checksum.split(":")
        assert len(digits) in (8, {"md5": 32, "sha1": 40, "sha256": 64}[method]) and int(digits, 16)
        assert published.url.startswith("https://") and published.licence
        if published.hub:
            cfg = timm.get_pretrained_cfg(published.fits)
            assert cfg.hf_hub_id and (not cfg.url or cfg.url.endswith(published.file))
        else:
            assert published.fits == "resnet38" or timm.is_model(published.fits)
