"""PASCAL VOC 2012 as it lies on disk: lists, tags, masks, and one line for whatever is missing."""

import pickle
import re
import shutil

import numpy as np
import PIL.Image
import pytest
from miniature import VOC_CLASSES, draw_voc

from tag2mask import recipe
from tag2mask.data.voc12 import CLASSES, Voc12
from tag2mask.errors import UserError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_voc(tmp_path_factory.mktemp("voc"))


@pytest.fixture
def copied(drawn, tmp_path):
    """A copy to be damaged: its root and its VOC2012."""
    shutil.copytree(drawn.root, tmp_path / "copy")
    return tmp_path / "copy", tmp_path / "copy/VOCdevkit/VOC2012"


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


class TestWhatIsThere:
    def test_lists_tags_and_masks(self, drawn):
        before = files_below(drawn.root)
        source = Voc12(root=str(drawn.root))
        assert source.classes == CLASSES == VOC_CLASSES
        for split, called in (("train", "train_aug"), ("score", "train"), ("test", "val")):
            samples = source.split(split)
            assert list(samples.names) == drawn.lists[called]
            for index, name in enumerate(samples.names):
                assert {CLASSES[k] for k in np.flatnonzero(samples.tags[index])} == drawn.tags(name)
                assert samples.image(index).shape[2] == 3
            assert samples.has_masks == (split != "train")
            assert samples.side == {}
        assert files_below(drawn.root) == before  # read-only

    def test_masks_are_read_by_index_and_keep_the_border(self, drawn):
        samples = Voc12(root=str(drawn.root)).split("score")
        home = drawn.root / "VOCdevkit/VOC2012"
        for index, name in enumerate(samples.names):
            mask = samples.mask(index)
            np.testing.assert_array_equal(
                mask, np.asarray(PIL.Image.open(home / f"SegmentationClass/{name}.png")), strict=True
            )
            assert mask.shape == samples.image(index).shape[:2]
            assert {CLASSES[k - 1] for k in np.unique(mask) if 0 < k < 255} == drawn.tags(name)
            assert 255 in mask

    def test_the_summary_counts(self, drawn):
        found = Voc12(root=str(drawn.root)).summary()
        assert found["splits"] == {"train": 9, "score": 5, "test": 3}
        assert found["list"] == {"train": "train_aug", "score": "train", "test": "val"}
        assert found["masks"] == {"train": 5, "score": 5, "test": 3}
        assert found["images"] == 12
        people = sum("person" in drawn.tags(name) for name in drawn.lists["train_aug"])
        assert found["classes"]["person"]["train"] == people > 1
        assert found["classes"]["bus"] == {"train": 0, "score": 0, "test": 0}

    @pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
    def test_the_root_may_be_any_of_three_folders(self, drawn, below):
        assert len(Voc12(root=str(drawn.root / below)).split("test")) == 3

    def test_saliency(self, drawn):
        samples = Voc12(root=str(drawn.root), saliency=str(drawn.root / "saliency")).split("train")
        for index in range(len(samples)):
            grey = samples.side["saliency"](index)
            assert grey.shape == samples.image(index).shape[:2]
            assert grey.dtype == np.float32 and grey.max() == pytest.approx(220 / 255)

    def test_the_test_set_has_images_only(self, drawn):
        source = Voc12(root=str(drawn.root), test="test")
        samples = source.split("test")
        assert list(samples.names) == drawn.lists["test"]
        assert not samples.has_masks and not samples.tags.any()
        assert samples.image(0).ndim == 3

    def test_a_split_travels_to_worker_processes(self, drawn):
        samples = Voc12(root=str(drawn.root)).split("score")
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(samples)).mask(1), samples.mask(1))

    def test_as_the_data_of_a_recipe(self, drawn, tmp_path):
        path = tmp_path / "r.yaml"
        path.write_text(
            f"title: t\ndata: {{name: voc12, root: {drawn.root}, test: test}}\nstages:\n"
            "  classify: {do: classify, net: {name: cam, backbone: {name: resnet18}}, train: {steps: 1, batch: 2}}\n"
        )
        source = recipe.load(path).source()
        assert source.split("test").names == tuple(drawn.lists["test"])


