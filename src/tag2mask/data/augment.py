"""Training samples: resize, crop, flip, jitter, normalise - image, masks and side maps together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tf

from tag2mask.core import Batch
from tag2mask.data.source import IGNORE, Mask, Samples
from tag2mask.errors import UserError
from tag2mask.ops.seed import seed_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What is done to a training image.

    The long side is resized to a random length in `long` (pixels), a square of `crop` pixels is cut out at random
    (smaller images are padded with the mean colour; padding is marked in `valid`), flipped left-right half of the
    time if `flip`, up-down and turned by quarter turns if `rotate` (for images without an upright: steel,
    tissue, aerial), and brightness, contrast and saturation vary by up to `jitter`, hue by up to `hue` (the papers
    take 0.1; it costs more time than all the rest).
    """

    crop: int = 224
    long: tuple[int, int] = (256, 448)
    flip: bool = True
    rotate: bool = False
    jitter: float = 0.3
    hue: float = 0.0

    def __post_init__(self) -> None:
        if self.crop < 8 or not 8 <= self.long[0] <= self.long[1]:
            raise UserError("crop must be at least 8 and long must be [smallest, largest], at least 8")
        if not 0 <= self.jitter <= 1:
            raise UserError("jitter must be in 0..1")
        if not 0 <= self.hue <= 0.5:
            raise UserError("hue must be in 0..0.5")


@dataclass
class Sample:
    """One training sample: image [3 S S] normalised, tags [K], valid [1 S S], place [2 3]; see Batch for the rest."""

    image: Tensor
    tags: Tensor
    index: int
    valid: Tensor
    side: dict[str, Tensor]
    target: Tensor | None
    place: Tensor | None = None


class Crops(Dataset[Sample]):
    """Augmented training samples; `crops[(epoch, index)]` is a function of (seed, epoch, index) alone."""

    def __init__(
        self,
        samples: Samples,
        augment: Augment,
        *,
        seed: int,
        side: frozenset[str] = frozenset(),
        target: Callable[[int], Mask] | None = None,
    ) -> None:
        self.samples, self.augment, self.seed, self.target = samples, augment, seed, target
        self.side = {name: samples.side[name] for name in sorted(side)}
        jitter, hue = augment.jitter, augment.hue
        self.jitter = v2.ColorJitter(jitter, jitter, jitter, hue) if jitter or hue else None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        epoch, index = place
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, epoch, index))
            return self._sample(index)

    def _sample(self, index: int) -> Sample:
        image = tv_tensors.Image(torch.from_numpy(self.samples.image(index)).permute(2, 0, 1))
        parts: dict[str, Tensor] = {"image": image, "valid": tv_tensors.Mask(torch.ones(1, *image.shape[1:]))}
        parts |= {
            name: tv_tensors.Image(torch.from_numpy(read(index))[None], dtype=torch.float32)
            for name, read in self.side.items()
        }
        if self.target is not None:
            parts["target"] = tv_tensors.Mask(torch.from_numpy(self.target(index))[None].long())
        parts, place = self._cut(parts)
        if self.jitter is not None:
            parts["image"] = self.jitter(parts["image"])
        parts["image"] = normalise(parts["image"])
        parts, place = self._pad(parts, place)
        target = parts.get("target")
        return Sample(
            parts["image"].as_subclass(Tensor),
            torch.from_numpy(self.samples.tags[index]).float(),
            index,
            parts["valid"].as_subclass(Tensor),
            {name: parts[name].as_subclass(Tensor) for name in self.side},
            None if target is None else target[0].as_subclass(Tensor),
            place.float(),
        )

    def _cut(self, parts: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Resize the long side, cut at most crop x crop, flip and turn. Returns the place [2 3] of the result, too."""
        height, width = parts["image"].shape[-2:]
        scale = _integer(*self.augment.long) / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        cut = min(size[0], self.augment.crop), min(size[1], self.augment.crop)
        top, left = _integer(0, size[0] - cut[0]), _integer(0, size[1] - cut[1])
        mirror = self.augment.flip and _integer(0, 1) == 1
        turns, upset = (_integer(0, 3), _integer(0, 1) == 1) if self.augment.rotate else (0, False)

        def one(x: Tensor) -> Tensor:
            x = tf.crop(_resize(x, size), top, left, *cut)
            x = tf.horizontal_flip(x) if mirror else x
            x = tf.vertical_flip(x) if upset else x
            return tv_tensors.wrap(torch.rot90(x.as_subclass(Tensor), turns, (-2, -1)), like=x) if turns else x

        across = [size[1], 0, size[1] - 2 * left - cut[1]]
        down = [0, size[0], size[0] - 2 * top - cut[0]]
        place = torch.tensor([across, down], dtype=torch.float64) / torch.tensor([[cut[1]], [cut[0]]])
        place = place * torch.tensor([[-1 if mirror else 1], [-1 if upset else 1]])
        for _ in range(turns):  # what was up is left then, what was right is up
            place = torch.stack([place[1], -place[0]])
        return {name: one(x) for name, x in parts.items()}, place

    def _pad(self, parts: dict[str, Tensor], place: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Put the cut at a random spot of a crop x crop canvas: zeros (the mean colour), targets ignored."""
        size, (height, width) = self.augment.crop, parts["image"].shape[-2:]
        if (height, width) == (size, size):
            return parts, place
        top, left = _integer(0, size - height), _integer(0, size - width)
        box = [left, top, size - width - left, size - height - top]
        place = place * torch.tensor([[width], [height]]) / size
        place[:, 2] += torch.tensor([2 * left + width - size, 2 * top + height - size]) / size
        return {name: tf.pad(x, box, fill=IGNORE if name == "target" else 0) for name, x in parts.items()}, place


def normalise(image: Tensor) -> Tensor:
    """uint8 [... 3 H W] -> float32 with ImageNet's mean and standard deviation."""
    scaled: Tensor = tf.normalize(tf.to_dtype(image, torch.float32, scale=True), list(MEAN), list(STD))
    return scaled


def pixels_of(images: Tensor) -> Tensor:
    """What `normalise` was given, of a batch [B 3 H W]: float32 [B H W 3], whole numbers in 0..255."""
    scale, shift = (torch.tensor(x, device=images.device)[:, None, None] for x in (STD, MEAN))
    return ((images * scale + shift) * 255).round().clamp(0, 255).movedim(1, -1).contiguous()


def collate(samples: list[Sample]) -> Batch:
    """Samples of one size -> a batch."""
    targets = [s.target for s in samples if s.target is not None]
    places = [s.place for s in samples if s.place is not None]
    return Batch(
        images=torch.stack([s.image for s in samples]),
        tags=torch.stack([s.tags for s in samples]),
        index=torch.tensor([s.index for s in samples]),
        valid=torch.stack([s.valid for s in samples]),
        side={name: torch.stack([s.side[name] for s in samples]) for name in samples[0].side},
        target=torch.stack(targets) if targets else None,
        place=torch.stack(places) if places else None,
    )


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear for images, the pixel under the centre for masks (torchvision's rule for masks is half a pixel off)."""
    if isinstance(x, tv_tensors.Mask):
        nearest = F.interpolate(x.as_subclass(Tensor)[None].float(), size=size, mode="nearest-exact")[0]
        resized: Tensor = tv_tensors.Mask(nearest.to(x.dtype))
    else:
        resized = tf.resize(x, list(size), antialias=True)
    return resized


def _integer(low: int, high: int) -> int:
    """A random integer in low..high, both included."""
    return int(torch.randint(low, high + 1, ()))
