"""k-means against Lloyd's iterations and k-means++ by loops, and what it must keep."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tag2mask.ops.kmeans import candidates, kmeans, lloyd, spread


def case(classes=4, entries=15, dim=3, share=0.8, seed=0, dtype=torch.float64):
    """Points and which of them are entries; the first class has all, the last has none."""
    random = torch.Generator().manual_seed(seed)
    points = torch.randn(classes, entries, dim, generator=random, dtype=dtype)
    present = torch.rand(classes, entries, generator=random) < share
    present[0], present[-1] = True, classes == 1
    return points, present


def apart(a, b):
    return sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))


def loop_assign(entries, centres):
    """For each entry (position of the nearest centre that is not None, squared distance to it)."""
    found = []
    for entry in entries:
        best = min((k for k, c in enumerate(centres) if c is not None), key=lambda k: apart(entry, centres[k]))
        found.append((best, apart(entry, centres[best])))
    return found


def loop_lloyd(entries, centres, iterations):
    """Of one class: entries and centres are lists of vectors, a centre that is not found is None."""
    before = None
    for _ in range(iterations):
        if not entries:
            return [None] * len(centres)
        nearest = loop_assign(entries, centres)
        order = sorted(range(len(entries)), key=lambda i: -nearest[i][1])
        moved, helped = [], 0
        for k in range(len(centres)):
            mine = [e for e, (best, _) in zip(entries, nearest, strict=True) if best == k]
            if mine:
                moved.append(sum(mine) / len(mine))
            elif helped < len(order) and nearest[order[helped]][1] > 1e-12:
                moved.append(entries[order[helped]])
                helped += 1
            else:
                moved.append(None)
        centres = moved
        labels = [best for best, _ in nearest]
        if labels == before and not helped:
            break
        before = labels
    return centres


def loop_spread(entries, draws):
    centres, weights = [], [1.0] * len(entries)
    for row in draws:
        if sum(weights) <= 0:
            centres.append(None)
            continue
        trials = []
        for draw in row:
            cumulated, total = 0.0, float(draw) * sum(weights)
            for place in range(len(weights)):
                cumulated += weights[place]
                if cumulated > total:
                    break
            rest = [apart(e, entries[place]) for e in entries]
            if centres:
                rest = [min(a, b) for a, b in zip(rest, weights, strict=True)]
            trials.append((sum(rest), place, rest))
        _, place, weights = min(trials, key=lambda trial: trial[0])
        centres.append(entries[place])
    return centres


def listed(points, present):
    """[[entry, ...] for each class]."""
    return [[p for p, ok in zip(*pair, strict=True) if ok] for pair in zip(points, present, strict=True)]


def assert_same(got, wanted):
    """got (centres, found); wanted: for each class a list of centres or None."""
    centres, found = got
    assert found.tolist() == [[c is not None for c in row] for row in wanted]
    for mine, row in zip(centres, wanted, strict=True):
        for a, b in zip(mine, row, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("iterations", [1, 2, 3, 60])
@pytest.mark.parametrize("classes", [1, 4])
def test_lloyd_equals_the_loops_from_the_same_start(iterations, classes):
    points, present = case(classes)
    start = torch.randn(classes, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.ones(classes, 4, dtype=torch.bool)
    found[0, 2] = False  # a centre that is not there draws nobody, and is given the farthest entry
    wanted = [
        loop_lloyd(entries, [c if ok else None for c, ok in zip(s, f, strict=True)], iterations)
        for entries, s, f in zip(listed(points, present), start, found, strict=True)
    ]
    assert_same(lloyd(points, present, start, found, iterations=iterations), wanted)


@pytest.mark.parametrize("iterations", [1, 2, 60])
def test_empty_clusters_move_to_the_farthest_entries(iterations):
    points, present = case(3)
    start = points[:, :6] * 0.1
    start[:, 1], start[:, 3], start[0, 4] = 100, -100, 1000  # nobody is near these
    start[1:, 0] = 100
    found = torch.ones(3, 6, dtype=torch.bool)
    wanted = [loop_lloyd(e, list(s), iterations) for e, s in zip(listed(points, present), start, strict=True)]
    centres, found = lloyd(points, present, start, found, iterations=iterations)
    assert_same((centres, found), wanted)
    assert found[:2].all() and not found[2].any() and centres[:2].abs().max() < 50
    if iterations == 1:
        entries, nearest = listed(points, present)[0], loop_assign(points[0], start[0])
        farthest = max(range(len(entries)), key=lambda i: nearest[i][1])
        assert centres[0, 1].equal(points[0, farthest])


def test_more_centres_than_entries_or_than_different_entries():
    points = torch.tensor([[[0.0], [4], [9]], [[0.0], [4], [4]]], dtype=torch.float64)
    start = torch.tensor([[[-1.0], [50], [50], [50], [50]]], dtype=torch.float64).expand(2, -1, -1)
    centres, found = lloyd(points, torch.ones(2, 3).bool(), start, torch.ones(2, 5, dtype=torch.bool), iterations=9)
    assert [sorted(rows[ok].flatten().tolist()) for rows, ok in zip(centres, found, strict=True)] == [[0, 4, 9], [0, 4]]


@pytest.mark.parametrize("trials", [1, 3])
def test_the_start_equals_the_loops_with_the_same_draws(trials):
    points, present = case(5)
    draws = torch.rand(7, trials, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = [loop_spread(entries, draws) for entries in listed(points, present)]
    centres, found = spread(points, present, draws)
    assert_same((centres, found), wanted)
    assert found[:-1].all() and not found[-1].any()
    for rows, entries in zip(centres[:-1], listed(points, present), strict=False):
        places = [next(i for i, entry in enumerate(entries) if entry.equal(row)) for row in rows]
        assert len(set(places)) == 7  # entries, and no one twice


def test_the_start_draws_in_proportion_to_the_squared_distance():
    points = torch.tensor([0.0, 1, 3]).view(1, 3, 1).double().expand(2000, -1, -1).clone()
    points[:, 0] = 0
    random = torch.Generator().manual_seed(0)
    first = torch.zeros(1, 1, dtype=torch.float64)  # the first entry
    shares = [
        float(spread(points[:1], torch.ones(1, 3).bool(), torch.cat([first, draw.view(1, 1)]))[0][0, 1] == 3)
        for draw in torch.rand(2000, generator=random, dtype=torch.float64)
    ]
    assert sum(shares) / 2000 == pytest.approx(0.9, abs=0.02)  # 9 of 1 + 9


def test_the_start_ends_where_all_entries_are_centres():
    points = torch.zeros(2, 6, 2)
    points[0, 3:] = torch.tensor([1.0, 2.0])
    points[1] = 0.3
    for draws in (torch.rand(4, 3, generator=torch.Generator().manual_seed(5)), torch.ones(4, 3), torch.zeros(4, 3)):
        centres, found = spread(points, torch.ones(2, 6).bool(), draws)
        assert found.tolist() == [[True, True, False, False], [True, False, False, False]]
        assert {tuple(row) for row in centres[0, :2].tolist()} == {(0.0, 0.0), (1.0, 2.0)}


@pytest.mark.parametrize("entries", [0, 1, 3, 6])
def test_a_class_of_no_more_entries_than_clusters_keeps_them(entries):
    points, present = case(2, 20)
    present[1] = False
    present[1, torch.tensor([17, 2, 5, 19, 11, 3])[:entries]] = True
    centres, found = kmeans(points, present, 6, seed=0)
    assert found.sum(1).tolist() == [6, entries] and found[1, :entries].all()
    assert centres[1, :entries].equal(points[1][present[1]]) and not centres[1, entries:].any()
    narrow, there = kmeans(points[:, :4], torch.ones(2, 4).bool(), 6, seed=0)
    assert narrow[:, :4].equal(points[:, :4]) and there.sum(1).tolist() == [4, 4] and narrow.shape == (2, 6, 3)
    nothing, there = kmeans(points[:, :0], present[:, :0], 6, seed=0)
    assert nothing.shape == (2, 6, 3) and not nothing.any() and not there.any()


def test_equal_entries_and_equally_near_centres():
    points = torch.tensor([[1.0, 0], [-1, 0], [0, 0], [1, 0], [-1, 0], [1, 0]], dtype=torch.float64)[None]
    start = torch.tensor([[1.0, 0], [-1, 0]], dtype=torch.float64)[None]
    centres, _ = lloyd(points, torch.ones(1, 6).bool(), start, torch.ones(1, 2).bool(), iterations=1)
    torch.testing.assert_close(centres[0], torch.tensor([[0.75, 0], [-1, 0]], dtype=torch.float64))  # the tie: first
    centres, found = kmeans(points, torch.ones(1, 6).bool(), 4, seed=0)  # three different ones
    assert found.sum() == 3
    assert sorted(centres[0][found[0]][:, 0].tolist()) == pytest.approx([-1, 0, 1], abs=1e-12)


def blobs(classes=3, groups=5, each=12, dim=8, seed=0):
    random = torch.Generator().manual_seed(seed)
    means = 20 * torch.randn(classes, groups, dim, generator=random)
    points = means.repeat(1, each, 1) + torch.randn(classes, groups * each, dim, generator=random)
    return points[:, torch.randperm(groups * each, generator=random)], means


@pytest.mark.parametrize("offset", [0, 1e3])
def test_groups_that_lie_apart_are_found(offset):
    points, means = blobs()
    for seed in range(5):
        centres, found = kmeans(points + offset, torch.ones(points.shape[:2]).bool(), 5, seed=seed)
        assert found.all() and (torch.cdist(means + offset, centres).min(2).values < 1.5).all()


def test_the_end_is_a_fixed_point():
    points, present = case(3, 60, 4, seed=2)
    centres, found = kmeans(points, present, 8, seed=1)
    assert_same((centres, found), [loop_lloyd(e, list(c), 1) if e else [None] * 8
                                   for e, c in zip(listed(points, present), centres, strict=True)])  # fmt: skip


def test_the_start_spares_what_random_starts_end_in():
    points, _ = blobs(1, 8, 6, seed=1)
    mine, plain = [], []
    for seed in range(6):
        centres, _ = kmeans(points, torch.ones(1, 48).bool(), 8, seed=seed)
        mine.append(sum(distance for _, distance in loop_assign(points[0], list(centres[0]))))
        order = torch.randperm(48, generator=torch.Generator().manual_seed(seed))[:8]
        ends = loop_lloyd(list(points[0]), list(points[0, order]), 100)
        plain.append(sum(distance for _, distance in loop_assign(points[0], ends)))
    assert max(mine) <= min(plain) + 1e-3 and max(mine) < 0.2 * sum(plain) / 6


def test_seed_order_of_classes_and_what_is_masked():
    points, present = case(4, 40, seed=3)
    first, found = kmeans(points, present, 5, seed=1)
    again, _ = kmeans(points, present, 5, seed=1)
    other, _ = kmeans(points, present, 5, seed=2)
    assert first.equal(again) and not torch.allclose(first, other)
    order = torch.tensor([2, 3, 0, 1])
    moved, there = kmeans(points[order], present[order], 5, seed=1)
    torch.testing.assert_close(moved, first[order])
    assert there.equal(found[order])
    dirty, _ = kmeans(torch.where(present[..., None], points, math.nan), present, 5, seed=1)
    assert dirty.equal(first)
    alone, _ = kmeans(points[:1], present[:1], 5, seed=1)
    torch.testing.assert_close(alone, first[:1])
    single, found = kmeans(points, present, 1, seed=1)
    assert found.tolist() == [[True], [True], [True], [False]]
    torch.testing.assert_close(single[0, 0], points[0].mean(0))


def test_it_stops_when_nothing_moves_and_after_the_iterations():
    points, present = case(3, 200, seed=4)
    ends = [kmeans(points, present, 10, seed=0, iterations=n)[0] for n in (1, 2, 60, 1000)]
    assert not torch.allclose(ends[0], ends[1]) and ends[2].equal(ends[3])


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_nothing_loops_over_classes_or_entries():
    calls = []
    for classes, entries in ((2, 15), (7, 90)):
        points, present = case(classes, entries)
        with Count() as count:
            kmeans(points, present, 4, seed=0, iterations=1)
        calls.append(count.calls)
    assert calls[0] == calls[1] and candidates(4) == 3 and candidates(50) == 5
