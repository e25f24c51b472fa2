"""The random walk: sparse and cut short, against dense powers in float64."""

import math

import pytest
import torch
from loop_affinity import dense_transitions, edge_affinity, feature_affinity, loop_pairs, loop_walk

from tag2mask.errors import UserError
from tag2mask.refine import walk as walk_module
from tag2mask.refine.walk import Affinity, chebyshev

SIZES = [(1, 1), (1, 9), (7, 1), (2, 2), (9, 13), (12, 6)]


def edges_case(size, radius=5, beta=10.0, dtype=torch.float64):
    edge = torch.rand(size, dtype=dtype)
    listed = [(i, j, edge_affinity(edge, i, j)) for i, j in loop_pairs(size, radius)]
    return Affinity.from_edges(edge, radius=radius), *dense_transitions(listed, size, beta)


def features_case(size, radius=5, border="all", beta=8.0):
    features = torch.randn(6, *size, dtype=torch.float64)
    listed = [(i, j, feature_affinity(features, i, j)) for i, j in loop_pairs(size, radius, border)]
    return Affinity.from_features(features, radius=radius, border=border), *dense_transitions(listed, size, beta)


class TestEveryStep:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("steps", [1, 2, 7, 256])
    def test_of_boundaries(self, size, steps):
        affinity, transitions, _ = edges_case(size)
        maps = torch.rand(3, *size, dtype=torch.float64)
        found = affinity.propagate(maps, beta=10, steps=steps, tol=0)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, loop_walk(maps, transitions, steps), rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("border", ["all", "psa"])
    @pytest.mark.parametrize("size", SIZES)
    def test_of_features(self, size, border):
        affinity, transitions, _ = features_case(size, border=border)
        maps = torch.rand(2, *size, dtype=torch.float64)
        found = affinity.propagate(maps, beta=8, steps=64, tol=0)
        torch.testing.assert_close(found, loop_walk(maps, transitions, 64), rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("radius", [2, 3, 10])
    def test_of_other_radii(self, radius):
        affinity, transitions, _ = edges_case((8, 11), radius=radius, beta=2.0)
        maps = torch.rand(1, 8, 11, dtype=torch.float64)
        found = affinity.propagate(maps, beta=2, steps=20, tol=0)
        torch.testing.assert_close(found, loop_walk(maps, transitions, 20), rtol=1e-9, atol=1e-11)

    def test_in_single_precision(self):
        affinity, transitions, _ = edges_case((9, 13), dtype=torch.float32)
        maps = torch.rand(3, 9, 13)
        found = affinity.propagate(maps, tol=0)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), loop_walk(maps, transitions, 256), rtol=1e-3, atol=1e-4)

    def test_half_precision_maps_walk_in_single(self):
        affinity, transitions, _ = edges_case((9, 13), dtype=torch.float32)
        maps = torch.rand(1, 9, 13).half()
        found = affinity.propagate(maps)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), loop_walk(maps, transitions, 256), rtol=1e-3, atol=1e-4)


class TestSeries:
    @pytest.mark.parametrize("steps", [1, 2, 5, 64, 256, 1001])
    def test_is_the_power(self, steps):
        weights = chebyshev(steps, 0)
        assert math.isclose(sum(weights), 1)
        assert all(weight >= 0 for weight in weights)
        for s in (-1.0, -0.7, 0.0, 0.3, 0.99, 1.0):
            value = sum(weight * math.cos(k * math.acos(s)) for k, weight in enumerate(weights))
            assert math.isclose(value, s**steps, abs_tol=1e-12)

    @pytest.mark.parametrize("tol", [1e-2, 1e-5, 1e-9])
    def test_is_cut_where_the_rest_is_small(self, tol):
        whole, cut = chebyshev(256, 0), chebyshev(256, tol)
        assert cut == whole[: len(cut)]
        assert sum(whole[len(cut) :]) <= tol < sum(whole[len(cut) - 1 :])

    def test_seventy_products_for_the_walk_of_the_papers(self):
        assert len(chebyshev(256, 1e-5)) - 1 == 70

    @pytest.mark.parametrize("tol", [1e-8, 1e-5, 0.1])
    @pytest.mark.parametrize("steps", [3, 255, 256])
    @pytest.mark.parametrize("case", [edges_case, features_case])
    def test_keeps_its_bound(self, case, steps, tol):
        affinity, transitions, sums = case((9, 13))
        maps = torch.cat([torch.rand(2, 9, 13), torch.ones(1, 9, 13), torch.eye(9, 13)[None]]).double()
        beta = 10 if case is edges_case else 8
        error = affinity.propagate(maps, beta=beta, steps=steps, tol=tol) - loop_walk(maps, transitions, steps)
        size_of_error, size_of_maps = ((x.flatten(1).square() * sums).sum(dim=1).sqrt() for x in (error, maps))
        assert (size_of_error <= tol * size_of_maps + 1e-10).all()

    def test_the_bound_is_not_idle(self):
        affinity, transitions, _ = edges_case((9, 13))
        maps = torch.rand(2, 9, 13, dtype=torch.float64)
        exact = loop_walk(maps, transitions, 256)
        errors = [(affinity.propagate(maps, tol=tol) - exact).abs().max() for tol in (0.3, 1e-2, 1e-4, 1e-8)]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 0.01


