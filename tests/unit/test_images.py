"""Photos, masks and grey maps of every kind that people have, and the messages for those that cannot be read."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from PIL import TiffImagePlugin

from tag2mask.data.images import ENDINGS, luma, read_grey, read_image, read_mask
from tag2mask.errors import UserError

rng = np.random.default_rng(0)
PHOTO = rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(40)[:, None] * 5, np.arange(56) * 4, 90), -1).astype(np.uint8)
GREY16 = np.linspace(0, 65535, 12 * 10).round().astype(np.uint16).reshape(12, 10)


def save(path, array, **options):
    PIL.Image.fromarray(array).save(path, **options)
    return path


def test_every_ending_that_is_promised_is_read(tmp_path):
    for ending in ENDINGS:
        kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".tif": "TIFF"}.get(ending, ending[1:].upper())
        image = read_image(save(tmp_path / f"x{ending.upper()}", SMOOTH, format=kind))
        assert image.shape == SMOOTH.shape and image.dtype == np.uint8 and image.flags.writeable
        assert np.abs(image.astype(int) - SMOOTH).mean() < 4


@pytest.mark.parametrize(
    "name, options",
    [
        ("x.png", {}),
        ("x.bmp", {}),
        ("x.tif", {}),
        ("x.webp", {"lossless": True}),
        ("y.tif", {"compression": "tiff_lzw"}),
    ],
)
def test_lossless_formats_are_exact(tmp_path, name, options):
    np.testing.assert_array_equal(read_image(save(tmp_path / name, PHOTO, **options)), PHOTO)


def test_grey_and_bilevel_become_three_equal_channels(tmp_path):
    grey = PHOTO[:, :, 0]
    np.testing.assert_array_equal(read_image(save(tmp_path / "g.png", grey)), np.stack([grey] * 3, -1))
    two = grey > 99
    np.testing.assert_array_equal(read_image(save(tmp_path / "b.png", two)), np.stack([two * np.uint8(255)] * 3, -1))


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_16_bit_grey_is_divided_by_257_whatever_the_file_holds(tmp_path, name):
    expected = np.stack([np.round(GREY16 / 257)] * 3, -1)
    np.testing.assert_array_equal(read_image(save(tmp_path / name, GREY16)), expected)
    dark = read_image(save(tmp_path / f"dark-{name}", GREY16 // 16))  # 12 bits in a 16-bit file
    assert dark.max() == round(4095 / 257)


def test_big_endian_16_bit_tiff(tmp_path):
    path = tmp_path / "x.tif"
    PIL.Image.frombytes("I;16B", (10, 12), GREY16.astype(">u2").tobytes()).save(path)
    np.testing.assert_array_equal(read_image(path)[:, :, 1], np.round(GREY16 / 257))


def test_12_bit_tiff_is_scaled_by_its_own_range(tmp_path):
    values = [0, 4095, 2048, 1, 16, 4094, 100, 200]
    pixels = int("".join(f"{value:012b}" for value in values), 2).to_bytes(12, "big")
    entries = {256: 4, 257: 2, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: 2, 279: len(pixels)}
    entries[273] = start = 8 + 2 + 12 * len(entries) + 4
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items()) + b"\0" * 4
    assert len(head + body) == start
    (tmp_path / "x.tif").write_bytes(head + body + pixels)
    expected = np.array(values).reshape(2, 4) / 4095 * 255
    np.testing.assert_allclose(read_image(tmp_path / "x.tif")[:, :, 0], expected, atol=0.51)


def test_16_bit_colour_keeps_its_high_byte(tmp_path):
    deep = np.repeat(GREY16[:, :, None], 3, axis=2)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", 10, 12, 16, 2, 0, 0, 0)
    (tmp_path / "x.png").write_bytes(png((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), deep >> 8)


def test_transparency_is_laid_on_white(tmp_path):
    alpha = rng.integers(0, 256, (13, 17, 1), dtype=np.uint8)
    path = save(tmp_path / "x.png", np.concatenate([PHOTO, alpha], -1))
    expected = PHOTO * (alpha / 255) + 255 * (1 - alpha / 255)
    np.testing.assert_allclose(read_image(path), expected, atol=1)
    path = save(tmp_path / "la.png", np.concatenate([PHOTO[:, :, :1], alpha], -1))
    np.testing.assert_allclose(read_image(path)[:, :, 2], expected[:, :, 0], atol=1)


def test_palette_with_and_without_transparency(tmp_path):
    index = rng.integers(0, 3, (6, 7), dtype=np.uint8)
    colours = np.array([[10, 20, 30], [200, 100, 0], [0, 0, 250]], dtype=np.uint8)
    picture = PIL.Image.fromarray(index)
    picture.putpalette(colours.tobytes())
    picture.save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), colours[index])
    picture.save(tmp_path / "t.png", transparency=1)
    colours[1] = 255
    np.testing.assert_array_equal(read_image(tmp_path / "t.png"), colours[index])


def test_cmyk(tmp_path):
    PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif")[0, 0], [255, 0, 0])
    PIL.Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "x.jpg", quality=95)
    np.testing.assert_allclose(read_image(tmp_path / "x.jpg")[0, 0], [0, 255, 255], atol=4)


def upright(array, orientation):
    """What a viewer shows for stored pixels: EXIF says where the 0th row and the 0th column of the scene lie."""
    return {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[:, ::-1],
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }[orientation](array)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "x.png", PHOTO, exif=exif)
    np.testing.assert_array_equal(read_image(path), upright(PHOTO, orientation))
    jpeg = read_image(save(tmp_path / "x.jpg", SMOOTH, exif=exif, quality=95, subsampling=0))
    np.testing.assert_allclose(jpeg.astype(int), upright(SMOOTH, orientation), atol=6)
    mask = PHOTO[:, :, 0] % 4
    tiff = TiffImagePlugin.ImageFileDirectory_v2()
    tiff[0x0112] = orientation
    np.testing.assert_array_equal(
        read_mask(save(tmp_path / "m.tif", mask, tiffinfo=tiff), 3), upright(mask, orientation)
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03"])
def test_broken_exif_does_not_matter(tmp_path, exif):
    assert read_image(save(tmp_path / "x.jpg", SMOOTH, exif=exif)).shape == SMOOTH.shape


def png(*chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def encoded(kind, array=PHOTO):
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "empty"),
        (b"hello", "is not a JPEG, PNG, WebP, TIFF or BMP"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 50, "HEIC"),
        (encoded("GIF"), "is not a JPEG, PNG, WebP, TIFF or BMP"),
        (encoded("JPEG")[:-40], "truncated"),
        (encoded("JPEG", np.tile(PHOTO, (9, 9, 1)))[:2000], "truncated"),
        (encoded("PNG")[:-200], "truncated"),
        (encoded("BMP")[:-200], "truncated"),
        (encoded("TIFF")[:-200], "truncated"),
        (encoded("WEBP")[:-200], "is not a JPEG|truncated"),
        (encoded("TIFF", np.ones((5, 5), np.float32)), "float"),
        (encoded("TIFF", np.ones((5, 5), np.int32)), "32-bit"),
        (png((b"IHDR", struct.pack(">IIBBBBB", 50000, 50000, 8, 0, 0, 0, 0)), (b"IEND", b"")), "tiles"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(tmp_path, data, said):
    path = tmp_path / "some.jpg"
    path.write_bytes(data)
    with pytest.raises(UserError, match=said) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    with pytest.raises(UserError, match=said):
        read_grey(path, 5, 5)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_between_one_and_two_times_the_limit_is_too_large_as_well(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", PHOTO)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 13 * 17)
    read_image(path)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 13 * 17 - 1)
    with pytest.raises(UserError, match="17 x 13 pixels, more than 220"):
        read_image(path)


def test_a_missing_file_is_named(tmp_path):
    for read in (read_image, lambda path: read_mask(path, 2), lambda path: read_grey(path, 2, 2)):
        with pytest.raises(UserError, match=r"nowhere\.png: cannot be opened"):
            read(tmp_path / "nowhere.png")


MASK = np.array([[0, 1, 2], [3, 255, 0]], dtype=np.uint8)


def test_masks_are_read_by_index(tmp_path):
    np.testing.assert_array_equal(read_mask(save(tmp_path / "l.png", MASK), 3), MASK)
    picture = PIL.Image.fromarray(MASK)
    picture.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    picture.save(tmp_path / "p.png")
    assert PIL.Image.open(tmp_path / "p.png").mode == "P"
    np.testing.assert_array_equal(read_mask(tmp_path / "p.png", 3), MASK)
    two = read_mask(save(tmp_path / "1.png", MASK > 1), 3)
    np.testing.assert_array_equal(two, MASK > 1)
    deep = read_mask(save(tmp_path / "16.png", MASK.astype(np.uint16)), 3)
    np.testing.assert_array_equal(deep, MASK)
    assert two.dtype == deep.dtype == np.uint8


@pytest.mark.parametrize(
    "array, name, said",
    [
        (np.stack([MASK] * 3, -1), "m.png", "is a colour picture .mode RGB."),
        (MASK, "m.jpg", "is a JPEG"),
        (MASK * 3, "m.png", r"holds the values 6, 9, 253, which are no class"),
        (MASK + 1, "m.png", r"holds the value 4, which is no class"),
        (MASK.astype(np.uint16) * 300, "m.png", "300, 600, 900, 10964"),
        (np.arange(256, dtype=np.uint8)[None], "m.png", "4, 5, 6, 7, 8, 9, 10, 11 and 243 more"),
    ],
)
def test_wrong_masks_are_named_with_values_and_remedy(tmp_path, array, name, said):
    with pytest.raises(UserError, match=said) as error:
        read_mask(save(tmp_path / name, array), 3)
    assert str(error.value).startswith(str(tmp_path / name))
    assert "index PNG: 0 for background, 1..3 for the classes in order, 255" in str(error.value)


def test_grey_maps_are_0_to_1_and_take_the_size_of_the_image(tmp_path):
    eight = save(tmp_path / "8.png", PHOTO[:, :, 0])
    np.testing.assert_allclose(read_grey(eight, 13, 17), PHOTO[:, :, 0] / 255, atol=1e-6)
    deep = read_grey(save(tmp_path / "16.png", GREY16), 12, 10)
    np.testing.assert_allclose(deep, GREY16 / 65535, atol=1e-6)
    ramp = save(tmp_path / "ramp.png", np.array([[0, 255]], dtype=np.uint8))
    np.testing.assert_allclose(read_grey(ramp, 2, 4), [[0, 0.25, 0.75, 1]] * 2, atol=1e-6)  # pixel centres
    assert read_grey(ramp, 2, 4).dtype == deep.dtype == np.float32


def test_luma():
    np.testing.assert_allclose(luma(np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8)), [[0.299, 0.587]], atol=1e-6)
