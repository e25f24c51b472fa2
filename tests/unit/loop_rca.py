"""RCA by loops over images, classes, pixels and memories, from the paper and from what is released; for test_rca."""

from __future__ import annotations

import math

import torch


def loop_masks(o, maps, valid):
    """{(image, class): [(y, x), ...]}; maps [B K h w], valid bool [B h w]."""
    masks = {}
    for b in range(maps.shape[0]):
        places = [(y, x) for y in range(maps.shape[2]) for x in range(maps.shape[3]) if valid[b, y, x]]
        for k in range(maps.shape[1]):
            values = {}
            for y, x in places:
                value = maps[b, k, y, x].item()
                if o.masks == "shares":
                    value = math.exp(value) / sum(math.exp(v.item()) for v in maps[b, :, y, x])
                values[y, x] = value
            mean = sum(values.values()) / max(len(values), 1)
            masks[b, k] = [place for place, value in values.items() if value > mean]
    return masks


def loop_pool(features, b, pixels):
    return sum(features[b, :, y, x] for y, x in pixels) / len(pixels)


def loop_regions(o, batch, maps, features, valid):
    """{(image, class): f_l} of the tagged classes whose mask is not empty (eq. 2)."""
    masks = loop_masks(o, maps, valid)
    return {(b, k): loop_pool(features, b, m) for (b, k), m in masks.items() if batch.tags[b, k] and m}


def loop_writes(o, batch, out, maps, valid):
    """{(image, class): what is written}: confident classes (eq. 3)."""
    features = out.features["plain"].detach()
    masks, writes = loop_masks(o, maps, valid), {}
    for b in range(maps.shape[0]):
        before = None
        for k in range(maps.shape[1]):
            score = 1 / (1 + math.exp(-out.logits[b, k].item()))
            if o.gate_from == "coarse":
                score = maps[b, k].mean().item()
            mask = masks[b, k]
            if not batch.tags[b, k] or not mask or score <= o.gate:
                continue
            common = [p for p in mask if before is None or p in before] if o.cumulative_masks else mask
            before = common
            total = sum((features[b, :, y, x] for y, x in common), torch.zeros(features.shape[1]).double())
            writes[b, k] = total / len(mask)
    return writes


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def loop_nce(o, f, k, entries, own):
    """Eq. 4; entries: [(vector, class, name)]. None where there is no positive."""
    sizes = {c: len([1 for _, d, _ in entries if d == c]) for _, c, _ in entries}
    mean = sum(sizes.values()) / max(len(sizes), 1)
    e = [(torch.exp(cosine(f, m) / o.temperature), c, name) for m, c, name in entries]
    positives = [x for x, c, name in e if c == k and name != own]
    negatives = [x * (mean / sizes[c] if o.denominator == "balanced" else 1) for x, c, _ in e if c != k]
    if not positives:
        return None
    if o.denominator == "all":
        terms = [-torch.log(x / (sum(positives) + sum(negatives))) for x in positives]
    else:
        terms = [-torch.log(x / (x + sum(negatives))) for x in positives]
    return sum(terms) / len(terms)


def loop_contrast(o, batch, regions, scores, entries, seed, names):
    """Eq. 5 and 6. names: {(image, class): name of its own memory}."""
    images, most = len(batch.tags), o.most
    random = torch.Generator().manual_seed(seed)
    uniform = torch.rand(images, most, 2 * o.mix - 1, generator=random)
    to_image = torch.rand(images, most, images, generator=random)
    to_class = torch.rand(images, most, most, generator=random)
    places = {}  # the classes of an image by falling score
    for b in range(images):
        tagged = [k for k in range(batch.tags.shape[1]) if batch.tags[b, k]]
        ordered = sorted(tagged, key=lambda k: -scores[b, k].item())
        places |= {(b, k): place for place, k in enumerate(ordered) if (b, k) in regions}
    own = {name: names.get(name) if o.exclude_own else None for name in places}
    held = {(b, k) for b, k in places if any(c == k and n != own[b, k] for _, c, n in entries)}

    per_image = []
    for b in range(images):
        losses = []
        for k in range(batch.tags.shape[1]):
            if (b, k) not in held:
                continue
            m, candidates = places[b, k], {}
            for j, c in held:
                if o.partners == "any" or (o.partners == "other" and j != b and not batch.tags[b, c]):
                    candidates.setdefault(j, []).append(c)
            f = regions[b, k]
            if not candidates:
                losses.append(loop_nce(o, f, k, entries, own[b, k]))
                continue
            j = max(candidates, key=lambda j: to_image[b, m, j].item())
            c = max(candidates[j], key=lambda c: to_class[b, m, places[j, c]].item())
            omega = sorted(uniform[b, m].tolist())[o.mix - 1]
            mixed = omega * f + (1 - omega) * regions[j, c]
            losses.append(
                omega * loop_nce(o, mixed, k, entries, own[b, k])
                + (1 - omega) * loop_nce(o, mixed, c, entries, own[j, c])
            )
        if losses:
            per_image.append(sum(losses) / len(losses))
    if not per_image:
        return torch.zeros(()).double()
    return sum(per_image) / (1 if o.images == "sum" else len(per_image))


