"""RCA against the same by loops (loop_rca), in every reading, and what it must keep."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from loop_rca import loop_attend, loop_learned, loop_losses
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tag2mask.core import FULL, Baseline, Batch, CamOutput, Objective, Progress, inference_state
from tag2mask.core import load_inference_state as load
from tag2mask.errors import UserError
from tag2mask.methods.rca import RCA
from tag2mask.ops.aggregation import towers
from tag2mask.ops.kmeans import kmeans
from tag2mask.ops.regions import at, gathered, highest
from tag2mask.ops.seed import seed_of

CHANNELS, CLASSES = 6, 4
RELEASED = {
    "contrast": 0.01, "aggregation": "released", "heads": "towers", "capacity": 5, "start": "random", "query": True,
    "masks": "shares", "cumulative_masks": True, "partners": "any", "warmup": 2.0, "images": "sum",
}  # fmt: skip
OTHERS = [
    {"start": "copy"}, {"capacity": 3, "start": "copy", "momentum": 0.0}, {"gate_from": "coarse", "gate": -0.02},
    {"denominator": "all"}, {"denominator": "balanced"}, {"denominator": "balanced", "capacity": 4},
    {"exclude_own": True}, {"exclude_own": True, "denominator": "all"},
    {"exclude_own": True, "denominator": "balanced"}, {"partners": "none"}, {"gate": 0.3}, {"mix": 1},
    {"aggregation": "printed"}, {"aggregation": "none"},
]  # fmt: skip
READINGS = (
    {"paper": {}, "released": RELEASED}
    | {f"{key}={value}": {key: value} for key, value in RELEASED.items()}
    | {" ".join(f"{key}={value}" for key, value in options.items()): options for options in OTHERS}
)
every_reading = pytest.mark.parametrize("reading", READINGS)


class Net(Baseline):
    """Features and maps are what the pixels say."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.dims = {"last": CHANNELS}
        self.conv = nn.Conv2d(3, CHANNELS, 3, stride=8, padding=1)
        self.classifier = nn.Conv2d(CHANNELS, classes, 1, bias=False)

    def encode(self, images):
        return {"last": self.conv(images).relu()}

    def classify(self, features, images):
        cams = self.classifier(features["last"])
        return CamOutput(cams.mean((2, 3)), cams, features)

    def losses(self, batch, outs, progress):
        return {"cls": F.multilabel_soft_margin_loss(outs[FULL].logits, batch.tags)}


def tags_of(images, classes=CLASSES, seed=0):
    """About half of the classes, always the first; nothing shows the last class of several."""
    tags = (torch.rand(images, classes, generator=torch.Generator().manual_seed(seed)) < 0.6).float()
    tags[:, 0] = 1
    tags[:, -1] = classes == 1
    return tags


def make(options, images=5, classes=CLASSES, filled=3):
    """RCA on `Net`, double precision; the memory holds a few rounds of vectors, of half of the pairs."""
    torch.manual_seed(0)
    method = RCA(**({"gate": 0.5, "clusters": 3, "width": 5} | options)).double()
    method.bind(Net(classes), classes)
    method.double().remember(tags_of(images, classes))
    for seed in range(filled):
        random = torch.Generator().manual_seed(seed)
        vectors = torch.randn(images, classes, CHANNELS, generator=random).double()
        present = (torch.rand(images, classes, generator=random) < 0.5) & (tags_of(images, classes) > 0)
        method.memory.stage(vectors, present, torch.arange(images))
        method.memory.write()
    method.on_epoch_start(1)
    return method.double()


def case(images=5, classes=CLASSES, seed=0):
    """A batch on a grid of 4 x 5 and its output."""
    random = torch.Generator().manual_seed(seed)
    batch = Batch(
        torch.zeros(images, 3, 32, 40), tags_of(images, classes), torch.arange(images), torch.ones(images, 1, 32, 40)
    )
    plain = torch.randn(images, CHANNELS, 4, 5, generator=random, dtype=torch.float64).requires_grad_()
    logits = torch.randn(images, classes, generator=random, dtype=torch.float64).requires_grad_()
    return batch, CamOutput(logits, torch.zeros(images, classes, 4, 5), {"plain": plain, "last": plain})


