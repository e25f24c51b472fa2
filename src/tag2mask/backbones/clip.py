"""CLIP through open_clip: the two towers apart, and of the image tower what Grad-CAM and attention maps need.

Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, arXiv:2103.00020.

    image tower    tokens -> blocks 1 .. L-1 (`before_last`) -> block L (`enter`, `last`) -> `embedding`
    token 0        the class token; the rest are patches, row by row

The open_clip package is an extra; it is imported when a CLIP is loaded, and not before.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.backbones.weights import fill, read_weights
from tag2mask.errors import UserError
from tag2mask.schema import WeightsFile, meant

Size = tuple[int, int]
FILES = (".safetensors", ".pt", ".pth")
EXTRA = 'clip: CLIP needs the package open_clip, which is not installed; pip install "tag2mask[clip]"'
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's
GRIDS = 16  # how many resized position embeddings are kept


@dataclass(frozen=True, kw_only=True)
class CLIPSettings:
    """name: of an open_clip model whose image tower is a plain ViT; OpenAI's weights want one that ends in quickgelu.

    weights: a tag of that model (`open_clip.list_pretrained()`; downloaded once), or the path of a .safetensors, .pt or
    .pth file with all its tensors by open_clip's names; null is random, for tests and estimates: it knows nothing.
    """

    name: str = "ViT-B-16-quickgelu"
    weights: Annotated[str | None, WeightsFile()] = "openai"


class CLIP(nn.Module):
    """An open_clip model with a plain ViT, frozen: `model` is one, `tokenizer` turns text into its tokens.

    patch: pixels per patch (height, width). native: patches of the images that it was trained on. depth, width: blocks
    and channels of the image tower. scale: factor on cosines.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        visual = cast(Any, model).visual
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.patch: Size = tuple(visual.patch_size)
        self.native: Size = tuple(visual.grid_size)
        self.depth, self.width = len(visual.transformer.resblocks), int(visual.transformer.width)
        looks = getattr(visual, "preprocess_cfg", {})
        for key, default in (("mean", MEAN), ("std", STD)):
            self.register_buffer(key, torch.tensor(looks.get(key, default))[:, None, None], persistent=False)
        self._positions: dict[tuple[Size, torch.device, torch.dtype], Tensor] = {}

    def train(self, mode: bool = True) -> CLIP:
        """It is never trained, and stays as it is."""
        return super().train(False)

    @property
    def scale(self) -> Tensor:
        """The factor on cosines."""
        return cast(Tensor, cast(Any, self.model).logit_scale.exp())

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [n D] of length 1. Raises UserError for a prompt with more tokens than CLIP reads."""
        limit = int(cast(Any, self.model).context_length)
        for prompt in prompts:
            length = len(self.tokenizer.encode(prompt)) + 2  # a mark at the start, one at the end
            if length > limit:  # the tokenizer would cut it without a word
                shown = prompt if len(prompt) < 60 else f"{prompt[:60]}..."
                raise UserError(f"clip: {shown!r} has {length} tokens, CLIP reads {limit}; make it shorter")
        tokens = self.tokenizer(list(prompts), context_length=limit).to(self.mean.device)
        return cast(Tensor, cast(Any, self.model).encode_text(tokens, normalize=True))

    def grid(self, size: Size, longest: int | None = None) -> Size:
        """Patches (rows, columns) of an image of size (H, W), made smaller first if a side exceeds `longest` pixels."""
        least = 1.0 if longest is None else min(1.0, longest / max(size))
        rows, columns = (max(1, -(-round(side * least) // patch)) for side, patch in zip(size, self.patch, strict=True))
        return rows, columns

    def positions(self, grid: Size) -> Tensor:
        """Position embeddings [1 + h w, D] for a grid of h x w patches, resized (bilinear) once per grid."""
        visual = cast(Any, self.model).visual
        learnt: Tensor = visual.positional_embedding
        if grid == self.native:
            return learnt
        key = grid, learnt.device, learnt.dtype
        if key not in self._positions:
            if len(self._positions) >= GRIDS:
                self._positions.clear()
            patches = learnt[1:].reshape(1, *self.native, -1).permute(0, 3, 1, 2)
            resized = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
            self._positions[key] = torch.cat([learnt[:1], resized[0].flatten(1).T])
        return self._positions[key]

    def tokens(self, pixels: Tensor, grid: Size) -> Tensor:
        """Images [B 3 H W] with values in 0..1, resized (bicubic) to fit the grid -> what the first block reads."""
        visual, size = cast(Any, self.model).visual, (grid[0] * self.patch[0], grid[1] * self.patch[1])
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        x = visual.conv1((pixels - self.mean) / self.std).flatten(2).mT
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positions(grid)
        return cast(Tensor, visual.ln_pre(x))

    @torch.no_grad()
    def before_last(self, tokens: Tensor, *, keep: int) -> tuple[Tensor, Tensor]:
        """What the last block reads [B T D], and the sum of the attention [B T T] of the `keep` blocks before it.

        Attention is the mean over heads; each row, of the token that looks, sums to 1.
        """
        x, total = tokens, tokens.new_zeros(len(tokens), tokens.shape[1], tokens.shape[1])
        blocks = list(cast(Any, self.model).visual.transformer.resblocks)[:-1]
        for number, block in enumerate(blocks):
            if number < len(blocks) - keep:
                x = block(x)
            else:
                x, attention = _through(block, x, block.ln_1(x))
                total += attention
        return x, total

    def enter(self, tokens: Tensor) -> Tensor:
        """The first norm of the last block."""
        return cast(Tensor, cast(Any, self.model).visual.transformer.resblocks[-1].ln_1(tokens))

    def last(self, tokens: Tensor, entered: Tensor) -> tuple[Tensor, Tensor]:
        """(output of the last block [B T D], its attention [B T T]), given what it reads and `enter` of that."""
        return _through(cast(Any, self.model).visual.transformer.resblocks[-1], tokens, entered)

    def patches(self, tokens: Tensor) -> Tensor:
        """The patches (not the class token) after the last norm, projected: [B T-1 D]; `embedding` is their mean."""
        visual = cast(Any, self.model).visual
        return cast(Tensor, visual.ln_post(tokens[:, 1:]) @ visual.proj)

    def embedding(self, tokens: Tensor) -> Tensor:
        """The mean of the patches (not the class token) after the last norm, projected: [B D] of length 1."""
        visual = cast(Any, self.model).visual
        return F.normalize(visual.ln_post(tokens[:, 1:]).mean(dim=1) @ visual.proj, dim=-1)


def _through(block: Any, x: Tensor, entered: Tensor) -> tuple[Tensor, Tensor]:
    """A block of the image tower and its attention, with what its first norm gave."""
    attended, attention = block.attn(entered, entered, entered, need_weights=True)
    x = x + block.ls_1(attended)
    return x + block.ls_2(block.mlp(block.ln_2(x))), attention


def load_clip(settings: CLIPSettings) -> CLIP:
    """The model of these settings with its weights.

    Raises UserError if open_clip is not installed, the name or the tag is unknown, they do not fit each other, the
    image tower is no plain ViT, or the weights cannot be had.
    """
    open_clip = _open_clip()
    name, path = settings.name, Path(settings.weights or "")
    if name not in open_clip.list_models():
        close = meant(name, dict.fromkeys(open_clip.list_models()), "open_clip.list_models()")
        raise UserError(f"clip.name: open_clip has no model {name!r}; {close}")
    if not _is_plain(open_clip.get_model_config(name)):
        raise UserError(f"clip.name: the image tower of {name} is no plain ViT; take ViT-B-16-quickgelu")
    if path.suffix in FILES:
        if not path.is_file():
            raise UserError(f"clip.weights: no file {path}; {_where(open_clip, name, 'openai')}")
        model = _create(open_clip, name, None)
        try:
            fill(model, read_weights(path), str(path))
        except UserError as fault:
            raise UserError(str(fault).replace("backbone.weights", "clip.weights", 1)) from None
    else:
        model = _create(open_clip, name, settings.weights)
    return CLIP(model, open_clip.get_tokenizer(name))


def _open_clip() -> ModuleType:
    try:
        import open_clip
    except ImportError:
        raise UserError(EXTRA) from None
    return cast(ModuleType, open_clip)


def _is_plain(config: dict[str, Any]) -> bool:
    """Whether a model of open_clip is two transformers as OpenAI's are."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    transformers = isinstance(vision.get("layers", 12), int) and "timm_model_name" not in vision
    own = ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs")
    return (
        transformers and not vision.get("attentional_pool") and not config.get("custom_text") and not set(own) & {*text}
    )


