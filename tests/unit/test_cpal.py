"""CPAL against the same by loops (loop_cpal), in every reading, over several steps, and what it must keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from loop_cpal import Loops
from torch import nn

from tag2mask.core import FULL, Baseline, Batch, CamOutput, Objective, Progress, inference_state
from tag2mask.errors import UserError
from tag2mask.methods.cpal import CPAL
from tag2mask.ops.kmeans import kmeans
from tag2mask.ops.seed import seed_of

DIMS = {"c2": 2, "c3": 3, "c4": 3, "c5": 4, "last": 4}
SMALL = {"dim": 6, "prototypes": 5, "neighbours": 3, "bank": 4}
PRINTED = {"positiveness": "uniform", "rank": "cosine", "align": "anchor", "gamma": 1.0}
READINGS = {
    "default": {},
    "printed": PRINTED,
    "uniform": {"positiveness": "uniform"},
    "rank=cosine": {"rank": "cosine"},
    "cosine": {"measure": "cosine"},
    "l1": {"measure": "l1"},
    "l2": {"measure": "l2"},
    "sncl": {"measure": "cosine", "rank": "cosine", "gamma": 1.0},
    "gamma": {"gamma": 0.3},
    "anchor": {"align": "anchor"},
    "both": {"align": "both", "delta_scale": 0.5},
    "off": {"align": "off"},
    "running": {"align_mean": "running"},
    "identity": {"projection": "identity"},
    "attached": {"detach": False},
    "hierarchical": {"projection": "hierarchical"},
    "hierarchical_attached": {"projection": "hierarchical", "detach": False, "measure": "l2"},
    "unit": {"unit": True, "detach": False},
    "unit_l1": {"unit": True, "measure": "l1"},
    "bank": {"background": "bank"},
    "bank_cam": {"background": "bank", "pooling": "cam", "pacam_norm": "none"},
    "pooling": {"pooling": "cam"},
    "threshold": {"threshold": 0.5, "weight": 0.7},
    "raw": {"pacam_norm": "none"},
    "sum": {"reduction": "sum"},
    "stop_pacam": {"stop": "pacam"},
    "stop_cam": {"stop": "cam", "detach": False},
    "all_neighbours": {"neighbours": 20},
    "one_neighbour": {"neighbours": 1},
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Stub(Baseline):
    def __init__(self, dims=DIMS):
        super().__init__()
        self.dims = dims
        self.weight = nn.Parameter(torch.zeros(1))


def fresh(classes=3, **options):
    torch.manual_seed(0)
    method = CPAL(**(SMALL | options))
    method.bind(Stub(), classes)
    return method


def make(classes=3, seed=1, **options):
    """With prototypes and a running mean, as after some epochs; the last of three classes has two prototypes only."""
    method = fresh(classes, **options)
    random = torch.Generator().manual_seed(seed)
    method.found[:] = True
    if classes > 1:
        method.found[-1, 2:] = False
    contexts = torch.randn(method.contexts.shape, generator=random) + 0.3
    if method.unit:
        contexts = F.normalize(contexts, dim=2)
    method.contexts.copy_(contexts * method.found[..., None])
    method.average.rows.copy_(torch.randn(method.average.rows.shape, generator=random) * 0.5)
    method.average.known[:] = True
    return method


def case(images=3, classes=3, seed=0, background=False):
    """A batch and what a network says about it, on a grid of 4 x 5; deeper taps are coarser."""
    random = torch.Generator().manual_seed(seed)
    tags = (torch.rand(images, classes, generator=random) < 0.6).double()
    tags[:, 0] = 1
    valid = torch.ones(images, 1, 32, 40)
    batch = Batch(torch.zeros(images, 3, 32, 40), tags, torch.arange(images), valid)
    sizes = {"c2": (8, 10), "c3": (6, 7), "c4": (4, 5), "c5": (4, 5), "last": (4, 5)}
    features = {
        tap: torch.randn(images, dim, *sizes[tap], generator=random).requires_grad_() for tap, dim in DIMS.items()
    }
    cams = (2 * torch.randn(images, classes, 4, 5, generator=random) + 0.3).requires_grad_()
    ground = torch.randn(images, 1, 4, 5, generator=random).requires_grad_() if background else None
    return batch, CamOutput(cams.mean((2, 3)), cams, features, background=ground)


def assert_equal(method, options, batch, out):
    got = method.losses(batch, {FULL: out}, Progress(1.5, 0.5))
    loops = Loops(method, options, batch, out)
    wanted = loops.loss()
    assert list(got) == ["self"]
    torch.testing.assert_close(got["self"], wanted, atol=1e-9, rtol=1e-7)
    inputs = [out.cams, *out.features.values(), *(p for p in method.parameters() if p.requires_grad)]
    inputs += [out.background] if out.background is not None else []
    if wanted.requires_grad:
        pairs = zip(*(torch.autograd.grad(x, inputs, retain_graph=True, allow_unused=True)
                      for x in (got["self"], wanted)), strict=True)  # fmt: skip
        for mine, expected in pairs:
            if mine is None:
                assert expected is None or not expected.any()
            else:
                torch.testing.assert_close(mine, torch.zeros_like(mine) if expected is None else expected)
    return got["self"], loops


@pytest.mark.parametrize("reading", READINGS)
def test_every_reading_equals_the_loops(reading):
    method = make(**READINGS[reading])
    batch, out = case()
    padded(batch, out, method)
    assert assert_equal(method, READINGS[reading], batch, out)[0] > 0


def absent(batch, out, method):
    batch.tags[:, 2] = 0


def empty_map(batch, out, method):
    out.cams.data[:, 0] = -1


def no_tags(batch, out, method):
    batch.tags[:] = 0


def all_tags(batch, out, method):
    batch.tags[:] = 1


def padded(batch, out, method):
    batch.valid[0, :, 24:] = 0
    batch.valid[1, :, :, :16] = 0


def all_padded(batch, out, method):
    batch.valid[:] = 0


def no_prototypes(batch, out, method):
    method.found[:], method.contexts[:], method.average.known[:] = False, 0, False


def none_of_one_class(batch, out, method):
    method.found[-3], method.contexts[-3] = False, 0


def one_prototype(batch, out, method):
    method.found[:, 1:], method.contexts[:, 1:] = False, 0


def equal_prototypes(batch, out, method):
    method.contexts[:, 1:3] = method.contexts[:, :1]
    method.contexts *= method.found[..., None]


def equal_pixels(batch, out, method):
    """Ties of maps and similarities everywhere; their gradients are shared in other ways, so none is asked for."""
    for tensor in (out.cams, *out.features.values()):
        tensor.data[:] = tensor.data[..., :1, :1].abs()
        tensor.requires_grad_(False)
    method.requires_grad_(False)


def no_mean_yet(batch, out, method):
    method.average.known[::2] = False


@pytest.mark.parametrize("reading", ["default", "printed", "bank", "running", "sum"])
@pytest.mark.parametrize(
    "edit",
    [absent, empty_map, no_tags, all_tags, all_padded, no_prototypes, none_of_one_class, one_prototype,
     equal_prototypes, equal_pixels, no_mean_yet],
)  # fmt: skip
def test_edges_equal_the_loops(reading, edit):
    method = make(**READINGS[reading])
    batch, out = case(seed=2)
    edit(batch, out, method)
    loss, _ = assert_equal(method, READINGS[reading], batch, out)
    if edit is all_padded or edit is no_prototypes or (edit is no_tags and reading != "bank"):
        assert loss == 0


@pytest.mark.parametrize("reading", ["default", "bank"])
@pytest.mark.parametrize(("images", "classes"), [(1, 3), (2, 1), (1, 1), (4, 5)])
def test_sizes_equal_the_loops(reading, images, classes):
    method = make(classes, **READINGS[reading])
    assert_equal(method, READINGS[reading], *case(images, classes, seed=3))


@pytest.mark.parametrize("reading", ["default", "bank"])
def test_a_predicted_background_makes_shares_of_the_maps(reading):
    method = make(**READINGS[reading])
    batch, out = case(seed=4, background=True)
    padded(batch, out, method)
    assert_equal(method, READINGS[reading], batch, out)
    wanted = Loops(method, READINGS[reading], batch, out, inference=True).exported()
    torch.testing.assert_close(method.cams(out, batch.tags), wanted)


@pytest.mark.parametrize("edit", [None, none_of_one_class, empty_map, no_mean_yet, no_prototypes])
@pytest.mark.parametrize("reading", ["default", "printed", "bank", "hierarchical", "raw", "unit"])
@pytest.mark.parametrize("export", ["pacam", "cam", "sum"])
def test_exported_maps_equal_the_loops(reading, export, edit):
    options = READINGS[reading] | {"export": export}
    method = make(**options)
    batch, out = case(seed=5)
    if edit:
        edit(batch, out, method)
    found = method.cams(out, batch.tags)
    torch.testing.assert_close(found, Loops(method, options, batch, out, inference=True).exported())
    assert not found.requires_grad
    if edit is no_prototypes and export == "pacam":
        torch.testing.assert_close(found, F.relu(out.cams) / (F.relu(out.cams).amax((2, 3), keepdim=True) + 1e-5))


# --- memory, clusters, running mean -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"gate": 0.5}, {"background": "bank"}, {"unit": True, "running": 0.5}, {"prototypes": 3}]
)
def test_training_equals_the_loops_step_by_step(options):
    """Losses, the queue of every class, its clusters and its running mean, over two epochs of three steps."""
    method = fresh(**options)
    rows = method.contexts.shape[0]
    queues, means, written, losses = [[] for _ in range(rows)], [None] * rows, [0] * rows, []
    for step in range(9):
        batch, out = case(2, 3, seed=10 + step)
        if step % 3 == 0:
            method.on_epoch_start(step // 3)
            slots, full = method.memory.by_class()
            for c in range(rows):
                assert slots[c][full[c]].shape[0] == min(written[c], 4)
            centres, found = kmeans(slots, full, method.count, seed=seed_of(step // 3))
            torch.testing.assert_close(method.contexts, centres)  # also their order: the seed
            enough = [len(queue) >= 2 for queue in queues]
            assert method.found.any(1).tolist() == enough and method.found.sum(1).tolist() == [
                min(len(queue), method.count) * ok for queue, ok in zip(queues, enough, strict=True)
            ]
            assert found[torch.tensor(enough)].equal(method.found[torch.tensor(enough)])
        loss, loops = assert_equal(method, options, batch, out)
        losses.append(loss.item())
        for b in range(2):
            for c in range(rows):
                n, anchor = c - loops.first, loops.anchors[b][c]
                sure = n < 0 or out.logits[b, n].sigmoid() >= method.gate
                if anchor is not None and sure:
                    queues[c] = [*queues[c], anchor][-4:]
                    written[c] += 1
        for c in range(rows):
            mine = [row[c] for row in loops.anchors if row[c] is not None]
            if mine:
                new = sum(mine) / len(mine)
                means[c] = new if means[c] is None else method.share * new + (1 - method.share) * means[c]
        method.after_step(Stub())
        stored, full = method.memory.by_class()
        for c in range(rows):
            turn = written[c] % 4 if written[c] > 4 else 0  # where the oldest is
            order = [(turn + i) % 4 for i in range(len(queues[c]))]
            assert full[c].sum() == len(queues[c]) and method.average.known[c] == (means[c] is not None)
            if queues[c]:
                torch.testing.assert_close(stored[c][torch.tensor(order)], torch.stack(queues[c]))
                torch.testing.assert_close(
                    method.average.rows[c], means[c] if means[c] is not None else method.average.rows[c]
                )
    assert losses[:3] == [0, 0, 0] and min(losses[3:]) > 0
    if "gate" not in options:
        assert max(written) > 8  # the queue went round twice


def test_a_class_of_few_entries_has_them_for_prototypes_and_one_entry_is_none():
    method = fresh()
    for step, tags in enumerate([[1, 1, 0], [1, 0, 0], [1, 0, 0]]):
        batch, out = case(1, seed=step)
        batch.tags = torch.tensor([tags]).double()
        out.cams.data.abs_()
        method.losses(batch, {FULL: out}, Progress(0, 0))
        method.after_step(Stub())
    method.on_epoch_start(1)
    assert method.found.sum(1).tolist() == [3, 0, 0]
    assert method.contexts[0, :3].equal(method.memory.by_class()[0][0, :3])


@pytest.mark.parametrize("first", [0.5, 1.0])
def test_the_first_clustering_may_come_within_the_first_epoch(first):
    method, made = fresh(first=first), []
    for step in range(6):
        if step % 4 == 0:
            method.on_epoch_start(step // 4)
        batch, out = case(2, seed=step)
        method.losses(batch, {FULL: out}, Progress(step / 4, 0))
        before = method.contexts.clone()
        method.after_step(Stub())
        made.append(not before.equal(method.contexts))
    assert made == [False, False, first == 0.5, False, False, False] and method.found.any()


def test_a_killed_run_does_not_cluster_again_within_the_first_epoch():
    method = fresh(first=0.25)
    other = fresh(first=0.25)
    for step in range(3):
        batch, out = case(2, seed=step)
        method.losses(batch, {FULL: out}, Progress(0.25 * step, 0))
        method.after_step(Stub())
    other.load_state_dict(method.state_dict())
    batch, out = case(2, seed=9)
    for one in (method, other):
        one.losses(batch, {FULL: out}, Progress(0.75, 0))
        one.after_step(Stub())
    assert all(other.state_dict()[name].equal(x) for name, x in method.state_dict().items())


def test_inference_needs_prototypes_and_running_means_but_no_memory():
    state = inference_state(make())
    assert {"contexts", "found", "average.rows", "average.known", "project.taps.last.weight"} == set(state)


# --- properties -------------------------------------------------------------------------------------------------------


def test_as_printed_positiveness_has_no_effect():
    batch, out = case(seed=6)
    losses = [
        make(positiveness="uniform", rank="cosine", **options).losses(batch, {FULL: out}, Progress(1, 0))["self"].item()
        for options in ({}, {"gamma": 0.01}, {"gamma": 100.0}, {"measure": "l2"}, {"measure": "cosine"})
    ]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-12)
    weighted = make().losses(batch, {FULL: out}, Progress(1, 0))["self"].item()
    assert weighted != pytest.approx(losses[0], rel=1e-3)


def test_equal_weights_are_uniform():
    batch, out = case(seed=6)
    equal = make(gamma=1e9, rank="cosine").losses(batch, {FULL: out}, Progress(1, 0))["self"]
    uniform = make(positiveness="uniform", rank="cosine").losses(batch, {FULL: out}, Progress(1, 0))["self"]
    torch.testing.assert_close(equal, uniform, rtol=1e-7, atol=0)


def test_neighbours_collapse_into_one_vector():
    """sum_i w_i cos(z, p_i) = z . (sum_i w_i p_i / |p_i|) / |z|: what `_aware` gives, with the weights of the loops."""
    method = make(align="off")
    batch, out = case(seed=7)
    loops = Loops(method, {"neighbours": 3, "align": "off"}, batch, out)
    anchors, exist = method._anchors(
        method.project(out.features, (4, 5)),
        method._maps(out, torch.ones(3, 1, 4, 5)),
        batch.tags,
        torch.ones(3, 1, 4, 5),
    )
    collapsed = method._aware(anchors)
    for b in range(3):
        for c in range(3):
            assert exist[b, c] == (loops.anchors[b][c] is not None)
            if exist[b, c]:
                torch.testing.assert_close(anchors[b, c], loops.anchors[b][c])
                kept = loops.neighbours(anchors[b, c], loops.prototypes(c))
                total = sum(w for w, _ in kept)
                torch.testing.assert_close(collapsed[b, c], sum(w / total * p / p.norm() for w, p in kept))


def test_aligning_the_anchor_of_the_only_image_leaves_the_mean_of_the_prototypes():
    method = make(align="anchor")
    batch, out = case(1, seed=8)
    valid = torch.ones(1, 1, 4, 5)
    anchors, exist = method._anchors(method.project(out.features, (4, 5)), method._maps(out, valid), batch.tags, valid)
    shifted = anchors + method._shift(*method._batch_mean(anchors, exist))
    means = torch.stack([method.contexts[c][method.found[c]].mean(0) for c in range(3)])
    assert exist.any()
    torch.testing.assert_close(shifted[0][exist[0]], means[exist[0]])


def test_no_gradient_into_prototypes_memory_or_running_mean_and_into_maps_and_features_as_told():
    for options, (cam, last, projection) in {
        (): (True, False, True), (("detach", False),): (True, True, True), (("stop", "pacam"),): (True, False, False),
        (("stop", "cam"),): (False, False, True), (("detach", False), ("stop", "cam")): (False, True, True),
    }.items():  # fmt: skip
        method = make(**dict(options))
        batch, out = case(seed=9)
        method.losses(batch, {FULL: out}, Progress(1, 0))["self"].backward()
        method.after_step(Stub())
        assert not any(x.requires_grad for x in method.buffers())
        weight = method.project.taps["last"].weight
        for expected, tensor in ((cam, out.cams), (last, out.features["last"]), (projection, weight)):
            assert (tensor.grad is not None and bool(tensor.grad.any())) == expected
        assert weight.requires_grad == projection


def test_what_lies_under_padding_and_what_is_not_tagged_make_no_difference():
    method = make(background="bank", detach=False)
    batch, out = case(seed=10)
    padded(batch, out, method)
    batch.tags[:, 1] = 0
    before = method.losses(batch, {FULL: out}, Progress(1, 0))["self"]
    gradients = torch.autograd.grad(before, [out.cams, out.features["last"]])
    for gradient in gradients:
        assert not gradient[0, :, 3:].any() and not gradient[1, :, :, :2].any() and gradient.any()
    assert not gradients[0][:, 1].any()
    staged = [x.clone() for x in method.memory._staged]
    for maps in (out.cams.data, out.features["last"].data):
        maps[0, :, 3:] = 9
        maps[1, :, :, :2] = 9
    out.cams.data[:, 1] = 7
    after = method.losses(batch, {FULL: out}, Progress(1, 0))["self"]
    assert after.item() == before.item()
    assert all(a.equal(b) for a, b in zip(staged, method.memory._staged, strict=True))


def test_order_of_classes_makes_no_difference():
    order = torch.tensor([2, 0, 1])
    method, batch, (_, out) = make(), case(seed=11)[0], case(seed=11)
    before = method.losses(batch, {FULL: out}, Progress(1, 0))["self"].item()
    maps = method.cams(out, batch.tags)
    for buffer in (method.contexts, method.found, method.average.rows, method.average.known):
        buffer.copy_(buffer[order].clone())
    batch.tags = batch.tags[:, order]
    moved = CamOutput(out.logits[:, order], out.cams[:, order], out.features)
    assert method.losses(batch, {FULL: moved}, Progress(1, 0))["self"].item() == pytest.approx(before, rel=1e-12)
    torch.testing.assert_close(method.cams(moved, batch.tags), maps[:, order])


def test_features_opposite_to_the_shift_and_features_of_zeros_are_finite():
    torch.set_default_dtype(torch.float32)
    for value in (0.0, 1.0):
        method = make(detach=False, projection="identity").float()
        batch, out = case(seed=12)
        shift = method._shift(method.average.rows, method.average.known)
        out = CamOutput(out.logits.float(), out.cams.float(), {"last": out.features["last"].float()})
        method.running_mean = True
        out.features["last"].data[:] = -value * shift[0, :, None, None]
        out.features["last"].retain_grad()
        loss = method.losses(batch, {FULL: out}, Progress(1, 0))["self"]
        loss.backward()
        assert loss.isfinite() and out.features["last"].grad.isfinite().all()
        assert out.features["last"].grad.abs().max() < 1e5


def test_a_temperature_of_the_root_of_dim_keeps_many_prototypes_and_none_keeps_one():
    """The effective number of prototypes, exp of the entropy of w: channels of variance 1, 50 prototypes."""
    random = torch.Generator().manual_seed(0)
    dim = 256
    for gamma, low, high in ((None, 25, 49), (1.0, 1, 3)):
        method = CPAL(dim=dim, neighbours=50, gamma=gamma, rank="cosine")
        method.bind(Stub(), 1)
        method.found[:] = True
        method.contexts.copy_(F.pad(torch.eye(50), (0, dim - 50))[None])  # p_i / |p_i| of which w can be read off
        anchors = torch.randn(20, 1, dim, generator=random) * dim**0.5  # so is the dot product that of random vectors
        w = method._aware(anchors)[:, 0, :50]
        torch.testing.assert_close(w.sum(1), torch.ones(20))
        number = (-(w * w.clamp(min=1e-30).log()).sum(1)).exp().mean().item()
        assert low < number < high
    scales = [
        make(**o).scale for o in ({}, {"unit": True}, {"measure": "l1"}, {"measure": "l2"}, {"measure": "cosine"})
    ]
    assert scales == pytest.approx([6**0.5, 1 / 6**0.5, 6, 6**0.5, 1 / 6**0.5])


# --- with a network ---------------------------------------------------------------------------------------------------


class Net(Baseline):
    def __init__(self, classes, **taps):
        super().__init__()
        self.dims = {"last": 6}
        self.conv = nn.Conv2d(3, 6, 3, stride=8, padding=1)
        self.classifier = nn.Conv2d(6, classes, 1, bias=False)

    def encode(self, images):
        return {"last": self.conv(images).relu()}

    def classify(self, features, images):
        cams = self.classifier(features["last"])
        return CamOutput(cams.mean((2, 3)), cams, features)

    def losses(self, batch, outs, progress):
        return {"cls": F.multilabel_soft_margin_loss(outs[FULL].logits, batch.tags)}


class Other(CPAL):
    """Another method with a map to export."""


def test_training_on_a_network_and_what_is_exported():
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    objective = Objective(Net(3), {"cpal": CPAL(**SMALL)}, num_classes=3)
    batch, _ = case(4, 3)
    batch.images, batch.tags = torch.randn(4, 3, 32, 40), batch.tags.float()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    values = []
    for step in range(6):
        if step % 2 == 0:
            objective.on_epoch_start(step // 2)
        losses = objective(batch, Progress(step / 2, 0.5))
        assert list(losses) == ["net/cls", "cpal/self"]
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        objective.after_step()
        values.append(losses["cpal/self"].item())
    assert values[:2] == [0, 0] and min(values[2:]) > 0
    maps, _ = objective.eval().infer(batch.images, batch.tags)
    out = objective.look(batch.images)
    assert maps.equal(objective.methods["cpal"].cams(out, batch.tags)) and not torch.allclose(maps, out.best)


def test_what_cannot_work_is_said():
    for options, word in [
        ({"bank": 0}, "bank"), ({"neighbours": 0}, "neighbours"), ({"dim": 0}, "dim"), ({"gate": 1.5}, "gate"),
        ({"threshold": 1.0}, "threshold"), ({"first": 0.0}, "first"), ({"running": 0.0}, "running"),
        ({"gamma": 0.0}, "gamma"),
        ({"projection": "identity", "stop": "cam"}, "nothing would learn"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=word):
            CPAL(**options)
    with pytest.raises(UserError, match="hierarchical reads c2, c3, c4, c5; this network has no c2"):
        CPAL(projection="hierarchical").bind(Net(3), 3)
    with pytest.raises(UserError, match="multiple of 6"):
        CPAL(projection="hierarchical", dim=16).bind(Stub(), 3)
    with pytest.raises(UserError, match="reads last; this network has no last"):
        CPAL().bind(Stub({"c4": 8}), 3)
    with pytest.raises(UserError, match=r"one and two cannot be combined, both define cams\(\); keep one"):
        Objective(Net(3), {"one": CPAL(), "two": Other()}, num_classes=3)