def run(method, batch, out, epoch=2.0, seed=5):
    return method.losses(batch, {FULL: out}, Progress(epoch, 0, seed))


def assert_equal(method, batch, out, epoch=2.0, seed=5):
    """Losses, gradients, and what is put into the memory; returns the losses."""
    got = run(method, batch, out, epoch, seed)
    wanted, writes = loop_losses(method, batch, out, epoch, seed)
    inputs = [out.features["plain"], *method.heads.parameters()]
    assert list(got) == list(wanted)
    for name in got:
        torch.testing.assert_close(got[name], wanted[name].double(), atol=1e-8, rtol=1e-8, msg=name)
        if wanted[name].requires_grad:
            both = [torch.autograd.grad(x[name], inputs, retain_graph=True, allow_unused=True) for x in (got, wanted)]
            for mine, theirs in zip(*both, strict=True):
                theirs = torch.zeros_like(mine) if theirs is None and mine is not None else theirs
                mine = torch.zeros_like(theirs) if mine is None and theirs is not None else mine
                assert mine is None or torch.allclose(mine, theirs, atol=1e-8, rtol=1e-6), name
        elif got[name].requires_grad:
            gradients = torch.autograd.grad(got[name], inputs, retain_graph=True, allow_unused=True)
            assert not any(g.any() for g in gradients if g is not None)
    vectors, present, classes, _ = method.memory._staged
    staged = {(b, classes[b, m].item()): vectors[b, m] for b, m in present.nonzero().tolist()}
    assert set(staged) == set(writes)
    for name, vector in writes.items():
        torch.testing.assert_close(staged[name], vector, atol=1e-10, rtol=1e-10)
    return got


@every_reading
def test_it_is_what_loops_compute(reading):
    method = make(READINGS[reading])
    losses = assert_equal(method, *case())
    assert losses["contrast"] > 0 and losses["coarse"] > 0
    before = method.memory.writes.clone()
    method.after_step(None)
    assert (method.memory.writes != before).any()


@pytest.mark.parametrize("reading", ["paper", "released"])
def test_nothing_is_contrasted_before_the_warm_up_is_over(reading):
    method = make(READINGS[reading])
    losses = assert_equal(method, *case(), epoch=method.warmup - 0.01)
    assert losses["contrast"] == 0 and losses["coarse"] > 0
    assert run(method, *case(), epoch=method.warmup)["contrast"] > 0


def absent(method, batch, out):
    batch.tags[:, 1] = 0


def no_tags(method, batch, out):
    batch.tags[:] = 0


def an_image_without_tags(method, batch, out):
    batch.tags[2] = 0


def one_tag_for_all(method, batch, out):
    batch.tags[:, 1:] = 0


def padded(method, batch, out):
    batch.valid[0, :, 24:] = 0
    batch.valid[1, :, :, :16] = 0
    batch.valid[3] = 0


def map_of_zeros(method, batch, out):
    method.heads.coarse.weight.data[0] = 0


def nothing_remembered(method, batch, out):
    method.memory.writes.zero_()
    method.memory.rows.zero_()


def a_class_not_remembered(method, batch, out):
    empty = method.memory.class_of == 0
    method.memory.writes[empty] = 0
    method.memory.rows[empty] = 0


def one_class_remembered(method, batch, out):
    empty = method.memory.class_of != 0
    method.memory.writes[empty] = 0


def twice_in_a_batch(method, batch, out):
    batch.index[1:3] = 0
    batch.tags[1:3] = batch.tags[0]


