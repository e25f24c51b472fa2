"""CLIP-ES written out: one image, one class, one head, one place after the other, in double precision."""

import torch
import torch.nn.functional as F


def loop_block(block, x, entered):
    """(output [T D], attention [T T]) of a block for one image, head after head, from its weights."""
    attn = block.attn
    heads, width = attn.num_heads, x.shape[1] // attn.num_heads
    q, k, v = (entered @ w.T + b for w, b in zip(attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3), strict=True))
    parts, attention = [], torch.zeros(len(x), len(x), dtype=x.dtype)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        looks = (q[:, own] @ k[:, own].T / width**0.5).softmax(dim=1)
        parts.append(looks @ v[:, own])
        attention = attention + looks / heads
    x = x + torch.cat(parts, dim=1) @ attn.out_proj.weight.T + attn.out_proj.bias
    return x + block.mlp(block.ln_2(x)), attention


def loop_tower(model, tokens):
    """(what the last block reads [T D], attention of every block, the last too) of one image's tokens [T D]."""
    x, found = tokens, []
    blocks = list(model.visual.transformer.resblocks)
    for block in blocks:
        entering = x
        x, attention = loop_block(block, x, block.ln_1(x))
        found.append(attention)
    return entering, found


def loop_embedding(model, tokens):
    after = model.visual.ln_post(tokens)
    mean = sum(after[1:]) / (len(after) - 1)
    projected = mean @ model.visual.proj
    return projected / projected.norm()


def loop_min_max(values):
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def loop_grad_cam(model, entering, wanted, tags, texts, others):
    """CAM [N] of one class of one image: the gradient of its softmax share, by autograd."""
    block = model.visual.transformer.resblocks[-1]
    activation = block.ln_1(entering).detach().requires_grad_()
    embedded = loop_embedding(model, loop_block(block, entering, activation)[0])
    rivals = [texts[k] for k in range(len(tags)) if tags[k]] + list(others)
    place = [k for k in range(len(tags)) if tags[k]].index(wanted)
    scores = torch.stack([model.logit_scale.exp() * (embedded * text).sum() for text in rivals])
    share = scores.exp()[place] / scores.exp().sum()
    share.backward()
    patches, depth = activation.grad[1:], activation.shape[1]
    weights = [sum(patches[:, d].tolist()) / len(patches) for d in range(depth)]
    own = activation.detach()[1:]
    cam = [max(0.0, sum(weights[d] * own[n, d].item() for d in range(depth))) for n in range(len(own))]
    return torch.tensor(loop_min_max(cam), dtype=entering.dtype)


def loop_affinity(attention, rounds=3):
    rows = [[value.item() for value in row] for row in attention]
    n = len(rows)
    for _ in range(rounds):
        sums = [sum(rows[i][j] for i in range(n)) for j in range(n)]
        rows = [[rows[i][j] / sums[j] for j in range(n)] for i in range(n)]
        rows = [[value / sum(row) for value in row] for row in rows]
    return torch.tensor([[(rows[i][j] + rows[j][i]) / 2 for j in range(n)] for i in range(n)], dtype=attention.dtype)


def loop_boxes(cam, share):
    """bool [h w] of one map [h w]: flood fill from every place above, then the box of what was reached."""
    height, width = cam.shape
    limit = share * cam.max().item()
    above = {(y, x) for y in range(height) for x in range(width) if cam[y, x].item() > limit}
    inside = torch.zeros(height, width, dtype=torch.bool)
    while above:
        part, edge = set(), [above.pop()]
        while edge:
            y, x = edge.pop()
            part.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & above
            above -= near
            edge += near
        ys, xs = [y for y, _ in part], [x for _, x in part]
        for y in range(min(ys), max(ys) + 1):
            for x in range(min(xs), max(xs) + 1):
                inside[y, x] = True
    return inside


def loop_refine(cam, inside, alike):
    """Refined map [N]: the square of the affinity, its columns outside the boxes zero, times the map; to 0..1."""
    squared = alike @ alike
    for n in range(len(cam)):
        if not inside[n]:
            squared[:, n] = 0
    return torch.tensor(loop_min_max((squared @ cam).tolist()), dtype=cam.dtype)


def loop_maps(clip, pixels, tags, texts, others, *, blocks, box, grid):
    """{(image, class): map [h w]} of all tagged classes."""
    found = {}
    for image in range(len(tags)):
        tokens = clip.tokens(pixels[image : image + 1], grid)[0]
        entering, attention = loop_tower(clip.model, tokens)
        alike = loop_affinity((sum(attention[-blocks:]) / blocks)[1:, 1:])
        for k in range(tags.shape[1]):
            if tags[image, k]:
                cam = loop_grad_cam(clip.model, entering, k, tags[image], texts, others)
                inside = loop_boxes(cam.view(grid), box).flatten()
                found[image, k] = loop_refine(cam, inside, alike).view(grid)
    return found


def loop_positions(learnt, native, grid):
    """Position embeddings [1 + h w, D]: bilinear, corners not aligned, place after place."""
    rows = [learnt[0]]
    for y in range(grid[0]):
        for x in range(grid[1]):
            at = [
                max((place + 0.5) * old / new - 0.5, 0.0) for place, old, new in zip((y, x), native, grid, strict=True)
            ]
            total = torch.zeros_like(learnt[0])
            for dy in (0, 1):
                for dx in (0, 1):
                    share = 1.0
                    place = []
                    for value, step, side in zip(at, (dy, dx), native, strict=True):
                        below = int(value)
                        share *= value - below if step else 1 - (value - below)
                        place.append(min(below + step, side - 1))
                    total = total + share * learnt[1 + place[0] * native[1] + place[1]]
            rows.append(total)
    return torch.stack(rows)


def loop_text(clip, word, templates):
    """The embedding [D] of a word: the mean over sentences, of length 1."""
    found = []
    for template in templates:
        before, after = template.split("{}")
        tokens = clip.tokenizer([before + word + after])
        found.append(F.normalize(clip.model.encode_text(tokens)[0], dim=0))
    return F.normalize(sum(found) / len(found), dim=0)