class TestTags:
    def test_difficult_objects_count_unless_they_are_not_wanted(self, drawn):
        last = drawn.lists["train_aug"].index("2007_000012")
        strict = Voc12(root=str(drawn.root), difficult=False).split("train").tags
        assert Voc12(root=str(drawn.root)).split("train").tags[last].any()
        assert not strict[last].any()
        assert strict[:last].any(axis=1).all()

    def test_one_class_twice_is_one_tag_and_a_part_is_none(self, copied):
        root, home = copied
        thing = "<object><name> dog </name><part><name>head</name></part></object>"
        (home / "Annotations/2007_000001.xml").write_text(f"<annotation>{thing}{thing}</annotation>")
        tags = Voc12(root=str(root)).split("train").tags[0]
        assert [CLASSES[k] for k in np.flatnonzero(tags)] == ["dog"]

    def test_an_image_without_objects_is_a_negative(self, copied):
        root, home = copied
        (home / "Annotations/2007_000001.xml").write_text("<annotation></annotation>")
        assert not Voc12(root=str(root)).split("train").tags[0].any()


class TestLists:
    SPELLINGS = (
        "{}",
        "{}.jpg",
        "JPEGImages/{}.jpg",
        "/JPEGImages/{}.jpg /SegmentationClassAug/{}.png",
        "./VOC2012/JPEGImages/{}",
    )

    @pytest.mark.parametrize("line", SPELLINGS)
    def test_names_with_and_without_folders_and_endings(self, drawn, tmp_path, line):
        wanted = drawn.lists["train_aug"][::-1]
        path = tmp_path / "mine.txt"
        path.write_text("\n".join(line.replace("{}", name) for name in wanted) + "\n\n")
        assert list(Voc12(root=str(drawn.root), train=str(path)).split("train").names) == wanted

    def test_trainaug_in_its_other_spelling(self, copied):
        root, home = copied
        lists = home / "ImageSets/Segmentation"
        (lists / "train_aug.txt").rename(lists / "trainaug.txt")
        assert len(Voc12(root=str(root)).split("train")) == 9

    def test_of_the_benchmark_must_have_their_length_or_it_says_so(self, drawn, capsys):
        Voc12(root=str(drawn.root)).check()
        said = capsys.readouterr().err
        assert "voc12: train_aug lists 9 images, the official list 10,582: do not compare" in said
        assert "val lists 3 images, the official list 1,449" in said
        Voc12(root=str(drawn.root)).check(show=False)
        assert capsys.readouterr().err == ""


class TestFingerprint:
    def test_is_of_the_content_not_of_the_place(self, drawn, copied):
        assert Voc12(root=str(copied[0])).fingerprint == Voc12(root=str(drawn.root)).fingerprint

    def test_changes_with_whatever_counts(self, drawn, copied):
        root, home = copied
        seen = {Voc12(root=str(root)).fingerprint}

        def changed(**settings):
            found = Voc12(root=str(root), **settings).fingerprint
            new = found not in seen
            seen.add(found)
            return new

        assert changed(difficult=False)
        assert changed(test="test")
        assert changed(saliency=str(root / "saliency"))
        PIL.Image.new("RGB", (64, 48)).save(home / "JPEGImages/2007_000001.jpg")
        assert changed()
        mask = PIL.Image.open(home / "SegmentationClass/2007_000006.png")
        mask.putpixel((0, 0), 3)
        mask.save(home / "SegmentationClass/2007_000006.png")
        assert changed()
        (home / "Annotations/2007_000002.xml").write_text("<annotation></annotation>")
        assert changed()
        (home / "ImageSets/Segmentation/val.txt").write_text("2007_000006\n")
        assert changed()

    def test_files_that_are_known_are_not_read_again(self, drawn, tmp_path, monkeypatch):
        cache = tmp_path / "cache.json"
        Voc12(root=str(drawn.root)).check(cache)
        again = Voc12(root=str(drawn.root))
        monkeypatch.setattr("tag2mask.data.verify._look", lambda file: pytest.fail(f"{file} was read"))
        again.check(cache)
        assert again.fingerprint


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


