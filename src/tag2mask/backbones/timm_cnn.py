"""Any timm CNN as a backbone: images -> named feature maps at a chosen output stride."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tag2mask.backbones.trunk import BackboneSettings, Trunk
from tag2mask.backbones.weights import load_from_hub, load_weights
from tag2mask.core import Features
from tag2mask.errors import UserError
from tag2mask.schema import meant

TAKE = "take a ResNet, a ConvNeXt or an EfficientNet"


class TimmCNN(Trunk):
    """A timm CNN without its classifier.

    Taps: "c2".."c5" are the outputs of the last four stages, whose nominal strides are 4, 8, 16, 32 (dilation keeps the
    later ones at `output_stride`), "last" is what the classifier would pool. With `stem`, "c1" is the level of stride
    2, where the model has one. `dims` gives their channels.
    Raises UserError when the name is unknown, the model has no such stride or wants images of one size, or the weights
    cannot be had.
    """

    def __init__(self, settings: BackboneSettings, *, stem: bool = False) -> None:
        super().__init__()
        # Convolutions are up to 1.5 times faster with channels last, on CPUs and on tensor cores.
        self.body = _create(settings).to(memory_format=torch.channels_last)
        stages = len(cast(Any, self.body).feature_info)
        levels = (1, 2, 3, 4, 5) if stem and stages > 4 else (2, 3, 4, 5)
        self._levels = {f"c{level}": stages - 6 + level for level in levels}
        self.dims = self._measure(settings)
        self.settle(settings, self._before(settings.freeze or "nothing", stages))

    def forward(self, images: Tensor) -> Features:
        """[B 3 H W] -> {tap: [B D h w]}."""
        images = images.contiguous(memory_format=torch.channels_last)
        last, stages = cast(Any, self.body).forward_intermediates(
            images, indices=list(self._levels.values()), norm=False
        )
        return dict(zip(self._levels, stages, strict=True)) | {"last": last}

    @torch.enable_grad()
    def _before(self, level: str, stages: int) -> list[nn.Parameter]:
        """The parameters that the output of a level depends on."""
        if level == "nothing":
            return []
        if (index := stages - 6 + int(level[1])) < 0:
            raise UserError(
                f"backbone.freeze: this model has no level {level} of its own; take a later one or leave it out"
            )
        images = torch.zeros(1, 3, 97, 97).contiguous(memory_format=torch.channels_last)
        was, parameters = self.training, list(self.parameters())
        self.eval()
        reached = cast(Any, self.body).forward_intermediates(images, indices=[index], norm=False)[1][0]
        self.train(was)
        found = torch.autograd.grad(reached.sum(), parameters, allow_unused=True)
        return [p for p, gradient in zip(parameters, found, strict=True) if gradient is not None]

    @torch.no_grad()
    def _measure(self, settings: BackboneSettings) -> dict[str, int]:
        was, side = self.training, 97  # no multiple of anything: images have any size
        self.eval()
        try:
            features = self(torch.zeros(1, 3, side, side))
        except Exception as error:  # whatever a model says that wants images of one size, or of a multiple of some size
            raise UserError(
                f"backbone.name: {settings.name} cannot look at images of any size "
                f"({' '.join(str(error).split())}); {TAKE}"
            ) from None
        self.train(was)
        if features["last"].shape[2:] != features["c5"].shape[2:]:
            raise UserError(f"backbone.name: {settings.name} lays out its last features in a way of its own; {TAKE}")
        return {tap: x.shape[1] for tap, x in features.items()}


def _create(settings: BackboneSettings) -> nn.Module:
    import timm

    if not timm.is_model(settings.name):
        known = dict.fromkeys([*timm.list_models(), "resnet38"])
        close = meant(settings.name, known, "timm.list_models()")
        raise UserError(f"backbone.name: timm has no model {settings.name!r}; {close}")
    dilation = {} if settings.output_stride == 32 else {"output_stride": settings.output_stride}
    try:
        model: nn.Module = timm.create_model(settings.name, num_classes=0, global_pool="", **dilation)
    except RuntimeError as error:  # of all that can go wrong, an unknown tag alone
        raise UserError(f"backbone.name: {error} See `timm.list_pretrained()`") from None
    except (TypeError, NotImplementedError, AssertionError, ValueError):
        raise UserError(
            f"backbone: {settings.name} cannot be built with output stride {settings.output_stride}; "
            f"{'set output_stride: 32 or ' if dilation else ''}take another model"
        ) from None
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
        raise UserError(f"backbone.name: {settings.name} gives no intermediate features; {TAKE}")
    strides = [info["reduction"] for info in cast(Any, model).feature_info][-4:]
    wanted = [min(stride, settings.output_stride) for stride in (4, 8, 16, 32)]
    if strides != wanted:
        raise UserError(
            f"backbone: the last stages of {settings.name} have strides {strides}, needed are {wanted}; {TAKE}"
        )
    if settings.weights == "hub":
        load_from_hub(model, settings.name)
    elif settings.weights is not None:
        load_weights(model, Path(settings.weights), fits=settings.name)
    if not settings.dilate:
        _undilate(model)
    return model


def _undilate(model: nn.Module) -> None:
    """Every convolution as it is at output stride 32, but for the strides."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and max(module.dilation) > 1 and not isinstance(module.padding, str):
            module.padding = tuple(p // d for p, d in zip(module.padding, module.dilation, strict=True))
            module.dilation = (1, 1)
