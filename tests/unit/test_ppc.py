"""PPC against the same by loops (loop_ppc), in every reading, and what it must keep."""

from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from loop_ppc import loop_ppc
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tag2mask.core import FULL, Baseline, Batch, CamOutput, Objective, Progress
from tag2mask.errors import UserError
from tag2mask.methods import ppc as ppc_module
from tag2mask.methods.ppc import PPC
from tag2mask.ops import contrast as contrast_module

CHANNELS = 6
RELEASED = {
    "alpha": 0.05, "beta": 0.05, "proto_from": "any", "background_proto": "ties", "negative_floor": True,
    "negatives": "ranks", "exclude_positive": False, "hard_pixels": "semi", "intra_mean": "classes",
    "ignore_padding": False,
}  # fmt: skip
READINGS = {
    "paper": {},
    "released_seam": RELEASED | {"background": 0.2},
    "released_eps": RELEASED | {"background": 0.1, "top": 4},
    "no_mining": {"negatives": "all", "hard_pixels": "all"},
    "no_mining_by_class": {"negatives": "all", "hard_pixels": "all", "intra_mean": "classes"},
} | {f"{key}={value}": {key: value} for key, value in RELEASED.items()}
READINGS["top=1"] = {"top": 1, "hard_negatives": 0.3, "kept_negatives": 0.9}


class Net(Baseline):
    """Features and maps are what the pixels say."""

    def __init__(self, classes):
        super().__init__()
        self.dims = {"last": CHANNELS}
        self.conv = nn.Conv2d(3, CHANNELS, 3, stride=8, padding=1)
        self.classifier = nn.Conv2d(CHANNELS, classes, 1)

    def encode(self, images):
        return {"last": self.conv(images).relu()}

    def classify(self, features, images):
        cams = self.classifier(features["last"])
        return CamOutput(cams.mean((2, 3)), cams, features)

    def losses(self, batch, outs, progress):
        return {"cls": F.multilabel_soft_margin_loss(outs[FULL].logits, batch.tags)}


def make(classes, **options):
    torch.manual_seed(0)
    method = PPC(**({"size": 32, "dim": 5, "top": 6} | options)).double()
    method.bind(Net(classes), classes)
    return method.double()


def case(method, images=3, classes=4, seed=0, fine=False):
    """A batch on a grid of 4 x 5 and its outputs; the first view on a grid twice as fine if `fine`."""
    random = torch.Generator().manual_seed(seed)
    tags = (torch.rand(images, classes, generator=random) < 0.6).float()
    tags[:, 0] = 1
    batch = Batch(torch.zeros(images, 3, 32, 40), tags, torch.arange(images), torch.ones(images, 1, 32, 40))
    outs = {}
    for view in method.views:
        size = (8, 10) if fine and view == FULL else (4, 5)
        cams = 3 * torch.rand(images, classes, *size, generator=random, dtype=torch.float64) - 1
        last = torch.randn(images, CHANNELS, *size, generator=random, dtype=torch.float64).requires_grad_()
        outs[view] = CamOutput(cams.mean((2, 3)), cams, {"last": last})
    return batch, outs


def absent(batch, outs):
    batch.tags[:, 2] = 0


def empty_map(batch, outs):
    for out in outs.values():
        out.cams[:, 1] = -1


def nothing_but_background(batch, outs):
    batch.tags[:] = 0


def padded(batch, outs):
    batch.valid[0, :, 24:] = 0
    batch.valid[1, :, :, :16] = 0


def all_padded(batch, outs):
    batch.valid[:] = 0


def lone_pixel(batch, outs):
    batch.tags[:] = torch.eye(batch.tags.shape[1])[: len(batch.tags)]
    for out in outs.values():
        out.cams[0, 0] = 0
        out.cams[0, 0, 1, 2] = 1


def refined(batch, outs):
    for view, out in outs.items():
        outs[view] = CamOutput(out.logits, out.cams, out.features, refined=out.cams.flip(1).relu())


def assert_equal(method, batch, outs, seed=5):
    got = method.losses(batch, outs, Progress(0, 0, seed))
    wanted = loop_ppc(method, batch, outs, seed)
    inputs = [method.project.weight, *(out.features["last"] for out in outs.values())]
    assert list(got) == list(wanted)
    for name in got:
        torch.testing.assert_close(got[name].double(), wanted[name].double(), atol=1e-9, rtol=1e-9, msg=name)
        if wanted[name].requires_grad:
            pairs = zip(*(torch.autograd.grad(x[name], inputs, retain_graph=True, allow_unused=True)
                          for x in (got, wanted)), strict=True)  # fmt: skip
            for mine, expected in pairs:
                torch.testing.assert_close(mine, torch.zeros_like(mine) if expected is None else expected)
    return got


