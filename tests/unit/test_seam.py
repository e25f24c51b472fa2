"""SEAM as a whole: against one iteration of the released code written out, and what learns from what."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tag2mask.backbones import BackboneSettings
from tag2mask.baselines import SEAM
from tag2mask.core import FULL, Batch, Objective, Progress, View
from tag2mask.ops.equivariance import equivariance
from tag2mask.ops.pcm import PCMOutput

SMALL = BackboneSettings(name="resnet10t", weights=None, output_stride=16)
K = 3


def seam(**settings):
    torch.manual_seed(0)
    return SEAM(K, backbone=SMALL, **{"dropout": 0.0, "scale": 0.5} | settings)


def batch(images=2, size=64, tags=((1.0, 0, 1), (0, 1, 0))):
    draw = torch.Generator().manual_seed(1)
    return Batch(
        torch.randn(images, 3, size, size, generator=draw), torch.tensor(tags)[:images], torch.arange(images),
        torch.ones(images, 1, size, size),
    )  # fmt: skip


def random_outs(net, data, grids, empty=False):
    """What a network might say about both views, without a network."""
    draw = torch.Generator().manual_seed(2)
    outs = {}
    for view, grid in zip(net.views, grids, strict=True):
        shares = torch.rand(len(data.tags), K + 1, *grid, generator=draw)
        cams = torch.randn(len(data.tags), K, *grid, generator=draw)
        if empty:
            cams[0, 0], shares[-1, 2] = -1, 0
        leaves = [x.clone().requires_grad_() for x in (cams, shares[:, :K], shares[:, K:])]
        outs[view] = PCMOutput(
            net_logits(leaves[0], view(data.images).shape[-2:]), leaves[0], {}, refined=leaves[1],
            refined_background=leaves[2],
        )  # fmt: skip
    return outs


def net_logits(cams, size):
    return F.interpolate(cams, size=size, mode="bilinear", align_corners=True).mean(dim=(2, 3))


def released(cams, refined, images, label):
    """One iteration as released, step by step: background is channel 0, everything at image size.

    cams and refined: [B 1+K h w] of both views; images: sizes of both views; label [B K].
    """
    e = 1e-5
    up = [F.interpolate(x, size=s, mode="bilinear", align_corners=True) for x, s in zip(cams, images, strict=True)]
    up_rv = [
        F.interpolate(x, size=s, mode="bilinear", align_corners=True) for x, s in zip(refined, images, strict=True)
    ]
    mask = torch.cat([torch.ones(len(label), 1), label], dim=1)[:, :, None, None]

    cls = 0
    for x in up:
        score = torch.sigmoid(x.mean(dim=(2, 3))[:, 1:])
        cls = cls - (label * score.log() + (1 - label) * (1 - score).log()).mean() / 2

    rvmin = 0
    for x in up_rv:
        strongest = (x * mask)[:, 1:].max(dim=1).values.flatten(1)
        count = strongest.shape[1] // 4
        rvmin = rvmin + strongest.sort(dim=1).values[:, :count].relu().sum() / (count * len(label)) / 2

    def max_norm(p):
        p = p.relu()
        low, high = p.flatten(2).min(dim=2).values[:, :, None, None], p.flatten(2).max(dim=2).values[:, :, None, None]
        return (p - low - e).relu() / (high - low + e)

    def down(x):
        return F.interpolate(x, size=images[1], mode="bilinear", align_corners=True)

    a1, r1 = down(max_norm(up[0])) * mask, down(max_norm(up_rv[0])) * mask
    a2, r2 = max_norm(up[1]) * mask, max_norm(up_rv[1]) * mask
    er = (a1[:, 1:] - a2[:, 1:]).abs().mean()

    def one_hot(a):
        a = a.detach().clone()
        a[:, 0] = 1 - a[:, 1:].max(dim=1).values
        foreground = a[:, 1:]
        foreground[foreground != foreground.max(dim=1, keepdim=True).values] = 0
        return a

    ecr = 0
    for want, have in ((one_hot(a2), r1), (one_hot(a1), r2)):
        errors = (want - have).abs().flatten(1)
        count = int(0.2 * errors.shape[1])
        ecr = ecr + errors.sort(dim=1, descending=True).values[:, :count].mean()
    return {"cls": cls, "er": er, "ecr": ecr, "rvmin": rvmin}


@pytest.mark.parametrize("case", ["absent classes", "one image", "empty map"])
def test_as_released(case):
    """Values and gradients of all four terms."""
    net = seam(scale=0.3)
    data = batch(1 if case == "one image" else 2)
    outs = random_outs(net, data, [(4, 5), (2, 3)], empty=case == "empty map")
    looks = [outs[view] for view in net.views]
    found = net.losses(data, outs, Progress(0, 0))
    cams = [torch.cat([torch.randn(len(o.cams), 1, *o.cams.shape[2:]), o.cams], dim=1) for o in looks]
    refined = [torch.cat([o.refined_background, o.refined], dim=1) for o in looks]
    expected = released(cams, refined, [(64, 64), (19, 19)], data.tags)
    assert found.keys() == expected.keys()
    leaves = [x for o in looks for x in (o.cams, o.refined, o.refined_background)]
    for name, loss in found.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-6)
        one, two = (
            torch.autograd.grad(x, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            for x in (loss, expected[name])
        )
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_logits_are_the_mean_of_the_map_at_image_size():
    net, data = seam().eval(), batch()
    out = net.classify(net.encode(data.images), data.images)
    torch.testing.assert_close(out.logits, net_logits(out.cams, (64, 64)))
    grid = seam(resolution="grid").eval()
    out = grid.classify(grid.encode(data.images), data.images)
    torch.testing.assert_close(out.logits, out.cams.mean(dim=(2, 3)))
    assert not torch.allclose(out.logits, net_logits(out.cams, (64, 64)))


def test_on_the_grid():
    """Nothing is brought to image size."""
    net, data = seam(resolution="grid"), batch()
    outs = random_outs(net, data, [(4, 5), (2, 3)])
    found = net.losses(data, outs, Progress(0, 0))
    expected = equivariance([outs[v] for v in net.views], [(4, 5), (2, 3)], data.tags)
    torch.testing.assert_close({k: found[k] for k in expected}, expected)


def test_weights_and_hard_share():
    data = batch()
    plain, weighted = seam(), seam(er=2.0, ecr=0.0, rvmin=0.5, hard=1.0)
    outs = random_outs(plain, data, [(4, 4), (2, 2)])
    one, two = plain.losses(data, outs, Progress(0, 0)), weighted.losses(data, outs, Progress(0, 0))
    torch.testing.assert_close([two["cls"], two["er"], two["rvmin"]], [one["cls"], 2 * one["er"], one["rvmin"] / 2])
    assert two["ecr"] == 0
    everything = seam(hard=1.0).losses(data, outs, Progress(0, 0))["ecr"]
    assert 0 < everything < one["ecr"]


@pytest.mark.parametrize(
    ("settings", "view"),
    [({"scale": 0.3}, View(scale=0.3, align_corners=True)), ({"size": 48}, View(size=48, align_corners=True))],
)
def test_views(settings, view):
    assert seam(**settings).views == (FULL, view)


def test_what_learns_from_what():
    """L_cls and L_ER train trunk and classifier, L_ECR and L_rvmin the correlation module alone."""
    net, data = seam(), batch()
    outs = {view: net.classify(net.encode(view(data.images)), view(data.images)) for view in net.views}
    losses = net.losses(data, outs, Progress(0, 0))
    correlation = {id(p) for p in net.pcm.parameters()}
    for name, loss in losses.items():
        parameters = [p for p in net.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        reached = {id(p) for p, g in zip(parameters, grads, strict=True) if g is not None and g.abs().max() > 0}
        if name in ("ecr", "rvmin"):
            assert reached == correlation
        else:
            assert reached and not reached & correlation
            assert id(net.classifier.weight) in reached and id(next(net.backbone.parameters())) in reached


def test_a_step_and_what_is_exported():
    data = batch()
    objective = Objective(seam(dropout=0.5), num_classes=K)
    losses = objective(data, Progress(0, 0))
    assert set(losses) == {"net/cls", "net/er", "net/ecr", "net/rvmin"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters() if p.requires_grad)
    objective.eval()
    maps, logits = objective.infer(data.images, data.tags)
    out = objective.look(data.images)
    torch.testing.assert_close([maps, logits], [out.refined, out.logits])
    assert maps.min() >= 0 and maps.max() <= 1
