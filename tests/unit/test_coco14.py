"""COCO 2014 as it lies on disk: classes without gaps, tags, masks drawn once, and one line for whatever is missing."""

import json
import re
import shutil

import numpy as np
import PIL.Image
import pytest
from miniature import COCO_CATEGORIES, draw_coco, run_lengths
from pycocotools import mask as coco

from tag2mask.data import coco_annotations
from tag2mask.data.coco14 import Coco14
from tag2mask.data.coco_annotations import index_mask
from tag2mask.data.index_png import write_mask
from tag2mask.errors import UserError

TRAIN = "annotations/instances_train2014.json"
NOBODY = "COCO_train2014_000000000009"  # an image without any object


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture
def copied(drawn, tmp_path):
    """A copy to be damaged, without a cache."""
    shutil.copytree(drawn.root, tmp_path / "copy", ignore=shutil.ignore_patterns("tag2mask"))
    return tmp_path / "copy"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def loop_mask(things, labels, height, width):
    """Pixel by pixel: the first of the smallest objects there. `inside` is a function of (x, y)."""
    mask = np.zeros((height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            here = [k for k, thing in enumerate(things) if thing["inside"](x, y)]
            if here:
                smallest = min(things[k]["area"] for k in here)
                mask[y, x] = labels[next(k for k in here if things[k]["area"] == smallest)]
    return mask


def rectangle(x0, y0, x1, y1, area=None):
    outline = [x0, y0, x1, y0, x1, y1, x0, y1]
    area = (x1 - x0) * (y1 - y0) if area is None else area
    return {
        "segmentation": [[float(v) for v in outline]],
        "area": area,
        "inside": lambda x, y: x0 <= x < x1 and y0 <= y < y1,
    }


class TestMask:
    def test_equals_the_loop_on_random_rectangles(self):
        rng = np.random.default_rng(0)
        for _ in range(20):
            height, width = rng.integers(10, 30, 2).tolist()
            things = []
            for _ in range(rng.integers(0, 7)):
                (x0, x1), (y0, y1) = (
                    np.sort(rng.choice(side + 1, 2, replace=False)).tolist() for side in (width, height)
                )
                things.append(rectangle(x0, y0, x1, y1))
            labels = rng.integers(1, 81, len(things)).tolist()
            found = index_mask(things, labels, height, width)
            np.testing.assert_array_equal(found, loop_mask(things, labels, height, width))
            assert found.dtype == np.uint8

    def test_the_smaller_object_is_seen_and_of_equal_ones_the_first(self):
        large, small = rectangle(0, 0, 8, 8), rectangle(2, 2, 5, 5)
        for order in ([large, small], [small, large]):
            labels = [80 if thing is small else 7 for thing in order]
            mask = index_mask(order, labels, 10, 10)
            assert mask[3, 3] == 80 and mask[6, 6] == 7 and mask[9, 9] == 0
        assert index_mask([rectangle(0, 0, 4, 4), rectangle(0, 0, 4, 4)], [5, 6], 4, 4).tolist() == [[5] * 4] * 4

    @pytest.mark.parametrize("compressed", [False, True])
    @pytest.mark.parametrize("first", [0, 1])
    def test_run_lengths_of_a_crowd(self, compressed, first):
        wanted = np.random.default_rng(1).integers(0, 2, (9, 13), dtype=np.uint8)
        wanted[0, 0] = first
        code = {"counts": run_lengths(wanted), "size": [9, 13]}
        if compressed:
            code = coco.encode(np.asfortranarray(wanted))
            code["counts"] = code["counts"].decode()  # as text, as it is in a JSON file
        thing = {"segmentation": code, "area": 1.0, "iscrowd": 1}
        np.testing.assert_array_equal(index_mask([thing], [3], 9, 13), 3 * wanted)

    def test_an_object_of_two_parts_and_a_part_without_an_inside(self):
        left, right = rectangle(0, 0, 2, 3), rectangle(5, 1, 8, 4)
        both = {"segmentation": [*left["segmentation"], [1.0, 1.0, 2.0, 2.0], *right["segmentation"]], "area": 15}
        mask = index_mask([both], [9], 5, 9)
        wanted = [[9 * (left["inside"](x, y) or right["inside"](x, y)) for x in range(9)] for y in range(5)]
        assert mask.tolist() == wanted
        nothing = {"segmentation": [[1.0, 1.0, 2.0, 2.0]], "area": 0}
        assert not index_mask([nothing], [9], 5, 9).any()


class TestWhatIsThere:
    def test_classes_are_contiguous_and_in_the_order_of_the_ids(self, drawn):
        classes = Coco14(root=str(drawn.root)).classes
        assert classes == tuple(COCO_CATEGORIES[k] for k in sorted(COCO_CATEGORIES))
        assert (
            len(classes) == 80 and classes[0] == "person" and classes[11] == "stop sign" and classes[-1] == "toothbrush"
        )

    def test_lists_tags_and_masks(self, drawn):
        source = Coco14(root=str(drawn.root))
        for split, half in (("train", "train2014"), ("score", "train2014"), ("test", "val2014")):
            samples = source.split(split)
            assert list(samples.names) == drawn.lists[half][1:]  # the first has no object
            for index, name in enumerate(samples.names):
                assert {source.classes[k] for k in np.flatnonzero(samples.tags[index])} == drawn.tags(name)
                mask, image = samples.mask(index), samples.image(index)
                assert mask.shape == image.shape[:2] and image.shape[2] == 3
                assert {source.classes[k - 1] for k in np.unique(mask) if k} <= drawn.tags(name)
                assert mask.any()

    def test_masks_lie_on_their_objects(self, drawn):
        source = Coco14(root=str(drawn.root))
        samples = source.split("train")
        for index, name in enumerate(samples.names):
            wanted = PIL.Image.new("L", samples.mask(index).shape[::-1])
            for thing in drawn.things[name]:
                PIL.ImageDraw.Draw(wanted).polygon(thing.outline, fill=1)
            agree = (samples.mask(index) > 0) == np.asarray(wanted, bool)
            assert agree.mean() > 0.95  # PIL paints the outline too

    def test_masks_are_drawn_once_and_the_annotations_read_once(self, drawn, copied, monkeypatch):
        loads = []
        plain = coco_annotations._load
        monkeypatch.setattr(coco_annotations, "_load", lambda *words: loads.append(words[0].name) or plain(*words))
        first = Coco14(root=str(copied))
        first.check(show=False)
        before = {path: path.stat().st_mtime_ns for path in copied.rglob("*.*")}
        assert loads == ["instances_train2014.json", "instances_val2014.json"] * 2
        assert sum("tag2mask" in str(path) and path.suffix == ".png" for path in before) == 12
        again = Coco14(root=str(copied))
        again.check(show=False)
        assert len(loads) == 4
        assert {path: path.stat().st_mtime_ns for path in copied.rglob("*.*")} == before
        assert again.fingerprint == first.fingerprint == Coco14(root=str(drawn.root)).fingerprint

    def test_masks_that_are_missing_are_drawn_again(self, copied):
        whole = Coco14(root=str(copied))
        whole.check(show=False)
        lost = sorted(copied.glob("tag2mask/*/COCO_*.png"))[3]
        content = lost.read_bytes()
        lost.unlink()
        Coco14(root=str(copied)).check(show=False)
        assert lost.read_bytes() == content

    def test_other_annotations_make_other_tags_and_masks(self, copied):
        one = Coco14(root=str(copied))
        before = one.fingerprint
        name = one.split("train").names[2]
        number = int(name[-12:])

        def change(content):
            kept = [thing for thing in content["annotations"] if thing["image_id"] == number]
            kept[0]["category_id"] = 90

        edit(copied / TRAIN, change)
        other = Coco14(root=str(copied))
        samples = other.split("train")
        assert np.flatnonzero(samples.tags[2]).tolist() == [79]
        assert set(np.unique(samples.mask(2))) == {0, 80}
        assert other.fingerprint != before

    def test_a_damaged_index_is_made_again(self, copied):
        before = Coco14(root=str(copied)).fingerprint
        for path in copied.glob("tag2mask/*/index.json"):
            path.write_text('{"classes": [')
        assert Coco14(root=str(copied)).fingerprint == before

    def test_a_cache_of_ones_own_leaves_the_root_alone(self, copied, tmp_path):
        source = Coco14(root=str(copied), cache=str(tmp_path / "cache"))
        assert source.split("test").mask(0).any()
        assert not (copied / "tag2mask").exists()
        assert len([*(tmp_path / "cache").rglob("*.png")]) == 12

    @pytest.mark.parametrize("place", ["images/{}2014", "JPEGImages/{}2014", "JPEGImages/{}"])
    def test_other_layouts(self, drawn, copied, place):
        for half in ("train", "val"):
            target = copied / place.format(half)
            target.parent.mkdir(exist_ok=True)
            (copied / f"{half}2014").rename(target)
        assert Coco14(root=str(copied)).fingerprint == Coco14(root=str(drawn.root)).fingerprint

    @pytest.mark.parametrize("sub", ["{}2014", "{}", "."])
    def test_masks_that_somebody_else_made(self, drawn, tmp_path, sub):
        for half in ("train", "val"):
            for name in drawn.lists[f"{half}2014"]:
                size = PIL.Image.open(drawn.root / f"{half}2014/{name}.jpg").size[::-1]
                write_mask(tmp_path / "masks" / sub.format(half) / f"{name}.png", np.full(size, 80, np.uint8))
        source = Coco14(root=str(drawn.root), masks=str(tmp_path / "masks"), cache=str(tmp_path / "cache"))
        assert (source.split("test").mask(0) == 80).all()
        assert [*(tmp_path / "cache").rglob("*.png")] == []

    def test_saliency_and_summary(self, drawn):
        source = Coco14(root=str(drawn.root), saliency=str(drawn.root / "saliency"))
        assert source.split("train").side["saliency"](0).max() == pytest.approx(220 / 255)
        found = source.summary()
        assert found["splits"] == {"train": 8, "score": 8, "test": 4}
        assert found["negatives"] == {"train": 0, "score": 0, "test": 0}
        assert found["classes"]["hair drier"]["train"] == 0 < found["classes"]["person"]["train"]


class TestLists:
    @pytest.mark.parametrize(
        "line",
        [
            "COCO_train2014_{:012d}",
            "COCO_train2014_{:012d}.jpg",
            "train2014/COCO_train2014_{:012d}.jpg",
            "/JPEGImages/train/COCO_train2014_{:012d}.jpg /SegmentationClass/train/COCO_train2014_{:012d}.png",
            "COCO_train2014_{:012d} 45 49 50",
            "{:012d}",
            "{}",
        ],
    )
    def test_every_spelling(self, drawn, tmp_path, line):
        numbers = (17, 11, 12)
        (tmp_path / "list.txt").write_text("# mine\n" + "\n".join(line.format(k, k) for k in numbers) + "\n")
        source = Coco14(root=str(drawn.root), train=str(tmp_path / "list.txt"))
        assert list(source.split("train").names) == [f"COCO_train2014_{k:012d}" for k in numbers]
        assert source.split("score").names == source.split("train").names

    def test_may_name_an_image_without_objects(self, drawn, tmp_path):
        (tmp_path / "list.txt").write_text(f"{NOBODY}\nCOCO_train2014_000000000010\n")
        samples = Coco14(root=str(drawn.root), train=str(tmp_path / "list.txt")).split("train")
        assert samples.names[0] == NOBODY and not samples.tags[0].any() and not samples.mask(0).any()

    def test_score_and_test(self, drawn, tmp_path):
        (tmp_path / "score.txt").write_text("10\n11\n")
        (tmp_path / "test.txt").write_text("581922\n")
        source = Coco14(root=str(drawn.root), score=str(tmp_path / "score.txt"), test=str(tmp_path / "test.txt"))
        assert len(source.split("train")) == 8
        assert list(source.split("score").names) == ["COCO_train2014_000000000010", "COCO_train2014_000000000011"]
        assert list(source.split("test").names) == ["COCO_val2014_000000581922"]


class TestOneLine:
    """Wrong and half-unpacked folders: one line that names what is missing and the remedy."""

    def fault(self, root, **settings):
        with pytest.raises(UserError) as raised:
            Coco14(root=str(root), **settings).check(show=False)
        line = str(raised.value)
        assert "\n" not in line
        return line

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            ("train2014", "no COCO 2014 here, the folder train2014 is missing; get it: .*data prepare coco14"),
            ("val2014", "the folder val2014 is missing; get it"),
            ("annotations", "instances_train2014.json: no such file, so there are no tags; get it"),
            ("annotations/instances_val2014.json", "instances_val2014.json: no such file"),
            (f"train2014/{NOBODY[:-2]}14.jpg", "1 of 12 images are missing, the first is .*000014.jpg; unpack"),
        ],
    )
    def test_what_is_missing(self, copied, part, message):
        path = copied / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert re.search(message, self.fault(copied))

    def test_annotations_that_are_none(self, copied):
        (copied / TRAIN).write_text('{"images": [')
        assert "is no instances file of COCO (Expecting value" in self.fault(copied)
        (copied / TRAIN).write_text('{"info": 1}')
        assert "no images, annotations and categories in it" in self.fault(copied)
        (copied / TRAIN).write_text('{"images": 3, "categories": [], "annotations": [{}]}')
        assert "is no instances file of COCO (KeyError('image_id')" in self.fault(copied)

    def test_halves_of_other_categories(self, copied):
        edit(copied / TRAIN, lambda content: content["categories"].append({"id": 99, "name": "fox"}))
        assert "the two instances files list other categories" in self.fault(copied)

    def test_a_cache_that_cannot_be_written(self, copied):
        (copied / "tag2mask").write_text("a file is in the way")
        assert "cannot be written" in (line := self.fault(copied)) and "give data.cache" in line

    def test_a_broken_image(self, copied):
        (copied / "val2014/COCO_val2014_000000581923.jpg").write_bytes(b"")
        line = self.fault(copied)
        assert "1 of 24 files cannot be read" in line and "000000581923.jpg: the file is empty" in line

    def test_an_image_of_another_size_than_annotated(self, copied):
        PIL.Image.new("RGB", (20, 10)).save(copied / "val2014/COCO_val2014_000000581923.jpg")
        assert "but its image has 20 x 10" in self.fault(copied)

    def test_masks_of_somebody_else(self, drawn, tmp_path):
        assert "12 of 12 masks are missing, the first is COCO_train2014" in self.fault(drawn.root, masks=str(tmp_path))
        for half in ("train2014", "val2014"):
            for name in drawn.lists[half]:
                size = PIL.Image.open(drawn.root / f"{half}/{name}.jpg").size[::-1]
                write_mask(tmp_path / f"{name}.png", np.full(size, 90, np.uint8))
        line = self.fault(drawn.root, masks=str(tmp_path))
        assert "holds the value 90, which is no class; save masks as index PNG: 0 for background, 1..80" in line

    @pytest.mark.parametrize("line", ["COCO_train2014_000000000999", "zebra", "12.5.7x"])
    def test_a_list_of_other_images(self, drawn, tmp_path, line):
        (tmp_path / "list.txt").write_text(f"10\n{line}\n")
        assert f"line 2: {line} is no image of COCO 2014" in self.fault(drawn.root, train=str(tmp_path / "list.txt"))
