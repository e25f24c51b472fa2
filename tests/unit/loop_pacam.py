"""CPAL without training, written out: one image, one tag, one patch, one prototype after the other."""

import torch
import torch.nn.functional as F
from loop_clip_es import loop_block, loop_tower

from tag2mask.ops.kmeans import kmeans

EPS = 1e-5  # of the normalisation by the maximum


def cos(a, b):
    return (a @ b) / a.norm() / b.norm()


def loop_patches(clip, pixels, grid):
    """{place: what CLIP says of the patch, of length 1} for one image [3 H W]."""
    model = clip.model
    entering, _ = loop_tower(model, clip.tokens(pixels[None], grid)[0])
    last = model.visual.transformer.resblocks[-1]
    after = loop_block(last, entering, last.ln_1(entering))[0]
    found = {}
    for y in range(grid[0]):
        for x in range(grid[1]):
            vector = model.visual.ln_post(after[1 + y * grid[1] + x]) @ model.visual.proj
            found[y, x] = vector / vector.norm()
    return found


def loop_map(stored, grid):
    """{place: M_n (3)} for one map [h w]."""
    small = F.interpolate(stored[None, None], size=grid, mode="bilinear", align_corners=False)[0, 0]
    highest = max(max(row) for row in small.tolist())
    return {
        (y, x): max(small[y, x].item(), 0) / (highest + EPS) for y in range(grid[0]) for x in range(grid[1])
    }  # fmt: skip


def loop_bank(tags, bank):
    """{(image, class)} of the pairs that give an instance prototype."""
    chosen = set()
    for n in range(len(tags[0])):
        images = [b for b in range(len(tags)) if tags[b][n]]
        wanted = range(len(images)) if len(images) <= bank else [i * len(images) // bank for i in range(bank)]
        chosen |= {(images[i], n) for i in wanted}
    return chosen


def loop_pacam(clip, images, tags, stored, *, threshold, bank, prototypes, neighbours, gamma, share, longest=None):
    """{(image, class): fused map [h w]} for images [3 H W], their tags and maps {(image, class): [h w]}."""
    grids = [clip.grid(tuple(pixels.shape[1:]), longest) for pixels in images]
    pairs = [(b, n) for b, row in enumerate(tags) for n, tag in enumerate(row) if tag]
    with torch.no_grad():
        patches = [loop_patches(clip, pixels, grid) for pixels, grid in zip(images, grids, strict=True)]
    maps = {(b, n): loop_map(stored[b, n], grids[b]) for b, n in pairs}
    chosen = loop_bank(tags, bank)

    banked = sorted({b for b, _ in chosen})
    mean = sum(sum(patches[b].values()) / len(patches[b]) for b in banked) / len(banked)
    z = [{place: vector - mean for place, vector in of.items()} for of in patches]
    anchors = {}
    for b, n in pairs:
        inside = [place for place, value in maps[b, n].items() if value > threshold]
        if inside:
            anchors[b, n] = sum(z[b][place] for place in inside) / len(inside)

    found = {}
    for b, n in pairs:
        rows = [anchors[i, c] for i, c in sorted(anchors) if c == n and (i, c) in chosen]
        if (b, n) not in anchors or len(rows) < 2:
            found[b, n] = stored[b, n]
            continue
        centres, there = kmeans(torch.stack(rows)[None], torch.ones(1, len(rows)).bool(), prototypes, seed=0)
        contexts = [p for p, ok in zip(centres[0], there[0], strict=True) if ok]  # k-means has loops of its own
        shifts = [p - row for p in contexts for row in rows]
        delta = sum(shifts) / len(shifts)

        length = 1 - mean @ mean
        scale = gamma or length / len(mean) ** 0.5
        anchor = anchors[b, n]
        powers = [torch.exp(anchor @ p / scale) for p in contexts]
        w = [power / sum(powers) for power in powers]
        rank = sorted(range(len(w)), key=lambda i: -w[i] * cos(contexts[i], anchor))[:neighbours]
        aware = torch.zeros(grids[b], dtype=mean.dtype)
        for place, vector in z[b].items():
            alike = sum(w[i] * cos(vector + delta, contexts[i]) for i in rank) / sum(w[i] for i in rank)
            aware[place] = max(alike, 0)
        aware = aware / (aware.max() + EPS)
        size = tuple(stored[b, n].shape)
        resized = F.interpolate(aware[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        both = (1 - share) * stored[b, n] + share * resized
        found[b, n] = both / (both.max() + EPS)
    return found
