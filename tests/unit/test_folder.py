"""A folder of somebody's own: what is read from it, and the one report of everything that is wrong with it."""

import json
import pickle
import re
from typing import get_type_hints

import numpy as np
import PIL.Image
import pytest

from tag2mask.data import verify as verify_module
from tag2mask.data.faults import Faults, Kind
from tag2mask.data.folder import Folder
from tag2mask.errors import UserError

TAGS = {"a": ("cat",), "b": ("dog",), "c": ("cat", "dog"), "d": (), "e": ("dog",), "f": ("cat",)}
SIZE = (8, 6)  # height, width


def picture(name, size=SIZE):
    return np.random.default_rng(sum(map(ord, name))).integers(0, 256, (*size, 3), dtype=np.uint8)


def truth(name, size=SIZE):
    mask = np.zeros(size, dtype=np.uint8)
    for k, tag in enumerate(("cat", "dog"), start=1):
        if tag in TAGS.get(name, ()):
            mask[k] = k
    mask[-1] = 255
    return mask


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path, **options)


class Place:
    """A sound data set of six images in a folder, there to be damaged."""

    def __init__(self, root):
        self.root = root
        for name in TAGS:
            save(root / f"images/{name}.png", picture(name))
            save(root / f"masks/{name}.png", truth(name))
        self.rows(TAGS)

    def rows(self, tags, classes=("cat", "dog")):
        lines = [",".join([name, *("01"[tag in row] for tag in classes)]) for name, row in tags.items()]
        self.write("tags.csv", "\n".join([",".join(("image", *classes)), *lines]))

    def write(self, name, text):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)
        return str(self.root / name)

    def folder(self, *keys, **settings):
        names = {"masks": "masks", "saliency": "maps", "list": "list.txt", "score": "score.txt", "test": "test.txt"}
        given = {"images": "images", "tags": "tags.csv", **{key: names[key] for key in keys}}
        given = {key: str(self.root / value) for key, value in given.items()} | settings
        return Folder(**given)

    def report(self, *keys, **settings):
        with pytest.raises(UserError) as error:
            self.folder(*keys, **settings).check(show=False)
        return str(error.value)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def part(report, kind):
    """The lines about one kind: its offenders and its remedy."""
    blocks = {block.split(" (")[0]: block.split("\n")[1:] for block in report.split("\n\n")[1:]}
    assert kind.title in blocks, report
    *offenders, remedy = blocks[kind.title]
    assert remedy.startswith("  Remedy: ") and len(remedy) > 20
    return [offender.strip() for offender in offenders]


def only(report, kind):
    assert report.startswith("1 kind of fault in "), report
    return part(report, kind)


# What is read


def test_a_sound_folder(place):
    place.write("test.txt", "e\nf.png\n")
    place.write("score.txt", "# by hand\nc\na\n")
    source = place.folder("masks", "score", "test")
    source.check(show=False)
    assert source.classes == ("cat", "dog")
    train, score, test = (source.split(name) for name in ("train", "score", "test"))
    assert list(train.names) == ["a", "b", "c", "d"]
    assert list(score.names) == ["c", "a"] and list(test.names) == ["e", "f"]
    assert train.tags.dtype == np.uint8 and train.tags.tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]
    assert score.tags.tolist() == [[1, 1], [1, 0]]
    for samples in (train, score, test):
        assert samples.has_masks
        for i, name in enumerate(samples.names):
            np.testing.assert_array_equal(samples.image(i), picture(name))
            np.testing.assert_array_equal(samples.mask(i), truth(name))


def test_without_lists_and_masks(place):
    source = place.folder()
    assert list(source.split("train").names) == list(source.split("score").names) == list(TAGS)
    assert len(source.split("test")) == 0 and source.split("test").tags.shape == (0, 2)
    assert not any(source.split(name).has_masks for name in ("train", "score", "test"))


def test_score_falls_back_to_the_training_images_that_have_masks(place):
    for name in ("a", "d", "f"):
        (place.root / f"masks/{name}.png").unlink()
    place.write("test.txt", "e")
    source = place.folder("masks", "test")
    assert list(source.split("score").names) == ["b", "c"] and source.split("score").has_masks
    assert not source.split("train").has_masks


