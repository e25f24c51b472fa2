"""PPC against loops over pixels and classes, written from the paper and from what the released code computes."""

from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.nn.functional as F
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

    def losses(self, batch, outs):
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


# --- the same by loops ------------------------------------------------------------------------------------------------


def loop_maps(cams, valid, negative_floor):
    maps = torch.zeros_like(cams)
    for b in range(cams.shape[0]):
        for c in range(cams.shape[1]):
            inside = [max(v.item(), 0) for v in cams[b, c][valid[b]]]
            low, high = (min(inside), max(inside)) if inside else (0, 0)
            for y in range(cams.shape[2]):
                for x in range(cams.shape[3]):
                    value = max(cams[b, c, y, x].item(), 0)
                    floor = -low - 1e-5 if negative_floor else 0
                    above = floor if value < low + 1e-5 else value - low - 1e-5
                    maps[b, c, y, x] = above / (high - low + 1e-5)
    return maps


def loop_look(method, batch, out, grid):
    """(unit pixel vectors, labels (None: out), {column: prototype}), pixels in the order of the batch."""
    o = method
    features = torch.einsum("dk,bkhw->bdhw", o.project.weight[:, :, 0, 0], out.features["last"]).relu()
    cams = (out.cams if out.refined is None else out.refined).relu()
    if features.shape[-2:] != grid:
        features = F.interpolate(features, size=grid, mode="bilinear", align_corners=True)
        cams = F.interpolate(cams, size=grid, mode="bilinear", align_corners=True)
    valid = batch.valid[:, 0, 4::8, 4::8] > 0 if o.ignore_padding else torch.ones(len(cams), *grid, dtype=torch.bool)
    maps = loop_maps(cams, valid, o.negative_floor)
    images, classes = batch.tags.shape
    places = [(b, y, x) for b in range(images) for y in range(grid[0]) for x in range(grid[1])]
    vectors, labels = [], []
    for b, y, x in places:
        f = features[b, :, y, x]
        vectors.append(f / max(f.norm(), 1e-12))
        scores = [o.background] + [maps[b, c, y, x].item() * batch.tags[b, c].item() for c in range(classes)]
        labels.append(scores.index(max(scores)) if valid[b, y, x] else None)
    prototypes = {}
    for column in range(classes + 1):
        members = [i for i, label in enumerate(labels) if label == column]
        anyone = [i for i, label in enumerate(labels) if label is not None]
        if column == 0:
            members = members if o.background_proto == "assigned" else anyone[: o.top]
            weights = dict.fromkeys(members, 1.0)
        else:
            b_y_x = {i: maps[places[i][0], column - 1, places[i][1], places[i][2]].item() for i in range(len(places))}
            members = members if o.proto_from == "assigned" else anyone
            members = sorted(members, key=lambda i: -b_y_x[i])[: o.top]
            weights = {i: b_y_x[i] for i in members}
        total = sum(weights.values())
        if total:
            raw = [features[places[i][0], :, places[i][1], places[i][2]].detach() for i in weights]
            p = sum(w * f for w, f in zip(weights.values(), raw, strict=True)) / total
            prototypes[column] = p / max(p.norm(), 1e-12)
    return vectors, labels, prototypes


def nce(v, positive, negatives, tau):
    terms = [torch.exp(v @ p / tau) for p in negatives]
    return -torch.log(torch.exp(v @ positive / tau) / (torch.exp(v @ positive / tau) + sum(terms)))


def loop_contrast(vectors, labels, prototypes, tau):
    terms = [
        nce(v, prototypes[label], [p for c, p in prototypes.items() if c != label], tau)
        for v, label in zip(vectors, labels, strict=True)
        if label in prototypes
    ]
    return sum(terms) / len(terms) if terms else torch.zeros(())


def half_up(x):
    return math.floor(x + 0.5)


def loop_negatives(o, v, label, prototypes, keys):
    pool = [p for c, p in prototypes.items() if c != label or not o.exclude_positive]
    pool.sort(key=lambda p: -(v @ p).item())
    if o.negatives == "all" or not pool:
        return pool
    hard = pool[: max(1, half_up(o.hard_negatives * len(pool)))]
    if o.negatives == "ranks":
        return hard[len(hard) - int(o.kept_negatives * len(pool)) :]
    kept = max(1, half_up(o.kept_negatives * len(hard)))
    return [hard[j] for j in sorted(range(len(hard)), key=lambda j: keys[j].item())[:kept]]


def loop_intra(o, vectors, labels, prototypes, pick_keys, sample_keys):
    losses, closeness = {}, {}
    for i, (v, label) in enumerate(zip(vectors, labels, strict=True)):
        if label in prototypes:
            negatives = loop_negatives(o, v, label, prototypes, pick_keys[i])
            losses[i] = nce(v, prototypes[label], negatives, o.temperature)
            closeness[i] = (v @ prototypes[label]).item()
    per_class = []
    for c in prototypes:
        members = [i for i in losses if labels[i] == c]
        n = len(members)
        by_chance = sorted(members, key=lambda i: sample_keys[i].item())[: n // 2]
        hardest = sorted(members, key=lambda i: closeness[i])
        if o.hard_pixels == "hardest":
            sample = by_chance + hardest[: n // 2]
        elif o.hard_pixels == "semi":
            sixty = hardest[: 3 * n // 5]
            sample = by_chance + sixty[len(sixty) - n // 2 :]
        else:
            sample = members
        if members:
            per_class.append([losses[i] for i in sample])
    if o.intra_mean == "pixels":
        everything = [loss for terms in per_class for loss in terms]
        return sum(everything) / len(everything) if everything else torch.zeros(())
    means = [sum(terms) / len(terms) if terms else torch.zeros(()) for terms in per_class]
    return sum(means) / len(means) if means else torch.zeros(())


def loop_ppc(method, batch, outs, seed):
    o, grid = method, tuple(outs[method.view].cams.shape[-2:])
    one, two = (loop_look(o, batch, outs[view], grid) for view in method.views)
    images, columns = len(batch.tags), batch.tags.shape[1] + 1
    random = torch.Generator().manual_seed(seed)
    proto = cam = intra = torch.zeros(())
    for (v, y, p), (_, other_y, other_p) in ((one, two), (two, one)):
        proto = proto + loop_contrast(v, y, other_p, o.temperature)
        cam = cam + loop_contrast(v, other_y, p, o.temperature)
        pick = torch.rand(images, grid[0] * grid[1], columns, generator=random).flatten(0, 1)
        sample = torch.rand(images, grid[0] * grid[1], generator=random).flatten()
        intra = intra + loop_intra(o, v, y, p, pick, sample)
    return {"cross_prototype": o.alpha * proto, "cross_cam": o.alpha * cam, "intra": o.beta * intra}


# --- tests ------------------------------------------------------------------------------------------------------------


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
