"""The lattice against loops over points and corners, and against the Gaussian that it approximates."""

import numpy as np
import pytest
import torch
from loop_lattice import LoopLattice, corners, dense

from tag2mask.ops.permutohedral import Lattice, coefficients, embed


def cloud(batch, count, dims, seed=0, spread=3.0):
    return spread * torch.randn(batch, count, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image_like(height=4, width=5, seed=1):
    """Whole numbers, equal ones among them: columns, rows and grey."""
    grey = torch.randint(0, 3, (height, width), generator=torch.Generator().manual_seed(seed)) * 60.0
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows, grey, grey, grey], dim=-1).flatten(0, 1)[None].double()


@pytest.mark.parametrize("dims", [1, 2, 3, 5])
def test_corners_are_those_of_the_simplex_around_the_point(dims):
    points, sigmas = cloud(1, 200, dims), [0.7, 1.0, 2.0, 3.0, 0.3][:dims]
    points[0, 0] = 0
    keys, weights = embed(points, sigmas)
    names = {}
    for point, own_keys, own_weights in zip(points[0], keys[0].tolist(), weights[0].tolist(), strict=True):
        found = corners(point.tolist(), sigmas)
        assert own_weights == pytest.approx([weight for _, weight in found], abs=1e-12)
        assert min(own_weights) >= 0 and sum(own_weights) == pytest.approx(1)
        for key, (corner, _) in zip(own_keys, found, strict=True):
            assert names.setdefault(corner, key) == key and len({x % (dims + 1) for x in corner}) == 1
    assert len(set(names.values())) == len(names)
    middle = sum(weight * np.array(corner) for corner, weight in corners(points[0, 5].tolist(), sigmas))
    rows = [
        np.where(np.arange(dims) >= k, 1.0, 0.0) - np.where(np.arange(dims) == k - 1, k, 0) for k in range(dims + 1)
    ]
    basis = np.array(rows) / np.sqrt(np.arange(1, dims + 1) * np.arange(2, dims + 2))
    elevated = basis @ (points[0, 5].numpy() / sigmas) * (dims + 1) * np.sqrt(2 / 3)
    np.testing.assert_allclose(middle, elevated, atol=1e-9)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 5])
def test_filter(dims, compact):
    points, sigmas = cloud(2, 40, dims, spread=1.5), [1.0, 0.5, 2.0, 1.0, 1.0][:dims]
    values = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = Lattice(points, sigmas, compact=compact).filter(values)
    for own, given, expected in zip(points, values, found, strict=True):
        slow = LoopLattice(own.tolist(), sigmas).filter(given.numpy())
        np.testing.assert_allclose(expected.numpy(), slow, atol=1e-10)


def test_filter_of_pixels_with_equal_coordinates():
    points, sigmas = image_like(), (3.0, 3.0, 20.0, 20.0, 20.0)
    values = torch.rand(1, points.shape[1], 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slow = LoopLattice(points[0].tolist(), sigmas).filter(values[0].numpy())
    np.testing.assert_allclose(Lattice(points, sigmas).filter(values)[0].numpy(), slow, atol=1e-10)


def test_one_point_set_for_several_values():
    points, values = cloud(1, 20, 2), torch.rand(3, 20, 2, dtype=torch.float64)
    lattice = Lattice(points, (1.0, 2.0))
    expected = torch.cat([lattice.filter(own[None]) for own in values])
    torch.testing.assert_close(lattice.filter(values), expected)
    torch.testing.assert_close(Lattice(points.expand(3, -1, -1), (1.0, 2.0)).filter(values), expected)


def test_images_of_a_batch_do_not_meet():
    points = cloud(1, 30, 2).expand(3, -1, -1)
    values = torch.zeros(3, 30, 1, dtype=torch.float64)
    values[1] = 1
    found = Lattice(points, (1.0, 1.0)).filter(values)
    assert found[0].abs().max() == 0 == found[2].abs().max() and found[1].min() > 0


@pytest.mark.parametrize("compact", [False, True])
def test_points_that_take_no_part(compact):
    points, sigmas = cloud(2, 30, 3), (1.0, 1.0, 1.0)
    valid = torch.rand(2, 30, generator=torch.Generator().manual_seed(3)) < 0.6
    valid[1, :] = False
    valid[1, 4] = True
    values = torch.ones(2, 30, 1, dtype=torch.float64)
    found = Lattice(points, sigmas, valid, compact=compact).filter(values)
    assert found[~valid].abs().max() == 0
    for image in range(2):
        inside = valid[image]
        slow = LoopLattice(points[image, inside].tolist(), sigmas).filter(values[image, inside].numpy())
        np.testing.assert_allclose(found[image, inside].numpy(), slow, atol=1e-10)
    moved = torch.where(valid[..., None], points, points + 0.1)
    assert torch.equal(Lattice(moved, sigmas, valid, compact=compact).filter(values), found)


@pytest.mark.parametrize(("dims", "share"), [(2, 0.04), (3, 0.04), (5, 0.2)])
def test_it_is_nearly_a_gaussian_filter(dims, share):
    points = cloud(1, 600, dims, spread=1.5)
    values = (points.sum(dim=2, keepdim=True) * 2).sin()
    lattice, ones = Lattice(points, [1.0] * dims), torch.ones_like(values)
    found = (lattice.filter(values) / lattice.filter(ones))[0].numpy()
    run = dense(points[0].tolist(), [1.0] * dims)
    exact = run(values[0].numpy()) / run(ones[0].numpy())
    off = np.abs(found - exact).mean() / np.abs(exact - values[0].numpy()).mean()  # of what filtering changes
    assert 1e-3 < off < share


def test_coefficients_are_odd_and_of_all_sizes():
    found = coefficients(30)
    assert len(set(found)) == 30 and all(c % 2 for c in found) and min(found) < 0 < max(found)
    assert max(map(abs, found)) > 2**62 and coefficients(5) == found[:5]
