"""PPC by loops over pixels and classes, from the paper and from what the released code computes; for test_ppc."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def loop_maps(cams, valid, negative_floor):
    maps = torch.zeros_like(cams)
    for b in range(cams.shape[0]):
        for c in range(cams.shape[1]):
            inside = [max(v.item(), 0) for v in cams[b, c][valid[b]]]
            low, high = (min(inside), max(inside)) if inside else (0, 0)
            for y in range(cams.shape[2]):
                for x in range(cams.shape[3]):
                    value = max(cams[b, c, y, x].item(), 0)
                    floor = -low - 1e-5 if negative_floor else 0
                    above = floor if value < low + 1e-5 else value - low - 1e-5
                    maps[b, c, y, x] = above / (high - low + 1e-5)
    return maps


def loop_look(method, batch, out, grid):
    """(unit pixel vectors, labels (None: out), {column: prototype}), pixels in the order of the batch."""
    o = method
    features = torch.einsum("dk,bkhw->bdhw", o.project.weight[:, :, 0, 0], out.features["last"]).relu()
    cams = (out.cams if out.refined is None else out.refined).relu()
    if features.shape[-2:] != grid:
        features = F.interpolate(features, size=grid, mode="bilinear", align_corners=True)
        cams = F.interpolate(cams, size=grid, mode="bilinear", align_corners=True)
    valid = batch.valid[:, 0, 4::8, 4::8] > 0 if o.ignore_padding else torch.ones(len(cams), *grid, dtype=torch.bool)
    maps = loop_maps(cams, valid, o.negative_floor)
    images, classes = batch.tags.shape
    places = [(b, y, x) for b in range(images) for y in range(grid[0]) for x in range(grid[1])]
    vectors, labels = [], []
    for b, y, x in places:
        f = features[b, :, y, x]
        vectors.append(f / max(f.norm(), 1e-12))
        scores = [o.background] + [maps[b, c, y, x].item() * batch.tags[b, c].item() for c in range(classes)]
        labels.append(scores.index(max(scores)) if valid[b, y, x] else None)
    prototypes = {}
    for column in range(classes + 1):
        members = [i for i, label in enumerate(labels) if label == column]
        anyone = [i for i, label in enumerate(labels) if label is not None]
        if column == 0:
            members = members if o.background_proto == "assigned" else anyone[: o.top]
            weights = dict.fromkeys(members, 1.0)
        else:
            b_y_x = {i: maps[places[i][0], column - 1, places[i][1], places[i][2]].item() for i in range(len(places))}
            members = members if o.proto_from == "assigned" else anyone
            members = sorted(members, key=lambda i: -b_y_x[i])[: o.top]
            weights = {i: b_y_x[i] for i in members}
        total = sum(weights.values())
        if total:
            raw = [features[places[i][0], :, places[i][1], places[i][2]].detach() for i in weights]
            p = sum(w * f for w, f in zip(weights.values(), raw, strict=True)) / total
            prototypes[column] = p / max(p.norm(), 1e-12)
    return vectors, labels, prototypes


def nce(v, positive, negatives, tau):
    terms = [torch.exp(v @ p / tau) for p in negatives]
    return -torch.log(torch.exp(v @ positive / tau) / (torch.exp(v @ positive / tau) + sum(terms)))


def loop_contrast(vectors, labels, prototypes, tau):
    terms = [
        nce(v, prototypes[label], [p for c, p in prototypes.items() if c != label], tau)
        for v, label in zip(vectors, labels, strict=True)
        if label in prototypes
    ]
    return sum(terms) / len(terms) if terms else torch.zeros(())


def half_up(x):
    return math.floor(x + 0.5)


def loop_negatives(o, v, label, prototypes, keys):
    pool = [p for c, p in prototypes.items() if c != label or not o.exclude_positive]
    pool.sort(key=lambda p: -(v @ p).item())
    if o.negatives == "all" or not pool:
        return pool
    hard = pool[: max(1, half_up(o.hard_negatives * len(pool)))]
    if o.negatives == "ranks":
        return hard[len(hard) - int(o.kept_negatives * len(pool)) :]
    kept = max(1, half_up(o.kept_negatives * len(hard)))
    return [hard[j] for j in sorted(range(len(hard)), key=lambda j: keys[j].item())[:kept]]


def loop_intra(o, vectors, labels, prototypes, pick_keys, sample_keys):
    losses, closeness = {}, {}
    for i, (v, label) in enumerate(zip(vectors, labels, strict=True)):
        if label in prototypes:
            negatives = loop_negatives(o, v, label, prototypes, pick_keys[i])
            losses[i] = nce(v, prototypes[label], negatives, o.temperature)
            closeness[i] = (v @ prototypes[label]).item()
    per_class = []
    for c in prototypes:
        members = [i for i in losses if labels[i] == c]
        n = len(members)
        by_chance = sorted(members, key=lambda i: sample_keys[i].item())[: n // 2]
        hardest = sorted(members, key=lambda i: closeness[i])
        if o.hard_pixels == "hardest":
            sample = by_chance + hardest[: n // 2]
        elif o.hard_pixels == "semi":
            sixty = hardest[: 3 * n // 5]
            sample = by_chance + sixty[len(sixty) - n // 2 :]
        else:
            sample = members
        if members:
            per_class.append([losses[i] for i in sample])
    if o.intra_mean == "pixels":
        everything = [loss for terms in per_class for loss in terms]
        return sum(everything) / len(everything) if everything else torch.zeros(())
    means = [sum(terms) / len(terms) if terms else torch.zeros(()) for terms in per_class]
    return sum(means) / len(means) if means else torch.zeros(())


def loop_ppc(method, batch, outs, seed):
    o, grid = method, tuple(outs[method.view].cams.shape[-2:])
    one, two = (loop_look(o, batch, outs[view], grid) for view in method.views)
    images, columns = len(batch.tags), batch.tags.shape[1] + 1
    random = torch.Generator().manual_seed(seed)
    proto = cam = intra = torch.zeros(())
    for (v, y, p), (_, other_y, other_p) in ((one, two), (two, one)):
        proto = proto + loop_contrast(v, y, other_p, o.temperature)
        cam = cam + loop_contrast(v, other_y, p, o.temperature)
        pick = torch.rand(images, grid[0] * grid[1], columns, generator=random).flatten(0, 1)
        sample = torch.rand(images, grid[0] * grid[1], generator=random).flatten()
        intra = intra + loop_intra(o, v, y, p, pick, sample)
    return {"cross_prototype": o.alpha * proto, "cross_cam": o.alpha * cam, "intra": o.beta * intra}
