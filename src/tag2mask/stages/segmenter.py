"""A trained segmenter as an object: photos in, masks out; from the folder of a stage or from an ONNX file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from PIL import ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tag2mask.data.augment import normalise, pixels_of
from tag2mask.data.images import Undecodable, read_image, rgb
from tag2mask.data.source import Image, Mask
from tag2mask.errors import UserError
from tag2mask.pipeline import read_json
from tag2mask.refine.crf import PRESETS, dense_crf
from tag2mask.schema import make
from tag2mask.segment import SEGMENTERS, DeepLab
from tag2mask.segment import predict as probabilities
from tag2mask.segment.onnx_model import OnnxModel
from tag2mask.stages.classify import MODEL, WEIGHTS, without_weights
from tag2mask.stages.crf import Preset

LEAST = 1e-5  # what a probability counts at least in a CRF
Photo: TypeAlias = "str | Path | PIL.Image.Image | NDArray[np.uint8]"


class ImageSegmenter(ABC):
    """What makes masks of photos: `mask = segmenter(photo)`.

    classes: the names of the mask values 1..K; 0 is background. A photo is a path, a PIL image, or an array uint8
    [H W 3] (RGB) or [H W] (grey).
    """

    classes: tuple[str, ...]
    device = torch.device("cpu")

    @abstractmethod
    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities [B 1+K H W], background first, of normalised images [B 3 H W], on their device."""

    def to(self, device: torch.device) -> None:
        """Compute on this device."""
        self.device = device

    def refined(self, images: Tensor, crf: Preset | None) -> Tensor:
        """`probabilities`, with the preset of a dense CRF over them."""
        found = self.probabilities(images)
        if crf is not None:
            found = dense_crf(pixels_of(images), -found.clamp(min=LEAST).log(), **PRESETS[crf])
        return found

    def scores(self, photo: Photo, *, crf: Preset | None = None) -> NDArray[np.float32]:
        """Probabilities [1+K H W] of a photo, background first; they sum to 1 in every pixel.

        crf: a dense CRF over them, such as "deeplab". A photo with an EXIF rotation is turned upright first.
        Raises UserError for what is no photo.
        """
        found: NDArray[np.float32] = self._of(photo, crf).cpu().numpy()
        return found

    def __call__(self, photo: Photo, *, crf: Preset | None = None) -> Mask:
        """The index mask [H W] uint8 of a photo: 0 background, 1..K the classes. For the rest see `scores`."""
        mask: Mask = self._of(photo, crf).argmax(dim=0).to(torch.uint8).cpu().numpy()
        return mask

    def _of(self, photo: Photo, crf: Preset | None) -> Tensor:
        pixels = torch.from_numpy(_pixels(photo)).permute(2, 0, 1)[None]
        return self.refined(normalise(pixels).to(self.device), crf)[0]


class Segmenter(ImageSegmenter):
    """A trained network with what is needed to apply it: classes, scales, flip."""

    def __init__(self, net: DeepLab, classes: tuple[str, ...], scales: Sequence[float], flip: bool) -> None:
        self.net, self.classes, self.scales, self.flip = net, classes, tuple(scales), flip

    def to(self, device: torch.device) -> None:
        """Compute on this device; the network is moved there."""
        super().to(device)
        self.net.to(device)

    def probabilities(self, images: Tensor) -> Tensor:
        """See ImageSegmenter."""
        return probabilities(self.net, images, scales=self.scales, flip=self.flip)


class OnnxSegmenter(ImageSegmenter):
    """A segmenter in an ONNX file; its scales are in the graph. It computes on the CPU, whatever the device."""

    def __init__(self, model: OnnxModel) -> None:
        self.model, self.classes = model, model.classes

    def probabilities(self, images: Tensor) -> Tensor:
        """See ImageSegmenter."""
        pixels = pixels_of(images).movedim(-1, 1).to(torch.uint8).cpu().numpy()
        return torch.from_numpy(np.concatenate([self.model.scores(one[None]) for one in pixels])).to(images.device)


def load_segmenter(folder: Path) -> Segmenter:
    """Read the folder of a segment stage. Raises UserError if it is not one."""
    try:
        model: dict[str, Any] = read_json(folder / MODEL)
        net = make(SEGMENTERS[model["net"]["name"]], without_weights(model["net"]), num_classes=len(model["classes"]))
        net.load_state_dict(load_file(folder / WEIGHTS))
        return Segmenter(net.eval(), tuple(model["classes"]), model["scales"], model["flip"])
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{folder}: not the folder of a trained segmenter, or a damaged one ({reason})") from None


def _pixels(photo: Photo) -> Image:
    if isinstance(photo, str | Path):
        return read_image(Path(photo))
    if isinstance(photo, PIL.Image.Image):
        try:
            return rgb(ImageOps.exif_transpose(photo))
        except Undecodable as reason:
            raise UserError(f"the image {reason}") from None
    array = np.asarray(photo)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or not array.size:
        raise UserError(
            "a photo must be a path, a PIL image, or a uint8 array [H W 3] (RGB) or [H W] (grey), "
            f"not {array.dtype} {list(array.shape)}"
        )
    return np.ascontiguousarray(array if array.ndim == 3 else np.stack([array] * 3, axis=-1))
