"""Settings of a training, its optimiser groups and its learning rate."""

import math

import pytest
import torch
from torch import nn

from tag2mask.backbones import BackboneSettings
from tag2mask.baselines import CAM, MCTformer
from tag2mask.engine.training import Training, make_optimizer
from tag2mask.errors import UserError


class TestLength:
    @pytest.mark.parametrize(
        ("training", "images", "steps"),
        [
            ({"steps": 7}, 100, 7),
            ({"epochs": 3, "batch": 16}, 100, 19),
            ({"epochs": 0.5, "batch": 10}, 100, 5),
            ({"epochs": 1, "batch": 16}, 3, 1),
        ],
    )
    def test_steps(self, training, images, steps):
        assert Training(**training).total_steps(images) == steps

    @pytest.mark.parametrize(
        ("faulty", "message"),
        [
            ({}, "give either epochs or steps"),
            ({"steps": 5, "epochs": 1.0}, "give either epochs or steps"),
            ({"steps": 0}, "must be positive"),
            ({"epochs": 0.0}, "must be positive"),
            ({"epochs": -1.0}, "must be positive"),
            ({"epochs": float("inf")}, "must be positive"),
            ({"steps": 5, "batch": 0}, "must be positive"),
            ({"steps": 5, "lr": -0.1}, r"^lr: -0\.1"),
            ({"steps": 5, "lr": float("nan")}, "^lr: nan"),
            ({"steps": 5, "momentum": -1.0}, "^momentum"),
            ({"steps": 5, "weight_decay": -1.0}, "^weight_decay"),
            ({"steps": 5, "clip": -1.0}, "^clip"),
            ({"steps": 5, "seed": -1}, "^seed: -1"),
            ({"steps": 5, "warmup": 1.5}, r"^warmup: 1\.5"),
            ({"steps": 5, "decay_steps": 0}, "^decay_steps: 0 must be positive; null means all steps"),
            ({"steps": 5, "drops": (0.5, 1.0)}, r"^drops: \[0\.5, 1\.0\] are shares of the steps"),
            ({"steps": 5, "nesterov": True, "momentum": 0.0}, "^nesterov: needs optimizer sgd and a momentum"),
            ({"steps": 5, "nesterov": True, "optimizer": "adamw"}, "^nesterov: needs optimizer sgd and a momentum"),
        ],
    )
    def test_faults(self, faulty, message):
        with pytest.raises(UserError, match=message):
            Training(**faulty)


