"""Pairs, paths, labels, losses and the walk written from their formulas: plain loops over images, cells and classes."""

import math

import torch

IGNORE, EPS = 255, 1e-5


def loop_pairs(size, radius, border="all"):
    """[((y, x), (y', x')), ...]: every pair once, from the definition of the distance."""
    height, width = size
    if border == "psa" and min(size) < 2 * radius + 1:
        radius = (min(size) - 1) // 2
    found = []
    for y in range(height):
        for x in range(width):
            for other_y in range(height):
                for other_x in range(width):
                    near = (y - other_y) ** 2 + (x - other_x) ** 2 < radius**2
                    if near and (other_y, other_x) > (y, x):
                        inner = y < height - (radius - 1) and radius - 1 <= x < width - (radius - 1)
                        if border == "all" or inner:
                            found.append(((y, x), (other_y, other_x)))
    return found


def loop_path(one, two):
    """The cells on the way: closer than one cell to the line, within the rectangle of its ends."""
    (y0, x0), (y1, x1) = one, two
    length = math.hypot(y1 - y0, x1 - x0)
    cells = []
    for y in range(min(y0, y1), max(y0, y1) + 1):
        for x in range(min(x0, x1), max(x0, x1) + 1):
            distance = abs((y1 - y0) * (x - x0) - (x1 - x0) * (y - y0)) / length
            if distance < 1 - 1e-9:
                cells.append((y, x))
    return cells


def feature_affinity(features, one, two):
    """exp(-mean |f_i - f_j|) of features [D h w]."""
    apart = abs(features[:, one[0], one[1]] - features[:, two[0], two[1]])
    return torch.exp(-apart.sum() / len(features))


def edge_affinity(edge, one, two):
    """1 - the largest boundary on the path, of boundaries [h w]."""
    return 1 - max(edge[y, x] for y, x in loop_path(one, two))


def loop_losses(affinity, labels, radius, border="all"):
    """(bg / 4, fg / 4, neg / 2); affinity(image, one, two) is one number, labels [B h w]."""
    sums, counts = [0.0, 0.0, 0.0], [0, 0, 0]
    for image in range(len(labels)):
        for one, two in loop_pairs(labels.shape[1:], radius, border):
            first, second = int(labels[image][one]), int(labels[image][two])
            if IGNORE in (first, second):
                continue
            a = affinity(image, one, two)
            kind = 2 if first != second else 0 if first == 0 else 1
            sums[kind] = sums[kind] - torch.log(1 + EPS - a if kind == 2 else a + EPS)
            counts[kind] += 1
    return [w * s / (n + EPS) for w, s, n in zip((1 / 4, 1 / 4, 1 / 2), sums, counts, strict=True)]


def loop_displacement(ways, labels, radius, border="all"):
    """(centre, still) of displacements [B 2 h w]."""
    sums, counts = [0.0, 0.0], [0, 0]
    for image in range(len(labels)):
        for one, two in loop_pairs(labels.shape[1:], radius, border):
            first, second = int(labels[image][one]), int(labels[image][two])
            if first != second or first == IGNORE:
                continue
            kind = 1 if first == 0 else 0
            for axis in range(2):
                way = ways[image, axis][one] - ways[image, axis][two]
                sums[kind] = sums[kind] + abs(way - (0 if kind else two[axis] - one[axis]))
            counts[kind] += 1
    return [s / (2 * (n + EPS)) for s, n in zip(sums, counts, strict=True)]


def loop_labels_on_grid(labels, size, stride, num_classes):
    """What most pixels of each cell have; of equally many 255, then the lowest."""
    found = torch.zeros(len(labels), *size, dtype=torch.long)
    for image in range(len(labels)):
        for y in range(size[0]):
            for x in range(size[1]):
                cell = labels[image, y * stride : (y + 1) * stride, x * stride : (x + 1) * stride].flatten().tolist()
                candidates = [IGNORE, *range(num_classes + 1)]
                found[image, y, x] = max(candidates, key=lambda c: (cell.count(c), -candidates.index(c)))
    return found


def dense_transitions(affinities, size, beta):
    """T [N N] in float64 and its column sums before the division; affinities: [((y, x), (y', x'), a), ...]."""
    width = size[1]
    matrix = torch.eye(size[0] * width, dtype=torch.float64)
    for one, two, a in affinities:
        i, j = one[0] * width + one[1], two[0] * width + two[1]
        matrix[i, j] = matrix[j, i] = float(a) ** beta
    sums = matrix.sum(dim=0)
    return matrix / sums, sums


def loop_walk(maps, transitions, steps):
    """x T^steps, one step after the other, of maps [C h w]."""
    x = maps.double().flatten(1)
    for _ in range(steps):
        x = x @ transitions
    return x.reshape(maps.shape)
