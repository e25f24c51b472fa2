"""CLIP-ES: maps of the tagged classes out of CLIP, without any training.

Lin, Chen, Wang, Wu, Li, Lin, Liu, He: CLIP is Also an Efficient Segmenter: A Text-Driven Approach for Weakly
Supervised Semantic Segmentation, CVPR 2023, arXiv:2212.09506.

    s_c   = softmax_c(scale cos(v, t_c)) over the tagged classes and all background words
    w_ck  = mean over patches of ds_c / dA_k                       CAM_c = min-max(relu(sum_k w_ck A_k))
    A_out = Sinkhorn(mean of the attention of the last blocks), made symmetric, squared
    M_c   = min-max(A_out (B_c * CAM_c))

    symbol   here                   meaning
    v        CLIP.embedding         mean of the patches, not the class token, in the space of the texts
    t        texts, others          embeddings of the classes' prompts and of the background's
    A        CLIP.enter             what the first norm of the last block gives, [B 1+N D]
    CAM      softmax_grad_cam       one map for each pair of an image and one of its tags, [P N]
    A_out    affinity               how alike two patches are, [B N N]
    B        boxes                  1 in the boxes around what of CAM_c exceeds a share of its maximum

Softmax makes the classes of an image, and the background, compete for a place; attention tells what belongs together.

Where this differs from the released code:

    there                                           here
    last row and last column are in no box          they are
    a text is told by its 77 tokens, so an image    text and image have their own ways
    of 76 patches (4 x 19) gets no gradient
    an image without tags ends the whole process    it has no maps
    boxes of the map rounded to 8 bits              of the map as it is
    min-max adds 1e-7 to the range, so that a       it does not; what is constant becomes 0
    class that CLIP is sure of gets faint maps
    position embeddings in half precision           as precise as the network

Of s_c only the direction of its gradient matters, as maps are stretched to 0..1 at once. That of the logit minus the
log-sum-exp of its rivals is the same, and does not vanish in rounding where s_c is close to 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from tag2mask.backbones.clip import CLIP
from tag2mask.errors import UserError

# The paper's background words for VOC. For COCO it leaves "keyboard" and "sign" out, which are classes there.
BACKGROUND = (
    "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway",
    "railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley",
    "bridge", "sign",
)  # fmt: skip
TEMPLATES = ("a clean origami {}.",)
SHORT_WORDS = frozenset({"ax", "ox", "pc", "tv"})


class CLIPES(nn.Module):
    """Maps of pairs of an image and a tag.

    clip: see backbones/clip.py. classes: words for the K classes. templates: sentences with {} in the place of the
    words; the embeddings of several are averaged. background: words for what is no class; those of a class are left
    out. blocks: how many of the last blocks' attention is averaged. box: share of a map's maximum above which a place
    gets into a box (VOC: 0.4, COCO: 0.7). longest: larger images are made smaller, to this many pixels on the longer
    side: attention takes memory with the square of the pixels.

    Raises UserError if a sentence is too long for CLIP, lacks its {}, no background word is left, or there are not so
    many blocks.
    """

    texts: Tensor
    others: Tensor

    def __init__(
        self,
        clip: CLIP,
        classes: Sequence[str],
        *,
        templates: Sequence[str] = TEMPLATES,
        background: Sequence[str] = BACKGROUND,
        blocks: int = 8,
        box: float = 0.4,
        longest: int | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= blocks <= clip.depth:
            raise UserError(f"blocks: {blocks}, but the image tower has {clip.depth}; take 1 to {clip.depth}")
        others = [word for word in background if word not in classes]
        if not others:
            raise UserError("background: at least one word is needed that is no class")
        self.clip = clip
        self.blocks, self.box, self.longest = blocks, box, longest
        self.register_buffer("texts", embed(clip, classes, templates))
        self.register_buffer("others", embed(clip, others, templates))

    @torch.no_grad()
    def forward(self, pixels: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
        """(maps [P h w] in 0..1 of the tagged classes, image after image, on the grid of patches; logits [B K]).

        pixels [B 3 H W]: images of values in 0..1. tags [B K] of 0/1, on the CPU.
        """
        grid = self.clip.grid((pixels.shape[-2], pixels.shape[-1]), self.longest)
        entering, attention = self.clip.before_last(self.clip.tokens(pixels, grid), keep=self.blocks - 1)
        output, own = self.clip.last(entering, self.clip.enter(entering))
        logits = self.clip.scale * self.clip.embedding(output) @ self.texts.T
        image_of, class_of = (x.to(pixels.device) for x in tags.nonzero(as_tuple=True))  # on the CPU: no sync
        if len(image_of) == 0:
            return pixels.new_zeros(0, *grid), logits
        among = tags.to(pixels.device) > 0
        cams = softmax_grad_cam(self.clip, entering, image_of, class_of, among, self.texts, self.others)
        alike = affinity(((attention + own) / self.blocks)[:, 1:, 1:])
        inside = boxes(cams.view(-1, *grid), self.box)
        return refine(cams, inside.flatten(1), alike, image_of).view(-1, *grid), logits


def embed(clip: CLIP, words: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Embeddings [n D] of length 1 of words, each in all templates: the mean of theirs.

    Raises UserError for a template without exactly one {}, or a sentence that is too long.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"templates: {template!r} needs one {{}}, where the name of the class goes")
    sentences = [template.replace("{}", word) for word in words for template in templates]
    return F.normalize(clip.text(sentences).view(len(words), len(templates), -1).mean(dim=1), dim=-1)


def softmax_grad_cam(
    clip: CLIP, entering: Tensor, image_of: Tensor, class_of: Tensor, among: Tensor, texts: Tensor, others: Tensor
) -> Tensor:
    """Grad-CAM [P N] in 0..1 of the softmax over the tagged classes and the background, all pairs at once.

    entering [B T D]: what the last block reads. image_of, class_of [P]: the pairs. among bool [B K]: the tags. texts
    [K D], others [M D]: embeddings of classes and background.
    """
    with torch.enable_grad():
        activation = clip.enter(entering)[image_of].detach().requires_grad_()
        embedded = clip.embedding(clip.last(entering[image_of], activation)[0])
        logits = clip.scale * embedded @ torch.cat([texts, others]).T
        own = class_of[:, None]
        rivals = F.pad(among[image_of], (0, len(others)), value=True).scatter(1, own, False)
        odds = logits.gather(1, own)[:, 0] - logits.masked_fill(~rivals, -torch.inf).logsumexp(dim=1)
        (gradient,) = torch.autograd.grad(odds.sum(), activation)
    weights = gradient[:, 1:].mean(dim=1)
    return stretch(torch.einsum("pd,pnd->pn", weights, activation.detach()[:, 1:]).relu())


def affinity(attention: Tensor, rounds: int = 3) -> Tensor:
    """Attention between patches [B N N] -> symmetric affinity: columns, then rows, are made to sum to 1, in turn."""
    for _ in range(rounds):
        attention = attention / attention.sum(dim=-2, keepdim=True)
        attention = attention / attention.sum(dim=-1, keepdim=True)
    return (attention + attention.mT) / 2


def boxes(cams: Tensor, share: float) -> Tensor:
    """bool [P h w]: the smallest boxes around the connected parts (corners connect) of each map above share x its max.

    A box reaches from the first to the last row and column of its part, both included. A map of zeros has none.
    """
    above = (cams > share * cams.amax(dim=(1, 2), keepdim=True)).cpu().numpy()
    within_a_map = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])
    inside = np.zeros_like(above)
    for part in ndimage.find_objects(ndimage.label(above, within_a_map)[0]):
        inside[part] = True
    return torch.from_numpy(inside).to(cams.device)


def refine(cams: Tensor, inside: Tensor, alike: Tensor, image_of: Tensor, power: int = 2) -> Tensor:
    """Maps [P N] in 0..1: the power of the affinity [B N N], its columns outside of the boxes [P N] zero, x cams [P N].

    The power is never made: the affinity goes over the maps as often.
    """
    maps, own = (cams * inside)[:, :, None], alike[image_of]
    for _ in range(power):
        maps = own @ maps
    return stretch(maps[:, :, 0])


def stretch(maps: Tensor) -> Tensor:
    """Each map [P N] to 0..1; a constant one becomes zeros."""
    low, high = maps.amin(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1)


def codes(words: Sequence[str]) -> list[str]:
    """Those that are no words of any language, but short for something, or numbered: CLIP cannot know what is meant."""
    return [name for name in words if not any(_is_word(part) for part in re.findall(r"[^\W\d_]+", name))]


def _is_word(letters: str) -> bool:
    small = letters.lower()
    if small in ("class", "label", "category", "type"):
        return False
    if not small.isascii():
        return len(small) > 1
    return small in SHORT_WORDS or (len(small) > 2 and not set(small).isdisjoint("aeiouy"))
