"""Pooling, normalisation, background scores and seeds against loops over single pixels."""

import itertools

import pytest
import torch

from tag2mask.ops.cams import (
    EPS,
    best_class,
    max_norm,
    min_max_norm,
    pool,
    power_background,
    resize,
    resize_corners,
    to_mask,
)

SHAPES = [(2, 3, 4, 5), (1, 1, 1, 1), (1, 2, 1, 7), (3, 1, 6, 1)]


def random_maps(*shape, seed=0):
    """Positive, negative and zero values; the first map is all zeros, the last one all negative."""
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    maps = torch.where(maps.abs() < 0.2, 0.0, maps)
    flat = maps.flatten(0, -3)
    if len(flat) > 2:
        flat[0], flat[-1] = 0, -1
    return maps


def places(maps):
    return itertools.product(*map(range, maps.shape[-2:]))


def loop_max_norm(single):
    positive = {(y, x): max(0.0, single[y, x].item()) for y, x in places(single)}
    highest = max(positive.values())
    return torch.tensor([[positive[y, x] / (highest + 1e-5) for x in range(single.shape[1])]
                         for y in range(single.shape[0])], dtype=torch.float64)  # fmt: skip


def loop_min_max_norm(single, negative_floor):
    positive = [[max(0.0, v) for v in row] for row in single.tolist()]
    low, high = min(map(min, positive)), max(map(max, positive))

    def one(value):
        if negative_floor:
            if value < low + 1e-5:
                value = 0.0
            return (value - low - 1e-5) / (high - low + 1e-5)
        return max(0.0, (value - low - 1e-5) / (high - low + 1e-5))

    return torch.tensor([[one(v) for v in row] for row in positive], dtype=torch.float64)


def loop_bilinear(single, size, corners):
    """Each target pixel from its place in the source, by the two definitions of a pixel's place."""
    (height, width), out = single.shape, torch.zeros(size, dtype=single.dtype)

    def source(i, new, old):
        if corners:
            return i * (old - 1) / (new - 1) if new > 1 else 0.0
        return min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1)

    for y, x in itertools.product(range(size[0]), range(size[1])):
        v, u = source(y, size[0], height), source(x, size[1], width)
        for row, column in itertools.product(range(height), range(width)):
            out[y, x] += max(0, 1 - abs(v - row)) * max(0, 1 - abs(u - column)) * single[row, column]
    return out


@pytest.mark.parametrize("shape", SHAPES)
class TestNormalisation:
    def test_pool(self, shape):
        maps = random_maps(*shape)
        for b, k in itertools.product(*map(range, shape[:2])):
            assert pool(maps)[b, k].item() == pytest.approx(sum(maps[b, k].flatten().tolist()) / maps[b, k].numel())

    def test_max_norm(self, shape):
        maps = random_maps(*shape)
        for b, k in itertools.product(*map(range, shape[:2])):
            assert torch.allclose(max_norm(maps)[b, k], loop_max_norm(maps[b, k]))

    @pytest.mark.parametrize("negative_floor", [False, True])
    def test_min_max_norm(self, shape, negative_floor):
        for shift in (0.0, 2.5):  # with the shift, the minimum after ReLU is above 0
            maps = random_maps(*shape) + shift
            found = min_max_norm(maps, negative_floor=negative_floor)
            for b, k in itertools.product(*map(range, shape[:2])):
                assert torch.allclose(found[b, k], loop_min_max_norm(maps[b, k], negative_floor))

    def test_gradients(self, shape):
        maps = (random_maps(*shape) + 0.01).requires_grad_()  # off the kinks
        for function in (pool, max_norm, min_max_norm):
            maps.grad = None
            function(maps).square().sum().backward()
            assert torch.isfinite(maps.grad).all()
        if maps[0, 0].numel() > 1 and len(maps.flatten(0, 1)) > 2:
            some = maps.detach().flatten(0, 1)[1:-1].requires_grad_()
            assert torch.autograd.gradcheck(max_norm, some)
            assert torch.autograd.gradcheck(min_max_norm, some)