def loop_losses(o, batch, out, epoch, seed):
    """What `losses` returns."""
    plain = out.features["plain"]
    maps = o.heads.coarse(plain)
    valid = torch.ones(len(maps), *maps.shape[2:], dtype=torch.bool)
    for b in range(len(maps)):
        for y in range(maps.shape[2]):
            for x in range(maps.shape[3]):
                valid[b, y, x] = batch.valid[b, 0, 8 * y + 4, 8 * x + 4] > 0
    scores = maps.mean(dim=(2, 3))
    terms = []
    for b in range(len(maps)):
        for k in range(maps.shape[1]):
            p = 1 / (1 + torch.exp(-scores[b, k]))
            terms.append(-torch.log(p if batch.tags[b, k] else 1 - p))
    query = plain if o.heads.query is None else o.heads.query(plain)
    regions = loop_regions(o, batch, maps.detach(), query, valid)
    rows, filled, class_of = o.memory.entries()
    names = {}
    if o.capacity is None:
        table = o.memory.slots_of(batch.index).tolist()
        names = {(b, k): slot for b, row in enumerate(table) for k, slot in enumerate(row) if slot >= 0}
    entries = [(rows[s], class_of[s].item(), s) for s in range(len(rows)) if filled[s]]
    contrast = loop_contrast(o, batch, regions, scores, entries, seed, names)
    weight = o.contrast if epoch >= o.warmup else 0
    losses = {"contrast": weight * contrast, "coarse": o.coarse * sum(terms) / len(terms)}
    return losses, loop_writes(o, batch, out, maps.detach(), valid)


def loop_attend(o, features):
    """F' (eq. 7 and 8), pixel by pixel."""
    prototypes = [q for k in range(len(o.found)) for q, there in zip(o.prototypes[k], o.found[k], strict=True) if there]
    result = torch.zeros_like(features)
    for b in range(features.shape[0]):
        for y in range(features.shape[2]):
            for x in range(features.shape[3]):
                f = features[b, :, y, x]
                scale = 1 if o.aggregation == "printed" else 1 / math.sqrt(len(f))
                e = [torch.exp(scale * (f @ q)) for q in prototypes]
                result[b, :, y, x] = sum(w * q for w, q in zip(e, prototypes, strict=True)) / sum(e) if e else 0 * f
    return result


def loop_learned(o, features):
    """As released: no softmax, and the factor classes / prototypes per class."""
    a, result = o.attention, torch.zeros_like(features)
    q, out, fuse = (conv.weight[:, :, 0, 0] for conv in (a.query, a.out, a.fuse))
    for b in range(features.shape[0]):
        for y in range(features.shape[2]):
            for x in range(features.shape[3]):
                f = features[b, :, y, x]
                context = torch.zeros_like(f)
                for k in range(len(o.found)):
                    for prototype, there in zip(o.prototypes[k], o.found[k], strict=True):
                        if there:
                            affinity = (q @ f + a.query.bias) @ a.key(prototype) * len(o.found) / o.clusters
                            context = context + affinity * a.value(prototype)
                result[b, :, y, x] = fuse @ torch.cat([f, out @ context + a.out.bias]) + a.fuse.bias
    return result
