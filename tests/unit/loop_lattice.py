"""The permutohedral lattice and a CRF on it by loops over pixels, corners and labels, from the papers' formulas."""

from __future__ import annotations

import math

import numpy as np


def corners(features, sigmas):
    """[(coordinates of a lattice point, its weight)] * (d + 1) of one point, by remainder."""
    d = len(features)
    size = d + 1
    scaled = []
    for i, (value, sigma) in enumerate(zip(features, sigmas, strict=True), start=1):
        scaled.append(float(value) * (size * math.sqrt(2 / 3) / math.sqrt(i * (i + 1)) / sigma))
    high, beyond = [0.0] * size, 0.0  # E f, last coordinate first, as rounding must be that of the fast ones
    for k in range(d, 0, -1):
        high[k] = beyond - k * scaled[k - 1]
        beyond = beyond + scaled[k - 1]
    high[0] = beyond
    cells = [math.floor(x / size) for x in high]
    rests = [x - c * size for x, c in zip(high, cells, strict=True)]
    for _ in range(-sum(cells)):  # those with the largest rests are rounded up, the first of equal ones
        k = max(range(size), key=lambda k: (rests[k], -k))
        cells[k], rests[k] = cells[k] + 1, rests[k] - size
    up = -sum(math.floor(x / size) for x in high)
    before = sorted(range(size), key=lambda k: -(high[k] - math.floor(high[k] / size) * size))  # stable
    order = before[up:] + before[:up]  # largest rest first
    found = []
    for remainder in range(size):
        point = [size * c + remainder for c in cells]
        for k in order[size - remainder :]:
            point[k] -= size
        assert sum(point) == 0
        if remainder == 0:
            weight = 1 - (rests[order[0]] - rests[order[-1]]) / size
        else:
            weight = (rests[order[d - remainder]] - rests[order[size - remainder]]) / size
        found.append((tuple(point), weight))
    return found


class LoopLattice:
    """filter(values [P L]) -> [P L]."""

    def __init__(self, points, sigmas):
        self.corners = [corners(point, sigmas) for point in points]
        self.size = len(sigmas) + 1
        self.points = {point for simplex in self.corners for point, _ in simplex}

    def filter(self, values):
        table = {point: np.zeros(values.shape[1]) for point in self.points}
        for simplex, value in zip(self.corners, values, strict=True):
            for point, weight in simplex:
                table[point] += weight * value
        for direction in range(self.size):
            following = {}
            for point in table:
                total = table[point].copy()
                for sign in (1, -1):
                    step = [sign] * self.size
                    step[direction] -= sign * self.size
                    other = tuple(a + b for a, b in zip(point, step, strict=True))
                    if other in table:
                        total += table[other] / 2
                following[point] = total
            table = following
        return np.array([sum(weight * table[point] for point, weight in simplex) for simplex in self.corners])


class LoopCRF:
    """image [H W C]; kernels: [(sigmas (x, y, channels...), weight)]. With `exact`, the Gaussian itself."""

    def __init__(self, image, kernels, *, exact=False, valid=None):
        height, width = image.shape[:2]
        self.shape = (height, width)
        self.valid = np.ones((height, width), bool) if valid is None else np.asarray(valid, bool)
        self.filters = []
        for sigmas, weight in kernels:
            channels = len(sigmas) - 2
            points = [(x, y, *image[y, x, :channels]) for y in range(height) for x in range(width) if self.valid[y, x]]
            run = dense(points, sigmas) if exact else LoopLattice(points, sigmas).filter
            scale = np.sqrt(weight / run(np.ones((len(points), 1))))
            self.filters.append((run, scale))

    def __call__(self, unary, counts=None, steps=10):
        """Energies [L H W] -> marginals [L H W]; pixels that are not valid keep the softmax of their energies."""
        labels = len(unary)
        counts = [1] * labels if counts is None else counts
        inside = self.valid.flatten()
        energies = unary.reshape(labels, -1).T.astype(np.float64)
        messages, q = np.zeros_like(energies), None
        for step in range(steps + 1):
            if step and inside.any():
                messages = np.zeros_like(energies)
                for run, scale in self.filters:
                    messages[inside] += scale * run(scale * q[inside])
            q = np.zeros_like(energies)
            for pixel in range(len(q)):
                scores = messages[pixel] - energies[pixel]
                e = [math.exp(score - max(scores)) for score in scores]
                total = sum(count * value for count, value in zip(counts, e, strict=True))
                q[pixel] = [value / total for value in e]
        return q.T.reshape(unary.shape)


def dense(points, sigmas):
    """The exact filter: a matrix with an entry for every pair of points."""
    kernel = np.zeros((len(points), len(points)))
    for i, one in enumerate(points):
        for j, two in enumerate(points):
            distance = sum(((float(a) - float(b)) / s) ** 2 for a, b, s in zip(one, two, sigmas, strict=True))
            kernel[i, j] = math.exp(-distance / 2)
    return lambda values: kernel @ values
