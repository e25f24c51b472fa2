"""Pairs of cells, paths, labels of cells and the losses of affinities, against plain loops."""

import pytest
import torch
from loop_affinity import (
    edge_affinity,
    feature_affinity,
    loop_displacement,
    loop_labels_on_grid,
    loop_losses,
    loop_pairs,
    loop_path,
)
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tag2mask.errors import UserError
from tag2mask.refine import pairs as pairs_module
from tag2mask.refine.grid import grid_size, labels_on_grid, pad_to_multiple
from tag2mask.refine.irn import displacement_losses
from tag2mask.refine.pairs import affinity_losses, alikeness, pairs_of, path, path_maximum, runs_of

SIZES = [(1, 1), (1, 7), (6, 1), (2, 3), (7, 9), (9, 8)]


def listed(pairs, size):
    """[((y, x), (y', x')), ...] of what `pairs_of` gives."""
    places = torch.arange(size[0] * size[1]).reshape(size)
    found = []
    for each in pairs:
        for i, j in zip(each.first(places).flatten().tolist(), each.second(places).flatten().tolist(), strict=True):
            found.append((divmod(i, size[1]), divmod(j, size[1])))
    return found


class TestPairs:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("radius", [2, 3, 5])
    @pytest.mark.parametrize("border", ["all", "psa"])
    def test_against_the_distance_of_all_cells(self, size, radius, border):
        found = listed(pairs_of(size, radius, border), size)
        assert len(found) == len(set(found))
        assert set(found) == set(loop_pairs(size, radius, border))

    @pytest.mark.parametrize(("radius", "count"), [(5, 34), (10, 152)])
    def test_the_offsets_of_the_papers(self, radius, count):
        assert len(pairs_of((40, 40), radius)) == len(pairs_of((40, 40), radius, "psa")) == count

    def test_the_window_of_the_released_code(self):
        pairs = pairs_of((56, 56), 5, "psa")
        assert {each.first(torch.zeros(56, 56)).numel() for each in pairs} == {2496}

    @pytest.mark.parametrize("size", [(11, 11), (14, 20), (47, 63)])
    def test_ten_isolated_cells_at_the_border(self, size):
        height, width = size
        linked = {cell for pair in listed(pairs_of(size, 5, "psa"), size) for cell in pair}
        lonely = {(y, x) for y in range(height) for x in range(width)} - linked
        assert lonely == {
            (0, 0), (0, 1), (0, 2), (0, 3), (height - 2, 0), (height - 2, width - 1), (height - 1, 0), (height - 1, 1),
            (height - 1, width - 2), (height - 1, width - 1),
        }  # fmt: skip

    @pytest.mark.parametrize("radius", [1, 0, -3])
    def test_a_radius_without_pairs(self, radius):
        with pytest.raises(UserError, match=rf"^radius: {radius} leaves no pairs; give a whole number from 2$"):
            pairs_of((5, 5), radius)


class TestPaths:
    def test_against_the_distance_to_the_line(self):
        for dy in range(10):
            for dx in range(-9, 10):
                if (dy, dx) > (0, 0):
                    cells = [(y, x + n) for y, x, length in path(dy, dx) for n in range(length)]
                    assert sorted(cells) == sorted(loop_path((0, 0), (dy, dx)))
                    assert (0, 0) in cells
                    assert (dy, dx) in cells

    def test_by_hand(self):
        assert path(0, 3) == [(0, 0, 4)]
        assert path(2, 0) == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]
        assert path(2, -1) == [(0, -1, 2), (1, -1, 2), (2, -1, 2)]
        assert path(2, 2) == [(0, 0, 2), (1, 0, 3), (2, 1, 2)]

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("radius", [2, 5, 10])
    def test_maxima_against_a_loop(self, size, radius):
        edge = torch.rand(2, *size, dtype=torch.float64)
        runs = runs_of(edge, radius)
        for each in pairs_of(size, radius):
            values = path_maximum(runs, each)
            cells = listed([each], size)
            for image in range(2):
                expected = [max(edge[image][cell] for cell in loop_path(*pair)) for pair in cells]
                assert values[image].flatten().tolist() == expected

    def test_the_gradient_goes_to_the_largest_on_the_path(self):
        edge = torch.rand(1, 7, 8, dtype=torch.float64, requires_grad=True)
        runs = runs_of(edge, 5)
        weights = {each: torch.rand_like(each.first(edge[0])) for each in pairs_of((7, 8), 5)}
        sum((path_maximum(runs, each)[0] * weight).sum() for each, weight in weights.items()).backward()
        expected = torch.zeros(7, 8, dtype=torch.float64)
        for each, weight in weights.items():
            for pair, w in zip(listed([each], (7, 8)), weight.flatten().tolist(), strict=True):
                expected[max(loop_path(*pair), key=lambda cell: edge[0][cell].item())] += w
        torch.testing.assert_close(edge.grad[0], expected)


