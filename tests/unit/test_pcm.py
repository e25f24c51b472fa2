"""The pixel correlation module against loops over pairs of pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tag2mask.errors import UserError
from tag2mask.ops.pcm import PCM, confident, propagate

E = 1e-5
DIMS = {"c2": 5, "c4": 6, "c5": 7, "last": 7}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(batch=2, classes=3, size=(3, 4), seed=0):
    """CAMs, taps (c4 at twice the resolution) and images."""
    features = {
        "c4": randn(batch, 6, size[0] * 2, size[1] * 2, seed=seed + 1, dtype=torch.float32),
        "c5": randn(batch, 7, *size, seed=seed + 2, dtype=torch.float32),
    }
    images = randn(batch, 3, size[0] * 8, size[1] * 8, seed=seed + 3, dtype=torch.float32)
    return randn(batch, classes, *size, seed=seed, dtype=torch.float32), features, images


def loop_confident(cams):
    """(maps, background), one pixel at a time."""
    maps, background = torch.zeros_like(cams), torch.zeros_like(cams[:, :1])
    for b, image in enumerate(cams):
        highest = [max(x.item() for x in m.flatten().clamp(min=0)) for m in image]
        for y in range(cams.shape[2]):
            for x in range(cams.shape[3]):
                values = [max(max(v.item(), 0) - E, 0) / (h + E) for v, h in zip(image[:, y, x], highest, strict=True)]
                background[b, 0, y, x] = 1 - max(values)
                for c, value in enumerate(values):
                    maps[b, c, y, x] = value if value == max(values) else 0
    return maps, background


def loop_propagate(maps, embedded):
    """y_i = sum_j a_ij m_j / sum_j a_ij, one pair of pixels at a time."""
    out = []
    for m, q in zip(maps.flatten(2), embedded.flatten(2), strict=True):
        q = [column / (column.square().sum().sqrt() + E) for column in q.T]
        columns = []
        for one in q:
            affinity = [(one @ other).clamp(min=0) for other in q]
            columns.append(sum(a * m[:, j] for j, a in enumerate(affinity)) / (sum(affinity) + E))
        out.append(torch.stack(columns, dim=1))
    return torch.stack(out).view_as(maps)


@pytest.mark.parametrize("case", ["mixed", "one image, one class", "empty map", "empty maps", "tie"])
def test_confident(case):
    cams = randn(1, 1, 3, 4) if case == "one image, one class" else randn(2, 3, 3, 4)
    if case == "empty map":
        cams[0, 1] = -1
    if case == "empty maps":
        cams[1] = 0
    if case == "tie":
        cams[:, 2] = cams[:, 0]
    maps, background = confident(cams)
    torch.testing.assert_close([maps, background], [*loop_confident(cams)])
    assert maps.min() >= 0 and maps.max() <= 1
    if case == "empty maps":
        assert maps[1].max() == 0 and (background[1] == 1).all()
    if case == "tie":
        assert torch.equal(maps[:, 0], maps[:, 2]) and maps[:, 0].max() > 0
    else:
        torch.testing.assert_close(maps.sum(dim=1, keepdim=True) + background, torch.ones_like(background))


@pytest.mark.parametrize("block", [1, 2 * 12 * 5, 2 * 12 * 7 + 3, 10**9])
def test_propagate(block):
    maps, embedded = randn(2, 3, 3, 4).abs(), randn(2, 5, 3, 4, seed=1).requires_grad_()
    found, expected = propagate(maps, embedded, block=block), loop_propagate(maps, embedded)
    torch.testing.assert_close(found, expected)
    weights = randn(*found.shape, seed=2)
    grads = [torch.autograd.grad((x * weights).sum(), embedded)[0] for x in (found, expected)]
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads)


def test_propagate_where_nothing_is_alike():
    maps = torch.rand(1, 2, 1, 2)
    opposite = torch.tensor([[1.0, -1.0], [0.0, 0.0]])[None, :, None]
    torch.testing.assert_close(propagate(maps, opposite), maps, rtol=1e-4, atol=0)
    assert propagate(maps, torch.zeros_like(opposite)).abs().max() == 0  # not even like itself


@pytest.mark.parametrize("case", ["several", "one image, one class", "empty maps"])
def test_module(case):
    """Against the formula with the module's own weights; values, and gradients of the three convolutions."""
    batch, classes = (1, 1) if case == "one image, one class" else (2, 3)
    pcm = PCM(DIMS)
    cams, features, images = inputs(batch, classes)
    if case == "empty maps":
        cams[0] = -1
    weights = {tap: conv.weight[:, :, 0, 0] for tap, conv in pcm.reduce.items()}

    def at_grid(x):
        return F.interpolate(x, size=(3, 4), mode="bilinear", align_corners=True)

    def convolved(weight, x):
        return torch.einsum("od,bdhw->bohw", weight, x)

    low, high = (convolved(weights[tap], at_grid(features[tap])).clamp(min=0) for tap in ("c4", "c5"))
    embedded = convolved(pcm.embed.weight[:, :, 0, 0], torch.cat([at_grid(images), low, high], dim=1))
    expected = loop_propagate(torch.cat(loop_confident(cams), dim=1), embedded)
    refined, background = pcm(cams, features, images)
    found = torch.cat([refined, background], dim=1)
    assert refined.shape == cams.shape and background.shape == (batch, 1, 3, 4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.min() >= 0 and found.max() <= 1
    torch.testing.assert_close(found.sum(dim=1), torch.ones(batch, 3, 4), rtol=0, atol=1e-4)
    pull = randn(*found.shape, seed=7, dtype=torch.float32)
    grads = [torch.autograd.grad((x * pull).sum(), [*pcm.parameters()]) for x in (found, expected)]
    for one, two in zip(*grads, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5 * one.abs().max().item())


def test_only_the_three_convolutions_learn():
    pcm = PCM(DIMS)
    cams, features, images = inputs()
    trunk = [x.requires_grad_() for x in (cams, *features.values())]
    refined, background = pcm(cams, features, images)
    grads = torch.autograd.grad((refined * 2 + background).sum(), [*trunk, *pcm.parameters()], allow_unused=True)
    assert grads[:3] == (None, None, None)
    assert all(g.abs().max() > 0 for g in grads[3:])
    assert [tuple(p.shape[:2]) for p in pcm.parameters()] == [(64, 6), (128, 7), (192, 195)]


def test_relabelling_the_classes_relabels_the_result():
    pcm, order = PCM(DIMS), torch.tensor([2, 0, 1])
    cams, features, images = inputs()
    one, two = pcm(cams, features, images), pcm(cams[:, order], features, images)
    torch.testing.assert_close([one[0][:, order], one[1]], [*two])


def test_bfloat16_trunk():
    """Under autocast the result stays float32 and close."""
    pcm = PCM(DIMS)
    cams, features, images = inputs()
    plain = torch.cat(pcm(cams, features, images), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = torch.cat(pcm(cams.bfloat16(), {k: x.bfloat16() for k, x in features.items()}, images), dim=1)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0.02)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("block", [2 * 144 * 16, 10**9])
def test_memory(block):
    """All pairs of pixels are never held at once, not for the gradient either."""
    maps, embedded = torch.rand(2, 3, 12, 12), torch.randn(2, 8, 12, 12, requires_grad=True)
    with Largest() as largest:
        propagate(maps, embedded, block=block).square().sum().backward()
    assert largest.numel == min(block, 2 * 144 * 144)


def test_backbone_without_the_taps():
    with pytest.raises(UserError, match=r"c4 and c5.*this backbone has only last"):
        PCM({"last": 8})
