"""What stages are said to take, against counts by hand and against files that were really written."""

import pytest
import torch
from torch import nn

from tag2mask.ops.seed import seed_of
from tag2mask.recipe import load
from tag2mask.stages.classify import build_objective
from tag2mask.stages.cost import COSTS, CRF_SECONDS, MASK_BYTES, Cost, cost_of, typical_size

SMALL = ["data.images=8", "data.test=2", "classify.augment.crop=64", "classify.train.batch=2"]
QUICK = [*SMALL, "cams.scales=[1.0]", "cams.flip=false"]


def planned(recipe, overrides):
    loaded = load(recipe, overrides)
    return loaded.source(), {stage.name: stage for stage in loaded.plan("x")}


def convolutions(net, image):
    """Two operations for every weight of a convolution at every place of its output, as they are run."""
    total = [0]

    def count(layer, given, made):
        kernel = layer.kernel_size[0] * layer.kernel_size[1] * layer.in_channels // layer.groups
        total[0] += 2 * kernel * made.numel()

    handles = [layer.register_forward_hook(count) for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        net(image)
    for handle in handles:
        handle.remove()
    return total[0]


def test_maps_of_every_image_at_every_scale():
    source, stages = planned("demo", QUICK)
    torch.manual_seed(seed_of(0))
    settings = stages["classify"].settings
    objective = build_objective(settings["net"], {}, len(source.classes), bf16=False).eval()
    look = type("Look", (nn.Module,), {"forward": lambda self, x: self.inner.look(x).cams})()
    look.inner = objective
    once = convolutions(look, torch.zeros(1, 3, 80, 112))
    assert cost_of(stages["cams"], source, (80, 112)).flops == once * 8
    source, both = planned("demo", [*SMALL, "cams.scales=[1.0]", "cams.flip=true"])
    assert cost_of(both["cams"], source, (80, 112)).flops == 2 * once * 8


def test_a_training_step_is_about_three_forward_passes_and_grows_with_the_epochs():
    source, stages = planned("demo", [*QUICK, "classify.train.epochs=4"])
    _, twice = planned("demo", [*QUICK, "classify.train.epochs=8"])
    one, two = (cost_of(x["classify"], source, (64, 64)) for x in (stages, twice))
    assert two.flops == 2 * one.flops and two.disk == one.disk > 1e6
    forward = cost_of(stages["cams"], source, (64, 64)).flops  # 8 images
    assert 2.5 < one.flops / (4 * forward) < 3.1


def test_what_a_method_adds_is_counted():
    source, plain = planned("scenes-cam", SMALL)
    _, method = planned("scenes-rcm-mam-cam", SMALL)
    cost = [cost_of(x["classify"], source, (64, 64)).flops for x in (plain, method)]
    assert cost[1] > 3 * cost[0]  # three scales and a second network


def test_masks_and_maps_on_disk():
    source, stages = planned("demo", QUICK)
    pixels, tags = 8 * 100 * 120, int(source.split("train").tags.sum())
    _, told = planned("demo", [*QUICK, "masks.background.score=0.3"])
    assert cost_of(told["masks"], source, (100, 120)) == Cost(0.0, CRF_SECONDS * pixels, MASK_BYTES * pixels)
    chosen = cost_of(stages["masks"], source, (100, 120))  # goes over all 8 images seven times to choose the score
    assert chosen == Cost(0.0, CRF_SECONDS * (8 * pixels), MASK_BYTES * pixels)
    assert cost_of(stages["cams"], source, (100, 120)).disk == 2 * 25 * 30 * tags
    assert cost_of(stages["tags"], source, (100, 120)) == Cost()


@pytest.mark.parametrize(
    ("recipe", "kinds"),
    [("scenes-psa", {"psa", "walk"}), ("scenes-irn", {"irn", "walk"}), ("scenes-oaa-plus", {"attention", "integrate"})],
)
def test_every_kind_of_stage(recipe, kinds):
    source, stages = planned(recipe, [])
    for stage in stages.values():
        if stage.kind in kinds:
            cost = cost_of(stage, source, (96, 96))
            assert cost.disk > 0 and (cost.flops > 0 or stage.kind == "attention")
    assert kinds <= COSTS.keys()


def test_typical_size_is_a_median():
    source, _ = planned("demo", [*QUICK, "data.size=80"])
    assert typical_size(source) == (80, 80)
