"""Confident pixels, class means, labels, contrast and ranks against loops written from the definitions."""

from __future__ import annotations

import math

import pytest
import torch

from tag2mask.ops.contrast import (
    confidence,
    pixel_contrast,
    pseudo_labels,
    rank_within_group,
    top_pixels,
    valid_on_grid,
    weighted_means,
)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places(maps):
    """Every (image, row, column) in the order of the batch."""
    return [(b, y, x) for b in range(maps.shape[0]) for y in range(maps.shape[2]) for x in range(maps.shape[3])]


def test_valid_cells_are_those_whose_centre_is_on_the_image():
    valid = torch.zeros(2, 1, 12, 16)
    valid[0, :, :8, 3:] = 1
    valid[1] = 1
    cells = valid_on_grid(valid, (3, 4))
    for b in range(2):
        for y in range(3):
            for x in range(4):
                assert cells[b, y, x] == bool(valid[b, 0, 4 * y + 2, 4 * x + 2])


@pytest.mark.parametrize("negative_floor", [False, True])
def test_confidence_uses_valid_pixels_only(negative_floor):
    cams = 4 * rand(3, 2, 4, 5) - 1
    cams[1, 0] = -2
    valid = rand(3, 4, 5, seed=1) > 0.3
    valid[0] = True
    maps = confidence(cams, valid, negative_floor=negative_floor)
    for b in range(3):
        for c in range(2):
            inside = [max(v.item(), 0) for v in cams[b, c][valid[b]]]
            low, high = min(inside), max(inside)
            for y in range(4):
                for x in range(5):
                    if valid[b, y, x]:
                        value = max(cams[b, c, y, x].item(), 0)
                        above = value - low - 1e-5
                        if value < low + 1e-5:
                            above = -low - 1e-5 if negative_floor else 0
                        assert maps[b, c, y, x].item() == pytest.approx(above / (high - low + 1e-5), abs=1e-9)


def test_pseudo_labels_are_the_best_tagged_class_above_the_background():
    maps = rand(3, 4, 5, 5)
    tags = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1.0]])
    valid = rand(3, 5, 5, seed=1) > 0.2
    maps[0, 0, 0, 0], maps[0, 2, 0, 0], valid[0, 0, 0] = 0.5, 0.25, True  # a tie with the background
    labels = pseudo_labels(maps, tags, 0.5, valid)
    for b, y, x in places(maps):
        best, score = 0, 0.5
        for c in range(4):
            if tags[b, c] and maps[b, c, y, x] > score:
                best, score = c + 1, maps[b, c, y, x]
        assert labels[b, y, x] == (best if valid[b, y, x] else 255)
    assert labels[0, 0, 0] == 0 and set(labels.flatten().tolist()) == {0, 1, 2, 3, 4, 255}


@pytest.mark.parametrize("top", [1, 5, 1000])
def test_top_pixels_of_the_batch(top):
    scores = (rand(3, 4, 5, 6) * 8).floor()  # many ties
    scores[:, 3] = -1
    candidates = rand(3, 4, 5, 6, seed=1) > 0.6
    candidates[:, 2] = False
    chosen = top_pixels(scores, candidates, top)
    for c in range(4):
        allowed = [p for p in places(scores) if candidates[p[0], c, p[1], p[2]]]
        best = sorted(allowed, key=lambda p: -scores[p[0], c, p[1], p[2]].item())[:top]
        assert {p for p in places(scores) if chosen[p[0], c, p[1], p[2]]} == set(best)
    assert not chosen[:, 2].any() and chosen[:, 3].sum() == min(top, int(candidates[:, 3].sum()))


def test_weighted_means_over_the_batch():
    features, weights = rand(3, 7, 4, 5), rand(3, 4, 4, 5, seed=1) - 0.2
    weights[:, 1] = 0
    weights[:, 2] = -1
    means, found = weighted_means(features, weights)
    assert found.tolist() == [True, False, True, True] and not means[1].any()
    for c in (0, 2, 3):
        total, wanted = 0.0, torch.zeros(7, dtype=torch.float64)
        for b, y, x in places(features):
            total += weights[b, c, y, x]
            wanted = wanted + weights[b, c, y, x] * features[b, :, y, x]
        torch.testing.assert_close(means[c], wanted / total)


def loop_contrast(similarity, labels, found, temperature):
    terms = []
    for i, label in enumerate(labels.tolist()):
        if label != 255 and found[label]:
            below = sum(torch.exp(similarity[i, c] / temperature) for c in range(len(found)) if found[c])
            terms.append(-torch.log(torch.exp(similarity[i, label] / temperature) / below))
    return sum(terms) / len(terms) if terms else 0 * similarity.sum()


@pytest.mark.parametrize("found", [[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
def test_pixel_contrast_value_and_gradient(found):
    found = torch.tensor(found).bool()
    similarity = (2 * rand(30, 4) - 1).requires_grad_()
    labels = (rand(30, seed=1) * 4).long()
    labels[::7] = 255
    loss, wanted = pixel_contrast(similarity, labels, found, 0.1), loop_contrast(similarity, labels, found, 0.1)
    torch.testing.assert_close(loss, wanted)
    got, expected = (torch.autograd.grad(value, similarity)[0] for value in (loss, wanted))
    torch.testing.assert_close(got, expected)
    assert not got[:, ~found].any() and not got[::7].any()


def test_pixel_contrast_of_two_equal_prototypes_is_log_two():
    found = torch.tensor([True, True, False])
    loss = pixel_contrast(torch.full((5, 3), 0.3), torch.tensor([0, 1, 0, 2, 255]), found, 0.1)
    assert loss.item() == pytest.approx(math.log(2))


def test_rank_within_group():
    keys = (rand(2, 60) * 10).floor()  # many ties
    groups = (rand(60, seed=1) * 5).long()
    groups[groups == 3] = 2
    ranks, sizes = rank_within_group(keys, groups, 5)
    assert sizes.tolist() == [groups.tolist().count(g) for g in range(5)] and sizes[3] == 0
    for row in range(2):
        for i in range(60):
            before = [j for j in range(60) if groups[j] == groups[i] and (keys[row, j], j) < (keys[row, i], i)]
            assert ranks[row, i] == len(before)