class TestOneLine:
    """Wrong and half-unpacked folders: one line that names what is missing and the remedy."""

    def fault(self, root, **settings):
        with pytest.raises(UserError) as raised:
            Voc12(root=str(root), **settings).check(show=False)
        line = str(raised.value)
        assert "\n" not in line
        return line

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            ("JPEGImages", "no PASCAL VOC 2012 here, .*JPEGImages is missing; .*data prepare voc12"),
            ("Annotations", "Annotations is missing; unpack .*data prepare voc12"),
            ("SegmentationClass", "SegmentationClass is missing; unpack"),
            ("ImageSets", "ImageSets/Segmentation is missing; unpack"),
            ("ImageSets/Segmentation/train_aug.txt", r"train_aug.txt: no such list; .*data prepare sbd"),
            ("ImageSets/Segmentation/val.txt", r"val.txt: no such list; .*unpack the archive again"),
            ("JPEGImages/2007_000003.jpg", "JPEGImages lacks 1 of the 9 images on a list, the first is .*2007_000003"),
            ("SegmentationClass/2007_000007.png", "1 of 3 files are missing, the first is 2007_000007; unpack"),
            ("SegmentationClass/2007_000002.png", "1 of 5 files are missing, the first is 2007_000002; unpack"),
            ("Annotations/2007_000010.xml", "2007_000010.xml: no such file, so the image has no tags; unpack"),
        ],
    )
    def test_what_is_missing(self, copied, part, message):
        root, home = copied
        remove(home / part)
        assert re.search(message, self.fault(root))

    def test_two_folders_are_missing(self, copied):
        root, home = copied
        remove(home / "Annotations")
        remove(home / "SegmentationClass")
        assert "Annotations and SegmentationClass are missing; unpack" in self.fault(root)

    def test_an_empty_folder(self, tmp_path):
        assert f"`tag2mask data prepare voc12 --root {tmp_path}`" in self.fault(tmp_path)

    def test_all_masks_of_the_score_list_are_missing(self, copied):
        root, home = copied
        for name in ("2007_000001", "2007_000002", "2007_000003", "2007_000004", "2007_000005"):
            remove(home / f"SegmentationClass/{name}.png")
        assert "5 of 5 files are missing" in self.fault(root)

    def test_the_images_of_the_server_are_not_in_the_archive(self, copied):
        root, home = copied
        remove(home / "ImageSets/Segmentation/test.txt")
        assert "VOC2012test.tar" in self.fault(root, test="test")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("<annotation><object>", "no element found"),
            ("<a><object><name>fox</name></object></a>", "'fox' is no class"),
        ],
    )
    def test_an_annotation_that_is_none(self, copied, content, reason):
        root, home = copied
        (home / "Annotations/2007_000004.xml").write_text(content)
        line = self.fault(root)
        assert "2007_000004.xml: no annotation of VOC 2012" in line and re.search(reason, line)

    def test_a_truncated_image(self, copied):
        root, home = copied
        path = home / "JPEGImages/2007_000009.jpg"
        path.write_bytes(path.read_bytes()[:300])
        line = self.fault(root)
        assert "1 of 20 files cannot be read, the first is" in line
        assert "2007_000009.jpg: is truncated" in line and "unpack the archive again" in line

    def test_a_mask_with_values_that_are_no_class(self, copied):
        root, home = copied
        PIL.Image.fromarray(np.full((48, 64), 42, np.uint8)).save(home / "SegmentationClass/2007_000001.png")
        assert "holds the value 42, which is no class" in self.fault(root)

    def test_a_mask_of_another_size(self, copied):
        root, home = copied
        PIL.Image.fromarray(np.zeros((20, 30), np.uint8)).save(home / "SegmentationClass/2007_000001.png")
        assert "has 30 x 20 pixels, but its image has 64 x 48" in self.fault(root)

    def test_lists_that_contradict_each_other(self, drawn):
        assert "3 of 3 images of the score list are not in the train list, the first is 2007_000006" in self.fault(
            drawn.root, score="val"
        )
        assert "images of the test list are in the train list too, the first is 2007_000001" in self.fault(
            drawn.root, test="train"
        )

    def test_an_empty_list(self, drawn, tmp_path):
        (tmp_path / "none.txt").write_text("# nobody\n")
        assert "the list to train on is empty" in self.fault(drawn.root, train=str(tmp_path / "none.txt"))

    def test_no_such_list(self, drawn):
        assert "ImageSets/Segmentation/tarin.txt: no such list; correct the name" in self.fault(
            drawn.root, train="tarin"
        )

    def test_saliency(self, copied):
        root, _ = copied
        assert "no such folder; correct data.saliency" in self.fault(root, saliency=str(root / "maps"))
        remove(root / "saliency/2007_000009.png")
        line = self.fault(root, saliency=str(root / "saliency"))
        assert "1 of 9 files are missing, the first is 2007_000009; add them" in line