class TestLearningRate:
    def test_polynomial(self):
        training = Training(steps=10, power=0.9)
        for step in range(10):
            assert training.lr_at(step, 10) == pytest.approx((1 - step / 10) ** 0.9)

    def test_power_0_is_constant(self):
        assert {Training(steps=10, power=0.0).lr_at(step, 10) for step in range(10)} == {1.0}

    def test_warmup_rises_linearly_then_goes_on_as_without(self):
        training = Training(steps=20, warmup=0.2, power=1.0)
        assert [training.lr_at(step, 20) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
        assert [training.lr_at(step, 20) for step in range(4, 20)] == pytest.approx([1 - s / 20 for s in range(4, 20)])

    def test_falls_over_fewer_steps_and_then_stays(self):
        training = Training(steps=20, power=0.9, decay_steps=8)
        for step in range(20):
            assert training.lr_at(step, 20) == pytest.approx((1 - min(step, 7) / 8) ** 0.9)

    def test_falls_over_more_steps_than_there_are(self):
        assert Training(steps=4, power=1.0, decay_steps=8).lr_at(3, 4) == pytest.approx(1 - 3 / 8)

    def test_all_steps_is_the_default(self):
        plain, given = Training(steps=9, warmup=0.3), Training(steps=9, warmup=0.3, decay_steps=9)
        assert [plain.lr_at(step, 9) for step in range(9)] == [given.lr_at(step, 9) for step in range(9)]

    def test_the_schedule_released_with_hsc(self):
        """10,582 images in batches of 12 for 15 epochs are 13,215 steps; 20,000 are made, the last 6,785 at 2e-6."""
        training = Training(steps=20000, batch=12, lr=0.01, decay_steps=10582 // 12 * 15)
        assert training.decay_steps == 13215
        rates = [training.lr * training.lr_at(step, 20000) for step in range(20000)]
        assert rates[13213] == pytest.approx(0.01 * (2 / 13215) ** 0.9)
        assert len(set(rates[13214:])) == 1 and rates[-1] == pytest.approx(1.955e-6, rel=1e-3)

    def test_drops_to_a_tenth_at_shares_of_the_steps(self):
        """RCA's 30 epochs, with drops at 5 and 10, in 60 steps."""
        training = Training(steps=60, power=0.0, drops=(5 / 30, 10 / 30))
        expected = [1.0] * 10 + [0.1] * 10 + [0.01] * 40
        assert [training.lr_at(step, 60) for step in range(60)] == pytest.approx(expected)
        both = Training(steps=60, power=0.9, drops=(0.5,))
        assert both.lr_at(45, 60) == pytest.approx(0.1 * 0.25**0.9)

    def test_is_never_negative_or_complex(self):
        for power in (0.9, "cosine"):
            training = Training(steps=10, warmup=1.0, power=power)
            assert all(0 <= training.lr_at(step, 10) <= 1 for step in range(12))

    def test_cosine(self):
        training = Training(steps=8, power="cosine")
        expected = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
        assert [training.lr_at(step, 8) for step in range(8)] == pytest.approx(expected)
        assert training.lr_at(4, 8) == pytest.approx(0.5) and training.lr_at(9, 8) == training.lr_at(7, 8) > 0
        late = Training(steps=8, power="cosine", warmup=0.25)
        assert [late.lr_at(step, 8) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, expected[2]])


class Trunk(nn.Module):
    trunk = True

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head, self.frozen = Trunk(), nn.Conv2d(4, 2, 1), nn.Linear(2, 2).requires_grad_(False)


class TestOptimizer:
    def test_four_groups(self):
        net = Net()
        training = Training(steps=1, lr=0.1, lr_new=10, lr_bias=2, weight_decay=0.01)
        optimizer = make_optimizer(net, training)
        found = {id(p): (group["factor"], group["weight_decay"]) for group in optimizer.param_groups
                 for p in group["params"]}  # fmt: skip
        assert found == {
            id(net.backbone.conv.weight): (1, 0.01),
            id(net.backbone.conv.bias): (2, 0),
            id(net.backbone.norm.weight): (2, 0),
            id(net.backbone.norm.bias): (2, 0),
            id(net.head.weight): (10, 0.01),
            id(net.head.bias): (20, 0),
        }
        assert isinstance(optimizer, torch.optim.SGD)
        assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)

    def test_nesterov(self):
        for wanted in (False, True):
            optimizer = make_optimizer(nn.Linear(2, 2), Training(steps=1, nesterov=wanted))
            assert all(group["nesterov"] is wanted for group in optimizer.param_groups)

    def test_adamw(self):
        assert isinstance(make_optimizer(Net(), Training(steps=1, optimizer="adamw")), torch.optim.AdamW)

    @pytest.mark.parametrize("baseline", [CAM, MCTformer])
    def test_tokens_and_positions_of_transformers_do_not_decay(self, baseline):
        net = baseline(2, backbone=BackboneSettings(name="test_vit", output_stride=8, weights=None))
        optimizer = make_optimizer(net, Training(steps=1, optimizer="adamw", lr_bias=3.0, weight_decay=0.05))
        found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        plain = {name.rpartition(".")[2] for name, p in net.named_parameters()
                 if p.ndim > 1 and found[id(p)]["weight_decay"] == 0}  # fmt: skip
        tokens = {"cls_token", "pos_embed"} if baseline is CAM else {"grid", "tokens", "token_positions"}
        assert plain == tokens
        assert {found[id(p)]["factor"] for name, p in net.named_parameters() if name.rpartition(".")[2] in tokens} == {
            1
        }

    def test_a_module_that_is_all_backbone(self):
        factors = [group["factor"] for group in make_optimizer(Trunk(), Training(steps=1)).param_groups]
        assert factors == [1, 1]

    def test_a_shared_parameter_comes_once(self):
        net = Net()
        net.again = net.head
        parameters = [p for group in make_optimizer(net, Training(steps=1)).param_groups for p in group["params"]]
        assert len(parameters) == len(set(map(id, parameters))) == 6

    def test_nothing_to_train(self):
        assert make_optimizer(Net().requires_grad_(False), Training(steps=1)) is None
        assert make_optimizer(nn.ReLU(), Training(steps=1)) is None
