"""Means over regions against loops."""

from __future__ import annotations

import pytest
import torch

from tag2mask.ops.region_means import mean_over_regions


def loop(losses, regions, weights, kind, images):
    terms = [(int(c), loss) for c, loss in zip(regions, losses, strict=True) if 0 <= c < len(weights)]
    if kind == "sum":
        return sum((weights[c] * loss for c, loss in terms), torch.zeros(())) / images
    if kind == "pixels":
        total = sum(weights[c] for c, _ in terms)
        return sum(weights[c] * loss for c, loss in terms) / total if total else torch.zeros(())
    present = sorted({c for c, _ in terms})
    total = sum(weights[c] for c in present)
    if not total:
        return torch.zeros(())
    means = {c: torch.stack([loss for k, loss in terms if k == c]).mean() for c in present}
    return sum(weights[c] * means[c] for c in present) / total


@pytest.mark.parametrize("kind", ["classes", "pixels", "sum"])
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (0.25, 1, 1, 1), (0, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("regions", ["mixed", "one", "first", "none"])
def test_value_and_gradient(kind, weights, regions):
    draws = torch.Generator().manual_seed(0)
    losses = torch.randn(40, generator=draws, dtype=torch.float64).requires_grad_()
    chosen = torch.randint(-1, 3, (40,), generator=draws)  # the last region is empty
    chosen[3] = 255
    chosen = {"mixed": chosen, "one": chosen * 0 + 2, "first": chosen * 0, "none": chosen * 0 - 1}[regions]
    weights = torch.tensor(weights, dtype=torch.float64)
    value, wanted = (f(losses, chosen, weights, kind, 5) for f in (mean_over_regions, loop))
    assert value.item() == pytest.approx(wanted.item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(value, losses)
    expected = torch.autograd.grad(wanted, losses)[0] if wanted.requires_grad else torch.zeros_like(losses)
    torch.testing.assert_close(gradient, expected)


def test_equal_losses_have_that_mean():
    for kind in ("classes", "pixels"):
        value = mean_over_regions(torch.full((7,), 3.0), torch.arange(7) % 3, torch.tensor([0.5, 1, 2]), kind, 1)
        assert value.item() == pytest.approx(3)
