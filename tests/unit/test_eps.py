"""EPS against loops written from its formula, and EPS with a PCM against its released reading."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tag2mask.backbones import BackboneSettings
from tag2mask.baselines import EPS
from tag2mask.baselines.eps import inside, saliency_loss
from tag2mask.core import FULL, Batch, CamOutput, Objective, Progress, View
from tag2mask.ops.equivariance import equivariance
from tag2mask.ops.pcm import PCMOutput

SMALL = BackboneSettings(name="resnet10t", weights=None, output_stride=16)
K = 3


def eps(**settings):
    torch.manual_seed(0)
    return EPS(K, backbone=SMALL, **settings)


def batch(images=2, size=64):
    draw = torch.Generator().manual_seed(1)
    saliency = torch.rand(images, 1, size, size, generator=draw)
    valid = torch.ones(images, 1, size, size)
    saliency[:, :, :, 48:] = valid[:, :, :, 48:] = 0  # padded
    return Batch(
        torch.randn(images, 3, size, size, generator=draw) * valid, torch.tensor([[1.0, 0, 1], [0, 1, 0]])[:images],
        torch.arange(images), valid, {"saliency": saliency},
    )  # fmt: skip


def loop_saliency_loss(shares, saliency, tags, overlap, foreground):
    """Pixel by pixel; shares [B K+1 h w], background last."""
    images, channels, height, width = shares.shape
    step_y, step_x = saliency.shape[2] / height, saliency.shape[3] / width
    total = 0
    for b in range(images):
        s = [[saliency[b, 0, int(y * step_y), int(x * step_x)] for x in range(width)] for y in range(height)]
        cells = [(y, x) for y in range(height) for x in range(width)]
        salient = []
        for c in range(channels - 1):
            area = sum(shares[b, c, y, x].item() > 0.5 for y, x in cells)
            common = sum(shares[b, c, y, x].item() > 0.5 and s[y][x].item() > 0.5 for y, x in cells)
            salient.append(area > 0 and common / area > overlap)
        for y, x in cells:
            m_fg = sum(shares[b, c, y, x] for c in range(channels - 1) if tags[b, c] and salient[c])
            m_bg = shares[b, -1, y, x]
            m_bg = m_bg + sum(shares[b, c, y, x] for c in range(channels - 1) if tags[b, c] and not salient[c])
            estimate = foreground * m_fg + (1 - foreground) * (1 - m_bg)
            total = total + (s[y][x] - estimate) ** 2 / (len(cells) * images)
    return total


def shares_of(images, classes, seed):
    """Confident enough for areas above one half, with classes inside and outside of the saliency."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(images, classes + 1, 4, 5, generator=draw, dtype=torch.float64).mul(4).requires_grad_()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", ["some absent", "one image, one class", "no area", "no tags", "nothing salient"])
def test_saliency_loss(case, seed):
    images, classes = (1, 1) if case == "one image, one class" else (2, 3)
    raw = shares_of(images, classes, seed)
    saliency = torch.rand(images, 1, 12, 10, generator=torch.Generator().manual_seed(seed + 9), dtype=torch.float64)
    tags = torch.ones(images, classes, dtype=torch.float64)
    if case == "some absent":
        tags[0, 0] = tags[1, 1] = 0
    if case == "no area":
        with torch.no_grad():
            raw[:, 0] = -20
    if case == "no tags":
        tags[0] = 0
    if case == "nothing salient":
        saliency[:] = 0
    shares = raw.softmax(dim=1)
    for overlap, foreground in ((0.4, 0.5), (0.6, 0.9)):
        found = saliency_loss(shares[:, :-1], shares[:, -1:], saliency, tags, overlap=overlap, foreground=foreground)
        expected = loop_saliency_loss(shares, saliency, tags, overlap, foreground)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(x, raw, retain_graph=True)[0] for x in (found, expected)]
        assert grads[0].abs().max() > 0
        torch.testing.assert_close(*grads)


def test_the_cases_of_the_saliency_loss_differ():
    """The random cases above hold classes that are inside, outside and without area."""
    shares = shares_of(2, 3, 0).softmax(dim=1)[:, :-1]
    saliency = torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = inside(shares, saliency, 0.4).flatten()
    assert 0 < found.sum() < len(found)


@pytest.mark.parametrize("area", range(1, 41))
def test_overlap_is_decided_as_by_the_plain_ratio(area):
    """Also at the threshold, which counts as outside; on a grid of 56 x 56."""
    classes, saliency = torch.zeros(1, area + 1, 56, 56), torch.zeros(1, 1, 56, 56)
    classes.flatten(2)[0, :, :area] = 0.9
    for common in range(area + 1):
        saliency.zero_().flatten()[:common] = 1
        assert (inside(classes[:, :1], saliency, 0.4) == 1).item() is (10 * common > 4 * area)


