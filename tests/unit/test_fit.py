"""The training loop: it learns, it logs, it stops when told to and goes on as if it had not been stopped."""

import os
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn

from tag2mask.core import Batch
from tag2mask.engine import Devices, Training, fit, read_log
from tag2mask.engine.checkpoint import load
from tag2mask.errors import Interrupted, UserError

IMAGES = 10


@pytest.fixture(scope="module")
def devices():
    return Devices("cpu")


class Numbers:
    """Ten "images" of four numbers; sample (epoch, index) is slightly different in every epoch."""

    def __init__(self, before=lambda place: None):
        self.before = before

    def __len__(self):
        return IMAGES

    def __getitem__(self, place):
        self.before(place)
        epoch, index = place
        x = torch.linspace(-1, 1, 4) * (index + 1) / IMAGES + 0.1 * epoch
        return x, (x.sum() + 1).view(1), index


def collate(samples):
    x, y, index = zip(*samples, strict=True)
    return Batch(torch.stack(x), torch.stack(y), torch.tensor(index), torch.ones(len(x), 1))


class Regression(nn.Module):
    """One linear layer behind dropout, with a running mean that after_step updates, and a record of its hooks."""

    def __init__(self, dropout=0.5, losses=None):
        super().__init__()
        torch.manual_seed(0)
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(4))
        self.given, self.calls, self.told = losses, [], []

    def forward(self, batch, progress):
        self.calls.append(("forward", progress))
        self.latest = batch.images.detach().mean(0)
        error = self.linear(self.dropout(batch.images)) - batch.tags
        losses = {"square": error.square().mean(), "small": 0.01 * self.linear.weight.abs().sum()}
        return losses if self.given is None else self.given(losses, len(self.calls))

    def on_epoch_start(self, epoch):
        self.told.append(epoch)

    def after_step(self):
        self.told.append("step")
        self.mean.lerp_(self.latest, 0.1)


def train(out, devices, model=None, *, dataset=None, save_every=3, log_every=2, workers=0, **training):
    model = model or Regression()
    settings = Training(**({"steps": 12, "batch": 4, "lr": 0.05, "lr_new": 1.0} | training))
    out.mkdir(exist_ok=True)
    fit(
        model, dataset or Numbers(), collate, settings, out, devices,
        save_every=save_every, log_every=log_every, workers=workers,
    )  # fmt: skip
    return model


def same(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(x, states[1][k]) for k, x in states[0].items())


def rows_without_clock(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(out / "train.jsonl")]


