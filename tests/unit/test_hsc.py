"""HSC against loops written from the paper's equations, and from the released reading; over several steps."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tag2mask.core import FULL, Baseline, Batch, CamOutput, Progress, View
from tag2mask.errors import UserError
from tag2mask.methods.hsc import HSC
from tag2mask.ops.momentum import MomentumPrototypes

EPS, DIM, SMALL = 1e-5, 5, View(size=16, align_corners=True)
BASE = {"size": 16, "dim_coarse": 4, "dim_pixel": 3, "k_class": 3, "k_pixel": 4}
RELEASED = {
    "csc_weight": 0.05, "momentum": 0.5, "k_class_loss": 6, "k_pixel": 2, "class_pixels": "batch",
    "class_order": "sequential", "coarse_relu": False, "coarse_lr": "backbone", "rsc_norm": "width",
    "rsc_range": (0.0005, 0.9995), "rsc_pull": True, "proto_from": "any", "background_proto": "ties",
    "negative_floor": True, "bank_start": "random", "ignore_padding": False,
}  # fmt: skip
READINGS = {
    "paper": {},
    "released": RELEASED,
    "alone": {"cross": False, "momentum_pixels": False, "refine_regions": False, "background": 0.3},
    "unrefined": {"refine": "none", "rsc_norm": "channel", "temperature": 0.5},
    "saliency": {"saliency": True},
    "pull": {"rsc_pull": True, "rsc_weight": 1.0},
    "sequential": {"class_order": "sequential", "momentum": 0.3, "k_class_loss": 2},
    "batch": {"class_pixels": "batch", "k_class": 5, "bank_start": "random"},
    "any": {"proto_from": "any", "coarse_relu": False},
}


class Stub(Baseline):
    def __init__(self, needs=()):
        super().__init__()
        self.dims, self.needs = {"last": DIM}, frozenset(needs)
        self.weight = nn.Parameter(torch.zeros(1))


def make(count=3, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    hsc = HSC(**{**BASE, **settings})
    hsc.bind(Stub(["saliency"]), count)
    hsc.to(dtype)
    if hsc.labeller.refiner is not None:
        hsc.labeller = replace(hsc.labeller, refiner=shifted)
    return hsc


def shifted(labels, colours, count, valid):
    """Stands for the CRF: every label moves one column to the right."""
    assert labels.max() < count and valid.shape == labels.shape and colours.shape[2:] == labels.shape[1:]
    return labels.roll(1, dims=2)


def step(seed, tags=((1, 1, 0), (0, 1, 0), (1, 0, 0)), zero=True, pad=True, dtype=torch.float64):
    """A batch and what a network says about it; features require a gradient."""
    draws = torch.Generator().manual_seed(seed)
    tags = torch.tensor(tags, dtype=dtype)
    images, count = tags.shape
    valid = torch.ones(images, 1, 24, 24, dtype=dtype)
    if pad:
        valid[-1, :, 15:] = 0
    batch = Batch(
        torch.randn(images, 3, 24, 24, generator=draws, dtype=dtype), tags, torch.arange(images), valid,
        {"saliency": torch.rand(images, 1, 24, 24, generator=draws, dtype=dtype)},
    )  # fmt: skip
    outs = {}
    for view, side in ((FULL, 6), (SMALL, 4)):
        cams = torch.randn(images, count, side, side, generator=draws, dtype=dtype) + 0.4
        if zero:
            cams[0, 0] = -1  # a tagged class without any activation
        features = torch.randn(images, DIM, side, side, generator=draws, dtype=dtype).relu_().requires_grad_()
        outs[view] = CamOutput(cams.mean(dim=(2, 3)), cams, {"last": features})
    return batch, outs


# --- the slow reading -------------------------------------------------------------------------------------------------


def unit(x, eps=EPS):
    return x / x.norm().clamp(min=eps)


def fit(x, side=4):
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=True)


def slow_look(hsc, s, batch, out):
    """u and v [b][y][x] -> vectors, maps [b][k][y][x], raw and refined labels [b][y][x] (None on padding)."""
    images, count = batch.tags.shape
    u, v = fit(hsc.coarse(out.features["last"])), fit(hsc.pixel(out.features["last"]))
    cams = fit(out.cams.relu())
    inside = [[[bool(batch.valid[b, 0, 6 * y + 3, 6 * x + 3]) or not s["ignore_padding"] for x in range(4)]
               for y in range(4)] for b in range(images)]  # fmt: skip
    maps = torch.zeros_like(cams)
    for b in range(images):
        for k in range(count):
            pixels = [float(cams[b, k, y, x]) for y in range(4) for x in range(4) if inside[b][y][x]]
            low, high = (min(pixels), max(pixels)) if pixels else (0.0, 0.0)
            for y in range(4):
                for x in range(4):
                    value = float(cams[b, k, y, x])
                    if s["negative_floor"] and value < low + EPS:
                        value = -low - EPS
                    else:
                        value = value - low - EPS if s["negative_floor"] else max(value - low - EPS, 0)
                    maps[b, k, y, x] = value / (high - low + EPS)
    plain = [[[None] * 4 for _ in range(4)] for _ in range(images)]
    for b in range(images):
        for y in range(4):
            for x in range(4):
                if inside[b][y][x]:
                    best, label = s["background"], 0
                    if s["saliency"]:
                        cell = batch.side["saliency"][b, 0, 6 * y : 6 * y + 6, 6 * x : 6 * x + 6]
                        best = 1 - float(cell.mean())
                    for k in range(count):
                        if float(maps[b, k, y, x] * batch.tags[b, k]) > best:
                            best, label = float(maps[b, k, y, x]), k + 1
                    plain[b][y][x] = label
    labels = plain
    if s["refine"] == "crf":
        labels = [[[(plain[b][y][(x - 1) % 4] or 0) if inside[b][y][x] else None for x in range(4)]
                   for y in range(4)] for b in range(images)]  # fmt: skip
    return {"u": u, "v": v, "maps": maps, "labels": labels, "regions": labels if s["refine_regions"] else plain}


def places(look):
    return [(b, y, x) for b in range(len(look["labels"])) for y in range(4) for x in range(4)
            if look["labels"][b][y][x] is not None]  # fmt: skip


def slow_prototypes(look, s, count):
    """Q_c or None, background first."""
    found = []
    for c in range(count + 1):
        here = places(look)
        if c == 0:
            if s["background_proto"] == "assigned":
                here = [p for p in here if look["labels"][p[0]][p[1]][p[2]] == 0]
            else:
                here = here[: s["k_pixel"]]
            pairs = [(1.0, p) for p in here]
        else:
            if s["proto_from"] == "assigned":
                here = [p for p in here if look["labels"][p[0]][p[1]][p[2]] == c]
            pairs = sorted(((float(look["maps"][b, c - 1, y, x]), (b, y, x)) for b, y, x in here), key=lambda t: -t[0])
            pairs = pairs[: s["k_pixel"]]
        total = sum(w for w, _ in pairs)
        if total == 0:
            found.append(None)
        else:
            mean = sum(w * look["v"][b, :, y, x].detach() for w, (b, y, x) in pairs) / total
            found.append(unit(mean, 1e-12))
    return found


def slow_rsc(looks, s, bank):
    regions = []
    for look in looks:
        u, pairs = look["u"], []
        if s["rsc_norm"] == "width":
            u = torch.stack([unit(row) for row in u.flatten(0, 2)]).view(u.shape)
        if s["rsc_norm"] == "channel":
            u = (
                torch.stack([unit(p) for p in u.permute(0, 2, 3, 1).flatten(0, 2)])
                .view(-1, 4, 4, 4)
                .permute(0, 3, 1, 2)
            )
        for b in range(len(u)):
            marks = {(y, x): look["regions"][b][y][x] for y in range(4) for x in range(4)}
            roi = [u[b, :, y, x] for (y, x), c in marks.items() if c is not None and c > 0]
            ground = [u[b, :, y, x] for (y, x), c in marks.items() if c == 0]
            pairs.append([unit(sum(g) / len(g)) if g else u.new_zeros(4) for g in (roi, ground)])
        regions.append(pairs)
    low, high = s["rsc_range"]

    def repel(one, two):
        total = 0.0
        for o, _ in one:
            for _, g in two:
                total = total - torch.log(1 - (o @ g).clamp(low, high))
        return total / len(one) ** 2

    loss = 0.0
    for view in range(2):
        loss = loss + repel(regions[view], regions[view])
        if s["cross"]:
            loss = loss + repel(regions[view], regions[1 - view])
        for w in range(2) if s["rsc_pull"] else ():
            if bank[view][w] is not None:
                loss = loss + sum((bank[view][w] - pair[w]).abs().mean() for pair in regions[view]) / len(regions[view])
    for view in range(2) if s["rsc_pull"] else ():
        for w in range(2):
            slow_merge(bank[view], w, (sum(pair[w] for pair in regions[view]) / len(regions[view])).detach(), s)
    return loss / 2


def slow_merge(bank, row, new, s):
    bank[row] = new if bank[row] is None else s["momentum"] * new + (1 - s["momentum"]) * bank[row]


def slow_class(look, tags, c, s, k):
    """r_c, or None."""
    images, count = tags.shape
    if s["class_pixels"] == "image":
        means = []
        for b in range(images):
            if tags[b, c]:
                here = [(max(float(look["maps"][b, c, y, x]), 0), y, x) for i, y, x in places(look) if i == b]
                here = sorted(here, key=lambda t: -t[0])[:k]
                total = sum(w for w, _, _ in here)
                if total > 0:
                    means.append(sum(w * look["u"][b, :, y, x] for w, y, x in here) / total)
        return sum(means) / len(means) if means else None
    if not tags[:, c].any():
        return None
    here = []
    for b, y, x in places(look):
        scores = [s["background"], *(float(look["maps"][b, j, y, x] * tags[b, j]) for j in range(count))]
        here.append((math.exp(scores[c + 1]) / sum(map(math.exp, scores)), b, y, x))
    here = sorted(here, key=lambda t: -t[0])[:k]
    return unit(sum(w * look["u"][b, :, y, x] for w, b, y, x in here) / sum(w for w, *_ in here))


def slow_csc(looks, tags, s, bank):
    count, before = tags.shape[1], [list(rows) for rows in bank]
    terms = {(this, view): [] for this in range(2) for view in ((0, 1) if s["cross"] else (this,))}
    for c in range(count):
        seen = bank if s["class_order"] == "sequential" else before
        for this, view in terms:
            r = slow_class(looks[this], tags, c, s, s["k_class_loss"] or s["k_class"])
            if r is None or before[view][c + 1] is None:
                continue
            logits = torch.stack([unit(r) @ unit(p) for p in seen[view] if p is not None]) / s["temperature"]
            own = [p is not None for p in seen[view][: c + 1]].count(True)
            terms[this, view].append(logits.logsumexp(0) - logits[own])
        for view in range(2):
            r = slow_class(looks[view], tags, c, s, s["k_class"])
            if r is not None:
                slow_merge(bank[view], c + 1, r.detach(), s)
    return sum((sum(t) / len(t) if t else tags.new_zeros(())) for t in terms.values()) / 2


def slow_psc(looks, s, bank, count):
    prototypes = [slow_prototypes(look, s, count) for look in looks]

    def contrast(look, labels, rows):
        losses = []
        for b, y, x in places(look):
            c = labels[b][y][x]
            if rows[c] is not None:
                logits = [unit(look["v"][b, :, y, x], 1e-12) @ p / s["temperature"] for p in rows if p is not None]
                own = [p is not None for p in rows[:c]].count(True)
                losses.append(torch.stack(logits).logsumexp(0) - logits[own])
        return sum(losses) / len(losses) if losses else look["v"].new_zeros(())

    loss = 0.0
    for this in range(2):
        look, own, other = looks[this], looks[this]["labels"], looks[1 - this]["labels"]
        loss = loss + contrast(look, own, prototypes[this])
        if s["cross"]:
            loss = loss + contrast(look, own, prototypes[1 - this]) + contrast(look, other, prototypes[this])
        if s["momentum_pixels"]:
            loss = loss + contrast(look, own, bank[this])
    for view in range(2):
        for c, p in enumerate(prototypes[view]):
            if p is not None:
                slow_merge(bank[view], c, p, s)
    return loss / 2


def settings_of(given):
    import inspect

    defaults = {name: p.default for name, p in inspect.signature(HSC.__init__).parameters.items() if name != "self"}
    return defaults | BASE | given


def as_lists(bank):
    """Rows of a bank as lists by view, None where nothing is known."""
    return [[row.clone() if known else None for row, known in zip(*both, strict=True)]
            for both in zip(bank.rows, bank.known, strict=True)]  # fmt: skip


def gradients(loss, hsc, outs):
    features = [outs[view].features["last"] for view in outs]
    wanted = [*hsc.parameters(), *features]
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in wanted]
    found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]


def same(found, slow):
    torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-5)


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", READINGS)
def test_losses_gradients_and_banks_equal_the_formulas(reading):
    given = READINGS[reading]
    s, hsc = settings_of(given), make(**given)
    names = ["class_bank", "pixel_bank"] + ["region_bank"] * s["rsc_pull"]
    slow = {name: as_lists(getattr(hsc, name)) for name in names}
    later = ((1, 0, 1), (0, 1, 1), (1, 0, 0))
    for number in range(3):
        batch, outs = step(number, **({} if number < 2 else {"tags": later}))
        losses = hsc.losses(batch, outs, Progress(0, 0))
        looks = [slow_look(hsc, s, batch, outs[view]) for view in (FULL, SMALL)]
        expected = {
            "rsc": s["rsc_weight"] * slow_rsc(looks, s, slow.get("region_bank")),
            "csc": s["csc_weight"] * slow_csc(looks, batch.tags, s, slow["class_bank"]),
            "psc": s["psc_weight"] * slow_psc(looks, s, slow["pixel_bank"], 3),
        }
        assert losses.keys() == expected.keys()
        for name, loss in losses.items():
            same(loss, expected[name])
            for found, wanted in zip(gradients(loss, hsc, outs), gradients(expected[name], hsc, outs), strict=True):
                same(found, wanted)
        hsc.after_step(None)
        for name in names:
            for found, wanted in zip(as_lists(getattr(hsc, name)), slow[name], strict=True):
                assert [row is None for row in found] == [row is None for row in wanted]
                for row, row_wanted in zip(found, wanted, strict=True):
                    if row is not None:
                        same(row, row_wanted)


def test_losses_leave_the_buffers_alone_and_count_what_they_should():
    hsc = make()
    for number in range(2):
        batch, outs = step(number)
        before = {name: x.clone() for name, x in hsc.state_dict().items()}
        losses = hsc.losses(batch, outs, Progress(0, 0))
        assert all(torch.equal(x, before[name]) for name, x in hsc.state_dict().items())
        assert (losses["csc"] > 0) == (number > 0)  # no class has a momentum prototype at first
        hsc.after_step(None)
        assert not torch.equal(hsc.class_bank.rows, before["class_bank.rows"])
    assert hsc.class_bank.known.tolist() == [[False, True, True, False]] * 2  # background and an absent class: never
    assert not hsc.pixel_bank.known[:, 3].any()


EDGES = {
    "one image": {"tags": ((1, 1, 0),), "zero": False, "pad": False},
    "one class": {"tags": ((1,), (1,)), "zero": False, "pad": False},
    "one image, one class, padded": {"tags": ((1,),)},
    "nothing shared": {"tags": ((1, 0, 0), (0, 1, 0), (0, 0, 1))},
    "no tag": {"tags": ((0, 0), (0, 0))},
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("reading", ["paper", "released"])
def test_edges_are_finite(edge, reading):
    count = len(EDGES[edge]["tags"][0])
    hsc = make(count, torch.float32, **READINGS[reading])
    for number in range(3):
        batch, outs = step(number, **EDGES[edge], dtype=torch.float32)
        losses = hsc.losses(batch, outs, Progress(0, 0))
        assert all(torch.isfinite(loss) for loss in losses.values())
        for grad in gradients(sum(losses.values()), hsc, outs):
            assert torch.isfinite(grad).all()
        hsc.after_step(None)
        assert all(torch.isfinite(x).all() for x in hsc.state_dict().values())


def test_nothing_to_contrast_is_zero():
    hsc = make(2)
    batch, outs = step(0, tags=((1, 0), (1, 1)), pad=False)
    for out in outs.values():
        out.cams = torch.full_like(out.cams, -1)  # all background
    for _ in range(2):
        losses = hsc.losses(batch, outs, Progress(0, 0))
        assert {name: loss.item() for name, loss in losses.items()} == {"rsc": 0, "csc": 0, "psc": 0}
        assert all((grad == 0).all() for grad in gradients(sum(losses.values()), hsc, outs))
        hsc.after_step(None)
    assert not hsc.class_bank.known.any()
    batch.valid.zero_()
    assert all(loss == 0 for loss in hsc.losses(batch, outs, Progress(0, 0)).values())


def test_padding_takes_no_part():
    hsc = make()
    hsc.coarse[0].weight.data[:, :, [0, 2]] = 0  # so that nothing reaches out of its row
    batch, outs = step(0)
    losses = hsc.losses(batch, outs, Progress(0, 0))
    gradient = torch.autograd.grad(sum(losses.values()), outs[SMALL].features["last"])[0]
    assert (gradient[-1, :, 2:] == 0).all()  # rows 15 to 23 of 24 are padding: centres 15 and 21 of the 4 rows
    assert (gradient[-1, :, :2] != 0).any()


def test_the_crf_refines_labels_on_its_own_grid():
    seen = []

    def spy(labels, colours, count, valid):
        seen.append((tuple(labels.shape), tuple(colours.shape), count, int(labels.max())))
        return torch.zeros_like(labels)

    hsc = make(crf_size=8)
    hsc.labeller = replace(hsc.labeller, refiner=spy)
    batch, outs = step(0)
    losses = hsc.losses(batch, outs, Progress(0, 0))
    assert [x[:3] for x in seen] == [((3, 8, 8), (3, 3, 8, 8), 4)] * 2 and all(x[3] <= 3 for x in seen)
    assert losses["rsc"] == 0  # all background now
    assert hsc._look(FULL, batch, outs).labels[-1, 3].tolist() == [255] * 4


def test_the_real_crf_runs_and_matters():
    batch, outs = step(0, dtype=torch.float32)
    batch.images[:] = 0  # one colour: the commonest label spreads
    values = []
    for refine in ("crf", "none"):
        torch.manual_seed(0)
        hsc = HSC(**BASE, refine=refine)
        hsc.bind(Stub(), 3)
        values.append(float(hsc.losses(batch, outs, Progress(0, 0))["psc"].detach()))
    assert all(map(math.isfinite, values)) and values[0] != values[1]


def test_the_refined_map_is_used_where_there_is_one():
    hsc = make()
    batch, outs = step(0)
    plain = hsc.losses(batch, outs, Progress(0, 0))["psc"]
    for out in outs.values():
        out.refined = out.cams.flip(-1).requires_grad_()
    refined = hsc.losses(batch, outs, Progress(0, 0))["psc"]
    assert plain != refined
    assert torch.autograd.grad(refined, outs[FULL].refined, allow_unused=True) == (None,)  # labels have no gradient


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="reads no saliency"):
        HSC(saliency=True).bind(Stub(), 3)
    frozen = Stub()
    frozen.weight.requires_grad_(False)
    with pytest.raises(UserError, match="stub has none that can be trained"):
        HSC().bind(frozen, 3)
    wrong_ones = {"temperature": 0, "momentum": 0, "background": 1, "k_class": 0, "k_class_loss": 0, "k_pixel": 0}
    for name, value in (wrong_ones | {"crf_size": 200, "rsc_range": (0.0, 1.0)}).items():
        with pytest.raises(UserError, match="hsc: "):
            HSC(**{name: value})


def test_learning_rate_group_of_the_coarse_projector():
    assert make(**RELEASED).coarse.trunk is True
    assert make().coarse.trunk is False


def test_momentum_prototypes():
    bank = MomentumPrototypes(2, 3, share=0.25)
    first, second = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.tensor([[5.0, 6, 7], [8, 9, 10]])
    bank.write()
    assert not bank.known.any() and (bank.rows == 0).all()
    bank.merge(first, torch.tensor([True, False]))
    assert not bank.known.any()
    bank.write()
    assert bank.known.tolist() == [True, False] and bank.rows.tolist() == [[1, 2, 3], [0, 0, 0]]
    rows, known = bank.merge(second, torch.tensor([True, True]))
    bank.write()
    assert rows.tolist() == bank.rows.tolist() == [[2, 3, 4], [8, 9, 10]] and known.all()
    bank.write()
    assert bank.rows.tolist() == [[2, 3, 4], [8, 9, 10]]
    assert MomentumPrototypes(4, 2, 3, share=0.5, random=True).known.shape == (4, 2)
