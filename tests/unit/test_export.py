"""The palette, mask files and pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tag2mask.data import index_png
from tag2mask.export import colourise, heatmap, overlay, palette, voc_palette, write_mask


class TestPalette:
    @pytest.mark.parametrize(
        ("index", "colour"),
        [
            (0, (0, 0, 0)),
            (1, (128, 0, 0)),
            (2, (0, 128, 0)),
            (4, (0, 0, 128)),
            (8, (64, 0, 0)),
            (15, (192, 128, 128)),
            (20, (0, 64, 128)),
            (255, (224, 224, 192)),
        ],
    )
    def test_known_colours(self, index, colour):
        assert tuple(voc_palette()[index]) == colour

    def test_all_colours_differ(self):
        assert len({tuple(c) for c in voc_palette()}) == 256

    def test_equals_the_bit_loop(self):
        for index in range(256):
            rest, colour = index, [0, 0, 0]
            for place in range(7, -1, -1):
                for channel in range(3):
                    colour[channel] |= ((rest >> channel) & 1) << place
                rest >>= 3
            assert list(voc_palette()[index]) == colour


class TestWriteMask:
    def test_round_trip_keeps_values_and_palette(self, tmp_path):
        mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
        path = tmp_path / "sub" / "a.b" / "mask.png"
        write_mask(path, mask)
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.mode == "P"
            np.testing.assert_array_equal(np.asarray(picture), mask)
            np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), voc_palette()[mask])
        assert [file.name for file in path.parent.iterdir()] == ["mask.png"]

    def test_few_values_and_non_contiguous_memory(self, tmp_path):
        mask = np.zeros((6, 8), np.uint8)
        mask[1:3, 2:5], mask[4] = 2, 255
        write_mask(tmp_path / "m.png", mask.T)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "m.png")), mask.T)

    def test_a_failed_write_leaves_the_old_file_and_no_litter(self, tmp_path, monkeypatch):
        path = tmp_path / "m.png"
        write_mask(path, np.full((2, 2), 3, np.uint8))

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(index_png.Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_mask(path, np.zeros((2, 2), np.uint8))
        monkeypatch.undo()
        assert list(tmp_path.iterdir()) == [path]
        assert (np.asarray(Image.open(path)) == 3).all()

    @pytest.mark.parametrize("mask", [np.zeros((2, 2), np.int64), np.zeros((2, 2, 3), np.uint8)])
    def test_wrong_masks_are_refused(self, tmp_path, mask):
        with pytest.raises(ValueError, match="uint8 mask"):
            write_mask(tmp_path / "m.png", mask)


class TestPictures:
    image = np.random.default_rng(0).integers(0, 256, (8, 10, 3)).astype(np.uint8)

    def test_overlay_paints_classes_only(self):
        mask = np.zeros((8, 10), np.uint8)
        mask[2:4] = 1
        painted = overlay(self.image, mask, alpha=0.5)
        np.testing.assert_array_equal(painted[mask == 0], self.image[mask == 0])
        expected = self.image[mask == 1] * 0.5 + np.array([64, 0, 0])
        np.testing.assert_allclose(painted[mask == 1], expected, atol=0.51)
        np.testing.assert_array_equal(overlay(self.image, mask, alpha=1.0)[2], colourise(mask)[2])
        np.testing.assert_array_equal(overlay(self.image, mask, alpha=0.0), self.image)

    def test_heatmap_resizes_and_shows_the_image_where_nothing_was_found(self):
        score = np.zeros((4, 5), np.float16)
        score[0, 0] = 1
        warm = heatmap(self.image, score, alpha=1.0)
        assert warm.shape == self.image.shape
        assert warm.dtype == np.uint8
        np.testing.assert_array_equal(warm[0, 0], palette.heat_colours(np.ones(1))[0])
        grey = np.asarray(Image.fromarray(self.image).convert("L"))
        np.testing.assert_array_equal(warm[-1, -1], [grey[-1, -1]] * 3)

    def test_lightness_of_the_heat_colours_rises(self):
        colours = palette.heat_colours(np.linspace(0, 1, 50)).astype(float)
        lightness = colours @ [0.2126, 0.7152, 0.0722]
        assert (np.diff(lightness) > 0).all()

    def test_wrong_shapes_are_refused(self):
        with pytest.raises(ValueError, match="fit"):
            overlay(self.image, np.zeros((3, 3), np.uint8))
        with pytest.raises(ValueError, match="H W 3"):
            heatmap(self.image[..., 0], np.zeros((4, 5)))
