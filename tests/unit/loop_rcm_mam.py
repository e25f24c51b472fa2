"""RCM and MAM by loops over images, scales, classes and pixels, from the paper's equations; for test_rcm_mam."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

EPS = 1e-5


def loop_maps(cams, batch, valid):
    """Each tagged map over its maximum on valid pixels: [b][k][y][x] -> scalar with gradient, 0 elsewhere."""
    cams = F.interpolate(cams, size=valid.shape[1:], mode="bilinear", align_corners=False)
    images, classes, height, width = cams.shape
    maps = [[[[torch.zeros((), dtype=cams.dtype)] * width for _ in range(height)] for _ in range(classes)]
            for _ in range(images)]  # fmt: skip
    for b in range(images):
        for k in range(classes):
            inside = [(y, x) for y in range(height) for x in range(width) if valid[b, y, x]]
            if batch.tags[b, k] and inside:
                y, x = max(inside, key=lambda p: cams[b, k, p[0], p[1]].item())
                highest = cams[b, k, y, x].clamp(min=0)
                for y, x in inside:
                    maps[b][k][y][x] = cams[b, k, y, x].clamp(min=0) / (highest + EPS)
    return maps


def loop_cams(out):
    """The CAM, or the share that a class has of every pixel beside the others and the background."""
    if out.background is None:
        return out.cams
    everything = torch.cat([out.background, out.cams], dim=1).exp()
    return everything[:, 1:] / everything.sum(dim=1, keepdim=True)


def loop_regions(o, taught, batch, valid):
    """Eq. 1 and 2: labels [b][y][x], None on padding and where nothing is known."""
    scales = [loop_maps(loop_cams(out) if out.refined is None else out.refined, batch, valid) for out in taught]
    images, height, width = valid.shape
    labels = [[[None] * width for _ in range(height)] for _ in range(images)]
    for b in range(images):
        classes = [k for k in range(batch.tags.shape[1]) if batch.tags[b, k]]
        places = [(y, x) for y in range(height) for x in range(width)]
        mean = {(k, p): sum(s[b][k][p[0]][p[1]].item() for s in scales) / len(scales) for k in classes for p in places}
        highest = {k: max(mean[k, p] for p in places) for k in classes}
        for y, x in places:
            if valid[b, y, x]:
                best, label = 0.0, 0
                for k in classes:
                    score = mean[k, (y, x)] / (highest[k] + EPS) if o.renormalise else mean[k, (y, x)]
                    if score > best:
                        best, label = score, k + 1
                if best > o.threshold:
                    labels[b][y][x] = label
                elif o.background_threshold is None or best <= o.background_threshold:
                    labels[b][y][x] = 0
    return labels


def loop_prototypes(o, x, labels, bank):
    """Eq. 3: {label: vector} of this batch, over those that earlier ones left."""
    found = dict(bank)
    for c in range(1 + max((k for image in labels for row in image for k in row if k is not None), default=0)):
        means, everything = [], []
        for b, image in enumerate(labels):
            pixels = [x[b, :, y, i] for y, row in enumerate(image) for i, k in enumerate(row) if k == c]
            if pixels:
                means.append(sum(pixels) / len(pixels))
                everything += pixels
        if means:
            vectors = means if o.prototype_mean == "images" else everything
            found[c] = (sum(vectors) / len(vectors)).detach()
    return found


def loop_mean(o, terms, images):
    """terms: [(label, loss)] of the pixels that count."""
    weight = {c: o.background_weight if c == 0 else 1.0 for c, _ in terms}
    if o.rcm_mean == "sum":
        return sum((weight[c] * loss for c, loss in terms), torch.zeros(())) / images
    if o.rcm_mean == "pixels":
        total = sum(weight[c] for c, _ in terms)
        return sum(weight[c] * loss for c, loss in terms) / total if total else torch.zeros(())
    per_class = {c: [loss for k, loss in terms if k == c] for c in weight}
    total = sum(weight.values())
    if not total:
        return torch.zeros(())
    return sum(weight[c] * sum(losses) / len(losses) for c, losses in per_class.items()) / total


def loop_contrast(o, x, labels, prototypes):
    """Eq. 5."""
    terms = []
    for b, image in enumerate(labels):
        for y, row in enumerate(image):
            for i, k in enumerate(row):
                if k is not None:
                    pixel = x[b, :, y, i] / x[b, :, y, i].norm().clamp(min=1e-12)
                    similar = {c: torch.exp(pixel @ (p / p.norm().clamp(min=1e-12)) / o.temperature)
                               for c, p in prototypes.items()}  # fmt: skip
                    share = similar[k] / sum(similar.values())
                    terms.append((k, -share if o.rcm == "literal" else -torch.log(share)))
    return loop_mean(o, terms, len(labels))


def loop_direct(o, out, labels, batch):
    """Table 2, direct: cross-entropy at every pixel among background (logit 0, or its own) and tagged classes."""
    size = len(labels[0]), len(labels[0][0])
    cams = F.interpolate(out.cams, size=size, mode="bilinear", align_corners=False)
    ground = torch.zeros_like(out.cams[:, :1]) if out.background is None else out.background
    ground = F.interpolate(ground, size=size, mode="bilinear", align_corners=False)
    terms = []
    for b, image in enumerate(labels):
        for y, row in enumerate(image):
            for i, k in enumerate(row):
                if k is not None:
                    scores = {0: ground[b, 0, y, i].exp()}
                    scores |= {c + 1: cams[b, c, y, i].exp() for c in range(cams.shape[1]) if batch.tags[b, c]}
                    terms.append((k, -torch.log(scores[k] / sum(scores.values()))))
    return loop_mean(o, terms, len(labels))


def loop_mam(o, outs, taught, batch, valid):
    """Eq. 6 to 8."""
    own = [loop_maps(loop_cams(outs[view]), batch, valid) for view in o.views]
    theirs = [loop_maps(loop_cams(out), batch, valid) for out in taught]
    images, height, width = valid.shape
    pairs, total = 0, torch.zeros(())
    for b in range(images):
        places = [(y, x) for y in range(height) for x in range(width) if valid[b, y, x]]
        for k in range(batch.tags.shape[1]):
            if not batch.tags[b, k]:
                continue
            pairs += 1
            for i in [o.views.index(o.views[o.middle])] if o.module == "smm" else range(len(own)):
                xi = []
                for j in range(len(theirs)):
                    a = [own[i][b][k][y][x] for y, x in places]
                    g = [theirs[j][b][k][y][x].detach() for y, x in places]
                    if not o.attention_gradient:
                        a = [value.detach() for value in a]
                    dot = sum(p * q for p, q in zip(a, g, strict=True))
                    lengths = [sum(p * p for p in v) for v in (a, g)]
                    zero = not places or min(length.item() if places else 0 for length in lengths) == 0
                    cosine = torch.zeros(()) if zero else dot / (lengths[0].sqrt() * lengths[1].sqrt())
                    xi.append((1 if o.attention == "distance" else 2) - cosine)
                if o.module != "mam":
                    xi = [torch.ones(())] * len(theirs)
                elif o.attention == "normalised":
                    xi = [len(theirs) * x / sum(xi) for x in xi]
                elif o.attention == "softmax":
                    xi = [len(theirs) * x.exp() / sum(x.exp() for x in xi) for x in xi]
                terms = []
                for y, x in places:
                    target = sum(w * theirs[j][b][k][y][x].detach() for j, w in enumerate(xi)) / len(theirs)
                    if o.clamp and target > 1:
                        target = torch.ones(())
                    terms.append((target - own[i][b][k][y][x]).abs())
                if terms:
                    total = total + sum(terms) / (1 if o.mam_mean == "sum" else len(terms))
    return total / (images if o.mam_mean == "sum" else max(pairs, 1))


def loop_rcm_mam(o, batch, outs, taught, bank, epoch):
    """(losses, prototypes after the step). taught: what the SupportNet says, in the order of the views; X is features
    ["x"] of both. bank: {label: prototype} before the step."""
    out = outs[o.views[o.middle]]
    if o.image_grid:
        valid = batch.valid[:, 0] > 0
    else:
        height, width = out.cams.shape[2:]
        steps = batch.valid.shape[2] // height, batch.valid.shape[3] // width
        valid = batch.valid[:, 0, steps[0] // 2 :: steps[0], steps[1] // 2 :: steps[1]] > 0
    labels = loop_regions(o, taught, batch, valid)
    if o.rcm == "direct":
        rcm = loop_direct(o, out, labels, batch)
    else:
        own, theirs = (F.interpolate(x.features["x"], size=valid.shape[1:], mode="bilinear", align_corners=False)
                       for x in (out, taught[o.middle]))  # fmt: skip
        bank = loop_prototypes(o, theirs, labels, bank)
        rcm = loop_contrast(o, own, labels, bank)
    losses = {"rcm": o.rcm_weight * rcm}
    losses["mam"] = o.mam_weight * loop_mam(o, outs, taught, batch, valid) * (0 if epoch < o.mam_epoch else 1)
    if o.cls_others:
        total = torch.zeros(())
        for view in o.views:
            if view.scale != 1:
                for b in range(len(batch.tags)):
                    for k in range(batch.tags.shape[1]):
                        p = 1 / (1 + (-outs[view].logits[b, k]).exp())
                        total = total - torch.log(p if batch.tags[b, k] else 1 - p) / batch.tags.numel()
        losses["cls"] = o.cls_others * total
    assert all(math.isfinite(x.item()) for x in losses.values())
    return losses, bank
