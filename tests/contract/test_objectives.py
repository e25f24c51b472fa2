"""What every baseline, alone and with every method, must keep: the rules of the plug-in contract.

The pairs are in `cases.PAIRS`; whoever adds a baseline or a method adds a line there.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BROKEN_PAIR,
    CLASSES,
    METHODS_HERE,
    PAIRS,
    SIZE,
    TAGS,
    Example,
    Memory,
    Pair,
    batch_of,
    build,
    fit_in,
    progress_at,
    train_step,
    trained,
)
from watch import HostSync, no_host_sync

from tag2mask.baselines import BASELINES
from tag2mask.baselines.oaa import Attention
from tag2mask.core import FULL, Objective
from tag2mask.engine import Devices, read_log
from tag2mask.methods import METHODS
from tag2mask.ops import memory


def over(pairs):
    """The parameters of a test of these pairs."""
    marked = [pytest.param(pair, marks=[pytest.mark.slow] if pair.slow else [], id=str(pair)) for pair in pairs]
    return pytest.mark.parametrize("pair", marked)


every_pair = over(PAIRS)
HERE = Path(__file__).parent
NOTHING = [[0] * CLASSES] * 4


def test_every_baseline_and_method_is_under_contract():
    assert {pair.net for pair in PAIRS} == set(BASELINES)
    assert {name for pair in PAIRS for name in pair.methods} == {*METHODS, "example"}
    assert len({str(pair) for pair in PAIRS}) == len(PAIRS)


@every_pair
@pytest.mark.parametrize("tags", [TAGS, NOTHING, [[1] * CLASSES] * 4], ids=["mixed", "no tag", "all tags"])
@pytest.mark.parametrize("steps", [0, 4], ids=["fresh", "trained"])
def test_losses_are_finite_scalars(pair, tags, steps):
    objective = trained(pair, steps)
    losses = objective(batch_of(tags), progress_at(steps))
    assert losses
    for name, loss in losses.items():
        assert name.split("/")[0] in {"net", *pair.methods}
        assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite(), name
    sum(losses.values()).backward()
    for name, p in objective.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


@every_pair
def test_whatever_is_trainable_gets_a_gradient_and_the_rest_is_listed(pair):
    objective = trained(pair)
    objective.zero_grad()
    sum(objective(batch_of(), progress_at(4)).values()).backward()
    trainable = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    idle = {name for name, p in trainable.items() if p.grad is None or not p.grad.any()}
    assert idle == {name for name in trainable if name.startswith(pair.untrained)}


@every_pair
def test_losses_write_no_buffer(pair):
    objective = trained(pair)
    before = {name: x.clone() for name, x in objective.state_dict().items()}
    objective(batch_of(), progress_at(4))
    after = objective.state_dict()
    assert [name for name, x in before.items() if not torch.equal(x, after[name])] == []


@every_pair
def test_all_state_is_in_the_state_dict(pair):
    """A fresh objective that is given the state of a trained one goes on in the same way."""
    old, new = trained(pair), build(pair, seed=1)
    new.load_state_dict({name: x.clone() for name, x in old.state_dict().items()})
    steps = [_sgd_step(objective, batch_of(seed=9), 5) for objective in (old, new)]
    assert steps[0] == steps[1]
    assert _differing(old.state_dict(), new.state_dict()) == []


@every_pair
def test_relabelling_the_classes_relabels_the_maps_and_changes_no_loss(pair):
    order = torch.tensor([3, 0, 4, 1, 2])
    old, new, batch = trained(pair), build(pair, seed=1), batch_of(seed=5)
    new.remember(torch.tensor(TAGS * 2)[:, order])
    new.load_state_dict(relabelled(pair, old.state_dict(), order))
    other = batch_of(seed=5, tags=batch.tags[:, order].int().tolist())
    one, two = old.look(batch.images), new.look(batch.images)
    for name in ("logits", "cams", "refined"):
        if getattr(one, name) is not None:
            assert not _close(getattr(one, name), getattr(two, name))
            assert _close(getattr(one, name)[:, order], getattr(two, name)), name
    assert one.background is None or _close(one.background, two.background)
    assert _close(old.infer(batch.images, batch.tags)[0][:, order], new.infer(batch.images, other.tags)[0])

    for step in (4, 5):
        losses, same = _sgd_step(old, batch, step), _sgd_step(new, other, step)
        assert losses == pytest.approx(same, rel=1e-4, abs=1e-6)
    expected = relabelled(pair, old.state_dict(), order)
    assert [name for name, x in new.state_dict().items() if not _close(x, expected[name])] == []


@over([p for p in PAIRS if p.methods and not p.leaks])
def test_methods_leave_the_maps_of_absent_classes_alone(pair):
    objective, batch = trained(pair), batch_of()
    absent = batch.tags.sum(0) == 0
    assert 0 < absent.sum() < CLASSES
    outs = {view: objective.look(view(batch.images)) for view in objective.views}
    maps = [x for out in outs.values() for x in (out.cams, out.refined) if x is not None and x.requires_grad]
    for name, method in objective.methods.items():
        losses = method.losses(batch, outs, progress_at(4))
        gradients = torch.autograd.grad(sum(losses.values()), maps, retain_graph=True, allow_unused=True)
        for gradient in gradients:
            assert gradient is None or not gradient[:, absent].any(), name


@every_pair
def test_bfloat16_changes_little_and_losses_stay_float32(pair):
    exact, rough = trained(pair), trained(pair, bf16=True)
    rough.load_state_dict(exact.state_dict())
    wanted, found = (objective(batch_of(), progress_at(4)) for objective in (exact, rough))
    sum(found.values()).backward()
    assert {loss.dtype for loss in found.values()} == {torch.float32}
    assert {name: x.item() for name, x in found.items()} == pytest.approx(
        {name: x.item() for name, x in wanted.items()}, rel=0.1, abs=0.05
    )
    for name, p in rough.named_parameters():
        assert p.grad is None or (p.grad.isfinite().all() and p.grad.dtype == torch.float32), name


@every_pair
def test_no_step_makes_the_host_wait_or_loops_over_classes_images_or_pixels(pair):
    def operations(classes, images, size):
        objective = trained(pair, num_classes=classes) if classes == CLASSES else build(pair, num_classes=classes)
        objective.zero_grad(set_to_none=True)
        tags = F.one_hot(torch.arange(images) % (classes - 1), classes).tolist()
        batch = batch_of(tags, size=size)
        with no_host_sync() as watch:
            losses = objective(batch, progress_at(4))
            sum(losses.values()).backward()
            objective.after_step()
        return watch.count

    assert operations(CLASSES, 4, SIZE) == operations(CLASSES + 2, 6, SIZE + 32) > 100


@every_pair
def test_a_killed_training_ends_as_if_it_had_not_been_killed(pair, tmp_path):
    devices = Devices("cpu")
    whole = fit_in(tmp_path / "whole", build(pair), steps=6, devices=devices)
    with pytest.raises(ConnectionError):  # in the first read of the fifth step; three are in the checkpoint
        fit_in(tmp_path / "cut", build(pair), steps=6, devices=devices, data=Memory(fails_at=17), save_every=3)
    resumed = fit_in(tmp_path / "cut", build(pair, seed=1), steps=6, devices=devices, data=(data := Memory()))
    assert data.reads == 3 * 4
    assert _differing(whole, resumed) == []
    assert _losses(tmp_path / "whole") == _losses(tmp_path / "cut")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """two_processes(slow): where two processes left the states and logs of the slow pairs, or of the others.

    One launch for all of them: starting is what takes long.
    """

    @functools.cache
    def launch(slow):
        out = tmp_path_factory.mktemp("two")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*command, str(HERE / "worker.py"), str(out), "slow" if slow else "fast"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
        return out

    return launch


@every_pair
def test_two_processes_train_like_one(pair, two_processes, tmp_path):
    together = two_processes(pair.slow)
    alone = fit_in(tmp_path, build(pair), steps=3, devices=Devices("cpu"))
    states = [torch.load(together / f"{pair}.{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert _differing(*states) == []
    atol = {name: 1e-3 if x.dtype == torch.float16 else 1e-5 for name, x in alone.items()}  # half: one more rounding
    assert [n for n, x in alone.items() if not torch.allclose(x, states[0][n], rtol=1e-5, atol=atol[n])] == []
    both, one = _losses(together / str(pair)), _losses(tmp_path)
    assert len(one) == 3
    for row, other in zip(one, both, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)


# The detectors above must detect: here are methods that break one rule each.


class Writes(Example):
    def losses(self, batch, outs, progress):
        found = super().losses(batch, outs, progress)
        self.prototypes.mul_(0.9)
        return found


class Forgets(Example):
    def bind(self, net, num_classes):
        super().bind(net, num_classes)
        self.calls = 1

    def losses(self, batch, outs, progress):
        self.calls += 1
        return {name: loss * self.calls for name, loss in super().losses(batch, outs, progress).items()}


class PrefersTheFirst(Example):
    def losses(self, batch, outs, progress):
        return super().losses(batch, outs, progress) | {"first": outs[FULL].cams[:, 0].square().mean()}


class TouchesAbsent(Example):
    def losses(self, batch, outs, progress):
        return super().losses(batch, outs, progress) | {"all": outs[FULL].cams.square().mean()}


class Loops(Example):
    def losses(self, batch, outs, progress):
        slow = sum(outs[FULL].cams[:, k].mean() for k in range(batch.tags.shape[1]))
        return super().losses(batch, outs, progress) | {"slow": slow}


class Waits(Example):
    def losses(self, batch, outs, progress):
        return super().losses(batch, outs, progress) | {"item": outs[FULL].cams.mean() * outs[FULL].cams.max().item()}


BROKEN = {
    Writes: test_losses_write_no_buffer,
    Forgets: test_all_state_is_in_the_state_dict,
    PrefersTheFirst: test_relabelling_the_classes_relabels_the_maps_and_changes_no_loss,
    TouchesAbsent: test_methods_leave_the_maps_of_absent_classes_alone,
    Loops: test_no_step_makes_the_host_wait_or_loops_over_classes_images_or_pixels,
    Waits: test_no_step_makes_the_host_wait_or_loops_over_classes_images_or_pixels,
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_method_that_breaks_a_rule_is_found(broken, monkeypatch):
    monkeypatch.setitem(METHODS_HERE, "example", broken)
    with pytest.raises(AssertionError):
        BROKEN[broken](Pair("cam", {"example": {}}))


def test_state_outside_the_state_dict_is_lost_by_a_kill_and_found(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS_HERE, "example", Forgets)
    with pytest.raises(AssertionError):
        test_a_killed_training_ends_as_if_it_had_not_been_killed(Pair("cam", {"example": {}}), tmp_path)


def test_a_method_that_does_not_gather_is_found(two_processes, tmp_path):
    with pytest.raises(AssertionError):
        test_two_processes_train_like_one(BROKEN_PAIR, two_processes, tmp_path)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.long().bincount(),
        lambda x: x.index_put((x > 0,), x.new_ones(2)),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: torch.where(x > 0),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: range(x.long()[0]),
    ],
)
def test_host_syncs_are_seen(operation):
    x = torch.tensor([1.0, 0.0, 2.0])
    with pytest.raises(HostSync), no_host_sync():
        operation(x)


def test_what_waits_for_nothing_passes():
    x = torch.tensor([1.0, 0.0, 2.0])
    with no_host_sync() as watch:
        torch.where(x > 0, x, 0).sum()
        x[torch.tensor([2, 0])].max()
        x.masked_fill(x > 1, 0)
    assert watch.count > 4


# Helpers.


def relabelled(pair, state, order):
    """The state with class order[k] in place k. Class axes are those that grow with the number of classes."""
    smaller, larger = build(pair), build(pair, num_classes=CLASSES + 1).state_dict()
    memories = {f"{name}.": part for name, part in smaller.named_modules() if isinstance(part, memory.Memory)}
    tables = {f"{name}.maps" for name, part in smaller.named_modules() if isinstance(part, Attention)}
    changed = {}
    for name, x in state.items():
        for axis, (size, grown) in enumerate(zip(x.shape, larger[name].shape, strict=True)):
            if grown == size or name in tables:  # whose these maps are is said by a table, with an axis of classes
                continue
            owner = next((part for start, part in memories.items() if name.startswith(start)), None)
            if owner is not None and size == len(owner.class_of):  # slots of class 0, then of class 1, ...
                classes = places(pair, name, len(owner.cursor), order)
                x = x.index_select(axis, torch.cat([torch.where(owner.class_of == k)[0] for k in classes]))
            else:
                x = x.index_select(axis, places(pair, name, size, order))
        changed[name] = x.clone()
    assert _differing(state, changed), "nothing depends on the order of the classes"
    return changed


def places(pair, name, size, order):
    """Where to take each place of a class axis of `size` from, for class order[k] to be in place k."""
    if size == CLASSES:
        return order
    assert size == CLASSES + 1, f"{name}: an axis of {size} grows with the classes, but is none of them"
    where = [side for start, side in pair.background.items() if name.startswith(start)]
    assert where, f"{name}: has a place for the background; say in the Pair whether it is first or last"
    return torch.cat([torch.tensor([0]), order + 1] if where[0] == "first" else [order, torch.tensor([CLASSES])])


def _sgd_step(objective: Objective, batch, step):
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.01)
    return train_step(objective, optimizer, batch, step)


def _close(a, b):
    return torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-3 if a.dtype == torch.float16 else 1e-5)


def _differing(one, two):
    assert one.keys() == two.keys()
    return [name for name, x in one.items() if not torch.equal(x, two[name])]


def _losses(folder):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_log(folder / "train.jsonl")]
