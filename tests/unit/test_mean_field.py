"""The mean field against sums over every pair of pixels, written from the formula, and against a lattice by loops."""

import math

import numpy as np
import pytest
import torch
from loop_lattice import LoopCRF
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tag2mask.ops import mean_field as module
from tag2mask.ops.mean_field import (
    Kernels,
    Messages,
    colours_of,
    mean_field,
    pair_weights,
    positions,
    refine_labels,
)

SMALL = Kernels(sigma=1.5, weight=0.7, sigma_xy=2.5, sigma_rgb=40.0, weight_rgb=1.3)


def slow_pairs(colours, kernels, valid):
    """k(i, j) of one image, [P P], by loops."""
    _, height, width = colours.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    near, alike = np.zeros((2, len(places), len(places)))
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            if valid[y, x] and valid[v, u]:
                d = (y - v) ** 2 + (x - u) ** 2
                c = sum(float(colours[k, y, x] - colours[k, v, u]) ** 2 for k in range(3))
                near[i, j] = math.exp(-d / 2 / kernels.sigma**2)
                alike[i, j] = math.exp(-d / 2 / kernels.sigma_xy**2 - c / 2 / kernels.sigma_rgb**2)
    total = np.zeros_like(near)
    for weight, kernel in ((kernels.weight, near), (kernels.weight_rgb, alike)):
        for i in range(len(places)):
            for j in range(len(places)):
                if kernel[i, j] > 0:
                    total[i, j] += weight * kernel[i, j] / math.sqrt(kernel[i].sum() * kernel[j].sum())
    return total


def slow_mean_field(unary, pairs, iterations):
    """Q of one image, [L P], by loops."""
    labels, pixels = unary.shape

    def normalised(scores):
        out = np.zeros_like(scores)
        for p in range(pixels):
            e = np.exp(scores[:, p] - scores[:, p].max())
            out[:, p] = e / e.sum()
        return out

    q = normalised(-unary)
    for _ in range(iterations):
        scores = -unary.copy()
        for label in range(labels):
            for i in range(pixels):
                for j in range(pixels):
                    scores[label, i] += pairs[i, j] * q[label, j]
        q = normalised(scores)
    return q


def slow_refine(labels, colours, count, valid, kernels, gt_prob, iterations, filters):
    flat = labels.flatten().numpy()
    unary = np.full((count, len(flat)), -math.log((1 - gt_prob) / (count - 1)))
    unary[flat, np.arange(len(flat))] = -math.log(gt_prob)
    if filters == "exact":
        q = slow_mean_field(unary, slow_pairs(colours, kernels, valid), iterations)
    else:
        crf = LoopCRF(colours.permute(1, 2, 0).numpy(), weighted(kernels), valid=valid)
        q = crf(unary.reshape(count, *labels.shape), steps=iterations)
    return torch.from_numpy(q.argmax(axis=0)).view(labels.shape)


def weighted(kernels):
    """As LoopCRF takes them."""
    alike = (kernels.sigma_xy, kernels.sigma_xy, *[kernels.sigma_rgb] * 3)
    return [((kernels.sigma, kernels.sigma), kernels.weight), (alike, kernels.weight_rgb)]


def messages(colours, kernels, valid=None):
    near, alike = positions(colours)
    one, two = weighted(kernels)
    return Messages([(near, *one), (alike, *two)], None if valid is None else valid.flatten(1) > 0)


@pytest.fixture
def colours():
    return torch.rand(2, 3, 3, 4, generator=torch.Generator().manual_seed(1)) * 255


@pytest.mark.parametrize("masked", [False, True])
def test_pair_weights(colours, masked):
    valid = torch.ones(2, 3, 4)
    if masked:
        valid[0, :, 3] = 0
        valid[1] = 0
    found = pair_weights(colours, SMALL, valid if masked else None)
    for image, shades in enumerate(colours):
        slow = torch.tensor(slow_pairs(shades, SMALL, valid[image]))
        torch.testing.assert_close(found[image].double(), slow, rtol=1e-5, atol=1e-6)


