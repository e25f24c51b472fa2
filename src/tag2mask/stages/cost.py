"""What a stage will take, before anything is run: operations of its networks, seconds on a CPU, bytes on disk.

Operations are counted, not guessed: one step of the very objective is gone through with fake tensors, which have shapes
and no values. What that leaves out (loading images, kernels that wait for memory) is in the speed that one assumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tag2mask.backbones.clip import CLIPSettings, load_clip
from tag2mask.baselines.integral import TARGET, IntegralObjective
from tag2mask.core import Batch, Objective, Progress
from tag2mask.data.augment import Augment
from tag2mask.data.maps import map_size
from tag2mask.data.source import Source
from tag2mask.engine import Training
from tag2mask.pipeline import Stage
from tag2mask.refine import AFFINITY_NETS, BOUNDARY_NETS
from tag2mask.refine.irn import IRNet, IRNObjective
from tag2mask.refine.pacam import in_the_bank
from tag2mask.refine.psa import AffinityNet, AffinityObjective
from tag2mask.schema import make
from tag2mask.segment import SEGMENTERS, DeepLab, SegmentObjective
from tag2mask.segment import predict as probabilities
from tag2mask.segment.amn import AMN, AMNObjective, shares
from tag2mask.stages.background import FEW
from tag2mask.stages.classify import build_objective, without_weights

MASK_BYTES = 0.03  # of a pixel of an index mask as PNG, measured on photos
CRF_SECONDS = 2.6e-7  # of a pixel on one core: three labels, ten steps, measured at 500 x 375 pixels
Size = tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """flops: floating-point operations of networks. cpu_seconds: other work, on one core. disk: bytes that stay."""

    flops: float = 0.0
    cpu_seconds: float = 0.0
    disk: float = 0.0


def cost_of(stage: Stage, source: Source, size: Size) -> Cost:
    """The cost of a stage on images of size (H, W), about."""
    count = COSTS.get(stage.kind)
    return Cost() if count is None else count(stage, source, size)


def _classify(stage: Stage, source: Source, size: Size) -> Cost:
    return _training(stage, source, _objective(stage, source))


def _integrate(stage: Stage, source: Source, size: Size) -> Cost:
    return _training(stage, source, IntegralObjective(_objective(stage, source)))


def _affinity(stage: Stage, source: Source, size: Size) -> Cost:
    net = _affinity_net(stage)
    return _on_sure_labels(
        stage, source, size, AffinityObjective(net) if isinstance(net, AffinityNet) else IRNObjective(net)
    )


def _amn(stage: Stage, source: Source, size: Size) -> Cost:
    return _on_sure_labels(stage, source, size, AMNObjective(_amn_net(stage, source)))


def _on_sure_labels(stage: Stage, source: Source, size: Size, objective: nn.Module) -> Cost:
    trained, images = _training(stage, source, objective), len(source.split("train"))
    labels = images * size[0] * size[1]
    return Cost(trained.flops, 2 * CRF_SECONDS * labels, trained.disk + MASK_BYTES * labels)  # labels of two CRFs


def _segment(stage: Stage, source: Source, size: Size) -> Cost:
    return _training(stage, source, SegmentObjective(_segmenter(stage, source)))


def _training(stage: Stage, source: Source, objective: nn.Module) -> Cost:
    """Forward, losses and backward of every step; the weights that stay."""
    train, augment = Training(**stage.settings["train"]), Augment(**stage.settings["augment"])
    samples, classes = source.split("train"), len(source.classes)
    grid = objective.grid(augment.crop) if isinstance(objective, IntegralObjective) else (1, 1)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        batch = _batch(train.batch, augment.crop, classes, grid)
        losses = objective.train()(batch, Progress(epoch=0.0, done=0.0))
        torch.stack(list(losses.values())).sum().backward()
    disk = sum(x.numel() * x.element_size() for x in objective.state_dict().values())
    return Cost(flops=counter.get_total_flops() * train.total_steps(len(samples)), disk=disk)


def _cams(stage: Stage, source: Source, size: Size) -> Cost:
    objective, samples = _objective(stage.inputs["of"], source).eval(), source.split("train")
    tags = torch.zeros(1, len(source.classes))
    scales, flip = stage.settings["scales"], stage.settings["flip"]
    seen = [_flops(lambda x: objective.infer(x, tags), _scaled(size, scale)) for scale in scales]
    return Cost(flops=sum(seen) * (1 + flip) * len(samples), disk=_maps_on_disk(source, size))


def _amn_maps(stage: Stage, source: Source, size: Size) -> Cost:
    net, tags = _amn_net(stage.inputs["of"], source).eval(), torch.zeros(1, len(source.classes))
    scales, flip = stage.settings["scales"], stage.settings["flip"]
    flops = _flops(lambda x: shares(net, x, tags, scales=scales, flip=flip, size=map_size(size)), size)
    return Cost(flops=flops * len(source.split("train")), disk=_maps_on_disk(source, size))


def _walk(stage: Stage, source: Source, size: Size) -> Cost:
    looks = 1 + (stage.inputs["of"].kind == "irn" and stage.settings["flip"])
    flops = _flops(_affinity_net(stage.inputs["of"]).eval(), size)
    return Cost(flops=looks * flops * len(source.split("train")), disk=_maps_on_disk(source, size))


def _predict(stage: Stage, source: Source, size: Size) -> Cost:
    trained = stage.inputs["of"]
    net, settings = _segmenter(trained, source).eval(), trained.settings
    flops = _flops(lambda x: probabilities(net, x, scales=settings["scales"], flip=settings["flip"]), size)
    images = len(source.split(stage.settings["split"]))
    return Cost(flops=flops * images, disk=MASK_BYTES * images * size[0] * size[1])


def _masks(stage: Stage, source: Source, size: Size) -> Cost:
    images, area = len(source.split("train")), size[0] * size[1]
    refined = images if stage.kind == "crf" else 0
    if stage.settings["background"]["score"] == "auto":
        refined += 7 * min(FEW, refined)  # to choose the score
    return Cost(cpu_seconds=CRF_SECONDS * (refined * area), disk=MASK_BYTES * (images * area))


def _clip_es(stage: Stage, source: Source, size: Size) -> Cost:
    """Every block once an image, the last once more and back for each tag."""
    samples = source.split("train")
    depth, block = _clip_blocks(stage, size)
    flops = block * (depth * len(samples) + 2 * float(samples.tags.sum()))
    return Cost(flops=flops, disk=_maps_on_disk(source, size))


def _pacam(stage: Stage, source: Source, size: Size) -> Cost:
    """Every block once an image, and once more for an image in the bank."""
    samples = source.split("train")
    depth, block = _clip_blocks(stage.inputs["of"], size)
    banked = in_the_bank(samples.tags, stage.settings["bank"]).any(axis=1).sum()
    return Cost(flops=block * depth * float(len(samples) + banked), disk=_maps_on_disk(source, size))


def _clip_blocks(stage: Stage, size: Size) -> tuple[int, float]:
    """How many blocks the image tower of a clip_es stage has, and the operations of one on an image of this size."""
    with torch.device("meta"):  # its sizes are wanted, no weights
        net = load_clip(CLIPSettings(name=stage.settings["clip"]["name"], weights=None))
    tokens = 1 + math.prod(net.grid(size, stage.settings["longest"]))
    return net.depth, 24.0 * tokens * net.width**2 + 4.0 * tokens**2 * net.width


def _attention(stage: Stage, source: Source, size: Size) -> Cost:
    return Cost(disk=_maps_on_disk(source, size))


COSTS: dict[str, Callable[[Stage, Source, Size], Cost]] = {
    "classify": _classify, "attention": _attention, "integrate": _integrate, "cams": _cams, "clip_es": _clip_es,
    "pacam": _pacam, "psa": _affinity,
    "irn": _affinity, "amn": _amn, "amn_maps": _amn_maps, "walk": _walk, "labels": _masks, "crf": _masks,
    "segment": _segment, "few_masks": _segment, "predict": _predict,
}  # fmt: skip


def _objective(stage: Stage, source: Source) -> Objective:
    """The objective of a classify or integrate stage with its memories; weights as they come."""
    net, settings = without_weights(stage.settings["net"]), stage.settings
    objective = build_objective(net, settings.get("methods") or {}, len(source.classes), bf16=False)
    objective.remember(torch.from_numpy(source.split("train").tags))
    return objective


def _affinity_net(stage: Stage) -> AffinityNet | IRNet:
    net = without_weights(stage.settings["net"])
    made: AffinityNet | IRNet = make({**AFFINITY_NETS, **BOUNDARY_NETS}[net["name"]], net)
    return made


def _amn_net(stage: Stage, source: Source) -> AMN:
    made: AMN = make(AMN, without_weights(stage.settings["net"]), num_classes=len(source.classes))
    return made


def _segmenter(stage: Stage, source: Source) -> DeepLab:
    net = without_weights(stage.settings["net"])
    made: DeepLab = make(SEGMENTERS[net["name"]], net, num_classes=len(source.classes))
    return made


def _batch(count: int, crop: int, classes: int, grid: Size) -> Batch:
    """With everything that some objective reads."""
    one = torch.zeros(count, 1, crop, crop)
    return Batch(
        torch.zeros(count, 3, crop, crop), torch.zeros(count, classes), torch.zeros(count, dtype=torch.long), one,
        {"saliency": one, TARGET: torch.zeros(count, classes, *grid)}, torch.zeros(count, crop, crop, dtype=torch.long),
        torch.zeros(count, 2, 3),
    )  # fmt: skip


@torch.no_grad()
def _flops(work: Callable[[Tensor], object], size: Size) -> int:
    """Of one image of size (H, W)."""
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        work(torch.zeros(1, 3, *size))
    return int(counter.get_total_flops())


def _scaled(size: Size, scale: float) -> Size:
    return max(32, round(size[0] * scale)), max(32, round(size[1] * scale))


def _maps_on_disk(source: Source, size: Size) -> float:
    """Maps of the tagged classes, two bytes a number."""
    height, width = map_size(size)
    return 2.0 * height * width * float(source.split("train").tags.sum())


def typical_size(source: Source) -> Size:
    """Height and width of most train images: the medians of nine of them."""
    samples = source.split("train")
    places = np.linspace(0, len(samples) - 1, min(9, len(samples))).astype(int)
    height, width = np.median([samples.image(index).shape[:2] for index in places], axis=0)
    return int(height), int(width)
