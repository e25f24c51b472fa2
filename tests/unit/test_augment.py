"""Training samples. The oracle is an image of coordinates: each pixel says where it came from."""

import numpy as np
import pytest
import torch

from tag2mask.data.augment import MEAN, STD, Augment, Crops, collate, normalise
from tag2mask.data.source import Samples
from tag2mask.errors import UserError

SIZES = [(40, 60), (60, 40), (37, 37), (11, 90), (5, 3), (1, 1), (1, 50)]
CLASSES = 2


def coordinates(index):
    """(x, y) of the centre of every pixel, in pixels."""
    height, width = SIZES[index]
    y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
    return x, y


def picture(index):
    """Red is twice x, green twice y: exact in 8 bits, for no side is longer than 127."""
    x, y = coordinates(index)
    return np.stack([2 * x, 2 * y, np.full_like(x, 99)], axis=-1).astype(np.uint8)


def stripes(index):
    """A mask with a value for every column and row, 0..250."""
    x, y = coordinates(index)
    return ((x.astype(int) * 7 + y.astype(int) * 13) % 251).astype(np.uint8)


SIDE = {"x": lambda index: coordinates(index)[0], "y": lambda index: coordinates(index)[1]}
SAMPLES = Samples([f"{i}" for i in range(len(SIZES))], np.eye(len(SIZES), CLASSES, dtype=np.uint8), picture, side=SIDE)


def crops(seed=0, side=frozenset(SIDE), target=stripes, **augment):
    settings = {"crop": 32, "long": (24, 48), "jitter": 0.0} | augment
    return Crops(SAMPLES, Augment(**settings), seed=seed, side=side, target=target)