@pytest.mark.parametrize("reading", READINGS)
def test_every_reading_equals_the_loops(reading):
    method = make(4, **READINGS[reading])
    batch, outs = case(method)
    padded(batch, outs)
    empty_map(batch, outs)
    assert all(loss > 0 for loss in assert_equal(method, batch, outs).values())


@pytest.mark.parametrize("reading", ["paper", "released_seam", "no_mining"])
@pytest.mark.parametrize("edit", [absent, empty_map, nothing_but_background, padded, lone_pixel, refined])
def test_edges_equal_the_loops(reading, edit):
    method = make(4, **READINGS[reading])
    batch, outs = case(method, seed=1)
    edit(batch, outs)
    assert_equal(method, batch, outs)


@pytest.mark.parametrize("reading", ["paper", "released_eps"])
@pytest.mark.parametrize(("images", "classes", "fine"), [(1, 3, False), (2, 1, False), (1, 1, False), (2, 3, True)])
def test_sizes_equal_the_loops(reading, images, classes, fine):
    method = make(classes, **READINGS[reading])
    assert_equal(method, *case(method, images, classes, seed=2, fine=fine))


def test_released_ranks_are_4_to_13_of_21():
    method = make(20, **READINGS["released_seam"])
    similarity = torch.linspace(1, -1, 21, dtype=torch.float64).expand(2, 21)
    own = torch.tensor([0, 7])
    got = method._mined(similarity, own, torch.ones(21).bool(), torch.zeros(2, 21))
    ranked = (similarity[0, 3:13] / 0.1).exp().sum()
    for loss, column in zip(got, own, strict=True):
        positive = (similarity[0, column] / 0.1).exp()
        assert loss.item() == pytest.approx(-math.log(positive / (positive + ranked)))


def test_paper_takes_six_of_the_twelve_most_similar_others():
    method = make(20)
    similarity = torch.rand(50, 21, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    own = torch.arange(50) % 21
    losses = method._mined(similarity, own, torch.ones(21).bool(), torch.rand(50, 21))
    (touched,) = torch.autograd.grad(losses.sum(), similarity)
    similarity = similarity.detach().scatter(1, own[:, None], -1)
    hard = similarity.argsort(dim=1, descending=True)[:, :12]
    negatives = (touched != 0).scatter(1, own[:, None], False)
    assert (negatives.sum(1) == 6).all() and (negatives.gather(1, hard).sum(1) == 6).all()
    assert negatives.gather(1, hard).any(0).all()  # each of the twelve comes up


def test_prototypes_and_maps_get_no_gradient_and_absent_classes_no_prototype():
    method = make(4)
    batch, outs = case(method)
    absent(batch, outs)
    for out in outs.values():
        out.cams.requires_grad_()
    sum(method.losses(batch, outs, Progress(0, 0)).values()).backward()
    assert all(out.cams.grad is None and out.features["last"].grad.abs().sum() > 0 for out in outs.values())
    look = method._look(FULL, batch, outs)
    assert look.found.tolist() == [bool((look.labels == c).any()) for c in range(5)] and not look.found[3]
    assert not list(method.buffers())


@pytest.mark.parametrize("reading", ["paper", "released_seam"])
def test_order_of_classes_makes_no_difference(reading):
    method = make(4, **READINGS[reading])
    batch, outs = case(method)
    before = method.losses(batch, outs, Progress(0, 0))
    order = torch.tensor([2, 0, 3, 1])
    batch.tags = batch.tags[:, order]
    outs = {v: CamOutput(o.logits[:, order], o.cams[:, order], o.features) for v, o in outs.items()}
    after = method.losses(batch, outs, Progress(0, 0))
    assert all(after[name].item() == pytest.approx(before[name].item(), rel=1e-9) for name in before)


def test_what_lies_under_padding_makes_no_difference():
    method = make(4)
    batch, outs = case(method)
    padded(batch, outs)
    before = method.losses(batch, outs, Progress(0, 0))
    for out in outs.values():
        for maps in (out.cams, out.features["last"].data):
            maps[0, :, 3:] = 9
            maps[1, :, :, :2] = 9
    after = method.losses(batch, outs, Progress(0, 0))
    assert all(after[name].item() == before[name].item() for name in before)


@pytest.mark.parametrize("reading", ["paper", "released_seam", "intra_mean=classes"])
def test_an_all_padded_batch_and_dead_features_are_finite(reading):
    for dead in (False, True):
        method = make(4, **READINGS[reading])
        batch, outs = case(method)
        if dead:
            for out in outs.values():
                out.features["last"].data.zero_()
        else:
            all_padded(batch, outs)
        losses = method.losses(batch, outs, Progress(0, 0))
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values()) and method.project.weight.grad.isfinite().all()
        if not dead and reading != "released_seam":
            assert not any(losses.values())


