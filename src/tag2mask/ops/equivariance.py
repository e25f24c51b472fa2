"""What two looks at an image must agree on: the losses of SEAM, which EPS with a PCM shares.

Wang et al.: Self-supervised Equivariant Attention Mechanism for Weakly Supervised Semantic Segmentation, CVPR 2020.
A is the change of view (resizing to the grid of the second) and n is `min_max_norm`; only tagged classes count.

    L_ER    = mean |A n(yhat1) - n(yhat2)|
    L_ECR   = hard |A n(y1) - t(n(yhat2))| + hard |n(y2) - t(A n(yhat1))|
    L_rvmin = mean, over the quarter of an image's pixels where it is least, of the largest y of the tagged classes

    symbol   here                  meaning
    yhat     CamOutput.cams        CAM, K classes
    y        CamOutput.refined     refined map, K classes; in L_ECR also its background
    t        target                keeps each pixel's best class and adds 1 - that as background; no gradient
    hard     hardest               mean of the largest fifth of an image's (channel, pixel) entries
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tag2mask.core import Losses
from tag2mask.ops.cams import min_max_norm, resize_corners
from tag2mask.ops.pcm import PCMOutput

Size = tuple[int, int]


def equivariance(
    looks: Sequence[PCMOutput],
    sizes: Sequence[Size],
    tags: Tensor,
    *,
    hard: float = 0.2,
    released_one_hot: bool = False,
) -> Losses:
    """The losses "er", "ecr" and "rvmin" of two looks, compared at the size of the second; tags [B K].

    sizes: to which the maps of each look are brought before they are normalised, their own to leave them. hard: share
    of entries that count in "ecr". released_one_hot: see `target`. "rvmin" is averaged over the looks.
    """
    present = tags[:, :, None, None]

    def normalised(maps: Tensor, size: Size) -> Tensor:
        return resize_corners(min_max_norm(resize_corners(maps, size)), sizes[1])

    one, two = (normalised(out.cams, size) * present for out, size in zip(looks, sizes, strict=True))
    refined_one, refined_two = (
        torch.cat([normalised(out.refined, size) * present, normalised(out.refined_background, size)], dim=1)
        for out, size in zip(looks, sizes, strict=True)
    )
    target_one, target_two = (target(maps, released_one_hot=released_one_hot) for maps in (one, two))
    weak_one, weak_two = (
        background_suppression(resize_corners(out.refined, size), tags) for out, size in zip(looks, sizes, strict=True)
    )
    return {
        "er": (one - two).abs().mean(),
        "ecr": hardest((target_two - refined_one).abs(), hard) + hardest((target_one - refined_two).abs(), hard),
        "rvmin": (weak_one + weak_two) / 2,
    }


@torch.no_grad()
def target(maps: Tensor, *, released_one_hot: bool = False) -> Tensor:
    """[B K h w] in 0..1 -> [B K+1 h w], background LAST: all but each pixel's best class set to 0, and 1 - best.

    released_one_hot: a slip of the code that puts SEAM's losses on EPS, whose background is last while this step still
    takes channel 0 for it: class 0 is never set to 0, and the background competes with the other classes.
    """
    best = maps.amax(dim=1, keepdim=True)
    if not released_one_hot:
        return torch.cat([torch.where(maps < best, 0, maps), 1 - best], dim=1)
    rivals = torch.cat([maps[:, 1:], 1 - best], dim=1)
    return torch.cat([maps[:, :1], torch.where(rivals < rivals.amax(dim=1, keepdim=True), 0, rivals)], dim=1)


def hardest(errors: Tensor, share: float) -> Tensor:
    """The mean of the largest `share` of the entries of every image (at least one), then over images: a scalar."""
    errors = errors.flatten(1)
    return errors.topk(max(1, int(share * errors.shape[1])), dim=1).values.mean()


def background_suppression(refined: Tensor, tags: Tensor, share: float = 0.25) -> Tensor:
    """L_rvmin for refined [B K h w] in 0..1 and tags [B K]; share of an image's pixels that is taken for background."""
    strongest = (refined * tags[:, :, None, None]).amax(dim=1).flatten(1)
    return strongest.topk(max(1, int(share * strongest.shape[1])), dim=1, largest=False).values.mean()


def pool_resized(cams: Tensor, size: Size) -> Tensor:
    """The mean of `resize_corners(cams, size)`, [B K h w] -> [B K], without making that map.

    Resizing is linear and separable, so this is a weighted mean, in which cells on the border count about half.
    """
    rows, columns = (_shares(cams, axis, size[axis]) for axis in (-2, -1))
    return (cams.float() * rows[:, None] * columns).sum(dim=(2, 3))


def _shares(cams: Tensor, axis: int, pixels: int) -> Tensor:
    """[cells]: how much each cell of an axis adds to the mean of the axis resized to `pixels`."""
    lines = torch.eye(cams.shape[axis], device=cams.device)[None]
    return F.interpolate(lines, size=pixels, mode="linear", align_corners=True)[0].mean(dim=1)