def _create(open_clip: ModuleType, name: str, tag: str | None) -> nn.Module:
    """The model, with the weights of a tag or random ones."""
    config = open_clip.get_model_config(name)
    if tag is None:
        return cast(nn.Module, open_clip.CLIP(**config))
    tags = dict.fromkeys(open_clip.list_pretrained_tags_by_model(name))
    if tag not in tags:
        raise UserError(f"clip.weights: {name} has no weights {tag!r}, and it is no file; {meant(tag, tags)}")
    quick = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
    if quick != bool(config.get("quick_gelu")):  # it would see and read, but badly
        other = f"{name}-quickgelu" if quick else name.removesuffix("-quickgelu")
        raise UserError(f"clip.name: the weights {tag} were trained with another activation; take name: {other}")
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # what goes wrong is said below, in one line
    try:
        return cast(nn.Module, open_clip.create_model(name, pretrained=tag))
    except Exception as error:  # the hub client raises a dozen kinds: offline, proxy, quota, moved
        raise UserError(
            f"clip.weights: cannot download the weights {tag} of {name} ({type(error).__name__}); "
            f"{_where(open_clip, name, tag)}"
        ) from None
    finally:
        logging.disable(before)


def _where(open_clip: ModuleType, name: str, tag: str) -> str:
    """How to get weights without a network."""
    source = open_clip.get_pretrained_cfg(name, tag)
    if source.get("hf_hub"):
        address = f"open_clip_model.safetensors from https://huggingface.co/{source['hf_hub'].rstrip('/')}"
    else:
        address = source.get("url") or "the file of this model"
    return f"get {address} on a machine with network and give its path as clip.weights"