class TestProperties:
    def test_values_are_weighted_means(self):
        affinity, _, _ = edges_case((9, 13))
        constant = affinity.propagate(torch.full((1, 9, 13), 0.7), tol=0)
        torch.testing.assert_close(constant, torch.full((1, 9, 13), 0.7, dtype=constant.dtype), atol=1e-6, rtol=0)
        maps = torch.rand(4, 9, 13)
        walked = affinity.propagate(maps, tol=0)
        assert walked.amin() >= maps.amin() - 1e-6
        assert walked.amax() <= maps.amax() + 1e-6

    def test_isolated_cells_keep_their_value(self):
        torch.manual_seed(0)
        maps, affinity = torch.rand(2, 12, 14), Affinity.from_features(torch.randn(3, 12, 14), border="psa")
        kept = (affinity.propagate(maps, beta=1, tol=0) - maps).abs().amax(dim=0) < 1e-6
        cells = [(0, 0), (0, 1), (0, 2), (0, 3), (10, 0), (10, 13), (11, 0), (11, 1), (11, 12), (11, 13)]
        assert kept.nonzero().tolist() == [list(cell) for cell in cells]

    def test_nothing_crosses_a_closed_boundary(self):
        edge = torch.zeros(10, 12)
        edge[:, 6] = 1
        maps = torch.zeros(1, 10, 12)
        maps[0, 2, 2] = 1
        walked = Affinity.from_edges(edge).propagate(maps)
        assert (walked[0, :, :6] > 1e-3).all()
        assert not walked[0, :, 6:].any()

    def test_maps_do_not_mix(self):
        affinity, _, _ = edges_case((9, 13))
        maps = torch.rand(3, 9, 13, dtype=torch.float64)
        together = affinity.propagate(maps)
        for one, map_ in zip(together, maps, strict=True):
            torch.testing.assert_close(one, affinity.propagate(map_[None])[0])

    def test_no_map_in_no_map_out(self):
        affinity, _, _ = edges_case((9, 13))
        assert affinity.propagate(torch.zeros(0, 9, 13)).shape == (0, 9, 13)

    def test_is_put_together_in_blocks(self, monkeypatch):
        affinity, _, _ = edges_case((9, 13))
        maps = torch.rand(2, 9, 13, dtype=torch.float64)
        whole = affinity.propagate(maps)
        for block in (1, 100, 1000):
            monkeypatch.setattr(walk_module, "BLOCK", block)
            assert torch.equal(affinity.propagate(maps), whole)

    def test_the_input_is_left_alone(self):
        affinity, _, _ = edges_case((9, 13))
        for maps in (torch.rand(2, 9, 13, dtype=torch.float64), torch.zeros(0, 9, 13, dtype=torch.float64)):
            before = maps.clone()
            affinity.propagate(maps).add_(1)
            assert torch.equal(maps, before)

    def test_column_sums_do_not_drift(self):
        """Many steps with almost equal neighbours: a column sum that is off by 1e-7 would show."""
        affinity = Affinity.from_edges(torch.full((40, 40), 1e-4))
        walked = affinity.propagate(torch.ones(1, 40, 40), steps=4096, tol=0)
        torch.testing.assert_close(walked, torch.ones(1, 40, 40), atol=3e-4, rtol=0)


class TestBadInput:
    def affinity(self):
        return Affinity.from_edges(torch.zeros(4, 5))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda a: a.propagate(torch.zeros(1, 5, 4)), "^maps: are 5 x 4, the affinities 4 x 5; resize"),
            (lambda a: a.propagate(torch.zeros(4, 5)), r"^maps: must be \[C h w\] floats, not float32 \[4, 5\]$"),
            (lambda a: a.propagate(torch.zeros(1, 4, 5).long()), "^maps: must be .* not int64"),
            (lambda a: a.propagate(torch.full((1, 4, 5), math.nan)), "^maps: has values that are not finite"),
            (lambda a: a.propagate(torch.full((1, 4, 5), math.inf)), "^maps: has values that are not finite"),
            (lambda a: a.propagate(torch.zeros(1, 4, 5), beta=0), "^beta: 0 must be a positive number"),
            (lambda a: a.propagate(torch.zeros(1, 4, 5), beta=math.nan), "^beta"),
            (lambda a: a.propagate(torch.zeros(1, 4, 5), steps=0), "^steps: 0 must be a whole number from 1"),
            (lambda a: a.propagate(torch.zeros(1, 4, 5), tol=1), "^tol: 1 must be a number from 0 to 1"),
            (lambda a: a.propagate(torch.zeros(1, 4, 5), tol=-0.1), "^tol"),
            (lambda a: a.propagate(torch.zeros(1, 4, 5), tol=math.nan), "^tol"),
            (lambda a: Affinity.from_edges(torch.full((4, 5), 1.5)), r"^edge: has values out of 0\.\.1"),
            (lambda a: Affinity.from_edges(torch.full((4, 5), -0.1)), r"^edge: has values out of 0\.\.1"),
            (lambda a: Affinity.from_edges(torch.full((4, 5), math.nan)), "^edge: has values that are not finite"),
            (lambda a: Affinity.from_edges(torch.zeros(1, 4, 5)), r"^edge: must be \[h w\] floats"),
            (lambda a: Affinity.from_edges(torch.zeros(4, 5), radius=1), "^radius: 1 leaves no pairs"),
            (lambda a: Affinity.from_features(torch.zeros(4, 5)), r"^features: must be \[D h w\] floats"),
            (lambda a: Affinity.from_features(torch.full((1, 4, 5), math.nan)), "^features: has values that are not"),
        ],
    )
    def test_is_one_line(self, call, message):
        with pytest.raises(UserError, match=message) as caught:
            call(self.affinity())
        assert "\n" not in str(caught.value)