class TestConstantMaps:
    def test_zeros_and_negatives_stay_zero(self):
        for maps in (torch.zeros(2, 3, 4), torch.full((2, 3, 4), -2.0)):
            assert max_norm(maps).eq(0).all()
            assert min_max_norm(maps).eq(0).all()
            assert min_max_norm(maps, negative_floor=True).eq(-1).all()

    def test_a_constant_positive_map(self):
        maps = torch.full((1, 3, 4), 2.0, dtype=torch.float64)
        assert torch.allclose(max_norm(maps), torch.tensor(2 / (2 + EPS), dtype=torch.float64))
        assert min_max_norm(maps).eq(0).all()

    def test_gradient_of_zeros_is_finite(self):
        maps = torch.zeros(1, 3, 4, requires_grad=True)
        (max_norm(maps).sum() + min_max_norm(maps).sum()).backward()
        assert torch.isfinite(maps.grad).all()


@pytest.mark.parametrize("size", [(4, 5), (8, 3), (1, 1), (7, 11)])
@pytest.mark.parametrize(("function", "corners"), [(resize, False), (resize_corners, True)])
def test_resize(size, function, corners):
    maps = random_maps(2, 3, 4, 5)
    found = function(maps, size)
    for b, k in itertools.product(range(2), range(3)):
        assert torch.allclose(found[b, k], loop_bilinear(maps[b, k], size, corners), atol=1e-12)


class TestBackground:
    @pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0, 16.0])
    def test_power(self, alpha):
        maps = torch.rand(3, 4, 5, dtype=torch.float64)
        maps[:, 0, 0], maps[:, 0, 1] = 0, 1
        found = power_background(maps, alpha)
        for y, x in places(maps):
            assert found[y, x].item() == pytest.approx((1 - max(maps[:, y, x].tolist())) ** alpha)
        assert found[0, 0] == 1
        assert found[0, 1] == 0

    def test_values_a_little_above_1_do_not_become_nan(self):
        assert power_background(torch.full((1, 2, 2), 1.001), 0.5).eq(0).all()

    def test_without_classes_everything_is_background(self):
        assert power_background(torch.zeros(0, 2, 3), 4.0).equal(torch.ones(2, 3))


def loop_mask(maps, classes, background):
    out = torch.zeros(maps.shape[1:], dtype=torch.uint8)
    for y, x in places(out):
        score = background if isinstance(background, float) else background[y, x].item()
        for position, k in enumerate(classes.tolist()):
            if maps[position, y, x].item() > score:
                score, out[y, x] = maps[position, y, x].item(), k + 1
    return out


class TestSeeds:
    @pytest.mark.parametrize("classes", [[0, 3, 19], [2], [253]])
    def test_against_a_loop(self, classes):
        maps = torch.randint(0, 5, (len(classes), 6, 7)).float() / 4  # many ties
        for background in (0.0, 0.5, 1.0, torch.randint(0, 5, (6, 7)).float() / 4, power_background(maps, 4.0)):
            found = to_mask(maps, torch.tensor(classes), background)
            assert found.dtype == torch.uint8
            assert torch.equal(found, loop_mask(maps, torch.tensor(classes), background))

    def test_background_wins_a_tie_and_the_first_class_beats_the_second(self):
        maps = torch.full((2, 1, 1), 0.3)
        assert to_mask(maps, torch.tensor([4, 7]), 0.3).item() == 0
        assert to_mask(maps, torch.tensor([4, 7]), 0.2).item() == 5

    def test_maps_of_zeros_are_background_at_threshold_0(self):
        assert to_mask(torch.zeros(1, 2, 2), torch.tensor([0]), 0.0).eq(0).all()

    def test_an_untagged_image(self):
        empty, none = torch.zeros(0, 2, 3), torch.zeros(0, dtype=torch.long)
        for background in (0.3, power_background(empty, 4.0)):
            found = to_mask(empty, none, background)
            assert found.equal(torch.zeros(2, 3, dtype=torch.uint8))
        position, value = best_class(empty)
        assert position.equal(torch.zeros(2, 3, dtype=torch.long))
        assert value.equal(torch.zeros(2, 3))

    def test_best_class(self):
        maps = torch.rand(4, 5, 6)
        position, value = best_class(maps)
        for y, x in places(maps):
            column = maps[:, y, x].tolist()
            assert value[y, x].item() == max(column)
            assert position[y, x].item() == column.index(max(column))
