"""Reads photos, index masks and grey maps from disk, whatever a camera, a microscope or an office program wrote."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL import ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from tag2mask.data.source import IGNORE, Image, Mask
from tag2mask.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp")  # compared in lower case
MASK_ENDINGS = (".png", ".tif", ".tiff", ".bmp")  # what keeps every value as it was written
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")


class Undecodable(Exception):
    """Why some bytes are not the picture that was asked for, as half a sentence for a person."""


def read_image(path: Path) -> Image:
    """A photo as [H W 3] RGB uint8, upright: its EXIF rotation is applied.

    Grey becomes three equal channels. Transparency is laid on white. 16-bit grey is divided by 257, so that the
    range of the type, not of this file, becomes 0..255: the same grey is the same number in every file, and 12-bit
    data in a 16-bit file comes out nearly black (`Folder.check` reports that). A TIFF that says it has 12 bits is
    divided by its own range. 16-bit colour keeps its high byte. CMYK is converted without its colour profile, and
    so is everything else. Of several pages or frames the first is read.
    Raises UserError for a missing or damaged file, floats, 32-bit integers, unknown colour modes, or a picture larger
    than Pillow's limit (about 89 million pixels).
    """
    try:
        return rgb(decode(_bytes(path)))
    except Undecodable as reason:
        raise UserError(f"{path}: {reason}. Replace or remove the file.") from None


def read_mask(path: Path, num_classes: int) -> Mask:
    """An index mask as [H W] uint8: 0 background, 1..num_classes, 255 ignore. EXIF rotation is applied as for a photo.

    A palette (mode P) is read by index, grey (8 or 16 bits) by value, a bilevel picture as 0 and 1.
    Raises UserError for a damaged file, a colour picture, a JPEG, or a value that is none of the above.
    """
    try:
        values = indices(decode(_bytes(path)))
        wrong = wrong_values(np.unique(values).tolist(), num_classes)
    except Undecodable as reason:
        raise UserError(f"{path}: {reason}; {mask_remedy(num_classes)}.") from None
    if wrong:
        raise UserError(f"{path}: {wrong}; {mask_remedy(num_classes)}.")
    return values.astype(np.uint8)


def read_grey(path: Path, height: int, width: int) -> NDArray[np.float32]:
    """A grey map (e.g. saliency) as [height width] float32 in 0..1, resized bilinearly where its size differs.

    Colour is turned into luma. Raises UserError for what `read_image` refuses.
    """
    try:
        picture = decode(_bytes(path))
        grey = grey16(picture) / np.float32(65535) if _is_16_bit(picture) else luma(rgb(picture))
    except Undecodable as reason:
        raise UserError(f"{path}: {reason}. Replace or remove the file.") from None
    if grey.shape != (height, width):
        resized = PIL.Image.fromarray(grey).resize((width, height), PIL.Image.Resampling.BILINEAR)
        grey = np.clip(np.asarray(resized), 0, 1)
    return np.asarray(grey, dtype=np.float32)


def decode(data: bytes) -> PIL.Image.Image:
    """The first picture in a file's bytes, fully decoded and upright, in the mode it was stored in."""
    if not data:
        raise Undecodable("the file is empty (0 bytes)")
    try:
        picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        limit = PIL.Image.MAX_IMAGE_PIXELS
        if limit is not None and picture.width * picture.height > limit:
            raise Undecodable(f"is {picture.width} x {picture.height} pixels, more than {limit}: {_TOO_LARGE}")
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
    except Undecodable:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise Undecodable(f"has more than {PIL.Image.MAX_IMAGE_PIXELS} pixels: {_TOO_LARGE}") from None
    except PIL.UnidentifiedImageError:
        kind = "a HEIC or AVIF" if data[4:8] == b"ftyp" else "damaged at its start or of another"
        raise Undecodable(f"is not a JPEG, PNG, WebP, TIFF or BMP that can be read ({kind} file)") from None
    except MemoryError:
        raise
    except Exception as reason:  # on damaged bytes the decoders raise whatever they stumble over
        raise Undecodable(f"is truncated or damaged ({reason})") from reason
    return picture


def rgb(picture: PIL.Image.Image) -> Image:
    """[H W 3] uint8 of a decoded picture; see `read_image`."""
    if _is_16_bit(picture):
        grey = ((grey16(picture).astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.stack([grey] * 3, axis=-1)
    if picture.mode in ("I", "F"):
        what = "float" if picture.mode == "F" else "32-bit or signed"
        raise Undecodable(f"holds {what} values, of which nobody knows the range: save it with 8 or 16 bits")
    try:
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
        return np.array(picture.convert("RGB"))
    except ValueError:
        raise Undecodable(f"has the colour mode {picture.mode}, which is not read: save it as RGB") from None


def grey16(picture: PIL.Image.Image) -> NDArray[np.uint16]:
    """[H W] of a grey picture with 9 to 16 bits, stretched from the bits that its file declares to 0..65535."""
    bits = picture.tag_v2.get(258, (16,))[0] if isinstance(picture, TiffImageFile) else 16
    values = np.asarray(picture).astype(np.uint32)
    return np.asarray(values * 65535 // (2**bits - 1), dtype=np.uint16)


def luma(image: Image) -> NDArray[np.float32]:
    """[H W] in 0..1 from [H W 3] RGB, weights 0.299, 0.587, 0.114 (ITU-R BT.601)."""
    return np.asarray(image @ np.array([0.299, 0.587, 0.114]) / 255, dtype=np.float32)


def indices(picture: PIL.Image.Image) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """[H W] stored numbers of a decoded mask, not looked up in its palette."""
    if picture.format == "JPEG":
        raise Undecodable("is a JPEG, whose compression changes the values of a mask")
    if picture.mode == "1":
        return np.asarray(picture).astype(np.uint8)
    if picture.mode in ("L", "P"):
        return np.array(picture)
    if _is_16_bit(picture):
        return np.asarray(picture).astype(np.uint16)
    raise Undecodable(f"is a colour picture (mode {picture.mode}) where an index mask is needed")


def wrong_values(values: Iterable[int], num_classes: int) -> str:
    """What is wrong with the values found in a mask, "" if nothing is."""
    wrong = [str(value) for value in values if value > num_classes and value != IGNORE]
    if not wrong:
        return ""
    listed = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
    return f"holds the value{'s' * (len(wrong) > 1)} {listed}, which {'are' if len(wrong) > 1 else 'is'} no class"


def mask_remedy(num_classes: int) -> str:
    """How a mask must be saved, as a sentence without its full stop."""
    classes = "1 for the class" if num_classes == 1 else f"1..{num_classes} for the classes in order"
    return f"save masks as index PNG: 0 for background, {classes}, 255 for pixels to ignore"


_TOO_LARGE = "cut it into tiles or scale it down"


def _is_16_bit(picture: PIL.Image.Image) -> bool:
    return picture.mode.startswith("I;16")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as reason:
        raise Undecodable(f"cannot be opened ({reason.strerror or reason})") from None