def test_a_list_leaves_all_else_out(place):
    place.rows({**TAGS, "z": (), "e": ("cat", "dog"), "nobody": ()})
    place.write("images/e.png", "broken")
    save(place.root / "images/untagged.png", picture("x"))
    place.write("list.txt", "f\na\nc\nf\nb\n")
    source = place.folder("list")
    assert list(source.split("train").names) == ["f", "a", "c", "b"]


def test_forty_images_with_a_spreadsheet_export(tmp_path):
    lines = ["Filename;Kratzer;Öl"]
    for i in range(40):
        folder = "left" if i % 2 else "right side"
        save(tmp_path / f"images/{folder}/{i:04d}.jpg", picture(str(i)))
        lines.append(f" {folder}\\{i:04d}.JPG ;{int(i % 3 == 0)};{int(i % 5 == 0)}")
    text = "\r\n".join([*lines, ";;", ""])
    (tmp_path / "tags.csv").write_bytes(text.encode("utf-8-sig"))
    source = Folder(images=str(tmp_path / "images"), tags=str(tmp_path / "tags.csv"))
    train = source.split("train")
    assert source.classes == ("Kratzer", "Öl") and len(train) == 40
    for name, tags in zip(train.names, train.tags, strict=True):
        number = int(name[-4:])
        assert tags.tolist() == [number % 3 == 0, number % 5 == 0]


def test_sub_folders_as_tags(tmp_path):
    for name in ("cat/1", "cat/2", "dog/1", "dog/deep/2", "background/1"):
        save(tmp_path / f"{name}.png", picture(name))
    source = Folder(images=str(tmp_path))
    train = source.split("train")
    assert list(train.names) == ["background/1", "cat/1", "cat/2", "dog/1", "dog/deep/2"]
    assert train.tags.tolist() == [[0, 0], [1, 0], [1, 0], [0, 1], [0, 1]]
    save(tmp_path / "stray.png", picture("s"))
    with pytest.raises(UserError) as error:
        Folder(images=str(tmp_path)).check(show=False)
    assert only(str(error.value), Kind.NO_FOLDER) == ["stray"]


def test_classes_fix_the_order(place):
    assert place.folder(classes=["dog", "cat"]).split("train").tags[:3].tolist() == [[0, 1], [1, 0], [1, 1]]


def test_test_tags_come_from_the_masks_where_no_test_image_has_a_row(place):
    place.rows({name: TAGS[name] for name in "abcd"})
    place.write("test.txt", "e\nf")
    assert place.folder("masks", "test").split("test").tags.tolist() == [[0, 1], [1, 0]]
    assert only(place.report("test"), Kind.NO_TAGS) == ["e", "f"]
    place.rows({name: TAGS[name] for name in "abcde"})
    assert only(place.report("masks", "test"), Kind.NO_TAGS) == ["f"]


def test_saliency_takes_the_size_of_its_image(place):
    for name in TAGS:
        save(place.root / f"maps/{name}.jpg", np.full((4, 3), 51, np.uint8))
    side = place.folder("saliency").split("train").side
    np.testing.assert_allclose(side["saliency"](0), np.full(SIZE, 0.2), atol=0.01)
    (place.root / "maps/c.jpg").unlink()
    assert only(place.report("saliency"), Kind.NO_MAP) == ["c"]
    place.write("maps/c.jpg", "no")
    assert "maps/c.jpg: is not a JPEG" in only(place.report("saliency"), Kind.BAD_MAP)[0]


def test_samples_can_be_sent_to_other_processes(place):
    for name in TAGS:
        save(place.root / f"maps/{name}.png", picture(name)[:, :, 0])
    samples = place.folder("masks", "saliency").split("train")
    sent = pickle.loads(pickle.dumps(samples))
    np.testing.assert_array_equal(sent.image(2), samples.image(2))
    np.testing.assert_array_equal(sent.mask(2), samples.mask(2))
    np.testing.assert_array_equal(sent.side["saliency"](2), samples.side["saliency"](2))