def colours(image):
    """Back from normalised values to 0..255."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (image * std + mean) * 255


def same(one, other):
    return (
        torch.equal(one.image, other.image)
        and torch.equal(one.valid, other.valid)
        and torch.equal(one.target, other.target)
        and all(torch.equal(one.side[name], other.side[name]) for name in SIDE)
    )


class TestJointTransforms:
    @pytest.mark.parametrize("long", [(24, 48), (8, 20), (100, 160)])
    @pytest.mark.parametrize("moves", [{}, {"flip": False}, {"rotate": True}])
    def test_every_part_comes_from_the_same_place(self, long, moves):
        checked = 0
        for index, epoch in [(i, e) for i in range(len(SIZES)) for e in range(4)]:
            height, width = SIZES[index]
            sample = crops(long=long, **moves)[epoch, index]
            x, y, inside = sample.side["x"][0], sample.side["y"][0], sample.valid[0] == 1
            assert sample.image.shape == (3, 32, 32)
            assert sample.target.shape == (32, 32)

            # Colours are twice the coordinates, up to rounding; at borders resizing repeats the last pixel.
            red, green, blue = colours(sample.image)
            assert torch.allclose(red[inside], 2 * x[inside], atol=1.6)
            assert torch.allclose(green[inside], 2 * y[inside], atol=1.6)
            assert torch.allclose(blue[inside], torch.tensor(99.0), atol=0.01)

            # The mask holds the value of the pixel under the centre; left out: centres near a pixel's edge, and what
            # interpolation at the image's border moves.
            scale = max(1.0, max(height, width) / min(long))
            sure = (
                inside & (x > 1.5 * scale) & (x < width - 1.5 * scale) & (y > 1.5 * scale) & (y < height - 1.5 * scale)
            )
            sure &= ((x % 1 - 0.5).abs() < 0.4) & ((y % 1 - 0.5).abs() < 0.4)
            expected = (x.long() * 7 + y.long() * 13) % 251
            assert torch.equal(sample.target[sure], expected[sure])
            checked += int(sure.sum())
        assert checked > 200

    def test_padding_is_marked_everywhere(self):
        found = set()
        for epoch in range(12):
            sample = crops(long=(16, 24), rotate=True)[epoch, 0]
            outside = sample.valid[0] == 0
            assert 0 < outside.sum() < 32 * 32
            assert sample.image[:, outside].eq(0).all()  # the mean colour
            assert sample.target[outside].eq(255).all()
            assert sample.target[~outside].lt(251).all()
            assert all(sample.side[name][0][outside].eq(0).all() for name in SIDE)
            rows, columns = (~outside).nonzero(as_tuple=True)
            box = rows.min().item(), rows.max().item() + 1, columns.min().item(), columns.max().item() + 1
            assert (box[1] - box[0]) * (box[3] - box[2]) == (~outside).sum()  # a full rectangle
            found.add(box)
        assert len(found) > 8  # of many sizes at many places

    def test_without_padding_everything_is_valid(self):
        sample = crops(long=(100, 160))[0, 2]
        assert sample.valid.eq(1).all()
        assert sample.target.lt(251).all()

    def test_the_long_side_is_in_its_range(self):
        lengths = []
        for epoch in range(60):
            rows, columns = crops(crop=64, long=(20, 30))[epoch, 0].valid[0].nonzero(as_tuple=True)
            height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
            lengths.append(width.item())
            assert height.item() == round(40 * width.item() / 60)
        assert set(lengths) == set(range(20, 31))

    def orientations(self, count=160, **moves):
        """How often each of the eight ways to lay down a square occurs: signs of the gradients of x and y."""
        counts = {}
        for epoch in range(count):
            side = crops(long=(64, 64), **moves)[epoch, 2].side
            x, y = side["x"][0], side["y"][0]
            slopes = [v[16 + dy, 16 + dx] - v[16 - dy, 16 - dx] for v in (x, y) for dy, dx in ((0, 4), (4, 0))]
            key = tuple(slope.sign().item() if slope.abs() > 1 else 0 for slope in slopes)
            counts[key] = counts.get(key, 0) + 1
        return counts

    def test_nothing_turns_unless_asked(self):
        assert set(self.orientations(12, flip=False)) == {(1, 0, 0, 1)}

    def test_flips_left_right_half_of_the_time(self):
        counts = self.orientations()
        assert set(counts) == {(1, 0, 0, 1), (-1, 0, 0, 1)}
        assert min(counts.values()) > 50

    def test_turns_into_all_eight_orientations(self):
        counts = self.orientations(rotate=True)
        assert len(counts) == 8
        assert min(counts.values()) > 5


class TestDeterminism:
    def test_a_sample_depends_on_seed_epoch_and_index_alone(self):
        settings = {"jitter": 0.5, "rotate": True}
        places = [(epoch, index) for epoch in range(2) for index in range(len(SIZES))]
        forward = {place: crops(**settings)[place] for place in places}
        dataset = crops(**settings)
        torch.manual_seed(99)
        backward = {place: dataset[place] for place in reversed(places)}
        assert all(same(forward[place], backward[place]) for place in places)

    def test_it_differs_with_each_of_them(self):
        images = [crops(seed=seed)[epoch, 0].image for seed in (0, 1) for epoch in (0, 1)]
        assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])

    def test_nobody_elses_randomness_is_touched(self):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        crops(jitter=0.5, rotate=True)[0, 0]
        assert torch.equal(before, torch.get_rng_state())

    def test_side_maps_and_targets_do_not_change_the_image(self):
        settings = {"jitter": 0.5, "long": (16, 40)}
        alone = crops(side=frozenset(), target=None, **settings)[3, 1]
        with_all = crops(**settings)[3, 1]
        assert torch.equal(alone.image, with_all.image)
        assert torch.equal(alone.valid, with_all.valid)
        assert alone.side == {}
        assert alone.target is None


class TestColours:
    @pytest.mark.parametrize("colours_only", [{"jitter": 0.4}, {"hue": 0.1}, {"jitter": 0.4, "hue": 0.1}])
    def test_jitter_changes_the_image_alone(self, colours_only):
        plain, jittered = (crops(long=(100, 160), **change)[0, 0] for change in ({}, colours_only))
        assert all(torch.equal(plain.side[name], jittered.side[name]) for name in SIDE)
        assert torch.equal(plain.target, jittered.target)
        assert not torch.equal(plain.image, jittered.image)

    def test_the_strongest_jitter_stays_in_range(self):
        for epoch in range(6):
            sample = crops(jitter=1.0, hue=0.5)[epoch, 0]
            found = colours(sample.image)
            assert found.min() > -0.01
            assert found.max() < 255.01

    def test_normalise(self):
        pixels = torch.arange(0, 240, dtype=torch.uint8).view(3, 8, 10)
        found = normalise(pixels)
        for c in range(3):
            expected = (pixels[c].double() / 255 - (0.485, 0.456, 0.406)[c]) / (0.229, 0.224, 0.225)[c]
            assert torch.allclose(found[c].double(), expected, atol=1e-6)
        assert torch.equal(normalise(pixels[None])[0], found)


class TestBatches:
    def test_collate(self):
        dataset = crops()
        samples = [dataset[0, i] for i in (4, 0, 1)]
        batch = collate(samples)
        assert batch.images.shape == (3, 3, 32, 32)
        assert batch.valid.shape == (3, 1, 32, 32)
        assert batch.target.shape == (3, 32, 32)
        assert batch.target.dtype == torch.long
        assert batch.index.tolist() == [4, 0, 1]
        assert batch.tags.tolist() == [[0, 0], [1, 0], [0, 1]]
        assert batch.tags.dtype == batch.images.dtype == batch.side["x"].dtype == torch.float32
        assert torch.equal(batch.side["y"][2], samples[2].side["y"])
        assert {type(x) for x in (batch.images, batch.valid, batch.target, batch.side["x"])} == {torch.Tensor}

    def test_without_targets_and_side_maps(self):
        batch = collate([crops(side=frozenset(), target=None)[0, 0]])
        assert batch.target is None
        assert batch.side == {}

    def test_length(self):
        assert len(crops()) == len(SIZES)


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ({"crop": 7}, "crop must be at least 8"),
        ({"long": (7, 20)}, "long must be"),
        ({"long": (30, 20)}, "long must be"),
        ({"jitter": -0.1}, "jitter must be in 0..1"),
        ({"jitter": 1.1}, "jitter must be in 0..1"),
        ({"jitter": float("nan")}, "jitter must be in 0..1"),
        ({"hue": 0.6}, "hue must be in 0..0.5"),
        ({"hue": -0.1}, "hue must be in 0..0.5"),
    ],
)
def test_faults(faulty, message):
    with pytest.raises(UserError, match=message):
        Augment(**faulty)