EDGES = [
    absent, no_tags, an_image_without_tags, one_tag_for_all, padded, map_of_zeros, nothing_remembered,
    a_class_not_remembered, one_class_remembered, twice_in_a_batch,
]  # fmt: skip


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capacity": 3},
        {"exclude_own": True},
        {"denominator": "all"},
        {"denominator": "balanced"},
        {"partners": "any"},
    ],
    ids=str,
)
def test_edges(edge, options):
    method, (batch, out) = make(options), case()
    edge(method, batch, out)
    losses = assert_equal(method, batch, out)
    alone = {one_class_remembered} if options.get("denominator") != "all" else set()
    nothing = edge in {no_tags, nothing_remembered} | alone
    assert (losses["contrast"] == 0) == nothing
    method.after_step(None)
    assert method.memory.rows.isfinite().all()


@pytest.mark.parametrize("images, classes", [(1, 4), (5, 1), (1, 1), (2, 2)])
def test_one_image_and_one_class(images, classes):
    assert_equal(make({}, images, classes), *case(images, classes))


def test_a_training_set_without_any_tag():
    method = RCA()
    method.bind(Net(), CLASSES)
    method.double().remember(torch.zeros(5, CLASSES))
    method.on_epoch_start(1)
    batch, out = case()
    losses = run(method, batch, out)
    assert losses["contrast"] == 0 and losses["coarse"] > 0
    sum(losses.values()).backward()
    method.after_step(None)
    assert out.features["plain"].grad.isfinite().all() and not method.found.any()


def test_room_for_the_regions_of_the_image_with_most_tags():
    method = make({})
    assert method.most == tags_of(5).sum(1).max()
    with pytest.raises(UserError, match="remember"):
        method = RCA()
        method.bind(Net(), CLASSES)
        batch, out = case()
        run(method, batch, CamOutput(out.logits.float(), out.cams, {"plain": out.features["plain"].float()}))


def test_the_memory_is_a_moving_average_of_confident_regions():
    """Eq. 3, and nothing but the tagged, confident pairs changes."""
    method, (batch, out) = make({"gate": 0.6}), case()
    rows, times = method.memory.rows.clone(), method.memory.writes.clone()
    _, writes = loop_losses(method, batch, out, 2.0, 5)
    run(method, batch, out)
    assert torch.equal(method.memory.rows, rows)
    method.after_step(None)
    slots = method.memory.slots_of(batch.index)
    changed = {slots[b, k].item(): vector for (b, k), vector in writes.items()}
    assert 0 < len(changed) < batch.tags.sum()
    for slot in range(len(rows)):
        wanted = 0.99 * rows[slot] + 0.01 * changed[slot] if slot in changed else rows[slot]
        torch.testing.assert_close(method.memory.rows[slot], wanted, atol=1e-12, rtol=1e-10)
        assert method.memory.writes[slot] == times[slot] + (slot in changed)


