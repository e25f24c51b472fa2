"""Any timm ViT as a backbone: its patch tokens, folded back to the grid of patches, are the features.

Dosovitskiy et al.: An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale, ICLR 2021,
arXiv:2010.11929; and what has the same tokens in the same order: DeiT, CLIP and SigLIP image towers, DINOv2 (with
registers), DINOv3, EVA-02.

    z_0 = [class, registers, E x_1, ..., E x_hw] + P        z_l = block_l(z_{l-1})        l = 1..d

    symbol   here            meaning
    E        patch_embed     a patch -> a token of D numbers
    P        `positions`     position embeddings, learnt on one grid, resized to any other; rotary ones are the model's
    z_l      "c2".."c5"      the patches of z_l for l = d/4, d/2, 3d/4 (rounded up) and d, as [B D h w]
             "last"          c5 after the model's last norm

All taps have the stride of the patches. A side that is no multiple of it is padded at its end with zeros (the mean
colour): h = ceil(H / patch). Class and register tokens take part in attention and are left out at the end, as is a
pooling head with weights of its own. Where a model pools before its last norm, the norm is taken at every patch.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tag2mask.backbones.trunk import BackboneSettings, Trunk
from tag2mask.backbones.weights import Tensors, fill, load_from_hub, read_weights
from tag2mask.core import Features
from tag2mask.errors import UserError

MODULES = ("vision_transformer", "deit", "eva")  # of timm.models
PREFIX = ("cls_token", "dist_token", "reg_token")  # what a model may have of them stands before the patches, so ordered
GRIDS = 32  # sizes of grids whose embeddings are kept, some 3 MB each


class ViT(Trunk):
    """A timm ViT without its head.

    freeze: "c1" is all before the first block, "c2".."c5" reach to their taps' blocks; "c5" is the whole network.
    From scratch, patches are as wide as `output_stride` says. Raises UserError when with weights it is another width
    than theirs, or the weights cannot be had.
    """

    def __init__(self, settings: BackboneSettings) -> None:
        super().__init__()
        self.body = _create(settings)
        body = cast(Any, self.body)
        depth, width = len(body.blocks), int(body.embed_dim)
        self._ends = {f"c{2 + quarter}": -(-depth * (1 + quarter) // 4) - 1 for quarter in range(4)}
        self.dims = dict.fromkeys((*self._ends, "last"), width)
        self._resized: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._resized_of: tuple[object, ...] = ()
        limit = {"nothing": -2, "c1": -1, **self._ends}[settings.freeze or "nothing"]
        self.settle(settings, [p for name, p in body.named_parameters() if _block(name, depth) <= limit])

    def forward(self, images: Tensor) -> Features:
        """[B 3 H W] -> {tap: [B D h w]}, h = ceil(H / patch)."""
        body = cast(Any, self.body)
        patches = body.patch_embed(images)
        grid = (int(patches.shape[1]), int(patches.shape[2]))
        x = self._embed(patches.flatten(1, 2), grid)
        features: Features = {}
        first = x.shape[1] - grid[0] * grid[1]  # class and register tokens stand before
        for number, (block, rotation) in enumerate(zip(body.blocks, self._rotations(grid), strict=True)):
            x = block(x) if rotation is None else block(x, rope=rotation)
            features |= {tap: fold(x[:, first:], grid) for tap, end in self._ends.items() if end == number}
        return features | {"last": fold(body.fc_norm(body.norm(x))[:, first:], grid)}

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """The learnt position embeddings for a grid (h, w): [1 N D], N with the prefix tokens if they have some.

        Resized as timm does it. Frozen ones, and those of a model in evaluation mode that are to get no gradient, are
        kept for the next call, until they change. None if the model has none.
        """
        from timm.layers import resample_abs_pos_embed

        body = cast(Any, self.body)
        learnt = body.pos_embed
        if learnt is None:
            return None
        moves = learnt.requires_grad and torch.is_grad_enabled()
        kept = not (moves or (learnt.requires_grad and self.training))
        state = (id(learnt), learnt._version, learnt.device, learnt.dtype)
        if moves or state != self._resized_of:  # a fused optimiser changes weights without counting a version
            self._resized.clear()
            self._resized_of = state
        if kept and grid in self._resized:
            self._resized.move_to_end(grid)
            return self._resized[grid]
        prefix = 0 if body.no_embed_class else body.num_prefix_tokens
        native = body.patch_embed.grid_size
        resized: Tensor = resample_abs_pos_embed(learnt, list(grid), list(native), num_prefix_tokens=prefix)
        if kept and type(resized) is Tensor:  # a fake one, with which operations are counted, is of one use only
            self._resized[grid] = resized
            if len(self._resized) > GRIDS:
                self._resized.popitem(last=False)
        return resized

    def _embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B hw D] -> z_0, [B N D]."""
        body, positions = cast(Any, self.body), self.positions(grid)
        held = [getattr(body, name, None) for name in PREFIX]
        tokens = [token.expand(len(patches), -1, -1) for token in held if token is not None]
        if positions is None:
            x = torch.cat([*tokens, patches], dim=1)
        elif body.no_embed_class:
            x = torch.cat([*tokens, patches + positions], dim=1)
        else:
            x = torch.cat([*tokens, patches], dim=1) + positions
        return cast(Tensor, body.norm_pre(body.pos_drop(x)))

    def _rotations(self, grid: tuple[int, int]) -> list[Tensor | None]:
        """What each block turns its queries and keys by; None where positions are not rotary."""
        body = cast(Any, self.body)
        if getattr(body, "rope", None) is None:
            return [None] * len(body.blocks)
        rotation = body.rope.get_embed(shape=list(grid))
        return list(rotation) if body.rope_mixed else [rotation] * len(body.blocks)