def test_summary_is_json(place):
    save(place.root / "images/d.png", picture("d", (20, 30)))
    place.write("images/readme.txt", "")
    place.write("test.txt", "e\nf")
    summary = place.folder("test").summary()
    assert json.loads(json.dumps(summary)) == {
        "images": 6,
        "splits": {"train": 4, "score": 4, "test": 2},
        "classes": {"cat": {"train": 2, "score": 2, "test": 1}, "dog": {"train": 2, "score": 2, "test": 1}},
        "negatives": {"train": 1, "score": 1, "test": 0},
        "masks": {"train": 0, "score": 0, "test": 0},
        "width": {"min": 6, "median": 6, "max": 30},
        "height": {"min": 8, "median": 8, "max": 20},
        "files_not_read": {".txt": 1},
    }


def test_the_signature_can_be_a_schema():
    hints = get_type_hints(Folder.__init__)
    assert hints["classes"] == list[str] | None and hints["list"] == str | None


# Fingerprint and cache


def test_fingerprint_follows_content_and_nothing_else(place, tmp_path):
    place.write("test.txt", "e\nf")

    def now(*keys, **settings):
        return place.folder("masks", "test", *keys, **settings).fingerprint

    first = now()
    assert now() == first
    assert place.folder(classes=["dog", "cat"]).fingerprint != place.folder(classes=["cat", "dog"]).fingerprint
    moved = Place(tmp_path / "elsewhere")
    moved.write("test.txt", "f\ne")
    assert moved.folder("masks", "test").fingerprint != first
    moved.write("test.txt", "e\nf")
    assert moved.folder("masks", "test").fingerprint == first
    place.rows({**TAGS, "d": ("cat",)})
    assert now() != first
    place.rows(TAGS)
    for file, array in (("images/a.png", picture("other")), ("masks/a.png", truth("a") * 0)):
        before = (place.root / file).read_bytes()
        save(place.root / file, array)
        assert now() != first
        (place.root / file).write_bytes(before)
    assert now() == first


def test_what_is_in_the_cache_is_not_decoded_again(place, monkeypatch):
    cache = place.root / "deep/cache.json"
    looked = []
    look = verify_module._look
    monkeypatch.setattr(verify_module, "_look", lambda file: looked.append(file[1].name) or look(file))

    def fingerprint():
        looked.clear()
        source = place.folder("masks")
        source.check(cache, show=False)
        return source.fingerprint

    first = fingerprint()
    assert len(looked) == 12
    assert fingerprint() == first and looked == []
    save(place.root / "images/b.png", picture("other"))
    assert fingerprint() != first and looked == ["b.png"]
    assert list(cache.parent.iterdir()) == [cache]  # nothing half-written stays behind
    for nonsense in ("", "[]", "{}", '{"version": 1, "files": {"image:x": {}}}', '{"version": 1, "files": {"x": 1}}'):
        cache.write_text(nonsense)
        fingerprint()
        assert len(looked) == 12


def test_a_broken_file_is_looked_at_again_and_the_others_are_not(place, monkeypatch):
    cache = place.root / "cache.json"
    place.write("images/b.png", "broken")
    for _ in range(2):
        with pytest.raises(UserError, match=r"b\.png"):
            place.folder().check(cache, show=False)
    save(place.root / "images/b.png", picture("b"))
    looked = []
    look = verify_module._look
    monkeypatch.setattr(verify_module, "_look", lambda file: looked.append(file[1].name) or look(file))
    place.folder().check(cache, show=False)
    assert looked == ["b.png"]