class TestTraining:
    @pytest.mark.parametrize("clip", [0.0, 0.05])
    def test_is_sgd_with_momentum_on_the_sum_of_the_losses(self, tmp_path, devices, clip):
        found = train(tmp_path, devices, Regression(dropout=0), batch=5, steps=6, lr_bias=2.0, clip=clip)
        model = Regression(dropout=0)
        weight, bias = (p.detach().clone() for p in (model.linear.weight, model.linear.bias))
        velocity, data = [torch.zeros_like(weight), torch.zeros_like(bias)], Numbers()
        for _, progress in found.calls:
            step = round(progress.done * 6)
            order = np.random.default_rng((0, step // 2)).permutation(10)
            places = [(step // 2, int(i)) for i in order[step % 2 * 5 :][:5]]
            batch = collate([data[place] for place in places])
            w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
            loss = (batch.images @ w.T + b - batch.tags).square().mean() + 0.01 * w.abs().sum()
            gradients = torch.autograd.grad(loss, (w, b))
            norm = torch.sqrt(sum(g.square().sum() for g in gradients))
            shrink = min(1.0, clip / (norm.item() + 1e-6)) if clip else 1.0
            rate = 0.05 * (1 - step / 6) ** 0.9
            velocity[0] = 0.9 * velocity[0] + gradients[0] * shrink + 5e-4 * weight
            velocity[1] = 0.9 * velocity[1] + gradients[1] * shrink
            weight, bias = weight - rate * velocity[0], bias - 2 * rate * velocity[1]
        assert torch.allclose(found.linear.weight, weight, atol=1e-6)
        assert torch.allclose(found.linear.bias, bias, atol=1e-6)

    def test_learns(self, tmp_path, devices):
        train(tmp_path, devices, Regression(dropout=0), steps=60, optimizer="adamw", lr=0.1)
        losses = [row["square"] for row in read_log(tmp_path / "train.jsonl")]
        assert losses[-1] < 0.1 * losses[0]

    def test_seed_decides_everything(self, tmp_path, devices):
        runs = [train(tmp_path / str(i), devices, seed=seed) for i, seed in enumerate((1, 1, 2))]
        assert same(runs[0], runs[1])
        assert not same(runs[0], runs[2])

    def test_workers_change_nothing(self, tmp_path, devices):
        assert same(train(tmp_path / "a", devices), train(tmp_path / "b", devices, workers=2))

    def test_is_in_training_mode(self, tmp_path, devices):
        assert train(tmp_path, devices, Regression().eval()).training

    def test_a_batch_must_divide_over_the_processes(self, tmp_path):
        class Three:
            world = 3

        with pytest.raises(UserError, match=r"train\.batch: 4 does not divide over 3 processes"):
            train(tmp_path, Three())


class TestHooks:
    def test_epochs_start_once_and_before_their_first_step(self, tmp_path, devices):
        model = train(tmp_path, devices, steps=6)  # ten images in batches of four: epochs start at steps 0, 3, 5
        assert model.told == [0, "step", "step", "step", 1, "step", "step", 2, "step"]

    def test_a_batch_larger_than_the_data(self, tmp_path, devices):
        assert train(tmp_path, devices, steps=3, batch=25).told == [0, "step", 2, "step", 5, "step"]

    def test_progress(self, tmp_path, devices):
        seen = [progress for _, progress in train(tmp_path, devices, steps=6, seed=3).calls]
        assert [p.done for p in seen] == [step / 6 for step in range(6)]
        assert [p.epoch for p in seen] == pytest.approx([step * 0.4 for step in range(6)])
        assert len({p.seed for p in seen}) == 6
        again = [progress for _, progress in train(tmp_path / "b", devices, steps=6, seed=3).calls]
        assert seen == again

    def test_an_epoch_that_was_begun_does_not_start_again(self, tmp_path, devices):
        train_then_stop(tmp_path, devices, step=3)
        assert train(tmp_path, devices).told[:3] == ["step", 2, "step"]


class Random(nn.Module):
    """Nothing to train: what comes from after_step alone."""

    def __init__(self, frozen=False):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.linear = nn.Linear(4, 1).requires_grad_(False) if frozen else None

    def forward(self, batch, progress):
        return {} if self.linear is None else {"x": self.linear(batch.images).mean()}

    def on_epoch_start(self, epoch):
        self.epoch = epoch

    def after_step(self):
        self.count += 1


class TestNothingToTrain:
    @pytest.mark.parametrize("frozen", [False, True])
    def test_hooks_run(self, tmp_path, devices, frozen):
        model = train(tmp_path, devices, Random(frozen))
        assert (model.count, model.epoch) == (12, 4)
        rows = read_log(tmp_path / "train.jsonl")
        assert [row["step"] for row in rows] == [0, 2, 4, 6, 8, 10, 11]
        assert all(row["total"] == row.get("x", 0) for row in rows)

    def test_goes_on(self, tmp_path, devices):
        with pytest.raises(Interrupted):
            train(tmp_path, devices, Random(), dataset=Numbers(kill_at(14)))
        assert 0 < load(tmp_path / "last.ckpt", Random(), None, devices.device)[0] < 12
        assert train(tmp_path, devices, Random()).count == 12


class TestLog:
    def test_rows(self, tmp_path, devices):
        train(tmp_path, devices, Regression(dropout=0), steps=6)
        rows = read_log(tmp_path / "train.jsonl")
        assert [row["step"] for row in rows] == [0, 2, 4, 5]
        for row in rows:
            assert list(row) == ["step", "epoch", "lr", "seconds", "total", "square", "small"]
            assert row["total"] == pytest.approx(row["square"] + row["small"], rel=1e-5)
            assert row["lr"] == pytest.approx(0.05 * (1 - row["step"] / 6) ** 0.9, rel=1e-5)
            assert row["epoch"] == pytest.approx(row["step"] * 0.4)
        assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)

    def test_first_loss_is_the_one_before_any_step(self, tmp_path, devices):
        train(tmp_path, devices, Regression(dropout=0), steps=1, batch=10)
        model, batch = Regression(dropout=0), collate([Numbers()[(0, i)] for i in range(10)])
        assert read_log(tmp_path / "train.jsonl")[0]["square"] == pytest.approx(
            model(batch, None)["square"].item(), rel=1e-5
        )


class TestFaults:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_a_loss_that_is_not_finite(self, tmp_path, devices, bad):
        model = Regression(losses=lambda losses, call: losses | {"small": losses["small"] * (bad if call > 5 else 1)})
        with pytest.raises(UserError, match=r"^train: the loss is .*'small'.* at step 6; lower train\.lr") as caught:
            train(tmp_path, devices, model)
        assert "\n" not in str(caught.value)
        assert [row["step"] for row in read_log(tmp_path / "train.jsonl")] == [0, 2, 4]

    def test_an_error_of_the_data_comes_through(self, tmp_path, devices):
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, devices, dataset=Numbers(lambda place: 1 / 0))


def kill_at(samples, number=signal.SIGTERM):
    """Sends a signal to this process when that many samples were read."""
    left = [samples]

    def before(place):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    return before


def train_then_stop(out, devices, *, step, number=signal.SIGTERM, **training):
    """Train until a signal arrives while the data of `step` are read."""
    with pytest.raises(Interrupted) as caught:
        train(out, devices, dataset=Numbers(kill_at(step * 4 + 1, number)), **training)
    return caught.value.code


class TestStopping:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
    def test_a_signal_saves_after_the_step_and_ends_with_its_code(self, tmp_path, devices, number, code):
        before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        assert train_then_stop(tmp_path, devices, step=4, number=number) == code
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
        model = Regression()
        steps, seconds = load(tmp_path / "last.ckpt", model, None, devices.device)
        assert steps == 5
        assert seconds > 0
        assert not same(model, Regression())

    @pytest.mark.parametrize("step", [0, 4, 5, 11])
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(self, tmp_path, devices, step, optimizer):
        whole = train(tmp_path / "whole", devices, optimizer=optimizer)
        train_then_stop(tmp_path / "stopped", devices, step=step, optimizer=optimizer)
        resumed = train(tmp_path / "stopped", devices, optimizer=optimizer)
        assert same(whole, resumed)
        assert rows_without_clock(tmp_path / "whole") == rows_without_clock(tmp_path / "stopped")
        seconds = [row["seconds"] for row in read_log(tmp_path / "stopped" / "train.jsonl")]
        assert seconds == sorted(seconds)

    def test_a_run_that_died_goes_on_from_its_last_checkpoint(self, tmp_path, devices):
        def die(place, left=[7 * 4]):  # noqa: B006
            left[0] -= 1
            if left[0] < 0:
                raise MemoryError

        whole = train(tmp_path / "whole", devices)
        with pytest.raises(MemoryError):
            train(tmp_path / "died", devices, dataset=Numbers(die))
        assert torch.load(tmp_path / "died" / "last.ckpt", weights_only=True)["step"] == 6
        resumed = train(tmp_path / "died", devices)
        assert len(resumed.calls) == 6
        assert same(whole, resumed)
        assert rows_without_clock(tmp_path / "whole") == rows_without_clock(tmp_path / "died")

    def test_a_finished_run_does_nothing_again(self, tmp_path, devices):
        whole = train(tmp_path, devices)
        again = train(tmp_path, devices)
        assert again.calls == []
        assert same(whole, again)
        assert [row["step"] for row in read_log(tmp_path / "train.jsonl")] == [0, 2, 4, 6, 8, 10, 11]

    def test_outside_the_main_thread_signals_are_left_alone(self, tmp_path, devices):
        done = []
        thread = threading.Thread(target=lambda: done.append(train(tmp_path, devices)))
        thread.start()
        thread.join()
        assert len(done[0].calls) == 12

    def test_holds_tensors_and_numbers_alone(self, tmp_path, devices):
        train(tmp_path, devices, optimizer="adamw")
        state = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert set(state) == {"model", "optimizer", "step", "seconds"}
        assert torch.equal(state["model"]["mean"], train(tmp_path, devices, optimizer="adamw").mean)