class TestAggregation:
    @pytest.mark.parametrize("aggregation", ["scaled", "printed"])
    @pytest.mark.parametrize("filled", [0, 1, 3], ids=["no prototype", "some", "more"])
    def test_every_pixel_reads_the_prototypes(self, aggregation, filled):
        method = make({"aggregation": aggregation}, filled=filled)
        plain = case()[1].features["plain"]
        adapted = method.adapt({"last": plain, "c4": plain * 2})
        assert set(adapted) == {"plain", "last", "c4"} and adapted["plain"] is plain
        wanted = torch.cat([plain, loop_attend(method, plain)], dim=1)
        torch.testing.assert_close(adapted["last"], wanted, atol=1e-10, rtol=1e-8)
        assert bool(adapted["last"][:, CHANNELS:].any()) == bool(method.found.any()) == (filled > 0)
        draw = torch.randn_like(wanted)
        both = [torch.autograd.grad((x * draw).sum(), plain)[0] for x in (adapted["last"], wanted)]
        torch.testing.assert_close(*both, atol=1e-10, rtol=1e-8)

    @pytest.mark.parametrize("start", ["zero", "random"])
    def test_as_released(self, start):
        method = make({"aggregation": "released", "start": start})
        for name, parameter in method.attention.named_parameters():
            nn.init.normal_(parameter, std=0.5) if "bias" not in name else nn.init.uniform_(parameter)
        assert method.found.any() and not method.found.all()
        plain = case()[1].features["plain"]
        adapted, wanted = method.adapt({"last": plain})["last"], loop_learned(method, plain)
        torch.testing.assert_close(adapted, wanted, atol=1e-9, rtol=1e-8)
        inputs = [plain, *method.attention.parameters()]
        draw = torch.randn_like(wanted)
        both = [torch.autograd.grad((x * draw).sum(), inputs) for x in (adapted, wanted)]
        for mine, theirs in zip(*both, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=1e-7)

    def test_without_a_softmax_it_is_linear(self):
        method = make({"aggregation": "released"})
        zero, one, two = torch.zeros(1, CHANNELS, 4, 5).double(), *torch.randn(2, 1, CHANNELS, 4, 5).double()
        at = [method.adapt({"last": x})["last"] for x in (zero, one, two, one + two)]
        torch.testing.assert_close(at[3] - at[0], (at[1] - at[0]) + (at[2] - at[0]))

    @pytest.mark.parametrize("options, more", [({}, CHANNELS), ({"aggregation": "none"}, 0), (RELEASED, 0)])
    def test_the_classifier_reads_what_there_is(self, options, more):
        net = Net()
        objective = Objective(net, {"rca": RCA(**({"width": 5} | options))}, num_classes=CLASSES)
        assert net.dims["last"] == CHANNELS + more and net.widened == more
        assert objective.look(torch.randn(2, 3, 32, 40)).cams.shape == (2, CLASSES, 4, 5)

    def test_prototypes_are_the_centres_of_the_memory_from_the_second_epoch_on(self):
        method = make({"clusters": 2}, images=12)
        method.prototypes.zero_(), method.found.zero_()
        method.on_epoch_start(0)
        assert not method.found.any()
        method.on_epoch_start(3)
        centres, found = kmeans(*method.memory.by_class(), 2, seed=seed_of(3))
        assert torch.equal(method.prototypes, centres) and torch.equal(method.found, found)
        assert found.any(1).tolist() == [True, True, True, False]
        for k in range(3):
            rows, valid = (x[k] for x in method.memory.by_class())
            if valid.sum() > 2:  # centres of clusters are not entries
                assert not (method.prototypes[k][:, None] == rows[valid]).all(-1).all()

    @pytest.mark.parametrize("start, there", [("zero", False), ("copy", False), ("random", True)])
    def test_before_that_there_are_none_or_random_ones(self, start, there):
        method = RCA(start=start)
        method.bind(Net(), CLASSES)
        method.on_epoch_start(0)
        assert method.found.all() == there == method.prototypes.any()


class TestTowers:
    def test_every_class_has_its_own(self):
        """One tower is three 3x3 convolutions and a 1x1; it reads what the classifier would."""
        net = Net()
        method = RCA(heads="towers", width=5)
        method.bind(net, CLASSES)
        convs = [m for m in net.double().classifier if isinstance(m, nn.Conv2d)]
        x = torch.randn(2, 2 * CHANNELS, 4, 5).double()
        wanted = []
        for k in range(CLASSES):
            y, own = x, slice(k * 5, (k + 1) * 5)
            for conv in convs[:3]:
                y = F.conv2d(y, conv.weight[own], conv.bias[own], padding=1).relu()
            wanted.append(F.conv2d(y, convs[3].weight[k : k + 1], convs[3].bias[k : k + 1]))
        torch.testing.assert_close(net.classifier(x), torch.cat(wanted, dim=1))

    def test_the_released_sizes(self):
        """141.6 million parameters on VOC."""
        with torch.device("meta"):
            head = towers(512, 512, 20, count=20)
        assert sum(p.numel() for p in head.parameters()) == pytest.approx(141.6e6, rel=1e-3)

    def test_the_coarse_head_is_one_deep_tower(self):
        method = make({"heads": "towers"})
        convs = [m for m in method.heads.coarse if isinstance(m, nn.Conv2d)]
        shapes = [(5, CHANNELS, 3, 3), (5, 5, 3, 3), (5, 5, 3, 3), (CLASSES, 5, 1, 1)]
        assert [conv.weight.shape for conv in convs] == shapes
        assert all(0.002 < conv.weight.std() < 0.03 for conv in convs)


