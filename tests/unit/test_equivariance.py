"""The normalisation and the losses of two looks against loops written from the formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tag2mask.ops.cams import min_max_norm, resize_corners
from tag2mask.ops.equivariance import background_suppression, equivariance, hardest, pool_resized, target
from tag2mask.ops.pcm import PCMOutput

E = 1e-5


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop_norm(cams, negative_floor):
    """One pixel at a time; cams a list of rows of scalars."""
    values = [[x.clamp(min=0) for x in row] for row in cams]
    flat = [x for row in values for x in row]
    low, high = min(flat), max(flat)

    def one(x):
        if x < low + E:
            return (-low - E) / (high - low + E) if negative_floor else 0 * x
        return (x - low - E) / (high - low + E)

    return [[one(x) for x in row] for row in values]


def loop_resize(rows, height, width):
    """Bilinear, corners aligned, one pixel at a time."""

    def place(i, new, old):
        at = i * (old - 1) / (new - 1) if new > 1 else 0.0
        low = min(int(at), old - 1)
        return low, min(low + 1, old - 1), at - low

    out = []
    for y in range(height):
        up, down, fy = place(y, height, len(rows))
        line = []
        for x in range(width):
            left, right, fx = place(x, width, len(rows[0]))
            upper = rows[up][left] * (1 - fx) + rows[up][right] * fx
            lower = rows[down][left] * (1 - fx) + rows[down][right] * fx
            line.append(upper * (1 - fy) + lower * fy)
        out.append(line)
    return out


def stack(rows):
    return torch.stack([torch.stack(row) for row in rows])


def same(found, expected, *inputs):
    """Values, and gradients where there are inputs."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    if inputs:
        weights = randn(*found.shape, seed=99)
        one, two = (
            torch.autograd.grad(
                (x * weights).sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for x in (found, expected)
        )
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


CAMS = {
    "mixed": randn(2, 3, 3, 4, seed=1),
    "positive": randn(2, 3, 3, 4, seed=2).abs() + 0.5,
    "one image, one class": randn(1, 1, 3, 4, seed=3),
    "an empty map": randn(2, 3, 3, 4, seed=4) - 100 * F.one_hot(torch.tensor(1), 3)[:, None, None],
}


@pytest.mark.parametrize("negative_floor", [False, True])
@pytest.mark.parametrize("cams", CAMS.values(), ids=CAMS.keys())
def test_min_max_norm(cams, negative_floor):
    cams = cams.clone().requires_grad_()
    expected = torch.stack([torch.stack([stack(loop_norm(m, negative_floor)) for m in image]) for image in cams])
    same(min_max_norm(cams, negative_floor=negative_floor), expected, cams)


def test_min_max_norm_of_constant_maps():
    maps = torch.stack([torch.zeros(2, 2), torch.full((2, 2), 3.0), torch.full((2, 2), -3.0)])[None]
    assert min_max_norm(maps).abs().max() == 0
    floored = min_max_norm(maps, negative_floor=True)
    torch.testing.assert_close(floored[0, [0, 2]], -torch.ones(2, 2, 2))
    torch.testing.assert_close(floored[0, 1], torch.full((2, 2), -3.00001 / E), rtol=1e-3, atol=0)


def test_min_max_norm_differs_only_at_the_minimum():
    maps = torch.rand(2, 3, 5, 5) + 1
    plain, floored = min_max_norm(maps), min_max_norm(maps, negative_floor=True)
    lowest = maps == maps.amin(dim=(2, 3), keepdim=True)
    assert torch.equal(plain[~lowest], floored[~lowest])
    assert (floored[lowest] < -0.9).all() and (plain[lowest] == 0).all()


@pytest.mark.parametrize(("grid", "size"), [((3, 4), (10, 13)), ((1, 5), (7, 7)), ((4, 4), (4, 4)), ((6, 5), (3, 2))])
def test_resizing_and_its_mean(grid, size):
    cams = randn(2, 2, *grid, seed=5).requires_grad_()
    expected = torch.stack([torch.stack([stack(loop_resize(m, *size)) for m in image]) for image in cams])
    same(resize_corners(cams, size), expected, cams)
    same(pool_resized(cams.float(), size).double(), expected.mean(dim=(2, 3)), cams)


def loop_target(maps, released_one_hot=False):
    """[K h w] -> [K+1 h w], background last."""
    classes, height, width = maps.shape
    out = torch.zeros(classes + 1, height, width, dtype=maps.dtype)
    for y in range(height):
        for x in range(width):
            column = [*maps[:, y, x].tolist(), 1 - maps[:, y, x].max().item()]
            rivals = range(1, classes + 1) if released_one_hot else range(classes)
            best = max(column[c] for c in rivals)
            for c in range(classes + 1):
                if c not in rivals or column[c] >= best:
                    out[c, y, x] = column[c]
    return out


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("classes", [1, 4])
def test_target(classes, released):
    maps = rand(2, classes, 3, 5, seed=6)
    maps[0, :, 0, 0] = 0
    maps[1, :, 1, 1] = 0.25  # a tie: all stay
    found = target(maps.requires_grad_(), released_one_hot=released)
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.stack([loop_target(m, released) for m in maps.detach()]))