def labels_of(batch, size, classes=3, ignored=0.25):
    labels = torch.randint(0, classes + 1, (batch, *size))
    labels[torch.rand(labels.shape) < ignored] = 255
    return labels


CASES = {
    "two images": lambda: labels_of(2, (6, 7)),
    "one image": lambda: labels_of(1, (5, 9)),
    "all known": lambda: labels_of(1, (5, 5), ignored=0),
    "one class": lambda: labels_of(1, (6, 5), classes=1),
    "background only": lambda: torch.zeros(1, 5, 6, dtype=torch.long),
    "one label only": lambda: torch.full((1, 5, 6), 2),
    "nothing known": lambda: torch.full((2, 5, 6), 255),
    "one cell known": lambda: torch.tensor([[255, 255, 255], [255, 1, 255]])[None],
    "a line": lambda: labels_of(1, (1, 12)),
}  # fmt: skip


def number(x):
    return x.item() if torch.is_tensor(x) else float(x)


class TestLosses:
    def compare(self, found, expected, leaf):
        assert list(found) == ["background", "foreground", "different"]
        for loss, wanted in zip(found.values(), expected, strict=True):
            assert loss.item() == pytest.approx(number(wanted), rel=1e-6, abs=1e-12)
        gradient = torch.autograd.grad(sum(found.values()), leaf)[0]
        total = sum(expected)
        wanted = torch.autograd.grad(total, leaf)[0] if torch.is_tensor(total) else torch.zeros_like(leaf)
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-9)
        return gradient

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize(("radius", "border"), [(2, "all"), (3, "all"), (3, "psa")])
    def test_of_features_against_a_loop(self, case, radius, border):
        torch.manual_seed(0)
        labels = CASES[case]()
        size = labels.shape[1], labels.shape[2]
        pairs = pairs_of(size, radius, border)
        if not pairs:
            pytest.skip("no pair on this grid")
        features = torch.randn(len(labels), 4, *size, dtype=torch.float64, requires_grad=True)
        found = affinity_losses(lambda each: alikeness(features, each), labels, pairs)
        expected = loop_losses(lambda b, i, j: feature_affinity(features[b], i, j), labels, radius, border)
        self.compare(found, expected, features)

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize(("radius", "border"), [(2, "all"), (4, "all"), (3, "psa")])
    def test_of_boundaries_against_a_loop(self, case, radius, border):
        torch.manual_seed(1)
        labels = CASES[case]()
        size = labels.shape[1], labels.shape[2]
        pairs = pairs_of(size, radius, border)
        if not pairs:
            pytest.skip("no pair on this grid")
        logits = torch.randn(len(labels), *size, dtype=torch.float64, requires_grad=True)
        runs = runs_of(logits.sigmoid(), radius)
        found = affinity_losses(lambda each: 1 - path_maximum(runs, each), labels, pairs)
        expected = loop_losses(lambda b, i, j: edge_affinity(logits[b].sigmoid(), i, j), labels, radius, border)
        self.compare(found, expected, logits)

    @pytest.mark.parametrize("case", CASES)
    def test_of_displacements_against_a_loop(self, case):
        torch.manual_seed(2)
        labels = CASES[case]()
        size = labels.shape[1], labels.shape[2]
        ways = torch.randn(len(labels), 2, *size, dtype=torch.float64, requires_grad=True)
        found = displacement_losses(ways, labels, pairs_of(size, 4))
        expected = loop_displacement(ways, labels, 4)
        assert list(found) == ["centre", "still"]
        for loss, wanted in zip(found.values(), expected, strict=True):
            assert loss.item() == pytest.approx(number(wanted), rel=1e-6, abs=1e-12)
        total = sum(expected)
        gradient = torch.autograd.grad(sum(found.values()), ways)[0]
        wanted = torch.autograd.grad(total, ways)[0] if torch.is_tensor(total) else torch.zeros_like(ways)
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-9)

    def test_equal_features_and_sure_boundaries_are_finite(self):
        labels = labels_of(1, (6, 6))
        for affinity in (torch.zeros(1, 6, 6), torch.ones(1, 6, 6)):
            affinity.requires_grad_()
            losses = affinity_losses(lambda each, a=affinity: each.first(a), labels, pairs_of((6, 6), 3))
            sum(losses.values()).backward()
            assert all(loss.isfinite() for loss in losses.values())
            assert affinity.grad.isfinite().all()

    def test_the_order_of_classes_makes_no_difference(self):
        labels, features = labels_of(2, (6, 6)), torch.randn(2, 4, 6, 6)
        other = torch.where((labels > 0) & (labels < 255), 4 - labels, labels)
        one, two = (affinity_losses(lambda e: alikeness(features, e), x, pairs_of((6, 6), 3)) for x in (labels, other))
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_mean_over_processes_is_the_loss_of_the_global_batch(self, monkeypatch):
        labels, features = labels_of(4, (6, 6)), torch.randn(4, 4, 6, 6, dtype=torch.float64)
        labels[0] = 255  # the processes hold different numbers of pairs
        pairs = pairs_of((6, 6), 3)
        whole = affinity_losses(lambda each: alikeness(features, each), labels, pairs)
        counts = sum(pairs_module.agreement(labels, each).sum(dim=(1, 2, 3)) for each in pairs)
        monkeypatch.setattr(pairs_module, "mean_over_processes", lambda x: counts / 2)
        monkeypatch.setattr(pairs_module, "processes", lambda: 2)
        shares = [
            affinity_losses(lambda each, r=r: alikeness(features[r::2], each), labels[r::2], pairs) for r in range(2)
        ]
        for name, loss in whole.items():
            assert ((shares[0][name] + shares[1][name]) / 2).item() == pytest.approx(loss.item(), rel=1e-9)

    def test_a_step_reads_no_value_back_from_the_device(self):
        labels, features = labels_of(2, (8, 9)), torch.randn(2, 4, 8, 9)
        edge = torch.rand(2, 8, 9)
        with FakeTensorMode() as mode:  # its tensors have shapes but no values: reading one raises
            features, edge = (mode.from_tensor(x).requires_grad_() for x in (features, edge))
            labels, runs = labels_on_grid(mode.from_tensor(labels), (8, 9), 1, 3), runs_of(edge, 4)
            pairs = pairs_of((8, 9), 4)
            losses = affinity_losses(lambda each: alikeness(features, each), labels, pairs)
            losses |= {
                f"e{n}": x for n, x in affinity_losses(lambda e: 1 - path_maximum(runs, e), labels, pairs).items()
            }
            total = sum(losses.values())
            total.backward()
            with pytest.raises(DataDependentOutputException):
                total.item()

    def test_no_pairs(self):
        with pytest.raises(ValueError, match="without pairs"):
            affinity_losses(lambda each: each, torch.zeros(1, 1, 1), [])

    def test_pairs_are_not_held(self):
        """What is kept for the gradient does not grow with the number of offsets."""
        features, labels = torch.randn(1, 64, 20, 20, requires_grad=True), labels_of(1, (20, 20))

        def kept(radius):
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
                affinity_losses(lambda each: alikeness(features, each), labels, pairs_of((20, 20), radius))
            return sum(saved)

        assert kept(8) == kept(3) < features.numel()


class TestGrid:
    @pytest.mark.parametrize("stride", [1, 2, 4, 8])
    @pytest.mark.parametrize("size", [(16, 24), (13, 9), (1, 1), (8, 31)])
    def test_labels_against_a_loop(self, stride, size):
        labels = labels_of(3, size)
        cells = grid_size(labels, stride)
        found = labels_on_grid(labels, cells, stride, 3)
        assert torch.equal(found, loop_labels_on_grid(labels, cells, stride, 3))

    @pytest.mark.parametrize(
        ("pixels", "label"), [([255, 0], 255), ([0, 2], 0), ([2, 1], 1), ([2, 2, 255, 0], 2), ([255], 255), ([3], 3)]
    )
    def test_ties(self, pixels, label):
        cell = torch.tensor(pixels).view(1, 1, -1)
        assert labels_on_grid(cell, (1, 1), 4, 3).item() == label

    def test_padding_is_to_the_right_and_below(self):
        images = torch.rand(1, 3, 13, 8)
        padded = pad_to_multiple(images, 8)
        assert padded.shape == (1, 3, 16, 8)
        assert torch.equal(padded[..., :13, :], images)
        assert not padded[..., 13:, :].any()
        assert grid_size(images, 8) == (2, 1)