class TestMixing:
    def test_weights_are_of_a_beta_distribution(self):
        """Mean 1/2 and variance 1 / (4 (2 beta + 1)), and symmetric."""
        for mix in (1, 2, 8):
            method = make({"mix": mix}, images=60)
            tags = torch.zeros(60, CLASSES)
            tags[torch.arange(60), torch.arange(60) % 2] = 1
            omega = torch.cat([self._mixing(method, tags, seed)[0] for seed in range(40)]).double()
            assert omega.mean() == pytest.approx(0.5, abs=0.01)
            assert omega.var() == pytest.approx(1 / (4 * (2 * mix + 1)), rel=0.1)
            assert ((omega - 0.5) ** 3).mean().abs() < 0.002

    @pytest.mark.parametrize("partners", ["other", "any"])
    def test_partners_are_drawn_evenly(self, partners):
        """First an image, then one of its classes; with "other" of another image and of a class this one has not."""
        tags = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
        method = make({"partners": partners})
        counts = torch.zeros(4, 3)
        for seed in range(1500):
            _, partner = self._mixing(method, tags, seed)
            place = partner.view(4, 3)[0, 0]  # of the one region of image 0
            counts[place // 3, place % 3] += 1 / 1500
        if partners == "other":
            wanted = torch.tensor([[0, 0, 0], [0, 0.25, 0.25], [0.5, 0, 0], [0, 0, 0]])
        else:
            wanted = torch.tensor([[0.25, 0, 0], [1 / 12, 1 / 12, 1 / 12], [0.25, 0, 0], [0.25, 0, 0]])
        assert torch.allclose(counts, wanted, atol=0.05)

    def _mixing(self, method, tags, seed):
        """Regions are all that is tagged, by the index of the class."""
        classes = highest(-torch.arange(CLASSES).float().expand(len(tags), -1), tags, int(tags.sum(1).max()))
        regions = gathered(torch.zeros(*classes.shape, CHANNELS), classes, at(tags > 0, classes), classes)
        draws = torch.Generator().manual_seed(seed)
        return method._mixing(regions, regions.exist, tags, draws)


def test_other_seeds_are_other_draws():
    method, (batch, out) = make({}), case()
    values = {run(method, batch, out, seed=seed)["contrast"].item() for seed in (0, 0, 1, 2)}
    assert len(values) == 3


def test_the_memory_gets_no_gradient_and_partners_do():
    method, (batch, out) = make({}), case()
    plain = out.features["plain"]
    batch.tags[:] = torch.eye(CLASSES)[[0, 1, 2, 0, 1]]
    run(method, batch, out)["contrast"].backward()
    assert (plain.grad.flatten(1).norm(dim=1) > 0).all()
    assert out.logits.grad is None
    assert not any(x.requires_grad for x in method.memory.buffers())


def test_scale_of_features_does_not_matter():
    method, (batch, out) = make({}), case()
    tripled = CamOutput(out.logits, out.cams, {"plain": 3 * out.features["plain"].detach()})
    assert run(method, batch, tripled)["contrast"].item() == pytest.approx(run(method, batch, out)["contrast"].item())


@pytest.mark.parametrize(
    "options", [{}, RELEASED, {"aggregation": "none"}], ids=["paper", "released", "no aggregation"]
)
def test_everything_that_can_be_trained_is(options):
    torch.manual_seed(0)
    objective = Objective(Net(), {"rca": RCA(**({"gate": 0.0, "width": 5} | options))}, num_classes=CLASSES)
    objective.remember(tags_of(5))
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.01)
    batch = Batch(torch.randn(5, 3, 32, 40), tags_of(5), torch.arange(5), torch.ones(5, 1, 32, 40))
    for epoch in range(4):
        objective.on_epoch_start(epoch)
        optimizer.zero_grad()
        losses = objective(batch, Progress(float(epoch), epoch / 4, epoch))
        sum(losses.values()).backward()
        optimizer.step()
        objective.after_step()
    assert set(losses) == {"net/cls", "rca/contrast", "rca/coarse"} and all(x > 0 for x in losses.values())
    assert [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_inference_needs_prototypes_and_no_memory():
    def objective():
        torch.manual_seed(0)
        return Objective(Net(), {"rca": RCA(gate=0.0, query=True)}, num_classes=CLASSES)

    trained = objective()
    trained.remember(tags_of(5))
    images = torch.randn(5, 3, 32, 40)
    batch = Batch(images, tags_of(5), torch.arange(5), torch.ones(5, 1, 32, 40))
    for epoch in range(3):
        trained.on_epoch_start(epoch)
        trained(batch, Progress(float(epoch), 0, 0))
        trained.after_step()
    kept = inference_state(trained)
    assert {name for name in kept if name.startswith("methods.")} == {"methods.rca.prototypes", "methods.rca.found"}
    other = objective()
    untrained = other.infer(images, batch.tags)[0]
    load(other, kept)
    assert torch.equal(other.infer(images, batch.tags)[0], trained.infer(images, batch.tags)[0])
    assert not torch.equal(untrained, trained.infer(images, batch.tags)[0])


@pytest.mark.parametrize("reading", ["paper", "released"])
def test_a_step_never_reads_a_value(reading):
    """Tensors without values: whoever looks at one, and would wait for a GPU, fails."""
    method, (batch, out) = make(READINGS[reading]), case()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = Batch(*(mode.from_tensor(x) for x in (batch.images, batch.tags, batch.index, batch.valid)))
        plain, logits = mode.from_tensor(out.features["plain"]), mode.from_tensor(out.logits)
        losses = run(method, fake, CamOutput(logits, out.cams, {"plain": plain}))
        sum(losses.values()).backward()
        with pytest.raises(DataDependentOutputException):
            losses["contrast"].item()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"clusters": 0}, {"mix": 0}, {"width": 0},
        {"capacity": 0}, {"capacity": 5, "exclude_own": True},
    ],
)  # fmt: skip
def test_values_out_of_range(options):
    with pytest.raises(UserError, match="rca"):
        RCA(**options)


