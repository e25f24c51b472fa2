"""A vision transformer with one class token per class, whose attention is kept: what MCTformer reads.

Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929 (the transformer).
Xu, Ouyang, Bennamoun, Boussaid, Xu: Multi-class Token Transformer for Weakly Supervised Semantic Segmentation, CVPR
2022, arXiv:2203.02891 (its class tokens).

The layers are timm's. The class token and its position are there K times: alike where they come from weights, drawn
one by one from scratch. There is no normalisation after the last layer, as in the released code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.backbones.trunk import BackboneSettings, Trunk
from tag2mask.backbones.weights import load_from_hub, load_weights
from tag2mask.core import Features
from tag2mask.errors import UserError

Positions = Literal["exact", "released"]
TAPS = ("c2", "c3", "c4", "c5")  # patch tokens after each quarter of the layers
TAKE = "take a plain ViT or DeiT such as deit_small_patch16_224"


class ClassTokenViT(Trunk):
    """Images [B 3 H W] -> patch tokens and class tokens by tap, and who attended to whom.

    Taps: "c2".."c5" are the patch tokens after each quarter of the layers, "last" is "c5", all at the stride of the
    patches. Beside them `forward` gives, where D are the channels and (h, w) the patches of an image:

        class_tokens      [B L K D]    after each of the L layers
        class_attention   [B K h w]    of class tokens to patches: mean over heads and the last `layers` layers
        patch_attention   [B hw h w]   of patches to patches: mean over heads and all layers; no gradient

    drop_path: share of the residual branches that are dropped in training, rising to it from layer to layer. positions:
    see `resized_positions`. repeat: how often each place of the position embeddings stands side by side in rows and in
    columns, for training on images as much larger. border: images whose sides are no multiples of the patch are resized
    (bilinear) to the next one, or what is beyond the last whole patch is dropped.
    Raises UserError if timm has no such transformer, its patches have another size than output_stride (from scratch
    they take it), the settings ask for what it has not, or the weights cannot be had.
    """

    def __init__(
        self,
        settings: BackboneSettings,
        num_classes: int,
        *,
        layers: int = 3,
        drop_path: float = 0.0,
        positions: Positions = "released",
        repeat: int = 1,
        border: Literal["resize", "drop"] = "resize",
    ) -> None:
        super().__init__()
        body = _create(settings, drop_path)
        self.patch, self.layers = settings.output_stride, layers
        self.positions, self.whole = positions, border == "resize"
        self.embed, self.start, self.blocks = body.patch_embed.proj, body.norm_pre, body.blocks
        if not 1 <= layers <= len(self.blocks):
            raise UserError(
                f"layers: {settings.name} has {len(self.blocks)} layers, this must be in 1..{len(self.blocks)}"
            )
        height, width = body.patch_embed.grid_size
        own, places = body.pos_embed.detach()[0].split([1, height * width])
        grid = places.mT.reshape(1, -1, height, width)
        grid = grid.repeat_interleave(repeat, dim=2).repeat_interleave(repeat, dim=3)
        self.grid = nn.Parameter(grid.contiguous())
        self.tokens = nn.Parameter(body.cls_token.detach()[0].repeat(num_classes, 1))
        self.token_positions = nn.Parameter(own.repeat(num_classes, 1))
        if settings.weights is None:
            nn.init.trunc_normal_(self.tokens, std=0.02)
            nn.init.trunc_normal_(self.token_positions, std=0.02)
        self.dims = dict.fromkeys((*TAPS, "last"), self.tokens.shape[1])
        self.settle(settings, [])

    def no_weight_decay(self) -> set[str]:
        """Tokens and position embeddings, as in timm."""
        return {"grid", "tokens", "token_positions"}

    def forward(self, images: Tensor) -> Features:
        """[B 3 H W] -> {tap: [B D h w]} and the three above."""
        x = self.embed(self._in_patches(images))
        grid = (x.shape[2], x.shape[3])
        x = (x + resized_positions(self.grid, grid, self.positions)).flatten(2).mT
        classes, count = len(self.tokens), len(self.blocks)
        own = (self.tokens + self.token_positions).expand(len(x), -1, -1)
        x = self.start(torch.cat([own.to(x.dtype), x], dim=1))
        features, tokens, to_patches, between = {}, [], [], x.new_zeros(())
        taps = {round((number + 1) * count / len(TAPS)): tap for number, tap in enumerate(TAPS)}
        for number, block in enumerate(cast(Any, self.blocks), 1):
            found, attention = attend(block.attn, block.norm1(x))
            x = x + block.drop_path1(block.ls1(found))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
            tokens.append(x[:, :classes])
            between = between + attention[:, classes:, classes:].detach()
            if number > count - self.layers:
                to_patches.append(attention[:, :classes, classes:])
            if number in taps:
                features[taps[number]] = x[:, classes:].mT.unflatten(2, grid)
        return features | {
            "last": features["c5"],
            "class_tokens": torch.stack(tokens, dim=1),
            "class_attention": (sum(to_patches[1:], to_patches[0]) / self.layers).unflatten(2, grid),
            "patch_attention": (between / count).unflatten(2, grid),
        }

    def _in_patches(self, images: Tensor) -> Tensor:
        """Images with sides that are multiples of the patch."""
        size = tuple(-(-side // self.patch) * self.patch for side in images.shape[-2:])
        if not self.whole or size == tuple(images.shape[-2:]):
            return images  # the convolution of the patches leaves out what is beyond the last one
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def resized_positions(grid: Tensor, size: tuple[int, int], how: Positions) -> Tensor:
    """Position embeddings [1 D g g'] for (h, w) = size patches, [1 D h w]: bicubic, as they are if the size is theirs.

    how: "exact" samples at steps of g / h; "released" at g / (h + 0.1), with which the embeddings lie up to a tenth of
    a step beside the patches: so the published weights were scored.
    """
    if tuple(grid.shape[-2:]) == size:  # both sides: as many patches in another shape lie elsewhere
        return grid
    if how == "exact":
        return F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    factors = [(side + 0.1) / own for side, own in zip(size, grid.shape[-2:], strict=True)]
    return F.interpolate(grid, scale_factor=factors, mode="bicubic", align_corners=False, recompute_scale_factor=False)


def attend(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What an attention layer of timm makes of tokens [B T D], and its mean over the heads, [B T T]; rows sum to 1."""
    qkv = layer.qkv(x).unflatten(2, (3, layer.num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores = layer.q_norm(query) * layer.scale @ layer.k_norm(key).mT
    shares = scores.softmax(dim=3)
    found = (layer.attn_drop(shares) @ value).transpose(1, 2).flatten(2)
    return layer.proj_drop(layer.proj(found)), shares.mean(dim=1)


def _create(settings: BackboneSettings, drop_path: float) -> Any:
    """The timm model of these settings, with its weights."""
    import timm
    from timm.layers import PatchEmbed
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    name, stride = settings.name, settings.output_stride
    if settings.freeze not in (None, "nothing") or settings.freeze_norm or not settings.dilate:
        raise UserError(
            "backbone: this transformer learns as a whole and dilates nothing; leave freeze, freeze_norm and dilate out"
        )
    if not timm.is_model(name):
        raise UserError(f"backbone.name: timm has no model {name!r}; {TAKE}")
    patches = {"patch_size": stride} if settings.weights is None else {}
    try:
        model = timm.create_model(name, num_classes=0, global_pool="", drop_path_rate=drop_path, **patches)
    except RuntimeError as error:  # an unknown tag
        raise UserError(f"backbone.name: {error} See `timm.list_pretrained()`") from None
    except (TypeError, AssertionError, ValueError):
        model = None
    plain = type(model) is VisionTransformer and type(model.patch_embed) is PatchEmbed
    if not (
        plain
        and model.cls_token is not None
        and model.pos_embed is not None
        and model.pos_embed.shape[1] == 1 + model.patch_embed.num_patches
        and isinstance(model.patch_embed.norm, nn.Identity)
        and all(type(b) is Block and type(b.attn) is Attention and _is_plain(b.attn) for b in model.blocks)
        and len(model.blocks) >= len(TAPS)
    ):
        raise UserError(f"backbone.name: {name} is no transformer with one class token and learnt positions; {TAKE}")
    if model.patch_embed.patch_size != (stride, stride):
        raise UserError(
            f"backbone.output_stride: the patches of {name} have {model.patch_embed.patch_size[0]} pixels; give that"
        )
    if settings.weights == "hub":
        load_from_hub(model, name)
    elif settings.weights is not None:
        load_weights(model, Path(settings.weights), fits=name)
    return model


def _is_plain(layer: Any) -> bool:
    """Whether an attention layer is what `attend` computes."""
    return getattr(layer, "gate", None) is None and isinstance(getattr(layer, "norm", nn.Identity()), nn.Identity)