def test_the_slip_of_the_released_one_hot():
    maps = torch.tensor([0.3, 0.6, 0.2])[None, :, None, None]
    assert target(maps).flatten().tolist() == pytest.approx([0, 0.6, 0, 0.4])
    assert target(maps, released_one_hot=True).flatten().tolist() == pytest.approx([0.3, 0.6, 0, 0])


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 1.0])
def test_hardest(share):
    errors = rand(3, 2, 4, 5, seed=7).requires_grad_()
    total = 0
    for image in errors:
        ordered = sorted(image.flatten(), key=lambda x: -x.item())
        kept = ordered[: max(1, int(share * 40))]
        total = total + sum(kept) / len(kept) / 3
    same(hardest(errors, share), total, errors)


@pytest.mark.parametrize("shape", [(2, 3, 3, 5), (1, 1, 3, 5), (2, 3, 1, 1)])
def test_background_suppression(shape):
    refined = rand(*shape, seed=8).requires_grad_()
    tags = torch.ones(shape[:2], dtype=torch.float64)
    tags[0, 0] = 0 if shape[1] > 1 else 1
    pixels = shape[2] * shape[3]
    count, total = max(1, pixels // 4), 0
    for image, own in zip(refined, tags, strict=True):
        strongest = [max(t * v for t, v in zip(own, pixel, strict=True)) for pixel in image.flatten(1).T]
        total = total + sum(sorted(strongest, key=lambda x: x.item())[:count]) / count / shape[0]
    same(background_suppression(refined, tags), total, refined)
    assert background_suppression(refined, torch.zeros_like(tags)) == 0


def loop_equivariance(cams, refined, background, tags, sizes, hard, released_one_hot):
    """(er, ecr, rvmin), image by image and class by class."""
    images, classes = tags.shape

    def normed(m, size):
        big = stack(loop_resize(m, *size))
        return stack(loop_resize(stack(loop_norm(big, False)), *sizes[1]))

    er = ecr = rvmin = 0
    for b in range(images):
        a = [torch.stack([normed(m[b, c], s) * tags[b, c] for c in range(classes)]) for m, s in zip(cams, sizes)]  # noqa: B905
        r = [torch.stack([normed(m[b, c], s) * tags[b, c] for c in range(classes)]) for m, s in zip(refined, sizes)]  # noqa: B905
        r = [torch.cat([x, normed(m[b, 0], s)[None]]) for x, m, s in zip(r, background, sizes, strict=True)]
        er = er + (a[0] - a[1]).abs().mean() / images
        t = [loop_target(x.detach(), released_one_hot) for x in a]
        for want, have in ((t[1], r[0]), (t[0], r[1])):
            errors = sorted((want - have).abs().flatten(), key=lambda x: -x.item())
            kept = errors[: int(hard * len(errors))]
            ecr = ecr + sum(kept) / len(kept) / images
        for m, s in zip(refined, sizes, strict=True):
            big = [stack(loop_resize(m[b, c], *s)) * tags[b, c] for c in range(classes)]
            weakest = sorted(torch.stack(big).amax(dim=0).flatten(), key=lambda x: x.item())[: s[0] * s[1] // 4]
            rvmin = rvmin + sum(weakest) / len(weakest) / images / 2
    return {"er": er, "ecr": ecr, "rvmin": rvmin}


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("case", ["some absent", "one image, one class", "empty map", "no tags"])
def test_equivariance(case, full, released):
    images, classes = (1, 1) if case == "one image, one class" else (2, 3)
    grids, sizes = [(3, 4), (2, 3)], [(7, 8), (3, 5)]
    sizes = sizes if full else grids
    cams = [randn(images, classes, *g, seed=10 + i) for i, g in enumerate(grids)]
    refined = [rand(images, classes, *g, seed=20 + i) for i, g in enumerate(grids)]
    background = [rand(images, 1, *g, seed=30 + i) for i, g in enumerate(grids)]
    tags = torch.ones(images, classes, dtype=torch.float64)
    if case == "some absent":
        tags[0, 0] = tags[1, 2] = 0
    if case == "no tags":
        tags[0] = 0
    if case == "empty map":
        cams[0][0, 1] = -1
        refined[1][1, 2] = 0
    inputs = [x.requires_grad_() for x in (*cams, *refined, *background)]
    outs = [
        PCMOutput(torch.zeros(images, classes), c, {}, refined=r, refined_background=b)
        for c, r, b in zip(cams, refined, background, strict=True)
    ]
    found = equivariance(outs, sizes, tags, hard=0.3, released_one_hot=released)
    expected = loop_equivariance(cams, refined, background, tags, sizes, 0.3, released)
    assert found.keys() == expected.keys()
    for name in found:
        same(found[name], expected[name], *inputs)


def looks(classes=4, seed=50):
    cams = [randn(2, classes, *g, seed=seed + i).requires_grad_() for i, g in enumerate([(4, 5), (2, 3)])]
    outs = []
    for i, c in enumerate(cams):
        refined = rand(2, classes, *c.shape[2:], seed=seed + 5 + i).requires_grad_()
        rest = rand(2, 1, *c.shape[2:], seed=seed + 9 + i)
        outs.append(PCMOutput(torch.zeros(2, classes), c, {}, refined=refined, refined_background=rest))
    return outs


def test_no_class_is_special_except_for_the_slip():
    outs, order = looks(), torch.tensor([2, 0, 3, 1])
    tags = torch.tensor([[1.0, 1, 0, 1], [1, 0, 1, 1]])
    renamed = [
        PCMOutput(o.logits, o.cams[:, order], {}, refined=o.refined[:, order], refined_background=o.refined_background)
        for o in outs
    ]
    sizes = [(4, 5), (2, 3)]
    for released in (False, True):
        one = equivariance(outs, sizes, tags, released_one_hot=released)
        two = equivariance(renamed, sizes, tags[:, order], released_one_hot=released)
        torch.testing.assert_close([one["er"], one["rvmin"]], [two["er"], two["rvmin"]])
        assert torch.isclose(one["ecr"], two["ecr"]).item() is not released


def test_absent_classes_and_targets_get_no_gradient():
    outs = looks()
    tags = torch.tensor([[1.0, 1, 0, 1], [1, 0, 1, 1]])
    losses = equivariance(outs, [(4, 5), (2, 3)], tags)
    for out in outs:
        (cams,) = torch.autograd.grad(losses["er"], out.cams, retain_graph=True)
        assert cams[tags == 0].abs().max() == 0 and cams[tags == 1].abs().max() > 0
        assert torch.autograd.grad(losses["ecr"], out.cams, retain_graph=True, allow_unused=True) == (None,)
        (refined,) = torch.autograd.grad(losses["ecr"] + losses["rvmin"], out.refined, retain_graph=True)
        assert refined[tags == 0].abs().max() == 0 and refined[tags == 1].abs().max() > 0
