"""RCM and MAM against the same by loops (loop_rcm_mam), in every reading, and what they must keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from loop_rcm_mam import loop_rcm_mam
from torch import nn

from tag2mask import schema
from tag2mask.core import FULL, Baseline, Batch, CamOutput, Method, Objective, Progress, inference_state
from tag2mask.errors import UserError
from tag2mask.methods.rcm_mam import RCMMAM

CHANNELS, DIM = 6, 5
READINGS = {
    "paper": {},
    "rcm=literal": {"rcm": "literal"},
    "rcm=direct": {"rcm": "direct"},
    "direct_by_pixel": {"rcm": "direct", "rcm_mean": "pixels", "background_weight": 0.3},
    "rcm_mean=pixels": {"rcm_mean": "pixels"},
    "rcm_mean=sum": {"rcm_mean": "sum"},
    "prototype_mean=pixels": {"prototype_mean": "pixels"},
    "background_weight": {"background_weight": 0.3},
    "no_background": {"background_weight": 0.0, "rcm_mean": "pixels"},
    "background_threshold": {"threshold": 0.6, "background_threshold": 0.4},
    "renormalise": {"threshold": 0.5, "renormalise": False},
    "temperature": {"temperature": 0.1, "rcm_weight": 0.3, "mam_weight": 2.0},
    "module=mmm": {"module": "mmm"},
    "module=smm": {"module": "smm"},
    "distance": {"attention": "distance"},
    "normalised": {"attention": "normalised"},
    "softmax": {"attention": "softmax"},
    "clamp": {"clamp": False},
    "attention_gradient": {"attention_gradient": True},
    "normalised_gradient": {"attention_gradient": True, "attention": "normalised", "clamp": False},
    "mam_mean=sum": {"mam_mean": "sum"},
    "cls_others": {"cls_others": 0.5},
    "two_scales": {"scales": (1.0, 1.5)},
    "one_scale": {"scales": (1.0,)},
    "beside": {"head": "beside"},
    "printed": {
        "rcm": "literal", "rcm_mean": "sum", "prototype_mean": "pixels", "clamp": False, "mam_mean": "sum",
        "attention_gradient": True, "renormalise": False,
    },
}  # fmt: skip


class Net(Baseline):
    """A cell of 8 x 8 pixels is a feature, and classes are directions; with background and refined map if asked for."""

    def __init__(self, classes, *, background=False, refined=False):
        super().__init__()
        self.dims = {"last": CHANNELS}
        self.conv = nn.Conv2d(3, CHANNELS, 1)
        self.classifier = nn.Conv2d(CHANNELS, classes + background, 1, bias=False)
        self.with_background, self.with_refined = background, refined

    def encode(self, images):
        return {"last": self.conv(F.avg_pool2d(images, 8)).relu()}

    def classify(self, features, images):
        maps = self.classifier(features["last"])
        cams, background = (maps[:, :-1], maps[:, -1:]) if self.with_background else (maps, None)
        refined = cams.flip(1).relu() if self.with_refined else None
        return CamOutput(cams.mean((2, 3)), cams, features, refined=refined, background=background)

    def losses(self, batch, outs, progress):
        return {"cls": F.multilabel_soft_margin_loss(outs[FULL].logits, batch.tags)}


def make(classes=4, net=None, **options):
    """A method on a SupportNet of its own, with its prototypes still empty."""
    torch.manual_seed(0)
    method = RCMMAM(**({"dim": DIM, "mam_epoch": 2} | options))
    method.bind(net or Net(classes), classes)
    for p in method.support.parameters():
        p.add_(0.7 * torch.randn_like(p))
    return method.double()


def case(method, images=3, classes=4, seed=0, size=(32, 40)):
    """A batch on a grid of 4 x 5 and what a network says about it: maps and features that require gradients."""
    random = torch.Generator().manual_seed(seed)
    tags = (torch.rand(images, classes, generator=random) < 0.6).float()
    tags[:, 0] = 1
    pixels = F.interpolate(
        torch.randn(images, 3, 4, 5, generator=random, dtype=torch.float64), size=size, mode="bilinear"
    )
    batch = Batch(pixels, tags, torch.arange(images), torch.ones(images, 1, *size, dtype=torch.float64))
    outs = {}
    for view in method.views:
        grid = [side // 8 for side in view(batch.images).shape[2:]]
        cams = torch.randn(images, classes, *grid, generator=random, dtype=torch.float64) + 0.5
        last = torch.randn(images, DIM if method.inside else CHANNELS, *grid, generator=random, dtype=torch.float64)
        outs[view] = leaf(cams, last.relu())
    return batch, outs


def leaf(cams, last, **more):
    cams = cams.detach().clone().requires_grad_()
    more = {name: x.detach().clone().requires_grad_() for name, x in more.items()}
    return CamOutput(cams.mean((2, 3)), cams, {"last": last.detach().clone().requires_grad_()}, **more)


def x_of(method, last, weight):
    """X of features, without the method: [B D h w]."""
    return last if method.inside else torch.einsum("dk,bkhw->bdhw", weight[:, :, 0, 0], last).relu()


def taught_by(method, batch):
    """What the SupportNet says, from its weights alone; features["x"] is X."""
    net, head, found = method.support.net.model, method.support.head.model.weight, []
    for view in method.views:
        images = batch.images
        if view.scale != 1:
            size = [int(side * view.scale) for side in images.shape[2:]]
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        features = net.encode(images)
        x = torch.einsum("dk,bkhw->bdhw", head[:, :, 0, 0], features["last"]).relu()
        out = net.classify({"last": x} if method.inside else features, images)
        out.features = {"x": x}
        found.append(out)
    return found


def assert_equal(method, batch, outs, epoch=3.0):
    """Losses, gradients and the prototypes after a step equal those of the loops."""
    rows, known = method.support.prototypes.rows, method.support.prototypes.known
    bank = {c: rows[c].clone() for c in range(len(rows)) if known[c]}
    got = method.losses(batch, outs, Progress(epoch, 0))
    for out in outs.values():
        out.features["x"] = x_of(method, out.features["last"], method.project.weight)
    wanted, bank = loop_rcm_mam(method, batch, outs, taught_by(method, batch), bank, epoch)
    inputs = [t for out in outs.values() for t in (out.cams, out.features["last"], out.background) if t is not None]
    inputs.append(method.project.weight)
    assert list(got) == list(wanted)
    for name in got:
        torch.testing.assert_close(got[name], wanted[name].double(), atol=1e-9, rtol=1e-9)
        if wanted[name].requires_grad:
            found, expected = (
                torch.autograd.grad(x[name], inputs, retain_graph=True, allow_unused=True) for x in (got, wanted)
            )
            for t, *both in zip(inputs, found, expected, strict=True):
                mine, other = (torch.zeros_like(t) if gradient is None else gradient for gradient in both)
                torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-7)
    method.support.prototypes.write()
    if method.rcm != "direct":
        assert {c for c in range(len(known)) if known[c]} == set(bank)
        for c, row in bank.items():
            torch.testing.assert_close(rows[c], row)
    return got


def padded(batch, outs):
    batch.valid[0, :, 24:] = 0
    batch.valid[1, :, :, :16] = 0


def absent(batch, outs):
    batch.tags[:, 2] = 0


def no_tags(batch, outs):
    batch.tags[:] = 0


def one_tag_each(batch, outs):
    batch.tags[:] = torch.eye(batch.tags.shape[1])[: len(batch.tags)]


def all_padded(batch, outs):
    batch.valid[1] = 0


def empty_map(batch, outs):
    for out in outs.values():
        out.cams.data[:, 0] = -1


@pytest.mark.parametrize("reading", READINGS)
def test_every_reading_equals_the_loops_over_several_steps(reading):
    method = make(**READINGS[reading])
    for seed in (0, 1):
        batch, outs = case(method, seed=seed)
        padded(batch, outs)
        if seed:
            absent(batch, outs)  # its prototype is that of the step before
        losses = assert_equal(method, batch, outs)
        assert losses["mam"] > 0 and losses["rcm"] != 0
    if method.rcm != "direct":
        assert method.support.prototypes.known[3] or reading == "renormalise"


@pytest.mark.parametrize("reading", ["paper", "rcm=direct", "printed"])
@pytest.mark.parametrize("edit", [padded, absent, no_tags, one_tag_each, all_padded, empty_map])
def test_edges_equal_the_loops(reading, edit):
    method = make(**READINGS[reading])
    batch, outs = case(method, seed=2)
    edit(batch, outs)
    losses = assert_equal(method, batch, outs)
    if edit is no_tags:
        assert losses["mam"] == 0


@pytest.mark.parametrize("reading", ["paper", "rcm=direct", "beside"])
@pytest.mark.parametrize(("images", "classes"), [(1, 3), (2, 1), (1, 1)])
def test_sizes_equal_the_loops(reading, images, classes):
    method = make(classes, **READINGS[reading])
    assert_equal(method, *case(method, images, classes, seed=3))


@pytest.mark.parametrize("kind", ["zero", "tied"])
def test_a_support_net_without_activation_and_one_with_ties(kind):
    method = make()
    weight = method.support.net.model.classifier.weight.data
    if kind == "zero":
        weight.copy_(-weight.abs())  # features are not negative: every map is zero
    else:
        weight[1] = weight[0]  # the first of equal classes has the pixel
    batch, outs = case(method)
    batch.tags[:] = 1
    assert_equal(method, batch, outs)
    labels = method._regions(taught_by(method, batch), batch.tags, torch.ones(3, 4, 5).bool())
    assert not labels.any() if kind == "zero" else (labels != 2).all() and (labels == 1).any()


@pytest.mark.parametrize("reading", ["paper", "rcm=direct"])
@pytest.mark.parametrize("given", ["background", "refined"])
def test_baselines_with_a_background_and_with_a_refined_map(reading, given):
    method = make(net=Net(4, **{given: True}), **READINGS[reading])
    batch, outs = case(method)
    for view, out in outs.items():
        more = {"background": out.cams[:, :1] * 0.3} if given == "background" else {}
        outs[view] = leaf(out.cams, out.features["last"], **more)
    assert_equal(method, batch, outs)


@pytest.mark.parametrize("reading", ["paper", "rcm=direct"])
def test_the_grid_of_the_image(reading):
    method = make(2, grid="image", **READINGS[reading])
    batch, outs = case(method, images=2, classes=2, size=(16, 16))
    batch.valid[0, :, :5] = 0
    assert_equal(method, batch, outs)


# What the equations say beyond their values.


def test_attention_is_between_one_and_two_over_three():
    method = make()
    own, theirs = torch.rand(2, 3, 2, 4, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own[0, 0, 0], theirs[1, 1, 1] = 0, 0
    xi = 3 * method._attention(own, theirs)
    assert xi.shape == (2, 4, 3, 3) and (xi >= 1).all() and (xi <= 2).all() and (xi == 2).any()
    assert torch.allclose(3 * method._attention(own, own).diagonal(dim1=2, dim2=3)[1], torch.ones(4, 3).double())


def test_the_target_is_the_map_itself_where_all_scales_agree():
    one = torch.rand(1, 2, 4, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every, valid, tags = one.expand(3, -1, -1, -1, -1), torch.ones(2, 4, 5).bool(), torch.ones(2, 4)
    for options in ({}, {"module": "mmm"}, {"module": "smm"}, {"attention": "normalised"}, {"attention": "softmax"}):
        assert make(**options)._mam(every, every, tags, valid).item() == pytest.approx(0, abs=1e-12)
    away = make(attention="distance", mam_mean="sum")._mam(every, every, tags, valid)
    assert away.item() == pytest.approx(3 * one.sum().item() / 2)  # 1 - cos leaves nothing of what agrees


def test_mam_with_equal_directions_is_mmm():
    draws = torch.Generator().manual_seed(0)
    theirs = torch.rand(1, 2, 4, 4, 5, generator=draws, dtype=torch.float64) * torch.rand(
        3, 2, 4, 1, 1, generator=draws, dtype=torch.float64
    )
    own, valid, tags = theirs * 0.5, torch.ones(2, 4, 5).bool(), torch.ones(2, 4)
    mam, mmm = (make(module=module)._mam(own, theirs, tags, valid).item() for module in ("mam", "mmm"))
    assert mam == pytest.approx(mmm) and mam > 0


def test_rcm_is_the_cross_entropy_of_cosines():
    method = make(rcm_mean="pixels")
    batch, outs = case(method)
    batch.tags[:] = 1
    loss = method.losses(batch, outs, Progress(0, 0))["rcm"]
    rows, known = method.support.prototypes._next
    labels = method._regions(taught_by(method, batch), batch.tags, torch.ones(3, 4, 5).bool())
    logits = torch.einsum(
        "bdhw,cd->bchw", F.normalize(outs[FULL].features["last"], dim=1), F.normalize(rows, dim=1)[known]
    )
    places = torch.where(known, known.cumsum(0) - 1, -1)
    assert loss.item() == pytest.approx(F.cross_entropy(logits / 0.5, places[labels]).item())


def test_rcm_does_not_feel_the_length_of_features():
    method = make()
    batch, outs = case(method)
    before = method.losses(batch, outs, Progress(0, 0))["rcm"].item()
    outs[FULL].features["last"].data *= 3 + torch.arange(3).view(3, 1, 1, 1)
    method.support.head.model.weight.data *= 7
    method.support.net.model.classifier.weight.data *= 2
    assert method.losses(batch, outs, Progress(0, 0))["rcm"].item() == pytest.approx(before)


def test_a_class_that_was_never_seen_is_no_negative_and_one_seen_before_is():
    method = make()
    batch, outs = case(method)
    batch.tags[:, 2:] = 0
    before = method.losses(batch, outs, Progress(0, 0))["rcm"].item()
    prototypes = method.support.prototypes
    prototypes.rows[4] = 1.0
    assert method.losses(batch, outs, Progress(0, 0))["rcm"].item() == before
    prototypes.known[4] = True
    assert method.losses(batch, outs, Progress(0, 0))["rcm"].item() > before


def test_a_prototype_is_replaced_by_its_class_and_kept_without():
    method = make()
    batch, outs = case(method)
    batch.tags[:] = torch.tensor([1.0, 1, 0, 0])
    prototypes = method.support.prototypes
    prototypes.rows[1:] = torch.arange(1, 5).view(4, 1).double()
    prototypes.known[1:4] = True
    method.losses(batch, outs, Progress(0, 0))
    assert prototypes.rows[1:].mean(1).tolist() == [1, 2, 3, 4]  # not before the step is over
    prototypes.write()
    assert prototypes.rows[3:].mean(1).tolist() == [3, 4] and prototypes.known.tolist() == [True] * 4 + [False]
    assert not (prototypes.rows[1:3] == torch.tensor([[1.0], [2]])).any()


@pytest.mark.parametrize("head", ["inside", "beside"])
def test_no_gradient_reaches_the_support_net_nor_its_prototypes_nor_xi(head):
    method = make(head=head)
    batch, outs = case(method)
    batch.images.requires_grad_()
    sum(method.losses(batch, outs, Progress(3, 0)).values()).backward()
    assert batch.images.grad is None and not any(p.requires_grad for p in method.support.parameters())
    assert all(out.cams.grad.abs().sum() > 0 for out in outs.values())
    assert outs[FULL].features["last"].grad.abs().sum() > 0
    rows, _ = method.support.prototypes._next
    assert not rows.requires_grad
    own = torch.rand(3, 2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    assert not method._attention(own, torch.rand(3, 2, 4, 4, 5).double()).requires_grad
    assert make(attention_gradient=True)._attention(own, torch.rand(3, 2, 4, 4, 5).double()).requires_grad


@pytest.mark.parametrize("reading", ["paper", "rcm=direct", "printed"])
def test_padding_and_absent_classes_add_nothing(reading):
    method = make(**(READINGS[reading] | {"scales": (1.0,)}))  # other scales mix what is next to padding
    batch, outs = case(method)
    padded(batch, outs)
    batch.tags[:, 2] = 0
    outs[FULL] = leaf(outs[FULL].cams, outs[FULL].features["last"])
    before = method.losses(batch, outs, Progress(3, 0))
    sum(before.values()).backward()
    for x in [outs[FULL].cams] + ([] if method.rcm == "direct" else [outs[FULL].features["last"]]):
        assert x.grad.any() and not x.grad[0, :, 3:].any() and not x.grad[1, :, :, :2].any()
    assert not outs[FULL].cams.grad[:, 2].any()
    cams, last = outs[FULL].cams.detach().clone(), outs[FULL].features["last"].detach().clone()
    for x in (cams, last):
        x[0, :, 3:] = 9
        x[1, :, :, :2] = 9
    cams[:, 2] = 9
    batch.images[0, :, 24:] = 9
    batch.images[1, :, :, :16] = 9
    after = method.losses(batch, {FULL: leaf(cams, last)}, Progress(3, 0))
    assert all(after[name].item() == pytest.approx(before[name].item(), rel=1e-12) for name in before)


def test_mam_begins_with_its_epoch_and_is_computed_before():
    method = make(mam_epoch=6.0)
    batch, outs = case(method)
    early, late = (method.losses(batch, outs, Progress(epoch, 0)) for epoch in (5.99, 6.0))
    assert early["mam"] == 0 and early["mam"].requires_grad and late["mam"] > 0 and early["rcm"] == late["rcm"]


def test_order_of_classes_makes_no_difference():
    method, order = make(), torch.tensor([2, 0, 3, 1])
    batch, outs = case(method)
    before = method.losses(batch, outs, Progress(3, 0))
    batch.tags = batch.tags[:, order]
    outs = {v: CamOutput(o.logits[:, order], o.cams[:, order], o.features) for v, o in outs.items()}
    classifier = method.support.net.model.classifier
    classifier.weight.data = classifier.weight.data[order]
    after = method.losses(batch, outs, Progress(3, 0))
    assert all(after[name].item() == pytest.approx(before[name].item()) for name in before)


# On a network.


def objective_of(seed=0, **options):
    torch.manual_seed(seed)
    return Objective(Net(3), {"rcm_mam": RCMMAM(**({"dim": DIM, "mam_epoch": 0} | options))}, num_classes=3)


def batch_of_two():
    torch.manual_seed(1)
    tags = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    return Batch(torch.randn(2, 3, 32, 32), tags, torch.arange(2), torch.ones(2, 1, 32, 32))


@pytest.mark.parametrize(("head", "channels"), [("inside", DIM), ("beside", CHANNELS)])
def test_x_is_what_the_classifier_reads_or_a_branch(head, channels):
    objective, images = objective_of(head=head), batch_of_two().images
    out = objective.look(images)
    x = F.conv2d(objective.net.encode(images)["last"], objective.methods.rcm_mam.project.weight).relu()
    assert objective.net.classifier.in_channels == objective.net.dims["last"] == channels
    assert torch.equal(out.features["last"], x if head == "inside" else objective.net.encode(images)["last"])
    assert torch.equal(out.cams, objective.net.classifier(out.features["last"]))


@pytest.mark.parametrize("head", ["inside", "beside"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_support_net_says_at_first_what_the_network_says(head, bf16):
    objective, batch = objective_of(head=head), batch_of_two()
    objective.bf16 = bf16
    method = objective.methods.rcm_mam
    for view in method.views:
        out, taught = objective.look(view(batch.images)), method._support(view(batch.images))
        assert torch.equal(out.cams, taught.cams) and taught.cams.dtype == torch.float32
        x, target = method._x(out, method.project), method._x(taught, method.support.head.model)
        assert torch.equal(x, target) and x.requires_grad and not target.requires_grad


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_support_net_follows_after_the_step(momentum):
    objective, batch = objective_of(momentum=momentum), batch_of_two()
    method = objective.methods.rcm_mam
    expected = {n: p.detach().clone() for n, p in objective.net.named_parameters()}
    head = method.project.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        losses = objective(batch, Progress(0, 0))
        assert list(losses) == ["net/cls", "rcm_mam/rcm", "rcm_mam/mam"]
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.any() for p in objective.parameters() if p.requires_grad)
        optimizer.step()
        objective.after_step()
        head = momentum * head + (1 - momentum) * method.project.weight.detach()
        expected = {
            n: momentum * expected[n] + (1 - momentum) * p.detach() for n, p in objective.net.named_parameters()
        }
    for name, p in method.support.net.model.named_parameters():
        torch.testing.assert_close(p, expected[name])
        assert torch.equal(p, objective.net.get_parameter(name)) == (momentum == 0)
    torch.testing.assert_close(method.support.head.model.weight, head)
    assert method.support.prototypes.known[0]


def test_exported_weights_hold_no_support_net():
    names = set(inference_state(objective_of()))
    assert names == {"net.conv.weight", "net.conv.bias", "net.classifier.weight", "methods.rcm_mam.project.weight"}


def test_settings_come_from_a_recipe():
    settings = schema.check(RCMMAM, {"scales": [0.5, 1, 1.5], "mam_epoch": 3}, "rcm_mam")
    method = schema.make(RCMMAM, settings)
    assert [view.scale for view in method.views] == [0.5, 1.0, 1.5] and method.views[1] == FULL


class Changing(Method):
    def adapt(self, features):
        return features


def test_what_cannot_work_is_said():
    for options, word in [
        ({"scales": (0.5, 2.0)}, "one scale must be 1"),
        ({"scales": (1.0, 0.5, 0.5)}, "none twice"),
        ({"temperature": 0}, "temperature"),
        ({"momentum": 1.0}, "momentum"),
        ({"threshold": 0.2, "background_threshold": 0.3}, "background's at most"),
        ({"mam_weight": -1.0}, "negative"),
        ({"head": "beside", "rcm": "direct"}, "head: inside"),
    ]:
        with pytest.raises(UserError, match=word):
            RCMMAM(**options)
    with pytest.raises(UserError, match="rcm_mam trains"):
        RCMMAM().bind(Net(3).requires_grad_(False), 3)
    shallow, wide = Net(3), Net(3)
    shallow.dims = {"c4": 8}
    wide.widen(2)
    with pytest.raises(UserError, match="'last'"):
        RCMMAM().bind(shallow, 3)
    with pytest.raises(UserError, match="cannot follow"):
        RCMMAM().bind(wide, 3)
    with pytest.raises(UserError, match=r"both define adapt\(\)"):
        Objective(Net(3), {"rcm_mam": RCMMAM(), "other": Changing()}, num_classes=3)