def test_a_network_that_cannot_be_trained_is_refused():
    net = Net()
    net.requires_grad_(False)
    with pytest.raises(UserError, match="rca trains the features 'last'; net has none"):
        RCA().bind(net, CLASSES)


def test_temperature_is_that_of_the_formula():
    """Two memories at right angles: one region on its own, no partner, log(1 + e^(-1 / tau))."""
    method = RCA(partners="none", gate=2.0, contrast=1.0)
    net = Net(2)
    method.bind(net, 2)
    method.remember(torch.eye(2))
    axes = torch.zeros(2, 2, CHANNELS)
    axes[0, 0, 0] = axes[1, 1, 1] = 1
    method.memory.stage(axes, torch.eye(2) > 0, torch.arange(2))
    method.memory.write()
    features = torch.zeros(1, CHANNELS, 4, 5)
    features[:, 0] = torch.rand(1, 4, 5) + 1
    batch = Batch(torch.zeros(1, 3, 32, 40), torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.ones(1, 1, 32, 40))
    out = CamOutput(torch.zeros(1, 2), torch.zeros(1, 2, 4, 5), {"plain": features})
    assert run(method, batch, out)["contrast"].item() == pytest.approx(math.log1p(math.exp(-1 / 0.07)), rel=1e-3)