def test_an_interrupted_check_keeps_what_it_saw(place, monkeypatch):
    cache = place.root / "cache.json"
    look = verify_module._look

    def interrupted(file):
        if file[1].name == "c.png":
            raise KeyboardInterrupt
        return look(file)

    monkeypatch.setattr(verify_module, "_look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        place.folder().check(cache, show=False)
    assert len(json.loads(cache.read_text())["files"]) == 2


# What is wrong


def test_everything_is_in_one_report(place):
    place.rows({name: TAGS.get(name, ()) for name in ("a", "b", "c", "nobody", "e", "f")})
    place.write("images/a.png", "broken")
    save(place.root / "masks/b.png", truth("b").T)
    report = place.report("masks")
    first, *_ = report.split("\n")
    assert first == (
        f"4 kinds of fault in {place.root}/images with {place.root}/tags.csv: images that cannot be read (1), "
        "images without tags (1), tag rows without an image (1), masks of another size than their image (1)"
    )
    assert part(report, Kind.NO_TAGS) == ["d"]
    assert part(report, Kind.NO_IMAGE) == ["row 5: nobody"]


def test_five_offenders_are_named_and_the_rest_counted(place):
    for i in range(9):
        save(place.root / f"images/new{i}.png", picture("n"))
    report = place.report()
    assert only(report, Kind.NO_TAGS) == [*(f"new{i}" for i in range(5)), "... and 4 more"]
    assert "images without tags (9)" in report


def damage_image(place, data):
    (place.root / "images/a.png").write_bytes(data)


def damage_rows(place, old, new):
    path = place.root / "tags.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def half_of_a_jpeg(place):
    save(place.root / "images/big.jpg", picture("big", (99, 99)))
    data = (place.root / "images/big.jpg").read_bytes()
    (place.root / "images/big.jpg").write_bytes(data[: len(data) // 2])
    place.rows({**TAGS, "big": ("cat",)})


def dark(place):
    save(place.root / "images/a.png", np.full(SIZE, 4095, np.uint16))


CASES = {
    "truncated": (half_of_a_jpeg, Kind.UNREADABLE, "big.jpg: is truncated or damaged"),
    "empty": (lambda p: damage_image(p, b""), Kind.UNREADABLE, "a.png: the file is empty"),
    "same stem": (
        lambda p: save(p.root / "images/a.jpg", picture("a")), Kind.SAME_NAME, "a.jpg and .*a.png"
    ),
    "no tags": (lambda p: damage_rows(p, "c,1,1\n", ""), Kind.NO_TAGS, "^c$"),
    "no image": (lambda p: damage_rows(p, "c,1,1\n", "c,1,1\nx.png,1,1\n"), Kind.NO_IMAGE, "^row 5: x.png$"),
    "capitals": (lambda p: damage_rows(p, "c,1,1\n", "c,1,1\nA.png,1,1\n"), Kind.NO_IMAGE, "did you mean a"),
    "no name": (lambda p: damage_rows(p, "c,1,1\n", "c,1,1\n,1,1\n"), Kind.NO_IMAGE, "row 5: .empty."),
    "two rows": (lambda p: damage_rows(p, "c,1,1\n", "c,1,1\na.png,0,1\n"), Kind.REPEATED, "^a: row 2 and row 5$"),
    "cell": (lambda p: damage_rows(p, "c,1,1", "c,1,2"), Kind.BAD_CELL, "^row 4 .c., column dog: '2'$"),
    "empty cell": (lambda p: damage_rows(p, "c,1,1", "c,,1"), Kind.BAD_CELL, "^row 4 .c., column cat: ''$"),
    "short row": (lambda p: damage_rows(p, "c,1,1", "c,1"), Kind.BAD_CELL, "^row 4 .c., column dog: no cell$"),
    "background": (
        lambda p: p.rows({**TAGS, "d": ("background",)}, ("cat", "background", "dog")),
        Kind.BACKGROUND, "^'background' .1 image, first in row 5.$"
    ),
    "rare": (lambda p: p.rows({**TAGS, "d": ("emu",)}, ("cat", "dog", "emu")), Kind.RARE, "^'emu': 1 image$"),
    "absent": (lambda p: p.rows(TAGS, ("cat", "dog", "emu")), Kind.RARE, "^'emu': no images$"),
    "everywhere": (
        lambda p: p.rows({name: (*tags, "steel") for name, tags in TAGS.items()}, ("cat", "dog", "steel")),
        Kind.EVERYWHERE, "^'steel': all 6 images$"
    ),
    "misspelt": (
        lambda p: p.rows({**TAGS, "d": ("Cat",)}, ("cat", "dog", "Cat")),
        Kind.MISSPELT, "^'Cat' .1 image, first in row 5. looks like 'cat' .3 images, first in row 2.$"
    ),
    "12 of 16 bits": (dark, Kind.DARK, "a.png: largest value 4095"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_fault(place, case):
    damage, kind, said = CASES[case]
    damage(place)
    offenders = only(place.report(), kind)
    assert len(offenders) == 1
    assert re.search(said, offenders[0]), offenders


MASK_CASES = {
    "colour": (np.zeros((*SIZE, 3), np.uint8), Kind.BAD_MASK, "(mode RGB) where an index mask is needed"),
    "values": (truth("b") * 3, Kind.BAD_MASK, "masks/b.png: holds the values 6, 253, which are no class"),
    "turned": (truth("b").T, Kind.MASK_SIZE, "masks/b.png: 8 x 6, but its image 6 x 8 (it lies on its side)"),
    "small": (truth("b")[:3, :3], Kind.MASK_SIZE, "masks/b.png: 3 x 3, but its image 6 x 8"),
}


@pytest.mark.parametrize("case", MASK_CASES)
def test_one_wrong_mask(place, case):
    array, kind, said = MASK_CASES[case]
    save(place.root / "masks/b.png", array)
    (offender,) = only(place.report("masks"), kind)
    assert offender.endswith(said)


def test_mask_of_a_photo_with_exif_rotation(place):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    save(place.root / "images/b.png", picture("b"), exif=exif)
    (offender,) = only(place.report("masks"), Kind.MASK_SIZE)
    assert offender.endswith("masks/b.png: 6 x 8, but its image 8 x 6 (it lies on its side)")
    save(place.root / "masks/b.png", truth("b").T[:, ::-1])
    train = place.folder("masks").split("train")
    assert train.image(1).shape[:2] == train.mask(1).shape == SIZE[::-1]


def test_broken_and_missing_masks(place):
    place.write("masks/b.png", "")
    assert only(place.report("masks"), Kind.BAD_MASK)[0].endswith("masks/b.png: the file is empty (0 bytes)")
    (place.root / "masks/b.png").unlink()
    place.folder("masks").check(show=False)
    place.write("score.txt", "a\nb")
    assert only(place.report("masks", "score"), Kind.NO_MASK) == ["b"]
    place.write("test.txt", "e\nb")
    assert part(place.report("masks", "test"), Kind.NO_MASK) == ["b"]


def test_two_mask_files_for_one_image(place):
    save(place.root / "masks/b.tif", truth("b"))
    assert only(place.report("masks"), Kind.SAME_NAME) == [f"{place.root}/masks/b.png and {place.root}/masks/b.tif"]


def test_masks_with_foreground_255(place):
    for name in TAGS:
        save(place.root / f"masks/{name}.png", (truth(name) > 0) * np.uint8(255))
    assert len(only(place.report("masks"), Kind.NO_CLASS_IN_MASKS)) == 6


def test_masks_in_another_order_than_the_tags(place):
    for name in TAGS:
        save(place.root / f"masks/{name}.png", np.array([0, 2, 1], np.uint8)[truth(name) % 255])
    report = place.report("masks")
    assert only(report, Kind.CONTRADICTION)[0].endswith("masks/a.png: shows dog, but the image is tagged cat")
    assert "1 cat, 2 dog" in report
    place.folder("masks", classes=["dog", "cat"]).check(show=False)


def test_unknown_classes(place):
    place.rows({**TAGS, "d": ("Catt",)}, ("cat", "dog", "Catt"))
    offenders = only(place.report(classes=["cat", "dog"]), Kind.UNKNOWN_CLASS)
    assert offenders == ["'Catt' (1 image, first in row 5): did you mean 'cat'?"]
    assert only(place.report(classes=["cat", "dog", "Catt", "emu"]), Kind.RARE) == [
        "'Catt': 1 image",
        "'emu': no images",
    ]


def test_bad_tags(place):
    place.write("tags.csv", 'image,tags\na,cat\nb,dog\nc,"cat,dog"\nd,\ne,dog\nf,cat\n')
    assert only(place.report(), Kind.BAD_TAGS) == ["row 4 (c): 'cat,dog'"]
    place.write("tags.csv", "image,tags\n" + "".join(f"{name},\n" for name in TAGS))
    assert only(place.report(), Kind.RARE) == ["no class at all: no image has a tag"]


def test_one_bad_column_does_not_hide_another(place):
    lines = (place.root / "tags.csv").read_text().split("\n")
    place.write("tags.csv", "\n".join([lines[0] + ",split,px", *(f"{line},train,8" for line in lines[1:])]))
    report = place.report()
    assert only(report, Kind.BAD_CELL) == [
        "row 2 (a), column split: 'train' (and 5 more cells of this column)",
        "row 2 (a), column px: '8' (and 5 more cells of this column)",
    ]
    assert "cells that are not 0 or 1 (12)" in report


def test_lists_that_name_nothing_or_too_much(place):
    place.write("list.txt", "a\nb\nc\nd\nz\n")
    place.write("test.txt", "c\ne\nf\n")
    report = place.report("list", "test")
    assert part(report, Kind.UNLISTED) == ["list.txt line 5: z"]
    assert part(report, Kind.LEAK) == ["c"]


def test_scored_images_must_be_trained_on(place):
    place.write("list.txt", "a\nb\nc\nd\n")
    place.write("score.txt", "b\ne\nf\n")
    assert part(place.report("list", "score"), Kind.NOT_TRAINED) == ["e", "f"]


def test_16_bit_images_that_use_their_bits_are_fine(place):
    dark(place)
    save(place.root / "images/b.png", np.full(SIZE, 4096, np.uint16))
    place.folder().check(show=False)


@pytest.mark.parametrize("use", [lambda f: f.fingerprint, lambda f: f.split("train"), lambda f: f.summary()])
def test_nothing_is_given_out_unchecked(place, use):
    damage_image(place, b"")
    source = place.folder()
    for _ in range(2):
        with pytest.raises(UserError, match=r"cannot be read \(1\)"):
            use(source)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"images": "nowhere"}, "images: nowhere is no folder"),
        ({"images": "tags.csv"}, "images: .*tags.csv is a file, not a folder"),
        ({"images": "empty"}, r"empty: holds no image .*\.jpg .*\.bmp.\. It holds other files: 2 \.heic, 1 \.txt\."),
        ({"tags": None}, "images: no tags"),
        ({"tags": "none.csv"}, "none.csv: cannot be opened"),
        ({"masks": "none"}, "masks: none is no folder"),
        ({"masks": "empty"}, "masks: .*empty holds no file that can be read"),
        ({"masks": "others"}, "no file in .*others has the name of an image. .*'a' needs .*others/a.png; .*x.png"),
        ({"masks": "images"}, "holds images and masks or maps together"),
        ({"saliency": "images"}, "holds images and masks or maps together"),
        ({"saliency": "others"}, "saliency: no file in"),
        ({"list": "none.txt"}, "none.txt: cannot be opened"),
        ({"test": "blank.txt"}, "test: .*blank.txt names no image"),
        ({"test": "all.txt"}, "all.txt: lists every image"),
        ({"classes": []}, "must name each class once"),
        ({"classes": ["cat", "dog", "cat "]}, "must name each class once"),
        ({"classes": [str(k) for k in range(255)]}, "255 classes, but a mask has room for 254"),
    ],
)  # fmt: skip
def test_what_stops_at_once(place, settings, said):
    for file in ("empty/1.heic", "empty/2.HEIC", "empty/3.txt", "blank.txt"):
        place.write(file, "# nothing\n")
    place.write("all.txt", "\n".join(TAGS))
    save(place.root / "others/x.png", truth("a"))
    paths = {
        key: str(place.root / value) if isinstance(value, str) and (place.root / value).exists() else value
        for key, value in settings.items()
    }
    with pytest.raises(UserError, match=said) as error:
        place.folder(**paths)
    assert "\n" not in str(error.value)


def test_masks_inside_the_image_folder_are_no_images(place):
    (place.root / "masks").rename(place.root / "images/masks")
    source = place.folder(masks=str(place.root / "images/masks"))
    assert list(source.split("train").names) == list(TAGS) and source.split("train").has_masks


def test_no_fault_no_report():
    Faults().stop("here")