def random_outs(net, data, grids, seed=2):
    draw = torch.Generator().manual_seed(seed)
    outs = {}
    for view, grid in zip(net.views, grids, strict=True):
        raw = torch.randn(len(data.tags), K + 1, *grid, generator=draw).mul(3).requires_grad_()
        cams, background = raw[:, :K], raw[:, K:]
        if net.pcm is None:
            outs[view] = CamOutput(cams.mean(dim=(2, 3)), cams, {}, background=background)
            continue
        refined = torch.randn(len(data.tags), K + 1, *grid, generator=draw).mul(2).softmax(dim=1).requires_grad_()
        outs[view] = PCMOutput(
            cams.mean(dim=(2, 3)), cams, {}, refined=refined[:, :K], background=background,
            refined_background=refined[:, K:],
        )  # fmt: skip
    return outs


@pytest.mark.parametrize("settings", [{}, {"overlap": 0.2, "foreground": 0.9}])
def test_losses(settings):
    net, data = eps(**settings), batch()
    outs = random_outs(net, data, [(4, 4)])
    out = outs[FULL]
    found = net.losses(data, outs, Progress(0, 0))
    shares = torch.cat([out.cams, out.background], dim=1).softmax(dim=1)
    sal = loop_saliency_loss(
        shares, data.side["saliency"], data.tags, settings.get("overlap", 0.4), settings.get("foreground", 0.5)
    )
    score = torch.sigmoid(out.cams.mean(dim=(2, 3)))
    cls = -(data.tags * score.log() + (1 - data.tags) * (1 - score).log()).mean()
    torch.testing.assert_close(found, {"cls": cls, "sal": sal})


@pytest.mark.parametrize("refined_softmax", [False, True])
@pytest.mark.parametrize("released_one_hot", [False, True])
def test_losses_with_pcm(refined_softmax, released_one_hot):
    """Every term that is not SEAM's is averaged over both views, each with the saliency that it sees."""
    net = eps(pcm=True, size=32, refined_softmax=refined_softmax, released_one_hot=released_one_hot)
    data, grids = batch(), [(4, 4), (2, 3)]
    outs = random_outs(net, data, grids)
    looks = [outs[view] for view in net.views]
    small = F.interpolate(data.side["saliency"], size=(32, 32), mode="bilinear", align_corners=True)
    cls = sal = sal_refined = 0
    for out, saliency in zip(looks, (data.side["saliency"], small), strict=True):
        cls = cls + F.multilabel_soft_margin_loss(out.cams.mean(dim=(2, 3)), data.tags) / 2
        shares = torch.cat([out.cams, out.background], dim=1).softmax(dim=1)
        sal = sal + loop_saliency_loss(shares, saliency, data.tags, 0.4, 0.5) / 2
        parts = torch.cat([out.refined, out.refined_background], dim=1)
        parts = parts.exp() / parts.exp().sum(dim=1, keepdim=True) if refined_softmax else parts
        sal_refined = sal_refined + loop_saliency_loss(parts, saliency, data.tags, 0.4, 0.5) / 2
    rest = equivariance(looks, grids, data.tags, released_one_hot=released_one_hot)
    expected = {"cls": cls, "sal": sal, "sal_refined": sal_refined} | rest
    torch.testing.assert_close(net.losses(data, outs, Progress(0, 0)), expected)


def test_views_and_needs():
    assert eps().views == (FULL,) and eps().needs == {"saliency"}
    assert eps(pcm=True).views == (FULL, View(size=128, align_corners=True))
    assert eps(pcm=True, size=48).views[1].size == 48


@pytest.mark.parametrize("pcm", [False, True])
def test_the_map_to_export_is_a_softmax(pcm):
    objective, data = Objective(eps(pcm=pcm, size=32), num_classes=K).eval(), batch()
    maps, logits = objective.infer(data.images, data.tags)
    out = objective.look(data.images)
    raw = torch.cat([out.cams, out.background], dim=1)
    torch.testing.assert_close(maps, (raw.exp() / raw.exp().sum(dim=1, keepdim=True))[:, :K])
    torch.testing.assert_close(logits, out.cams.mean(dim=(2, 3)))
    assert out.cams.shape == (2, K, 4, 4) and out.background.shape == (2, 1, 4, 4)
    if pcm:
        assert torch.equal(out.best, out.refined) and not torch.allclose(maps, out.refined)
    else:
        assert out.refined is None


def test_a_step_with_pcm():
    """Saliency trains the background's channel, and SEAM's terms reach the module; nothing is left out."""
    objective, data = Objective(eps(pcm=True, size=32), num_classes=K), batch()
    losses = objective(data, Progress(0, 0))
    assert set(losses) == {"net/cls", "net/sal", "net/sal_refined", "net/er", "net/ecr", "net/rvmin"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters() if p.requires_grad)
    assert objective.net.classifier.weight.grad[K].abs().max() > 0


def test_what_learns_from_what():
    net, data = eps(pcm=True, size=32), batch()
    outs = {view: net.classify(net.encode(view(data.images)), view(data.images)) for view in net.views}
    correlation = {id(p) for p in net.pcm.parameters()}
    for name, loss in net.losses(data, outs, Progress(0, 0)).items():
        parameters = [p for p in net.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        reached = {id(p) for p, g in zip(parameters, grads, strict=True) if g is not None and g.abs().max() > 0}
        assert reached == correlation if name in ("ecr", "rvmin", "sal_refined") else not reached & correlation
