"""Any timm CNN as a backbone: images -> named feature maps at a chosen output stride."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tag2mask.core import Features
from tag2mask.errors import UserError
from tag2mask.schema import WeightsFile, meant


@dataclass(frozen=True, kw_only=True)
class BackboneSettings:
    """name: of a timm model (`timm.list_models()`). weights: "hub" (timm's own, downloaded once), the path of a
    .safetensors or .pth file, or null (from scratch). output_stride: input pixels per feature, 8, 16 or 32.
    freeze_norm: batch norms keep their statistics, scale and shift; null means: if weights are loaded.
    """

    name: str
    weights: Annotated[str | None, WeightsFile()] = "hub"
    output_stride: Literal[8, 16, 32] = 16
    freeze_norm: bool | None = None


TAKE = "take a ResNet, a ConvNeXt or an EfficientNet"


class TimmCNN(nn.Module):
    """A timm CNN without its classifier.

    Taps: "c2".."c5" are the outputs of the last four stages, whose nominal strides are 4, 8, 16, 32 (dilation keeps the
    later ones at `output_stride`), "last" is what the classifier would pool. `dims` gives their channels.
    Raises UserError when the name is unknown, the model has no such stride or wants images of one size, or the weights
    cannot be had.
    """

    trunk = True  # marks these parameters as the backbone's for the optimiser groups

    def __init__(self, settings: BackboneSettings) -> None:
        super().__init__()
        # Convolutions are up to 1.5 times faster with channels last, on CPUs and on tensor cores.
        self.body = _create(settings).to(memory_format=torch.channels_last)
        weights = settings.weights
        self.freeze_norm = settings.freeze_norm if settings.freeze_norm is not None else weights is not None
        if self.freeze_norm:
            for norm in self._norms():
                norm.requires_grad_(False)
        stages = len(cast(Any, self.body).feature_info)
        self._levels = {f"c{level}": stages - 6 + level for level in (2, 3, 4, 5)}
        self.dims: dict[str, int] = self._measure(settings)

    def forward(self, images: Tensor) -> Features:
        """[B 3 H W] -> {tap: [B D h w]}."""
        images = images.contiguous(memory_format=torch.channels_last)
        last, stages = cast(Any, self.body).forward_intermediates(
            images, indices=list(self._levels.values()), norm=False
        )
        return dict(zip(self._levels, stages, strict=True)) | {"last": last}

    def train(self, mode: bool = True) -> TimmCNN:
        """As usual, but frozen norms stay in evaluation mode."""
        super().train(mode)
        if self.freeze_norm:
            for norm in self._norms():
                norm.eval()
        return self

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

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
        known = dict.fromkeys(timm.list_models())
        raise UserError(f"backbone.name: timm has no model {settings.name!r}; {_short(meant(settings.name, known))}")
    hub = settings.weights == "hub"
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
    if hub:
        _load_from_hub(model, settings.name)
    elif settings.weights is not None:
        _load_file(model, Path(settings.weights))
    return model


def _short(text: str) -> str:
    return text if len(text) < 200 else "see `timm.list_models()`"


def _load_from_hub(model: nn.Module, name: str) -> None:
    from timm.models import load_pretrained

    source = getattr(model, "pretrained_cfg", {})
    if not source.get("hf_hub_id") and not source.get("url"):
        raise UserError(f"backbone.weights: timm has no weights for {name}; use null (from scratch) or a file")
    try:
        load_pretrained(model, num_classes=0)
    except Exception as error:  # the hub client raises a dozen kinds: offline, proxy, quota, moved
        address = f"https://huggingface.co/{source['hf_hub_id']}" if source.get("hf_hub_id") else source["url"]
        raise UserError(
            f"backbone.weights: cannot download the weights of {name} ({type(error).__name__}); get model.safetensors "
            f"from {address} on a machine with network and give its path as weights, or set weights to null"
        ) from None


def _load_file(model: nn.Module, path: Path) -> None:
    """Weights of the same architecture; a classifier in the file is left out.

    Raises UserError if the file is missing, unreadable, or of another architecture.
    """
    if not path.is_file():
        raise UserError(f'backbone.weights: no file {path}; give an existing file, "hub", or null (from scratch)')
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
        tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    except Exception as error:  # a broken or crafted file provokes a dozen kinds
        raise UserError(
            f"backbone.weights: {path} is broken or holds more than tensors, it is not loaded "
            f"({type(error).__name__}); save the model's state_dict as .safetensors"
        ) from None
    wanted = model.state_dict()
    usable = {name: x for name, x in tensors.items() if name in wanted and x.shape == wanted[name].shape}
    missing = [name for name in wanted if name not in usable and not name.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"backbone.weights: {path} does not fit {type(model).__name__}: {len(missing)} of {len(wanted)} tensors "
            f"are missing or of another shape, the first is {missing[0]}; is it of another model?"
        )
    model.load_state_dict(usable, strict=False)
