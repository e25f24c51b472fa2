"""Tag files in every form that people write them, names that mean an image, and names that are nearly right."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tag2mask.data.names import Finder, read_list, scan
from tag2mask.data.tags import did_you_mean, folder_tags, misspelt, read_tags
from tag2mask.errors import UserError

EXPECTED = {"a.jpg": ("cat",), "b.jpg": ("cat", "dog"), "c.jpg": ()}


def write(tmp_path, content, name="tags.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def by_image(table):
    return {row.image: row.tags for row in table.rows}


ONE_HOT = "image,cat,dog\na.jpg,1,0\nb.jpg,1,1\nc.jpg,0,0\n"
LISTED = "image,tags\na.jpg,cat\nb.jpg,cat;dog\nc.jpg,\n"


@pytest.mark.parametrize(
    "content",
    [
        ONE_HOT,
        LISTED,
        "\ufeff" + ONE_HOT,
        ("\ufeff" + LISTED).replace("\n", "\r\n"),
        ONE_HOT.replace("\n", "\r"),
        ONE_HOT.replace(",", ";"),
        ONE_HOT.replace(",", "\t"),
        ONE_HOT.replace(",", "\t").encode("utf-16"),
        ONE_HOT.replace(",", " , "),
        "\n" + ONE_HOT.replace("\n", ",,\n") + ",,,,\n\n",
        "image,cat,dog\na.jpg,1.0,0.0\nb.jpg,TRUE,1\nc.jpg,False,0\n",
        ",image,cat,dog\n0,a.jpg,1,0\n1,b.jpg,1,1\n2,c.jpg,0,0\n",
        LISTED.replace(";", "|"),
        LISTED.replace("cat;dog", '" cat ; dog; cat;"'),
        LISTED.replace("cat;dog", "cat,dog"),
        LISTED.replace(";", "|").replace(",", ";"),
        "File Name,split,label\na.jpg,train,cat\nb.jpg,train,cat;dog\nc.jpg,test,\n",
        *(ONE_HOT.replace("image", name) for name in ("file", "file_name", "Filename", "ID", "name", "image-id")),
    ],
)
def test_tables(tmp_path, content):
    table = read_tags(write(tmp_path, content))
    assert by_image(table) == EXPECTED
    assert table.classes == ("cat", "dog")
    assert not any(row.problems for row in table.rows)


@pytest.mark.parametrize(
    "content",
    [
        {"a.jpg": "cat", "b.jpg": ["cat", "dog", " cat"], "c.jpg": []},
        {"a.jpg": ["cat"], "b.jpg": "cat; dog", "c.jpg": ""},
        [{"image": name, "tags": list(tags)} for name, tags in EXPECTED.items()],
        [{"file_name": name, "labels": list(tags), "other": 1} for name, tags in EXPECTED.items()],
    ],
)
def test_json(tmp_path, content):
    table = read_tags(write(tmp_path, json.dumps(content), "t.JSON"))
    assert by_image(table) == EXPECTED
    assert table.columns == () and table.classes == ("cat", "dog")


def test_order_of_classes(tmp_path):
    assert read_tags(write(tmp_path, "image,dog,ant,cat\na,0,1,0\n")).classes == ("dog", "ant", "cat")
    assert read_tags(write(tmp_path, "image,tags\na,dog\nb,cat;ant\n")).classes == ("ant", "cat", "dog")


def test_folders_are_tags():
    table = folder_tags(["cat/1", "cat/deep/2", "dog/1", "Background/3", "4"])
    assert by_image(table) == {
        "cat/1": ("cat",), "cat/deep/2": ("cat",), "dog/1": ("dog",), "Background/3": ()
    }  # fmt: skip
    assert table.classes == ("cat", "dog")


def test_rows_keep_their_place_and_their_problems(tmp_path):
    table = read_tags(write(tmp_path, "image,cat,dog\n\na,x,1\nb,,0\nc,1\nd,0,0,7\n"))
    assert [(row.place, row.tags, row.problems) for row in table.rows] == [
        ("row 3", ("dog",), (("cat", "'x'"),)),
        ("row 4", (), (("cat", "''"),)),
        ("row 5", ("cat",), (("dog", "no cell"),)),
        ("row 6", (), (("without a name", "'7'"),)),
    ]
    listed = read_tags(write(tmp_path, 'image,tags\na,"cat,dog;ant"\n'))
    assert listed.rows[0].problems == (("tags", "'cat,dog'"),)
    twice = read_tags(write(tmp_path, '{"a": ["x"], "b": 3, "b": ["y", 1], "c": {"x": 1}, "d": null}', "t.json"))
    assert [(row.place, bool(row.problems)) for row in twice.rows] == [
        ("entry 1", False), ("entry 2", True), ("entry 3", True), ("entry 4", True), ("entry 5", True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("t.csv", "", "is empty"),
        ("t.csv", "image,cat\n", "holds no row"),
        ("t.csv", "a.jpg,1\nb.jpg,0\n", "first line must name the columns.*It is 'a.jpg,1'"),
        ("t.csv", "image\na.jpg\n", "first line must name the columns"),
        ("t.csv", "image,cat,,dog\na,1,0,1\n", "column 3 has no name"),
        ("t.csv", "image,cat,dog,cat\na,1,0,1\n", "two columns are called 'cat'"),
        ("t.csv", "image,Öl\na,1\n".encode("cp1252"), "line 1 is not UTF-8.*CSV UTF-8"),
        ("t.csv", "image,x\na,1\nä,1\n".encode("latin-1"), "line 3 is not UTF-8"),
        ("t.json", '{"a": ["cat"', "not valid JSON.*line 1"),
        ("t.json", '"cat"', "must hold"),
        ("t.json", "{}", "holds no row"),
        ("t.json", '[{"image": "a"}]', "record 1 is not of the form"),
        ("t.json", '["a"]', "record 1 is not of the form"),
        ("t.npy", "x", "read from .csv and .json"),
        ("t.xlsx", "x", "export the file as CSV"),
    ],
)
def test_files_that_are_no_tag_files(tmp_path, name, content, said):
    path = write(tmp_path, content, name)
    with pytest.raises(UserError, match=said) as error:
        read_tags(path)
    assert str(error.value).startswith(f"{path}: ")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="cannot be opened"):
        read_tags(tmp_path / "tags.csv")
    with pytest.raises(UserError, match="is a folder"):
        read_tags(tmp_path)


@pytest.mark.parametrize(
    "counts, expected",
    [
        ({"scratch": 9, "scratchs": 1}, {"scratchs": "scratch"}),
        ({"scratch": 9, "scratchs": 2}, {}),  # twice is no slip
        ({"scratch": 1, "scratchs": 1}, {}),  # nobody knows which
        ({"cat": 9, "Cat": 8, "CAT ": 3}, {"Cat": "cat", "CAT ": "cat"}),
        ({"oil spot": 2, "oil  spot": 1, "Oil-Spot": 7}, {"oil spot": "Oil-Spot", "oil  spot": "Oil-Spot"}),
        ({"defect1": 9, "defect2": 1}, {}),
        ({"cat": 9, "car": 1, "cow": 1}, {}),
        ({"a": 3, "A": 3}, {"a": "A"}),  # a tie: some order, but always the same
    ],
)
def test_misspelt(counts, expected):
    assert misspelt(Counter(counts)) == expected


def test_did_you_mean():
    assert did_you_mean("Scrach", ["patch", "scratch"]) == ": did you mean 'scratch'?"
    assert did_you_mean("person", ["cat", "dog"]) == ""


def test_finder():
    finder = Finder(["a/1", "b/1", "b/2", "v1.5/x.y", "plain", "00012", "IMG_7"], {"phone": [Path("phone.heic")]})
    for written, name in {
        "a/1": "a/1", "a/1.PNG": "a/1", "./a/1.jpg": "a/1", "/data/set/b/2.jpg": "b/2", r"a\1.jpg": "a/1",
        "2": "b/2", "2.jpg": "b/2", "x.y.tif": "v1.5/x.y", "x.y": "v1.5/x.y", "sub/plain.jpg": "plain",
        " plain ": "plain",
        "1": None, "c/2": None, "": None, "x": None, "plain.txt": None, "12": None, "img_7": None, "in": None,
    }.items():  # fmt: skip
        assert finder.find(written) == name, written
    assert finder.hint("1.jpg") == "1.jpg (fits a/1 and b/1: write the folder too)"
    assert finder.hint("12.jpg") == "12.jpg (did you mean 00012?)"
    assert finder.hint("img_7") == "img_7 (did you mean IMG_7?)"
    assert finder.hint("phone.heic") == "phone.heic (there is phone.heic, but .heic is not read)"
    assert finder.hint("phone.jpg") == "phone.jpg (there is phone.heic, but .heic is not read)"
    assert finder.hint("what") == "what"


def test_unicode_forms_of_one_name_are_one_name(tmp_path):
    (tmp_path / "Ma\u0308rz.jpg").touch()  # as macOS writes it
    found, _ = scan(tmp_path, [".jpg"])
    assert Finder(found).find("M\u00e4rz.jpg") == "M\u00e4rz"


def test_scan(tmp_path):
    for name in ("b/2.JPG", "b/1.jpg", "a.x.jpg", ".hidden/3.jpg", "b/.4.jpg", "masks/5.jpg", "b/n.txt", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "link").symlink_to(tmp_path / "masks", target_is_directory=True)
    found, others = scan(tmp_path, [".jpg", ".png"], skip=[tmp_path / "masks"])
    assert {name: [path.name for path in paths] for name, paths in found.items()} == {
        "a.x": ["a.x.jpg"], "b/1": ["1.jpg", "1.png"], "b/2": ["2.JPG"]
    }  # fmt: skip
    assert list(found) == sorted(found) and list(others) == ["b/n"]


def test_lists(tmp_path):
    finder = Finder(["2007_000032", "b/2", "my photo 1"])
    path = write(
        tmp_path,
        "\ufeff# chosen by hand\r\n/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\r\n\r\n"
        "  b/2.png \r\nmy photo 1.jpg\r\n2\r\nnone.jpg\r\n",
        "list.txt",
    )
    assert read_list(path, finder) == (["2007_000032", "b/2", "my photo 1"], ["list.txt line 7: none.jpg"])
