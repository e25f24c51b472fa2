"""CPAL by loops over images, classes, prototypes and pixels, from the paper; for test_cpal."""

from __future__ import annotations

import torch
import torch.nn.functional as F

EPS = 1e-5
DEFAULTS = {
    "weight": 1.0, "threshold": 0.1, "projection": "conv", "detach": True, "positiveness": "weighted",
    "rank": "weighted", "measure": "dot", "gamma": None, "align": "features", "align_mean": "batch", "delta_scale": 1.0,
    "background": "complement", "pooling": "mask", "unit": False, "gate": 0.0, "pacam_norm": "max", "stop": "none",
    "reduction": "mean", "export": "pacam",
}  # fmt: skip


def cos(a, b):
    return a @ b / max(a.norm(), 1e-6) / max(b.norm(), 1e-12)


class Loops:
    """What CPAL with the options `o` makes of one batch; `method` lends its weights and what it remembers."""

    def __init__(self, method, options, batch, out, *, inference=False):
        self.o, self.method = DEFAULTS | {"neighbours": method.neighbours} | options, method
        self.images, self.classes, self.height, self.width = out.cams.shape
        self.tags = torch.ones_like(batch.tags) if inference else batch.tags
        every = [(y, x) for y in range(self.height) for x in range(self.width)]
        cell = batch.valid.shape[-2] // self.height, batch.valid.shape[-1] // self.width
        self.pixels = [
            [
                p
                for p in every
                if inference or batch.valid[b, 0, p[0] * cell[0] + cell[0] // 2, p[1] * cell[1] + cell[1] // 2]
            ]
            for b in range(self.images)
        ]
        self.inference = inference
        # Rows of prototypes: the background's first if it has some, then the classes'.
        self.first = int(self.o["background"] == "bank")
        self.maps = [[self.map_of(out, b, n) for n in range(self.classes)] for b in range(self.images)]
        self.z = self.project(out.features)
        self.anchors = [[self.anchor(b, c) for c in range(self.first + self.classes)] for b in range(self.images)]
        self.shifts = [self.shift(c) for c in range(self.first + self.classes)]
        self.pacam = [[self.aware(b, c) for c in range(self.first + self.classes)] for b in range(self.images)]

    def map_of(self, out, b, n):
        """{pixel: M_n}."""
        values = {}
        for p in self.pixels[b]:
            value = out.cams[b, n][p]
            if out.background is not None:
                rivals = [out.cams[b, m][p].exp() for m in range(self.classes)] + [out.background[b, 0][p].exp()]
                value = value.exp() / sum(rivals)
            values[p] = value.clamp(min=0)
        return normalised(values)

    def project(self, features):
        """{pixel: z} for each image."""
        if self.o["detach"]:
            features = {tap: x.detach() for tap, x in features.items()}
        if self.o["projection"] == "identity":
            whole = features["last"]
        elif self.o["projection"] == "conv":
            whole = torch.einsum("ed,bdhw->behw", self.method.project.taps["last"].weight[:, :, 0, 0], features["last"])
        else:
            parts = []
            for tap in ("c2", "c3", "c4", "c5"):
                part = torch.einsum("ed,bdhw->behw", self.method.project.taps[tap].weight[:, :, 0, 0], features[tap])
                part = part / part.norm(dim=1, keepdim=True).clamp(min=1e-12)
                size = (self.height, self.width)
                if part.shape[-2:] != size:
                    part = F.interpolate(part, size=size, mode="bilinear", align_corners=True)
                parts.append(part)
            whole = torch.cat(parts, dim=1)
        found = []
        for b in range(self.images):
            vectors = {p: whole[b, :, p[0], p[1]] for p in self.pixels[b]}
            if self.o["unit"]:
                vectors = {p: v / max(v.norm(), 1e-12) for p, v in vectors.items()}
            found.append(vectors)
        return found

    def anchor(self, b, c):
        """P_c of image b (eq. 4), or None."""
        n = c - self.first
        weights = {}
        for p in self.pixels[b]:
            if n < 0:
                best = max([self.maps[b][m][p].item() * self.tags[b, m].item() for m in range(self.classes)])
                if (1 - best) / 2 >= best:
                    weights[p] = 1 - best
            elif self.tags[b, n] and self.maps[b][n][p] > self.o["threshold"]:
                weights[p] = self.maps[b][n][p].item()
        if not weights:
            return None
        if self.o["pooling"] == "mask":
            weights = dict.fromkeys(weights, 1.0)
        mean = sum(w * self.z[b][p].detach() for p, w in weights.items()) / sum(weights.values())
        return mean / mean.norm() if self.o["unit"] else mean

    def prototypes(self, c):
        return [p for p, ok in zip(self.method.contexts[c], self.method.found[c], strict=True) if ok]

    def shift(self, c):
        """delta (eq. 12) as a mean over all pairs of prototypes and instances."""
        instances = [row[c] for row in self.anchors if row[c] is not None]
        if (self.o["align_mean"] == "running" or self.inference) and self.method.average.known[c]:
            instances = [self.method.average.rows[c]]
        elif self.inference:
            instances = []
        pairs = [p - q for p in self.prototypes(c) for q in instances]
        return self.o["delta_scale"] * sum(pairs) / len(pairs) if pairs else torch.zeros(self.method.project.dim)

    def neighbours(self, anchor, prototypes):
        """[(w, p)] (eq. 6 and 7)."""
        dim = self.method.project.dim
        length = 1 if self.o["unit"] else 2 if self.o["projection"] == "hierarchical" else dim**0.5
        if self.o["measure"] == "dot":
            close, gamma = [anchor @ p for p in prototypes], length**2 / dim**0.5
        elif self.o["measure"] == "cosine":
            close, gamma = [cos(anchor, p) for p in prototypes], 1 / dim**0.5
        elif self.o["measure"] == "l1":
            close, gamma = [-(anchor - p).abs().sum() for p in prototypes], length * dim**0.5
        else:
            close, gamma = [-(anchor - p).square().sum().sqrt() for p in prototypes], length
        gamma = self.o["gamma"] or gamma
        largest = max(close)
        powers = [((s - largest) / gamma).exp() for s in close]
        w = [power / sum(powers) for power in powers]
        factor = w if self.o["rank"] == "weighted" else [1.0] * len(w)
        score = [f * cos(anchor, p) for f, p in zip(factor, prototypes, strict=True)]
        kept = sorted(range(len(w)), key=lambda i: -score[i])[: self.o["neighbours"]]
        return [(w[i] if self.o["positiveness"] == "weighted" else 1.0, prototypes[i]) for i in kept]

    def aware(self, b, c):
        """{pixel: M~_c} (eq. 13), or None where image b has no part in class c."""
        anchor, prototypes = self.anchors[b][c], self.prototypes(c)
        if anchor is None or not prototypes:
            return None
        if self.o["align"] in ("anchor", "both"):
            anchor = anchor + self.shifts[c]
        kept = self.neighbours(anchor, prototypes)
        values = {}
        for p in self.pixels[b]:
            z = self.z[b][p] + self.shifts[c] if self.o["align"] in ("features", "both") else self.z[b][p]
            mean = sum(w * cos(z, q) for w, q in kept) / sum(w for w, _ in kept)
            values[p] = mean.clamp(min=0)
        return normalised(values) if self.o["pacam_norm"] == "max" else values

    def loss(self):
        """L_self (eq. 14)."""
        total, pixels = torch.zeros(()), 0
        for b in range(self.images):
            part = [n for n in range(self.classes) if self.pacam[b][self.first + n] is not None]
            for p in self.pixels[b]:
                pixels += 1
                own = [self.maps[b][n][p] for n in part]
                aware = [self.pacam[b][self.first + n][p] for n in part]
                if not self.first or self.pacam[b][0] is not None:
                    ground = 1 - max(own, default=torch.zeros(()))
                    own_ground, aware_ground = ground, 1 - max(aware, default=torch.zeros(()))
                    if self.first:
                        aware_ground = self.pacam[b][0][p]
                    own, aware = [*own, own_ground], [*aware, aware_ground]
                for m, t in zip(own, aware, strict=True):
                    m = m.detach() if self.o["stop"] == "cam" else m
                    t = t.detach() if self.o["stop"] == "pacam" else t
                    total = total + (m - t).abs()
        total = self.o["weight"] * total / (self.classes + 1)
        return total / self.images if self.o["reduction"] == "sum" else total / max(pixels, 1)

    def exported(self):
        """[B K h w]."""
        maps = torch.zeros(self.images, self.classes, self.height, self.width)
        for b in range(self.images):
            for n in range(self.classes):
                pacam = self.pacam[b][self.first + n] or self.maps[b][n]
                for p in self.pixels[b]:
                    own = self.maps[b][n][p]
                    value = {"pacam": pacam[p], "cam": own, "sum": own + pacam[p]}[self.o["export"]]
                    maps[b, n, p[0], p[1]] = value
        return maps


def normalised(values):
    highest = max(values.values(), default=0.0)
    return {p: v / (highest + EPS) for p, v in values.items()}