def fold(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens [B hw D], row by row -> [B D h w]."""
    folded: Tensor = tokens.unflatten(1, grid)
    return folded.permute(0, 3, 1, 2)


def is_vit(name: str) -> bool:
    """Whether `name`, with or without a tag of weights, is a ViT that this backbone can be made of."""
    from timm.models import is_model, is_model_in_modules

    plain = name.partition(".")[0]
    return bool(is_model(plain) and is_model_in_modules(plain, set(MODULES)))


def patch_of(name: str) -> int | None:
    """Width of the patches of a ViT, with or without a tag of weights: its stride. None for any other name."""
    import timm

    if not is_vit(name):
        return None
    with torch.device("meta"):
        model = timm.create_model(name.partition(".")[0], num_classes=0)
    return int(cast(Any, model).patch_embed.patch_size[1])


def _block(name: str, depth: int) -> int:
    """The number of the block that a parameter is in: -1 before the first; the last norms count to the last one."""
    first, _, rest = name.partition(".")
    if first == "blocks":
        return int(rest.partition(".")[0])
    return depth - 1 if first in ("norm", "fc_norm") else -1


def _create(settings: BackboneSettings) -> nn.Module:
    import timm

    if not settings.dilate:
        raise UserError(f"backbone: nothing of {settings.name} is dilated; leave dilate out")
    patches = {"patch_size": settings.output_stride} if settings.weights is None else {}
    try:
        model: nn.Module = timm.create_model(
            settings.name, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True, **patches
        )
    except RuntimeError as error:  # of all that can go wrong, an unknown tag alone
        raise UserError(f"backbone.name: {error} See `timm.list_pretrained()`") from None
    body = cast(Any, model)
    body.attn_pool = None
    height, width = body.patch_embed.patch_size
    if not height == width == settings.output_stride:
        raise UserError(
            f"backbone: the patches of {settings.name} are {width} pixels wide, its only stride; "
            f"set output_stride: {width}"
        )
    if settings.weights == "hub":
        load_from_hub(model, settings.name, keep=_own)
    elif settings.weights is not None:
        path = Path(settings.weights)
        tensors = read_weights(path, fits=settings.name)
        try:
            tensors = _own(tensors, model)
        except (AttributeError, IndexError, KeyError, RuntimeError, ValueError):  # timm takes it for what it is not
            raise UserError(
                f"backbone.weights: {path} does not fit {type(model).__name__}; is it of another model?"
            ) from None
        fill(model, tensors, str(path))
    return model


def _own(tensors: Tensors, model: nn.Module) -> Tensors:
    """Of a published file what the model has, by timm's names, embeddings resized to the model's own grid."""
    from timm.models import eva, vision_transformer

    source = eva if isinstance(model, eva.Eva) else vision_transformer
    found, wanted = source.checkpoint_filter_fn(dict(tensors), model), model.state_dict()
    return {name: x for name, x in found.items() if name in wanted}