def test_draws_follow_the_seed():
    method = make(4)
    batch, outs = case(method)
    first, again, other = (method.losses(batch, outs, Progress(0, 0, seed)) for seed in (1, 1, 2))
    assert first["intra"] == again["intra"] != other["intra"] and first["cross_cam"] == other["cross_cam"]


@pytest.mark.parametrize("reading", ["paper", "released_seam", "no_mining"])
def test_a_step_reads_no_value_back_from_the_device(reading):
    method = make(4, **READINGS[reading])
    batch, outs = case(method)
    weight, last = method.project.weight.detach(), {view: out.features["last"].detach() for view, out in outs.items()}
    with FakeTensorMode() as mode:  # its tensors have shapes but no values: reading one raises
        fake = mode.from_tensor
        method.project.weight = nn.Parameter(fake(weight))
        batch = Batch(*map(fake, (batch.images, batch.tags, batch.index, batch.valid)))
        outs = {v: CamOutput(fake(o.logits), fake(o.cams), {"last": fake(last[v])}) for v, o in outs.items()}
        total = sum(method.losses(batch, outs, Progress(0, 0)).values())
        total.backward()
        with pytest.raises(DataDependentOutputException):
            total.item()


class TwoThreads:
    """Two processes, played by threads that meet at a barrier."""

    def __init__(self, monkeypatch):
        self.barrier, self.local, self.slots = threading.Barrier(2, timeout=20), threading.local(), [None, None]
        for module in (contrast_module, ppc_module):
            for name in ("gather", "sum_over_processes", "processes", "rank"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, getattr(self, name))

    def exchange(self, x):
        self.slots[self.local.rank] = x.detach()
        self.barrier.wait()
        parts = list(self.slots)
        self.barrier.wait()
        return parts

    def gather(self, x):
        return torch.stack(self.exchange(x), dim=1).flatten(0, 1)

    def sum_over_processes(self, x):
        return sum(self.exchange(x))

    def processes(self):
        return 2

    def rank(self):
        return self.local.rank

    def run(self, work):
        results = [None, None]

        def play(number):
            self.local.rank = number
            try:
                results[number] = work(number)
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=play, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("reading", ["paper", "released_seam"])
def test_two_processes_are_as_one(reading, monkeypatch):
    method = make(4, **READINGS[reading])
    batch, outs = case(method, images=4)
    padded(batch, outs)
    alone = method.losses(batch, outs, Progress(0, 0, 3))
    inputs = [method.project.weight, *(out.features["last"] for out in outs.values())]
    gradients = torch.autograd.grad(sum(alone.values()), inputs)

    def half(number):
        mine = slice(number, None, 2)
        part = Batch(batch.images[mine], batch.tags[mine], batch.index[mine], batch.valid[mine])
        looks = {
            v: CamOutput(o.logits[mine], o.cams[mine], {"last": o.features["last"][mine]}) for v, o in outs.items()
        }
        losses = method.losses(part, looks, Progress(0, 0, 3))
        return losses, torch.autograd.grad(sum(losses.values()), inputs)

    (first, first_gradients), (second, second_gradients) = TwoThreads(monkeypatch).run(half)
    for name in alone:
        assert (first[name] + second[name]).item() / 2 == pytest.approx(alone[name].item(), rel=1e-9)
    for a, b, whole in zip(first_gradients, second_gradients, gradients, strict=True):
        torch.testing.assert_close((a + b) / 2, whole)


def test_a_training_step_on_a_baseline():
    torch.manual_seed(0)
    objective = Objective(Net(3), {"ppc": PPC(size=32, dim=8)}, num_classes=3)
    assert objective.views[1].size == 32 and "methods.ppc.project.weight" in objective.state_dict()
    batch = Batch(
        torch.randn(2, 3, 64, 64), torch.tensor([[1.0, 0, 1], [0, 1, 0]]), torch.arange(2), torch.ones(2, 1, 64, 64)
    )
    losses = objective(batch, Progress(0, 0))
    assert list(losses) == ["net/cls", "ppc/cross_prototype", "ppc/cross_cam", "ppc/intra"]
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    objective.after_step()


def test_what_cannot_work_is_said():
    for options, word in [
        ({"background": 1.2}, "background"),
        ({"temperature": 0}, "temperature"),
        ({"size": 0}, "size"),
        ({"kept_negatives": 0}, "kept_negatives"),
    ]:
        with pytest.raises(UserError, match=word):
            PPC(**options)
    frozen = Net(3).requires_grad_(False)
    with pytest.raises(UserError, match="ppc trains"):
        PPC().bind(frozen, 3)
    shallow = Net(3)
    shallow.dims = {"c4": 8}
    with pytest.raises(UserError, match="'last'"):
        PPC().bind(shallow, 3)


def test_second_view_by_size_or_by_scale():
    images = torch.zeros(1, 3, 100, 200)
    assert PPC().view(images).shape[-2:] == (128, 128) and PPC(size=None).view(images).shape[-2:] == (30, 60)