def test_marginals(colours):
    unary = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))
    pairs = pair_weights(colours, SMALL)
    for iterations in (0, 1, 4):
        found = mean_field(unary, pairs, iterations)
        for image in range(2):
            slow = slow_mean_field(unary[image].double().numpy(), pairs[image].double().numpy(), iterations)
            torch.testing.assert_close(found[image].double(), torch.tensor(slow), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_marginals_by_the_lattice(colours, masked):
    unary = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(2))
    valid = torch.ones(2, 3, 4)
    if masked:
        valid[0, :, 3] = 0
        valid[1] = 0
    run = messages(colours, SMALL, valid if masked else None)
    for iterations in (1, 4):
        found = mean_field(unary, run, iterations)
        torch.testing.assert_close(mean_field(unary, run.matrix(), iterations), found, rtol=1e-5, atol=1e-6)
        for image in range(2):
            crf = LoopCRF(colours[image].permute(1, 2, 0).numpy(), weighted(SMALL), valid=valid[image])
            slow = crf(unary[image].double().numpy().reshape(3, 3, 4), steps=iterations).reshape(3, 12)
            torch.testing.assert_close(found[image].double(), torch.tensor(slow), rtol=1e-5, atol=1e-5)


def test_labels_that_are_alike_are_one_with_a_number(colours):
    unary = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(2))
    counts = torch.tensor([[1, 4, 1], [2, 0, 1]])
    found = mean_field(unary, pair_weights(colours, SMALL), 5, counts)
    for image, several in enumerate(counts.tolist()):
        rows = [label for label, number in enumerate(several) for _ in range(number)]
        every = mean_field(unary[image : image + 1, rows], pair_weights(colours, SMALL)[image : image + 1], 5)[0]
        for row, label in enumerate(rows):
            torch.testing.assert_close(every[row], found[image, label])
    assert found[1, 1].abs().max() == 0


@pytest.mark.parametrize("filters", ["lattice", "exact"])
@pytest.mark.parametrize("count", [2, 4, 21])
def test_refined_labels(colours, count, filters):
    draws = torch.Generator().manual_seed(4)
    labels = torch.randint(0, min(count, 4), (2, 3, 4), generator=draws)
    labels[1] = labels[1].clamp(max=1)  # fewer labels than in the other image
    valid = torch.ones(2, 3, 4)
    valid[0, 2] = 0
    options = {"gt_prob": 0.6, "iterations": 3, "kernels": SMALL, "filters": filters}
    found = refine_labels(labels, colours, count, valid, **options)
    assert found.dtype == torch.int64
    for image in range(2):
        slow = slow_refine(labels[image], colours[image], count, valid[image], SMALL, 0.6, 3, filters)
        assert torch.equal(found[image], slow)


@pytest.mark.parametrize("masked", [False, True])
def test_large_grids_are_refined_like_small_ones(monkeypatch, masked):
    draws = torch.Generator().manual_seed(6)
    colours = torch.nn.functional.interpolate(torch.rand(2, 3, 3, 3, generator=draws) * 255, size=(9, 8))
    labels = torch.randint(0, 4, (2, 9, 8), generator=draws)
    valid = torch.ones(2, 9, 8)
    valid[1, 5:] = 0
    found = []
    for pixels in (0, 1000):
        monkeypatch.setattr(module, "SMALL_ON_CPU", pixels)
        found.append(refine_labels(labels, colours, 5, valid if masked else None))
    assert torch.equal(*found) and not torch.equal(found[0], labels)


@pytest.mark.parametrize("pixels", [0, 1000])
@pytest.mark.parametrize("filters", ["lattice", "exact"])
def test_refining_reads_no_value_back_from_the_device(monkeypatch, colours, filters, pixels):
    monkeypatch.setattr(module, "SMALL_ON_CPU", pixels)
    labels = torch.zeros(2, 3, 4, dtype=torch.int64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # tensors with shapes but no values
        given = mode.from_tensor(labels), mode.from_tensor(colours), 3, mode.from_tensor(torch.ones(2, 3, 4))
        refined = refine_labels(*given, filters=filters)
        assert refined.shape == labels.shape
        with pytest.raises(DataDependentOutputException):
            refined.sum().item()


def test_refinement_follows_edges_and_ignores_padding():
    colours = torch.zeros(1, 3, 16, 16)
    colours[..., 8:] = 200
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)
    labels[..., 8:] = 3
    clean = labels.clone()
    labels[0, 4, 3], labels[0, 9, 12] = 3, 0  # two wrong pixels
    valid = torch.ones(1, 16, 16)
    valid[..., :2] = 0
    labels[..., :2] = 7  # under the padding
    found = refine_labels(labels, colours, 21, valid)
    assert torch.equal(found[..., 2:], clean[..., 2:])
    assert torch.equal(found[..., :2], labels[..., :2])


def test_colours_from_normalised_images():
    image = torch.randint(0, 256, (3, 2, 2), generator=torch.Generator().manual_seed(5)).float()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (image / 255 - mean[:, None, None]) / std[:, None, None]
    shift = colours_of(normalised[None])[0] - image
    torch.testing.assert_close(shift, shift[:, :1, :1].expand_as(shift), atol=1e-3, rtol=0)
