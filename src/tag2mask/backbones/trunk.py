"""What all backbones share: their settings, what of them is frozen, and the mark that the optimiser looks for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tag2mask.schema import WeightsFile


@dataclass(frozen=True, kw_only=True)
class BackboneSettings:
    """name: of a timm model (`timm.list_models()`), or "resnet38"; "vgg16" with output_stride 8 is the dilated one.

    weights: "hub" (timm's own, downloaded once), the path of a .safetensors, .pth or MXNet .params file, or null (from
    scratch). output_stride: input pixels per feature, 8, 16 or 32; for a ViT the width of its patches, 14 as well.
    dilate: false drops strides without dilating what follows (IRN). freeze: the level up to which nothing is trained,
    from "c1", the stem, to "c5", which is all of a ViT; null means nothing, but "c2" for resnet38 with weights.
    freeze_norm: what batch norms keep: true all, "statistics" or "affine" (scale and shift) that half, false nothing;
    null means true if weights are loaded, else false.
    """

    name: str
    weights: Annotated[str | None, WeightsFile()] = "hub"
    output_stride: Literal[8, 14, 16, 32] = 16
    dilate: bool = True
    freeze: Literal["nothing", "c1", "c2", "c3", "c4", "c5"] | None = None
    freeze_norm: bool | Literal["statistics", "affine"] | None = None


class Trunk(nn.Module):
    """Images [B 3 H W] -> features by tap, {tap: [B D h w]}.

    dims: channels of every tap. affinity: the three taps that tell how alike two places are (AffinityNet).
    """

    trunk = True  # marks these parameters as the backbone's for the optimiser groups
    dims: dict[str, int]
    affinity: tuple[str, str, str] = ("c3", "c4", "last")
    freeze_norm: bool | Literal["statistics", "affine"] = False
    _still: frozenset[str] = frozenset()  # names of the batch norms that stay in evaluation mode

    def settle(self, settings: BackboneSettings, frozen: Collection[nn.Parameter]) -> None:
        """Freeze these parameters, and the batch norms as the settings say; those of a frozen part rest as well."""
        chosen = settings.freeze_norm
        self.freeze_norm = settings.weights is not None if chosen is None else chosen
        for parameter in frozen:
            parameter.requires_grad_(False)
        ids, still = {id(p) for p in frozen}, set()
        for name, norm in self._norms():
            if any(id(p) in ids for p in norm.parameters(recurse=False)) or self.freeze_norm in (True, "statistics"):
                still.add(name)
            if self.freeze_norm in (True, "affine"):
                norm.requires_grad_(False)
        self._still = frozenset(still)
        self.train(self.training)

    def train(self, mode: bool = True) -> Trunk:
        """As usual, but norms whose statistics are frozen stay in evaluation mode."""
        super().train(mode)
        for name, norm in self._norms():  # by name: data-parallel training puts other objects in their places
            if name in self._still:
                norm.eval()
        return self

    def _norms(self) -> Iterable[tuple[str, nn.Module]]:
        return [(name, module) for name, module in self.named_modules() if isinstance(module, _BatchNorm)]
