"""Where a crop lies in its image. The oracle is an image of coordinates, and bilinear sampling written as a loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_augment import SIZES, crops

from tag2mask.core import Batch
from tag2mask.data.augment import Sample, collate
from tag2mask.ops.place import into_crop, inverse, onto_image, whole

MOVES = [{"flip": False}, {}, {"rotate": True}]


def centres(count):
    """Normalised coordinates of the centres of `count` cells."""
    return (2 * torch.arange(count, dtype=torch.float64) + 1) / count - 1


def some_places(count, seed=0):
    """Places as the augmentation makes them: turned by quarters, mirrored, cut and padded."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.zeros(count, 2, 3, dtype=torch.float64)
    for b in range(count):
        scale, shift = (torch.rand(2, generator=draw, dtype=torch.float64) for _ in range(2))
        places[b, :, 2] = shift - 0.5
        mirror = 1 - 2 * torch.randint(0, 2, (2,), generator=draw)
        rows = (1, 0) if b % 2 else (0, 1)
        for column, row in enumerate(rows):
            places[b, row, column] = mirror[column] * (0.4 + 2 * scale[column])
    return places


def loop_warp(maps, place, size):
    """One value after the other: where the cell lies in `maps`, and the four cells around."""
    images, channels, height, width = maps.shape
    values, inside = torch.zeros(images, channels, *size, dtype=maps.dtype), torch.zeros(images, 1, *size)
    for b in range(images):
        for i in range(size[0]):
            for j in range(size[1]):
                u = (2 * j + 1) / size[1] - 1, (2 * i + 1) / size[0] - 1
                x, y = (float(place[b, r, 0] * u[0] + place[b, r, 1] * u[1] + place[b, r, 2]) for r in (0, 1))
                if abs(x) > 1 or abs(y) > 1:
                    continue
                inside[b, 0, i, j] = 1
                column, row = ((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2
                for dy in (0, 1):
                    for dx in (0, 1):
                        r, c = math.floor(row) + dy, math.floor(column) + dx
                        weight = (1 - abs(row - r)) * (1 - abs(column - c))
                        values[b, :, i, j] += weight * maps[b, :, min(max(r, 0), height - 1), min(max(c, 0), width - 1)]
    return values, inside


class TestPlaceOfACrop:
    @pytest.mark.parametrize("long", [(24, 48), (8, 20), (100, 160)])
    @pytest.mark.parametrize("moves", MOVES, ids=str)
    def test_every_pixel_of_the_image_is_where_the_place_says(self, long, moves):
        checked = 0
        for index, epoch in [(i, e) for i in range(len(SIZES)) for e in range(4)]:
            height, width = SIZES[index]
            sample = crops(long=long, **moves)[epoch, index]
            x, y, inside = sample.side["x"][0], sample.side["y"][0], sample.valid[0] == 1
            scale = max(1.0, max(height, width) / min(long))  # at the image's border its last pixel is repeated
            sure = inside & (x > 1.5 * scale) & (x < width - 1.5 * scale)
            sure &= (y > 1.5 * scale) & (y < height - 1.5 * scale)
            at = torch.stack([2 * x / width - 1, 2 * y / height - 1])
            found = torch.einsum("rc,cij->rij", sample.place[:, :2], at) + sample.place[:, 2, None, None]
            here = torch.stack(torch.meshgrid(centres(32), centres(32), indexing="xy")).float()
            # A smaller image mixes pixels, not quite symmetrically: a tenth of a pixel of the crop.
            assert torch.allclose(found[:, sure], here[:, sure], atol=1e-4 if long[0] == 100 else 0.1 / 16)
            checked += int(sure.sum())
        assert checked > 400

    @pytest.mark.parametrize("moves", MOVES, ids=str)
    @pytest.mark.parametrize("index", range(len(SIZES)))
    def test_a_padded_image_fills_the_rectangle_that_is_valid(self, index, moves):
        for epoch in range(6):
            sample = crops(long=(16, 24), **moves)[epoch, index]
            rows, columns = (sample.valid[0] == 1).nonzero(as_tuple=True)
            corners = sample.place[:, :2] @ torch.tensor([[-1.0, 1], [-1, 1]]) + sample.place[:, 2:]
            edges = (corners.sort(dim=1)[0] + 1) * 16
            expected = [[columns.min(), columns.max() + 1], [rows.min(), rows.max() + 1]]
            assert torch.allclose(edges, torch.tensor(expected, dtype=torch.float32), atol=1e-4)

    @pytest.mark.parametrize("moves", MOVES, ids=str)
    def test_a_crop_of_coordinates_becomes_the_image_of_coordinates(self, moves):
        """Coordinates in the crop, brought onto the image, are what the image has there; and the other way round."""
        seen = 0
        for index, epoch in [(i, e) for i in range(3) for e in range(6)]:
            height, width = SIZES[index]
            sample = crops(long=(60, 80), **moves)[epoch, index]
            shown = torch.stack([sample.side["x"][0], sample.side["y"][0]])[None]
            size = height, width
            truth = torch.stack(torch.meshgrid(*(torch.arange(n) + 0.5 for n in (width, height)), indexing="xy"))
            found, inside = onto_image(shown, sample.place[None], size)
            ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            corners = onto_image(torch.ones(1, 1, 32, 32), sample.place[None] * 1.08, size)[1][0, 0]
            sure = inside[0, 0] & corners & (xs > 2) & (xs < width - 3) & (ys > 2) & (ys < height - 3)
            assert torch.allclose(found[0][:, sure], truth[:, sure], atol=1e-2)
            assert not found[0][:, ~inside[0, 0]].any()
            seen += int(sure.sum())

            back, there = into_crop(truth[None], sample.place[None], (32, 32))
            assert torch.equal(there[0, 0], sample.valid[0] == 1)
            close = (back[0] - shown[0]).abs().amax(dim=0) < 1e-3
            x, y = shown[0]
            border = (x < 3) | (x > width - 3) | (y < 3) | (y > height - 3)
            assert (close | border | ~there[0, 0]).all()
        assert seen > 2000

    def test_the_place_is_drawn_like_the_crop(self):
        settings = {"long": (24, 48), "rotate": True}
        places = [crops(**settings)[epoch, 0].place for epoch in range(8)]
        assert all(torch.equal(crops(**settings)[epoch, 0].place, places[epoch]) for epoch in range(8))
        assert len({tuple(p.flatten().tolist()) for p in places}) == 8
        assert places[0].dtype == torch.float32


class TestBatch:
    def sample(self, place):
        return Sample(torch.zeros(3, 8, 8), torch.zeros(2), 0, torch.ones(1, 8, 8), {}, None, place)

    def test_collate_stacks_places(self):
        batch = collate([crops()[0, index] for index in (4, 0)])
        assert torch.equal(batch.place, torch.stack([crops()[0, index].place for index in (4, 0)]))
        assert type(batch.place) is torch.Tensor and batch.place.dtype == torch.float32

    def test_samples_without_a_place_make_a_batch_without(self):
        assert collate([self.sample(None), self.sample(None)]).place is None

    def test_it_moves_with_the_batch(self):
        batch = collate([self.sample(torch.eye(2, 3))])
        assert batch.to(torch.device("meta")).place.device.type == "meta"
        assert Batch(batch.images, batch.tags, batch.index, batch.valid).to(torch.device("cpu")).place is None


class TestMaps:
    @pytest.mark.parametrize("size", [(7, 5), (1, 1), (12, 9)])
    @pytest.mark.parametrize("grid", [(6, 8), (1, 3)])
    def test_against_a_loop(self, size, grid):
        places = some_places(6)
        maps = torch.randn(6, 2, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found, inside = onto_image(maps, places, size)
        expected, there = loop_warp(maps, places, size)
        assert torch.allclose(found, expected, atol=1e-10)
        assert torch.equal(inside, there == 1)

        found, inside = into_crop(maps, places, size)
        square = torch.cat([places, torch.tensor([0.0, 0, 1]).expand(6, 1, 3)], dim=1)
        expected, there = loop_warp(maps, torch.linalg.inv(square)[:, :2], size)
        assert torch.allclose(found, expected, atol=1e-10)
        assert torch.equal(inside, there == 1)
        if size == (12, 9):
            assert 0 < there.mean() < 1

    def test_the_gradient_reaches_the_maps(self):
        maps = torch.randn(4, 1, 5, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: onto_image(x, some_places(4), (6, 7))[0], maps)

    def test_there_and_back(self):
        places = some_places(5)
        assert torch.allclose(inverse(inverse(places)), places, atol=1e-12)

    def test_a_whole_image_is_merely_resized(self):
        maps = torch.randn(2, 3, 6, 9)
        for warp in (onto_image, into_crop):
            found, inside = warp(maps, whole(maps), (11, 5))
            expected = F.interpolate(maps, size=(11, 5), mode="bilinear", align_corners=False)
            assert torch.allclose(found, expected, atol=1e-5)
            assert inside.all()

    def test_a_mirrored_crop_is_mirrored_back_exactly(self):
        maps = torch.rand(1, 2, 6, 6)
        mirror = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])
        assert torch.allclose(onto_image(maps.flip(-1), mirror, (6, 6))[0], maps, atol=1e-6)
