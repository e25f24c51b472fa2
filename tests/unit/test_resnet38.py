"""ResNet38: size, names, strides and values against the formulas, what is frozen, and weights from an MXNet file."""

import hashlib
import json
import re

import pytest
import torch
import torch.nn.functional as F
from mxnet_file import file_of
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import BatchNorm2d
from typer.testing import CliRunner

from tag2mask import schema
from tag2mask.backbones import PUBLISHED, BackboneSettings, ResNet38, build_backbone, convert_weights, resnet38, weights
from tag2mask.baselines import SEAM
from tag2mask.cli import app
from tag2mask.core import Batch, Objective, Progress
from tag2mask.engine.training import Training, make_optimizer
from tag2mask.errors import UserError
from tag2mask.methods import METHODS

PUBLISHED_FILE = "ilsvrc-cls_rna-a1_cls1000_ep-0001.params"


def settings(**given):
    return BackboneSettings(**({"name": "resnet38", "weights": None, "output_stride": 8} | given))


@pytest.fixture
def tiny(monkeypatch):
    """All widths divided by 4, no dropout: the same network otherwise.

    Not by more: oneDNN writes past its memory in the gradient of a strided 1x1 convolution of 8 channels or fewer.
    """
    stages = {
        name: s._replace(channels=s.channels // 4, middle=s.middle // 4, out=s.out // 4)
        for name, s in resnet38.STAGES.items()
    }
    wides = {
        name: w._replace(channels=w.channels // 4, out=w.out // 4, dropout=0.0) for name, w in resnet38.WIDES.items()
    }
    monkeypatch.setattr(resnet38, "STAGES", stages)
    monkeypatch.setattr(resnet38, "WIDES", wides)


def shaken(net, seed=0):
    """The network with norms that do something, in evaluation mode."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in (m for m in net.modules() if isinstance(m, BatchNorm2d)):
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=draw) + 0.5)
            norm.running_var.copy_(torch.rand(norm.weight.shape, generator=draw) + 0.5)
            norm.bias.copy_(torch.randn(norm.weight.shape, generator=draw) / 4)
            norm.running_mean.copy_(torch.randn(norm.weight.shape, generator=draw) / 4)
    return net.eval()


def oracle(state, images):
    """The network from its description alone, by the names of the published weights."""

    def norm_relu(name, x):
        p = {key: state[f"{name}.{key}"][:, None, None] for key in ("weight", "bias", "running_mean", "running_var")}
        return ((x - p["running_mean"]) / (p["running_var"] + 1e-5).sqrt() * p["weight"] + p["bias"]).clamp(min=0)

    def conv(name, x, stride=1, dilation=1):
        kernel = state[f"{name}.weight"]
        return F.conv2d(x, kernel, stride=stride, dilation=dilation, padding=dilation * (kernel.shape[2] // 2))

    def plain(name, x, stride=1, first=1, dilation=1):
        a = norm_relu(f"{name}.bn_branch2a", x)
        y = conv(f"{name}.conv_branch2a", a, stride, first)
        y = conv(f"{name}.conv_branch2b1", norm_relu(f"{name}.bn_branch2b1", y), 1, dilation)
        shortcut = conv(f"{name}.conv_branch1", a, stride) if f"{name}.conv_branch1.weight" in state else x
        return shortcut + y, a

    def wide(name, x):
        a = norm_relu(f"{name}.bn_branch2a", x)
        y = norm_relu(f"{name}.bn_branch2b1", conv(f"{name}.conv_branch2a", a))
        y = norm_relu(f"{name}.bn_branch2b2", conv(f"{name}.conv_branch2b1", y, 1, 4))
        return conv(f"{name}.conv_branch1", a) + conv(f"{name}.conv_branch2b2", y), a

    x = conv("conv1a", images)
    for name in ("b2", "b2_1", "b2_2"):
        x, _ = plain(name, x, stride=2 if name == "b2" else 1)
    x, c2 = plain("b3", x, stride=2)
    for name in ("b3_1", "b3_2"):
        x, _ = plain(name, x)
    x, c3 = plain("b4", x, stride=2)
    for name in ("b4_1", "b4_2", "b4_3", "b4_4", "b4_5"):
        x, _ = plain(name, x)
    x, conv4 = plain("b5", x, first=1, dilation=2)
    for name in ("b5_1", "b5_2"):
        x, _ = plain(name, x, first=2, dilation=2)
    x, conv5 = wide("b6", x)
    x, _ = wide("b7", x)
    return {"c2": c2, "c3": c3, "c4": conv4, "c5": conv5, "last": norm_relu("bn7", x)}


def expected_names():
    """The state-dict names of the published weights, written out."""
    norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1a.weight", *(f"bn7.{end}" for end in norms)]
    plain = ["b2", "b2_1", "b2_2", "b3", "b3_1", "b3_2", "b4", *(f"b4_{i}" for i in range(1, 6)), "b5", "b5_1", "b5_2"]
    for block in (*plain, "b6", "b7"):
        parts = ["2a", "2b1"] + ["2b2"] * (block in ("b6", "b7"))
        names += [f"{block}.conv_branch{part}.weight" for part in parts]
        names += [f"{block}.bn_branch{part}.{end}" for part in parts for end in norms]
        if block in ("b2", "b3", "b4", "b5", "b6", "b7"):
            names.append(f"{block}.conv_branch1.weight")
    return names


class TestFullSize:
    def test_parameters_names_and_shapes(self):
        with torch.device("meta"):
            net = ResNet38(settings())
        assert sum(p.numel() for p in net.parameters()) == 105_070_912
        state = net.state_dict()
        assert sorted(state) == sorted(expected_names())
        assert net.dims == {"c2": 128, "c3": 256, "c4": 512, "c5": 1024, "last": 4096}
        shapes = {
            "conv1a": (64, 3, 3, 3), "b2.conv_branch2a": (128, 64, 3, 3), "b4_5.conv_branch2b1": (512, 512, 3, 3),
            "b5.conv_branch2b1": (1024, 512, 3, 3), "b5_2.conv_branch2a": (512, 1024, 3, 3),
            "b6.conv_branch2a": (512, 1024, 1, 1), "b6.conv_branch2b1": (1024, 512, 3, 3),
            "b7.conv_branch2b2": (4096, 2048, 1, 1), "b7.conv_branch1": (4096, 2048, 1, 1),
        }  # fmt: skip
        assert all(state[f"{name}.weight"].shape == shape for name, shape in shapes.items())
        assert (net.b6.dropout.p, net.b7.dropout.p) == (0.3, 0.5)
        assert isinstance(net.b6.dropout, nn.Dropout2d)

    def test_an_image_of_448_pixels(self):
        net = build_backbone(settings()).eval()
        with torch.no_grad():
            features = net(torch.randn(1, 3, 448, 448))
        sides = {"c2": 224, "c3": 112, "c4": 56, "c5": 56, "last": 56}
        assert {tap: x.shape for tap, x in features.items()} == {
            tap: (1, net.dims[tap], side, side) for tap, side in sides.items()
        }
        assert all(torch.isfinite(x).all() and x.min() >= 0 for x in features.values())


class TestValues:
    @pytest.mark.parametrize("frozen", [False, True])  # a frozen norm is computed in another way
    def test_against_the_description(self, tiny, frozen):
        net = shaken(build_backbone(settings(freeze_norm=frozen))).double()
        state = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in net.state_dict().items()}
        images = torch.randn(2, 3, 37, 26, dtype=torch.float64)
        found, wanted = net(images), oracle(state, images)
        assert list(found) == list(wanted) == ["c2", "c3", "c4", "c5", "last"]
        for tap, x in wanted.items():
            assert x.shape[1] == net.dims[tap]
            torch.testing.assert_close(found[tap], x, rtol=1e-9, atol=1e-9)
        weights = {tap: torch.randn_like(x) for tap, x in wanted.items()}
        sum((found[tap] * w).sum() for tap, w in weights.items()).backward()
        sum((wanted[tap] * w).sum() for tap, w in weights.items()).backward()
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-7, atol=1e-9)
        assert {name for name, p in net.named_parameters() if not p.requires_grad} == {
            name for name, _ in net.named_parameters() if frozen and "bn" in name
        }

    @pytest.mark.parametrize(("side", "cells"), [(448, 56), (128, 16), (134, 17), (1, 1), (9, 2)])
    def test_size_at_stride_8_rounds_up(self, tiny, side, cells):
        net = build_backbone(settings()).eval()
        with torch.no_grad():
            assert net(torch.randn(1, 3, side, 8))["last"].shape[2:] == (cells, 1)

    def test_bfloat16_stays_bfloat16(self, tiny):
        net = shaken(build_backbone(settings(freeze_norm=True)))
        images = torch.randn(1, 3, 32, 32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = net(images)
        assert {x.dtype for x in half.values()} == {torch.bfloat16}
        full = net(images)
        for tap, x in half.items():
            torch.testing.assert_close(x.float(), full[tap], rtol=0.05, atol=0.05 * full[tap].max().item())

    def test_a_frozen_norm_keeps_its_output_alone_for_the_gradient(self):
        def kept(frozen):
            norm = nn.BatchNorm2d(4).requires_grad_(not frozen).eval()
            seen = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
                out = resnet38.activate(norm, torch.randn(2, 4, 5, 5, requires_grad=True))
            places = {x.untyped_storage().data_ptr() for x in seen if x.ndim == 4}
            return len(places), out.untyped_storage().data_ptr() in places

        assert kept(frozen=True) == (1, True)  # which is the input of the next convolution, and kept anyway
        assert kept(frozen=False) == (2, True)

    def test_dropout_takes_whole_channels_in_training_alone(self, tiny, monkeypatch):
        monkeypatch.setattr(resnet38, "WIDES", {k: w._replace(dropout=0.5) for k, w in resnet38.WIDES.items()})
        net, images = shaken(build_backbone(settings(freeze_norm=True))), torch.randn(1, 3, 32, 32)
        seen = []
        net.b7.conv_branch2b2.register_forward_hook(lambda m, args, out: seen.append(args[0]))
        assert torch.equal(net(images)["last"], net(images)["last"])
        net.train()
        assert not torch.equal(net(images)["last"], net(images)["last"])
        off = (seen[-1] == 0).all(dim=(2, 3)).sum() - (seen[0] == 0).all(dim=(2, 3)).sum()
        assert 0 < off < seen[0].shape[1]


class TestFrozen:
    def file(self, tmp_path):
        path = tmp_path / "w.safetensors"
        state = shaken(build_backbone(settings())).state_dict()
        save_file({name: x.contiguous() for name, x in state.items()}, path)
        return str(path)

    def frozen(self, net):
        return {name for name, p in net.named_parameters() if not p.requires_grad}

    def test_with_weights_the_stem_and_all_norms(self, tiny, tmp_path):
        net = build_backbone(settings(weights=self.file(tmp_path))).train()
        names = [name for name, _ in net.named_parameters()]
        assert self.frozen(net) == {
            name for name in names if "bn" in name or re.match(r"(conv1a|b2|b2_1|b2_2)\.", name)
        }
        before = {name: x.clone() for name, x in net.state_dict().items()}
        features = net(torch.randn(3, 3, 48, 48) + 2)
        assert not features["c2"].requires_grad and features["c3"].requires_grad
        features["last"].square().mean().backward()
        assert {name for name, p in net.named_parameters() if p.grad is None} == self.frozen(net)
        assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())

    def test_from_scratch_nothing(self, tiny):
        net = build_backbone(settings()).train()
        before = net.bn7.running_mean.clone()
        net(torch.randn(2, 3, 16, 16))
        assert self.frozen(net) == set() and not torch.equal(net.bn7.running_mean, before)

    @pytest.mark.parametrize(
        ("level", "parts"),
        [
            ("nothing", ()), ("c1", ("conv1a",)), ("c2", ("conv1a", "b2")), ("c3", ("conv1a", "b2", "b3")),
            ("c4", ("conv1a", "b2", "b3", "b4")), ("c5", ("conv1a", "b2", "b3", "b4", "b5")),
        ],
    )  # fmt: skip
    def test_up_to_a_level(self, tiny, level, parts):
        net = build_backbone(settings(freeze=level, freeze_norm=False)).train()
        assert self.frozen(net) == {name for name, _ in net.named_parameters() if name.startswith(parts) and parts}
        still = {name for name, m in net.named_modules() if isinstance(m, BatchNorm2d) and not m.training}
        assert {name.split(".")[0].split("_")[0] for name in still} == set(parts) - {"conv1a"}

    def test_statistics_or_affine_alone(self, tiny):
        half = build_backbone(settings(freeze_norm="statistics")).train()
        assert not half.bn7.training and half.bn7.weight.requires_grad
        half = build_backbone(settings(freeze_norm="affine")).train()
        assert half.bn7.training and not half.bn7.weight.requires_grad

    def test_is_the_trunk_of_the_optimiser(self, tiny):
        net = nn.ModuleDict({"backbone": build_backbone(settings()), "head": nn.Conv2d(2, 2, 1)})
        groups = make_optimizer(net, Training(steps=1, lr_new=10, lr_bias=2)).param_groups
        factors = {id(p): group["factor"] for group in groups for p in group["params"]}
        assert factors[id(net["backbone"].conv1a.weight)] == 1
        assert factors[id(net["head"].weight)] == 10


def mxnet_name(name):
    """Of a state-dict name, by the rules of the file: block b4 is 4a, b4_5 is 4b5."""
    block, _, rest = name.partition(".")
    if block == "conv1a":
        return "arg:conv1a_weight"
    end = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}
    kind = "aux" if "running" in name else "arg"
    if block == "bn7":
        return f"{kind}:bn7_{end[rest]}"
    level, _, number = block[1:].partition("_")
    unit = f"{level}b{number}" if number else f"{level}a"
    layer, last = rest.split(".")
    if layer.startswith("conv_"):
        return f"arg:res{unit}_{layer.removeprefix('conv_')}_weight"
    return f"{kind}:bn{unit}_{layer.removeprefix('bn_')}_{end[last]}"


class TestWeights:
    @pytest.fixture
    def published(self, tiny):
        torch.manual_seed(5)
        return shaken(build_backbone(settings()), seed=5)

    def mxnet_file(self, net, path, version=0):
        arrays = {mxnet_name(name): x.numpy() for name, x in net.state_dict().items() if "num_batches" not in name} | {
            "arg:linear1000_weight": torch.randn(7, 3).numpy(),
            "arg:linear1000_bias": torch.randn(7).numpy(),
        }
        path.write_bytes(file_of(arrays, version))

    def test_names(self):
        assert mxnet_name("b4_5.conv_branch2a.weight") == "arg:res4b5_branch2a_weight"
        assert mxnet_name("b7.bn_branch2b1.running_var") == "aux:bn7a_branch2b1_moving_var"
        names = [name for name in expected_names() if "num_batches" not in name]
        found = resnet38.torch_names({mxnet_name(name).split(":")[1]: torch.zeros(i) for i, name in enumerate(names)})
        assert {name: len(x) for name, x in found.items()} == {name: i for i, name in enumerate(names)}

    @pytest.mark.parametrize("version", [0, 1, 2])
    def test_an_mxnet_file_is_read_and_converted(self, published, tmp_path, version):
        self.mxnet_file(published, tmp_path / "a.params", version)
        count = convert_weights(tmp_path / "a.params", tmp_path / "new/a.safetensors")
        assert count == len(load_file(tmp_path / "new/a.safetensors")) == 228 - 37  # without the norms' counters
        for file in ("a.params", "new/a.safetensors"):
            net = build_backbone(settings(weights=str(tmp_path / file)))
            wanted = published.state_dict()
            assert all(torch.equal(x, wanted[name]) for name, x in net.state_dict().items())

    def test_a_checkpoint_with_a_head(self, published, tmp_path):
        torch.save(published.state_dict() | {"fc8.weight": torch.zeros(20, 4, 1, 1)}, tmp_path / "seam.pth")
        net = build_backbone(settings(weights=str(tmp_path / "seam.pth")))
        assert torch.equal(net.conv1a.weight, published.conv1a.weight)
        assert convert_weights(tmp_path / "seam.pth", tmp_path / "seam.safetensors") == 229

    def fault(self, **given):
        with pytest.raises(UserError) as caught:
            build_backbone(settings(**given))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_where_to_get_them(self, tiny, tmp_path):
        at = PUBLISHED[0].url
        message = self.fault(weights=f"weights/{PUBLISHED_FILE}")
        assert message.startswith(f"backbone.weights: no file weights/{PUBLISHED_FILE}; get it from {at} (Apache")
        assert message.endswith("and put it there")
        message = self.fault(weights=str(tmp_path / "mine.safetensors"))
        assert "no file" in message and f"{PUBLISHED_FILE} is at {at}" in message
        message = self.fault(weights="hub")
        assert message.startswith("backbone.weights: resnet38 is on no hub; ") and at in message

    def test_a_damaged_or_another_file(self, published, tmp_path):
        path = tmp_path / "a.params"
        self.mxnet_file(published, path)
        content = path.read_bytes()
        path.write_bytes(content[:5000])
        assert self.fault(weights=str(path)).endswith("is no MXNet file of arrays, or a damaged one: it is cut short")
        path.write_bytes(file_of({"arg:fc_weight": torch.zeros(2).numpy()}))
        message = self.fault(weights=str(path))
        assert "does not fit ResNet38: 191 of 228 tensors" in message and "the first is conv1a.weight" in message

    def test_the_checksum_of_a_published_file_is_looked_at(self, published, tmp_path, monkeypatch):
        path = tmp_path / PUBLISHED_FILE
        self.mxnet_file(published, path)
        message = self.fault(weights=str(path))
        assert (
            f"its md5 is {hashlib.md5(path.read_bytes()).hexdigest()}, not ff21f45d6bf03284100dcbec571edfad" in message
        )
        assert PUBLISHED[0].url in message
        right = weights.Published(
            PUBLISHED_FILE, "resnet38", "url", f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}", ""
        )
        monkeypatch.setattr(weights, "PUBLISHED", (right,))
        assert torch.equal(build_backbone(settings(weights=str(path))).bn7.bias, published.bn7.bias)

    def test_the_result_of_a_conversion_is_safetensors(self, published, tmp_path):
        self.mxnet_file(published, tmp_path / "a.params")
        with pytest.raises(UserError, match=r"b\.pth: the result is a \.safetensors file"):
            convert_weights(tmp_path / "a.params", tmp_path / "b.pth")
        with pytest.raises(UserError, match=r"none\.params: no such file$"):
            convert_weights(tmp_path / "none.params", tmp_path / "b.safetensors")
        with pytest.raises(UserError, match="no such file; get it from https"):
            convert_weights(tmp_path / PUBLISHED_FILE, tmp_path / "b.safetensors")

    @pytest.mark.parametrize("given", [{"output_stride": 16}, {"dilate": False}])
    def test_another_stride(self, given):
        assert self.fault(**given) == (
            "backbone: resnet38 is made for stride 8; set output_stride: 8 and leave dilate out"
        )


class TestWithMethods:
    @pytest.mark.parametrize("method", ["ppc", "hsc", "rcm_mam"])
    def test_a_step_of_seam_with_a_method(self, tiny, method):
        torch.manual_seed(0)
        part = METHODS[method]
        net = SEAM(3, backbone=settings(freeze="c2", freeze_norm=True), size=32)
        objective = Objective(net, {method: schema.make(part, schema.check(part, {}, method))}, num_classes=3).train()
        assert net.pcm.reduce["c4"].in_channels == 128 and net.pcm.reduce["c5"].in_channels == 256
        tags = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
        batch = Batch(torch.randn(2, 3, 64, 64), tags, torch.arange(2), torch.ones(2, 1, 64, 64))
        objective.on_epoch_start(0)
        losses = objective(batch, Progress(7.0, 0.5, seed=1))
        assert all(torch.isfinite(loss) for loss in losses.values())
        torch.stack(list(losses.values())).sum().backward()
        got = {name for name, p in net.backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert got == {name for name, p in net.backbone.named_parameters() if p.requires_grad}
        assert got and not any(name.startswith(("conv1a", "b2")) for name in got)
        objective.after_step()


class TestCommands:
    def run(self, *words):
        return CliRunner().invoke(app, ["weights", *map(str, words)])

    def test_the_table(self):
        done = self.run("ls", "--json")
        assert done.exit_code == 0 and [row["file"] for row in json.loads(done.stdout)] == [p.file for p in PUBLISHED]
        plain = self.run("ls").stdout
        assert all(p.file in plain and p.url in plain and p.checksum in plain for p in PUBLISHED)

    def test_a_conversion(self, tmp_path):
        (tmp_path / "a.params").write_bytes(file_of({"arg:conv1a_weight": torch.ones(2, 3, 3, 3).numpy()}))
        done = self.run("convert", tmp_path / "a.params", tmp_path / "a.safetensors")
        assert done.exit_code == 0 and done.stdout == f"1 tensors in {tmp_path / 'a.safetensors'}\n"
        assert load_file(tmp_path / "a.safetensors")["conv1a.weight"].eq(1).all()
