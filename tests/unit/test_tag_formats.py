"""Tags in the form that each tool writes, files that are nearly in that form, and pickles that would do harm."""

import collections
import io
import json
import os
import pickle

import numpy as np
import PIL.Image
import pytest

from tag2mask import collect
from tag2mask.data.audit import image_of, rows_of_images
from tag2mask.data.faults import Faults
from tag2mask.data.folder import Folder
from tag2mask.data.names import Finder
from tag2mask.data.tag_formats import name_tags, read_any, read_converted, spellings, write_tags
from tag2mask.data.tag_formats.legacy_npy import read_legacy_npy
from tag2mask.data.tag_stats import class_rows, tag_stats
from tag2mask.data.tags import Row, TagTable
from tag2mask.errors import UserError


def put(path, content):
    """Write text, bytes or what becomes JSON; folders are made. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def by_image(table):
    return {row.image: row.tags for row in table.rows}


def sound(table):
    return not any(row.problems for row in table.rows)


def refused(path, said, classes=None, **options):
    """Reading must end in one line that begins with the path and matches `said`."""
    with pytest.raises(UserError, match=said) as error:
        read_any(path, classes, **options)
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text
    return text


class TestSpellings:
    @pytest.mark.parametrize(
        "address, expected",
        [
            ("a.jpg", ("a.jpg",)),
            ("set/a b.jpg", ("set/a b.jpg",)),
            ("a%20b.jpg", ("a%20b.jpg", "a b.jpg")),
            ("/data/upload/1/8ab3c4d5-name.jpg", ("8ab3c4d5-name.jpg", "name.jpg")),
            ("/data/upload/8ab3c4d5-name.jpg", ("8ab3c4d5-name.jpg", "name.jpg")),
            ("/data/upload/12/8ab3c4d5-a%20b.jpg", ("8ab3c4d5-a b.jpg", "a b.jpg")),
            ("/data/upload/1/plain.jpg", ("plain.jpg",)),
            ("http://localhost:8080/data/upload/1/8ab3c4d5-name.jpg", ("8ab3c4d5-name.jpg", "name.jpg")),
            ("/data/local-files/?d=local/path/a.jpg", ("local/path/a.jpg",)),
            ("/data/local-files/?d=local%2Fa%20b.jpg", ("local/a b.jpg",)),
            ("http://localhost:8080/data/local-files/?d=x/a.jpg", ("x/a.jpg",)),
            ("?d=local/path", ("local/path",)),
            ("s3://bucket/set/a.jpg", ("set/a.jpg",)),
            ("https://host/set/a%C3%A4.jpg?X-Amz-Signature=1&d=2", ("set/aä.jpg",)),
            ("8ab3c4d5-name.jpg", ("8ab3c4d5-name.jpg",)),  # no upload: the name of the file
        ],
    )
    def test_addresses(self, address, expected):
        assert spellings(address) == expected

    @pytest.mark.parametrize(
        "names, address, meant",
        [
            (["name"], "/data/upload/1/8ab3c4d5-name.jpg", "name"),
            (["x/name"], "/data/upload/1/8ab3c4d5-name.jpg", "x/name"),
            (["8ab3c4d5-name", "name"], "/data/upload/1/8ab3c4d5-name.jpg", "8ab3c4d5-name"),
            (["x/name", "y/name"], "/data/upload/1/8ab3c4d5-name.jpg", None),
            (["my photo (1)"], "/data/upload/1/8ab3c4d5-my_photo_1.jpg", "my photo (1)"),
            (["my photo 1", "my_photo (1)"], "/data/upload/1/8ab3c4d5-my_photo_1.jpg", None),
            (["y/my photo"], "s3://bucket/x/my_photo.jpg", None),  # another folder
            (["100%", "x"], "set/100%25.jpg", "100%"),
            (["a%20b", "a b"], "a%20b.jpg", "a%20b"),
        ],
    )
    def test_the_image_behind_an_address(self, names, address, meant):
        written = spellings(address)
        assert image_of(Row(written[-1], (), "task 1", (), written), Finder(names)) == meant

    def test_several_images_behind_an_address_are_named(self):
        names, faults = ["x/name", "y/name"], Faults()
        written = spellings("/data/upload/1/8ab3c4d5-name.jpg")
        table = TagTable((), (Row(written[-1], (), "task 7", (), written),))
        assert rows_of_images(table, Finder(names), names, strict=True, faults=faults) == {}
        with pytest.raises(UserError, match=r"task 7: name.jpg \(fits x/name and y/name: write the folder too\)"):
            faults.stop("here")


def labelme(image="a.jpg", flags=None, labels=()):
    """A file as labelme 5 writes it."""
    shapes = [
        {"label": label, "points": [[1.0, 2.0], [5.0, 2.0], [5.0, 7.0]], "group_id": None, "description": "",
         "shape_type": "polygon", "flags": {"occluded": True}, "mask": None}
        for label in labels
    ]  # fmt: skip
    return {
        "version": "5.4.1", "flags": flags or {}, "shapes": shapes, "imagePath": image, "imageData": None,
        "imageHeight": 8, "imageWidth": 8,
    }  # fmt: skip


class TestLabelme:
    def test_flags_beside_the_images(self, tmp_path):
        put(tmp_path / "a.json", labelme("a.jpg", {"dog": False, "cat": True, "unused": False}, ["tail"]))
        put(tmp_path / "sub/b.json", labelme("b.jpg", {"dog": True, "cat": True, "unused": False}))
        put(tmp_path / "sub/c.json", labelme("..\\sub\\c.png", {"dog": False, "cat": False, "unused": False}))
        put(tmp_path / "other.json", {"made": "by something else"})
        table = read_any(tmp_path)
        assert by_image(table) == {"a.jpg": ("cat",), "sub/b.jpg": ("dog", "cat"), "sub/c.png": ()}
        assert table.classes == ("dog", "cat")
        assert table.form == "labelme" and sound(table) and table.rows[1].place == "sub/b.json"

    def test_json_in_a_folder_of_its_own(self, tmp_path):
        put(tmp_path / "json/sub/a.json", labelme("../../images/sub/a.jpg", {"cat": True}))
        table = read_any(tmp_path / "json")
        assert table.rows[0].image == "images/sub/a.jpg"
        assert Finder(["sub/a"]).find(table.rows[0].image) == "sub/a"

    def test_labels_of_shapes_only_when_asked(self, tmp_path):
        put(tmp_path / "a.json", labelme("a.jpg", {}, ["cat", "cat", "dog "]))
        put(tmp_path / "b.json", labelme("b.jpg", {}, []))
        refused(tmp_path, "no image has a labelme flag.*--shapes")
        assert by_image(read_any(tmp_path, shapes=True)) == {"a.jpg": ("cat", "dog"), "b.jpg": ()}

    def test_what_is_wrong(self, tmp_path):
        put(tmp_path / "a.json", labelme("a.jpg", {"cat": True}))
        put(tmp_path / "b.json", labelme("b.jpg", {"cat": "yes"}))
        put(tmp_path / "c.json", labelme("c.jpg"))
        problems = {row.place: row.problems for row in read_any(tmp_path).rows}
        assert problems == {
            "a.json": (), "b.json": (("flags", "'cat' is 'yes'"),), "c.json": (("flags", "has none"),)
        }  # fmt: skip

    def test_what_is_no_labelme(self, tmp_path):
        put(tmp_path / "a/a.json", labelme("a.jpg", {"cat": False}))
        refused(tmp_path / "a", "no image has a labelme flag.*Set some")
        put(tmp_path / "b/a.json", '{"version": ')
        with pytest.raises(UserError, match=r"a.json: is not valid JSON"):
            read_any(tmp_path / "b")
        put(tmp_path / "c/a.json", {"x": 1})
        refused(tmp_path / "c", "holds no tags")


def task(identity, image, *annotations, **more):
    """A task as Label Studio 1.x exports it; an annotation is a list of choices, or a dict to replace its entries."""
    written = []
    for number, given in enumerate(annotations, start=1):
        choices = given if isinstance(given, list) else given.pop("choices", [])
        result = {"value": {"choices": choices}, "id": "zrh", "from_name": "choice", "to_name": "image",
                  "type": "choices", "origin": "manual"}  # fmt: skip
        entry = {
            "id": 10 * identity + number, "completed_by": 1, "result": [result] if choices else [],
            "was_cancelled": False, "ground_truth": False, "created_at": "2024-05-02T10:00:00.0Z", "lead_time": 3.2,
            "prediction": {}, "result_count": 0, "task": identity, "project": 1,
        }  # fmt: skip
        written.append(entry | (given if isinstance(given, dict) else {}))
    return {
        "id": identity, "annotations": written, "file_upload": image.rpartition("/")[2], "drafts": [],
        "predictions": [], "data": {"image": image}, "meta": {}, "inner_id": identity, "total_annotations": 1,
    } | more  # fmt: skip


TASKS = [
    task(1, "/data/upload/1/8ab3c4d5-a.jpg", ["cat"]),
    task(2, "/data/upload/1/00b3c4d5-b.jpg", ["cat", "dog"]),
    task(3, "/data/local-files/?d=set/c.jpg", []),
]
MIN = {"annotator": 1, "created_at": "2024-05-02T10:00:00Z", "updated_at": "2024-05-02T10:00:09Z", "lead_time": 3.2}
EXPECTED = {"a.jpg": ("cat",), "b.jpg": ("cat", "dog"), "set/c.jpg": ()}


class TestLabelStudio:
    def test_json(self, tmp_path):
        table = read_any(put(tmp_path / "project-1-at-2024.json", TASKS))
        assert by_image(table) == EXPECTED and table.classes == ("cat", "dog") and sound(table)
        assert [row.place for row in table.rows] == ["task 1", "task 2", "task 3"]
        assert table.form == "Label Studio" and table.notes == ()

    def test_old_exports_call_annotations_completions(self, tmp_path):
        old = [{key.replace("annotations", "completions"): value for key, value in entry.items()} for entry in TASKS]
        assert by_image(read_any(put(tmp_path / "t.json", old))) == EXPECTED

    def test_what_counts(self, tmp_path):
        skipped = {"choices": ["dog"], "was_cancelled": True}
        table = read_any(put(tmp_path / "t.json", [
            task(1, "a.jpg", skipped, ["cat"]),
            task(2, "b.jpg", ["dog", "cat"], ["cat", "dog"]),
            task(3, "c.jpg", ["dog"], {"choices": ["cat"], "ground_truth": True}),
            task(4, "d.jpg", ["dog"], ["cat"]),
            task(5, "e.jpg"),
            task(6, "f.jpg", skipped | {"choices": ["dog"]}),
        ]))  # fmt: skip
        assert by_image(table) == {"a.jpg": ("cat",), "b.jpg": ("dog", "cat"), "c.jpg": ("cat",), "d.jpg": ("dog",)}
        said = "annotation 41 says dog; annotation 42 says cat: mark one as ground truth"
        assert [row.problems for row in table.rows] == [(), (), (), (("choices", said),)]
        assert table.notes == ("2 tasks without annotation are left out",)

    def test_regions_and_second_controls(self, tmp_path):
        box = {"x": 1, "y": 2, "width": 3, "height": 4, "rotation": 0}
        regions = [
            {"value": box | {"rectanglelabels": ["tail"]}, "from_name": "label", "type": "rectanglelabels"},
            {"value": box | {"choices": ["blurred"]}, "from_name": "region", "type": "choices"},
        ]
        quality = {"value": {"choices": ["good"]}, "from_name": "quality", "type": "choices"}
        only = put(tmp_path / "only.json", [task(1, "a.jpg", {"result": regions})])
        refused(only, "has no choices, only regions.*--shapes")
        assert by_image(read_any(only, shapes=True)) == {"a.jpg": ("tail",)}
        chosen = task(1, "a.jpg", ["cat"])
        chosen["annotations"][0]["result"] += [*regions, quality]
        table = read_any(put(tmp_path / "both.json", [chosen]))
        assert by_image(table) == {"a.jpg": ("cat", "good")}
        assert table.notes == ("choices of choice and quality are all taken for tags",)

    def test_where_the_image_stands(self, tmp_path):
        first = task(1, "ignored", ["cat"], data={"caption": "a.b", "photo": "s3://x/set/a.png"})
        second = task(2, "ignored", ["cat"], data={"caption": "no image"}, file_upload="8ab3c4d5-b.png")
        table = read_any(put(tmp_path / "t.json", [first, second]))
        assert [row.image for row in table.rows] == ["set/a.png", "b.png"]
        third = task(3, "ignored", ["cat"], data={"n": 3}, file_upload=None)
        refused(put(tmp_path / "u.json", [third]), "task 3 names no image")

    @pytest.mark.parametrize(
        "content, said",
        [
            ([task(1, "a.jpg")], "no task has an annotation"),
            ([task(1, "a.jpg", ["cat"]), {"id": 2}], "entry 2 is no task"),
        ],
    )
    def test_wrong_json(self, tmp_path, content, said):
        refused(put(tmp_path / "t.json", content), said)

    def test_json_min(self, tmp_path):
        content = [
            {"image": "/data/upload/1/8ab3c4d5-a.jpg", "id": 1, "choice": "cat", "annotation_id": 1, **MIN},
            {"image": "/data/upload/1/8ab3c4d5-a.jpg", "id": 1, "choice": "cat", "annotation_id": 9, **MIN},
            {"image": "/data/upload/1/1ab3c4d5-b.jpg", "id": 2, "choice": {"choices": ["cat", "dog"]},
             "annotation_id": 2, **MIN},
            {"image": "/data/local-files/?d=set/c.jpg", "id": 3, "annotation_id": 3, **MIN},
        ]  # fmt: skip
        table = read_any(put(tmp_path / "t.json", content))
        assert by_image(table) == EXPECTED and len(table.rows) == 3
        assert [row.place for row in table.rows] == ["record 1", "record 3", "record 4"]

    @pytest.mark.parametrize("ending, mark", [("csv", ","), ("tsv", "\t")])
    def test_csv(self, tmp_path, ending, mark):
        lines = [
            ["annotation_id", "annotator", "created_at", "defect", "id", "image", "lead_time", "updated_at"],
            ["1", "1", "2024", "cat", "1", "/data/upload/1/8ab3c4d5-a.jpg", "3.2", "2024"],
            [
                "2",
                "1",
                "2024",
                '"{""choices"": [""cat"", ""dog""]}"',
                "2",
                "/data/upload/1/8ab3c4d5-b.jpg",
                "1",
                "2024",
            ],
            ["3", "1", "2024", "", "3", "/data/local-files/?d=set/c.jpg", "3.2", "2024"],
        ]
        table = read_any(put(tmp_path / f"t.{ending}", "".join(mark.join(line) + "\n" for line in lines)))
        assert by_image(table) == EXPECTED and [row.place for row in table.rows] == ["row 2", "row 3", "row 4"]

    def test_a_field_of_choices_must_be_found(self, tmp_path):
        record = {"image": "a.jpg", "id": 1, "annotation_id": 1, **MIN}
        refused(put(tmp_path / "a.json", [record | {"mood": "x", "place": "y"}]), "which of image, mood, place holds")
        assert by_image(read_any(put(tmp_path / "b.json", [record | {"mood": "cat"}]))) == {"a.jpg": ("cat",)}
        refused(put(tmp_path / "c.json", [{**record, "image": 3, "choice": "cat"}]), "record 1 names no image")


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <id>1</id><name>name of the task</name><size>3</size><mode>annotation</mode>
      <labels>
        <label><name>dog</name><color>#ff0000</color><type>tag</type><attributes></attributes></label>
        <label><name>cat</name><color>#00ff00</color><type>any</type>
          <attributes><attribute><name>age</name><input_type>text</input_type></attribute></attributes></label>
        <label><name>unused</name><type>any</type><attributes></attributes></label>
      </labels>
    </task>
    <dumped>2024-05-02 10:00:00.0+00:00</dumped>
  </meta>
  <image id="0" name="a.jpg" width="8" height="8">
    <tag label="cat" source="manual"><attribute name="age">3</attribute></tag>
  </image>
  <image id="1" name="sub/b &amp; c.jpg" width="8" height="8">
    <box label="cat" source="manual" occluded="0" xtl="1.0" ytl="1.0" xbr="3.0" ybr="3.0" z_order="0"></box>
    <polygon label="cat" source="manual" occluded="0" points="1,1;2,2;3,1" z_order="0"></polygon>
    <skeleton label="dog" source="manual" z_order="0"><points label="nose" outside="0" points="1,1"></points></skeleton>
  </image>
  <image id="2" name="c.jpg" width="8" height="8">
  </image>
</annotations>
"""


class TestCvat:
    def test_tags_and_shapes(self, tmp_path):
        table = read_any(put(tmp_path / "annotations.xml", CVAT))
        assert by_image(table) == {"a.jpg": ("cat",), "sub/b & c.jpg": ("cat", "dog"), "c.jpg": ()}
        assert table.classes == ("dog", "cat") and sound(table)
        assert [row.place for row in table.rows] == ["line 16", "line 19", "line 24"]
        assert table.notes == ("labels of shapes count as tags (1 box, 1 polygon, 1 skeleton)",)
        assert read_any(tmp_path) == table  # the unpacked export

    def test_a_shape_without_a_label(self, tmp_path):
        table = read_any(put(tmp_path / "a.xml", CVAT.replace('<tag label="cat"', "<tag")))
        assert table.rows[0].problems == (("label", "<tag> in line 17 has no label"),)

    @pytest.mark.parametrize(
        "content, said",
        [
            (CVAT[:-20], "not valid XML"),
            ("", "not valid XML"),
            ("<annotation><folder>VOC2012</folder></annotation>", "first element is <annotation>"),
            ("<annotations><track id='0' label='cat'></track></annotations>", "'CVAT for video'"),
            ("<annotations><version>1.1</version></annotations>", "holds no <image>"),
            ('<!DOCTYPE a [<!ENTITY x "y">]>' + CVAT.partition("\n")[2], "document type"),
            ('<!DOCTYPE annotations SYSTEM "http://localhost/x.dtd"><annotations/>', "document type"),
        ],
    )
    def test_other_xml(self, tmp_path, content, said):
        refused(put(tmp_path / "a.xml", content), said)

    def test_entities_are_not_expanded(self, tmp_path):
        secret = put(tmp_path / "secret.txt", "hidden")
        start = f'<!DOCTYPE annotations [<!ENTITY leak SYSTEM "{secret.as_uri()}">]>'
        said = refused(
            put(
                tmp_path / "a.xml",
                f'{start}<annotations><image name="a"><tag label="x">&leak;</tag></image></annotations>',
            ),
            "document type",
        )
        assert "hidden" not in said

    def test_missing(self, tmp_path):
        refused(tmp_path / "none.xml", "cannot be opened")


def coco(**changes):
    """A small instances file: ids with gaps, a crowd, an image without objects."""
    return {
        "info": {"year": 2014}, "licenses": [],
        "images": [
            {"id": 57, "file_name": "b.jpg", "height": 8, "width": 8},
            {"id": 9, "file_name": "sub/a.jpg", "height": 8, "width": 8, "coco_url": "http://images/a.jpg"},
            {"id": 100, "file_name": "c.jpg", "height": 8, "width": 8},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 90, "bbox": [0, 0, 3, 3], "iscrowd": 0, "area": 9,
             "segmentation": [[0, 0, 3, 0, 3, 3]]},
            {"id": 2, "image_id": 9, "category_id": 18, "bbox": [0, 0, 3, 3], "iscrowd": 0, "area": 9},
            {"id": 3, "image_id": 57, "category_id": 18, "bbox": [0, 0, 3, 3], "iscrowd": 1, "area": 9,
             "segmentation": {"counts": [0, 64], "size": [8, 8]}},
            {"id": 4, "image_id": 9, "category_id": 90, "bbox": [0, 0, 3, 3], "iscrowd": 0, "area": 9},
        ],
        "categories": [
            {"id": 90, "name": "toothbrush", "supercategory": "indoor"}, {"id": 18, "name": "dog"},
            {"id": 1, "name": "person"},
        ],
    } | changes  # fmt: skip


class TestCoco:
    def test_annotations_become_tags(self, tmp_path):
        table = read_any(put(tmp_path / "instances.json", coco()))
        assert by_image(table) == {"b.jpg": ("dog",), "sub/a.jpg": ("toothbrush", "dog"), "c.jpg": ()}
        assert table.classes == ("dog", "toothbrush") and sound(table)  # by id; nobody is a person
        assert table.form == "COCO JSON" and table.notes == ("tags are the classes of 4 annotations",)

    def test_annotations_that_lead_nowhere(self, tmp_path):
        wrong = [*coco()["annotations"][:1], {"image_id": 7, "category_id": 18}, {"image_id": 9, "category_id": 2}]
        table = read_any(put(tmp_path / "i.json", coco(annotations=wrong)))
        assert [(row.place, row.problems) for row in table.rows if row.problems] == [
            ("image 2", (("category_id", "annotation 3 has category_id 2, which is no category"),)),
            ("annotation 2", (("image_id", "7 is no image"),)),
        ]

    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"images": [{"id": 1}]}, "KeyError.*file_name"),
            ({"categories": [{"id": 1}]}, "no COCO file of objects"),
            ({"annotations": [{"id": 1, "image_id": 9, "caption": "a dog"}]}, "category_id"),
            ({"annotations": [{"image_id": [9], "category_id": 1}]}, "no COCO file of objects"),
            ({"images": [3]}, "no COCO file of objects"),
            ({"images": coco()["images"] * 2}, "two images have the id 57"),
        ],
    )
    def test_other_json(self, tmp_path, changes, said):
        refused(put(tmp_path / "i.json", coco(**changes)), said)


class TestHuggingFace:
    @pytest.mark.parametrize(
        "name, content",
        [
            ("metadata.csv", "file_name,label\na.jpg,cat\nsub/b.jpg,cat|dog\nc.jpg,\n"),
            (
                "metadata.csv",
                'caption,file_name,labels\nx,a.jpg,"[\'cat\']"\ny,sub/b.jpg,"[""cat"", ""dog""]"\nz,c.jpg,[]\n',
            ),
            ("metadata.csv", "file_name,cat,dog\na.jpg,1,0\nsub/b.jpg,1,1\nc.jpg,0,0\n"),
            (
                "metadata.jsonl",
                '{"file_name": "a.jpg", "label": "cat"}\n\n'
                '{"file_name": "sub/b.jpg", "label": ["cat", "dog"]}\n{"file_name": "c.jpg", "label": null}\n',
            ),
            (
                "metadata.jsonl",
                '{"labels": ["cat"], "file_name": "a.jpg"}\n'
                '{"file_name": "sub/b.jpg", "labels": ["cat", "dog"]}\n{"file_name": "c.jpg", "labels": []}',
            ),
        ],
    )
    def test_metadata(self, tmp_path, name, content):
        path = put(tmp_path / name, content)
        for given in (path, tmp_path):
            table = read_any(given)
            assert by_image(table) == {"a.jpg": ("cat",), "sub/b.jpg": ("cat", "dog"), "c.jpg": ()}, given
            assert table.classes == ("cat", "dog") and sound(table)

    def test_a_file_for_each_split(self, tmp_path):
        put(tmp_path / "test/metadata.csv", "file_name,label\nb.jpg,dog\n")
        put(tmp_path / "train/metadata.jsonl", '{"file_name": "a.jpg", "label": "cat"}\n')
        table = read_any(tmp_path)
        assert by_image(table) == {"test/b.jpg": ("dog",), "train/a.jpg": ("cat",)}
        assert [row.place for row in table.rows] == ["test/metadata.csv row 2", "train/metadata.jsonl line 1"]

    def test_numbers_need_names(self, tmp_path):
        path = put(
            tmp_path / "metadata.jsonl", '{"file_name": "a.jpg", "labels": [1, 0]}\n{"file_name": "b", "label": 2}'
        )
        refused(path, "line 1 has a number for a label.*--classes")
        table = read_any(path, ["cat", "dog"])
        assert table.rows[0].tags == ("dog", "cat") and table.rows[1].problems == (("labels", "2"),)
        csv = put(tmp_path / "x/metadata.csv", "file_name,label\na.jpg,1\n")
        refused(csv, "row 2 has a number for a label")
        assert by_image(read_any(csv, ["cat", "dog"])) == {"a.jpg": ("dog",)}

    @pytest.mark.parametrize(
        "name, content, said",
        [
            ("metadata.parquet", b"PAR1", "parquet is not read"),
            ("metadata.jsonl", '{"file_name": "a.jpg"', "line 1 is not valid JSON"),
            ("metadata.jsonl", "3\n", "line 1 is not of the form"),
            ("metadata.jsonl", "\n", "holds no row"),
            ("metadata.jsonl", '{"file_name": "a.jpg", "text": "x"}', "line 1 has no file_name or no label"),
        ],
    )
    def test_wrong_metadata(self, tmp_path, name, content, said):
        refused(put(tmp_path / name, content), said)

    def test_splits_with_different_columns(self, tmp_path):
        put(tmp_path / "a/metadata.csv", "file_name,cat\na.jpg,1\n")
        put(tmp_path / "b/metadata.csv", "file_name,dog\na.jpg,1\n")
        refused(tmp_path, "different columns")


class TestNames:
    @pytest.mark.parametrize("brackets", ["[1 0 0 1]", "[1001]", "[1, 0, 0, 1]", "[1_0_0_1]"])
    def test_brackets(self, brackets):
        table = name_tags([f"set/x-3{brackets}", "y[0 0 0 0]", "z"], ["a", "b", "c", "d"], "photos")
        assert by_image(table) == {f"set/x-3{brackets}": ("a", "d"), "y[0 0 0 0]": ()}
        assert table.classes == ("a", "b", "c", "d")

    def test_brackets_and_classes_must_fit(self):
        with pytest.raises(UserError, match=r"photos: tags stand in the names.*x\[1 0\]. Name the 2 classes"):
            name_tags(["x[1 0]"], None, "photos")
        table = name_tags(["x[1 0]", "y[1]"], ["a", "b"], "photos")
        assert table.rows[1].problems == (("brackets", "[1] has 1 digits, but there are 2 classes"),)

    def test_folders_win_where_brackets_are_rare(self):
        assert by_image(name_tags(["cat/x[1]", "cat/2", "dog/3"], None, "p"))["cat/x[1]"] == ("cat",)
        with pytest.raises(UserError, match="p: no tags"):
            name_tags(["a", "b"], None, "p")

    def test_parts_of_a_data_set_are_no_tags(self):
        with pytest.raises(UserError, match=r"^photos: its sub-folders \(test, train\) are parts .*photos/train, or"):
            name_tags(["train/cat/1", "test/cat/2", "loose"], None, "photos")
        assert by_image(name_tags(["train/1", "bus/2"], None, "photos")) == {"train/1": ("train",), "bus/2": ("bus",)}

    def test_folders_by_path(self, tmp_path):
        for name in ("cat/1", "cat/2", "background/3"):
            save(tmp_path / f"{name}.png", np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8))
        assert by_image(read_any(tmp_path)) == {"cat/1": ("cat",), "cat/2": ("cat",), "background/3": ()}
        refused(tmp_path / "cat", "is a folder, not a tag file")
        refused(tmp_path / "none", "tags are read from")


def save(path, array, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = PIL.Image.fromarray(array)
    if palette:
        picture.putpalette(list(range(256)) * 3)
    picture.save(path)


class TestMasks:
    def test_what_a_mask_shows(self, tmp_path):
        masks = {"a": [0, 2, 255], "sub/b": [1, 2, 0], "c": [0, 0, 255]}
        for name, values in masks.items():
            save(tmp_path / f"{name}.png", np.array([values], np.uint8), palette=name == "a")
        table = read_any(tmp_path, ["cat", "dog"])
        assert by_image(table) == {"a": ("dog",), "sub/b": ("cat", "dog"), "c": ()}
        assert table.derived == "masks" and table.notes == ("tags are derived from masks",)
        assert table.classes == ("cat", "dog")
        refused(tmp_path, "holds index masks. Name their classes")

    def test_a_mask_with_other_values(self, tmp_path):
        for number in range(6):
            save(tmp_path / f"{number}.png", np.array([[0, 1 + 8 * (number == 1)]], np.uint8))
        (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:40])
        rows = {row.image: row for row in read_any(tmp_path, ["cat"]).rows}
        assert rows["0"].tags == ("cat",) and rows["1"].problems[0][1].startswith(
            "holds the value 9, which is no class"
        )
        assert "damaged" in rows["5"].problems[0][1]

    def test_a_data_set_says_that_its_tags_come_from_masks(self, tmp_path):
        rng = np.random.default_rng(0)
        for number, value in enumerate((1, 1, 2, 2, 0)):
            save(tmp_path / f"images/{number}.png", rng.integers(0, 256, (8, 8, 3), np.uint8))
            save(tmp_path / f"masks/{number}.png", np.full((8, 8), value, np.uint8))
        put(tmp_path / "tags.csv", "image,cat,dog\n0,1,0\n1,1,0\n2,0,1\n3,0,1\n4,0,0\n")
        images, classes = str(tmp_path / "images"), ["cat", "dog"]
        derived = Folder(images=images, tags=str(tmp_path / "masks"), classes=classes)
        written = Folder(images=images, tags=str(tmp_path / "tags.csv"))
        assert derived.split("train").tags.tolist() == written.split("train").tags.tolist()
        assert derived.summary()["tags_derived_from"] == "masks" and "tags_derived_from" not in written.summary()
        stages = {"cams": {"kind": "cams", "folder": "cams-0123456789", "inputs": {}}}
        learnt = [
            collect.supervision(tmp_path, {"stages": stages, "supervision": [], "summary": source.summary()})
            for source in (derived, written)
        ]
        assert learnt == [["image tags derived from masks"], ["image tags"]]


def legacy(path, content, protocol=None):
    """cls_labels.npy: what np.save makes of a dictionary, by an older protocol if given."""
    if protocol is None:
        np.save(path, content)
        return path
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(np.array(content, dtype=object), file, protocol=protocol)
    return path


class Calls:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class TestLegacyNpy:
    @pytest.mark.parametrize("protocol", [None, 0, 1, 2, 3, 4, 5])
    @pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int64", "bool", ">f4"])
    def test_arrays_by_name(self, tmp_path, protocol, dtype):
        content = {"2007_000032": np.array([1, 0], dtype), "x": np.array([1, 1], dtype), "y": np.array([0, 0], dtype)}
        table = read_legacy_npy(legacy(tmp_path / "l.npy", content, protocol), ["cat", "dog"])
        assert by_image(table) == {"2007_000032": ("cat",), "x": ("cat", "dog"), "y": ()}
        assert sound(table) and table.classes == ("cat", "dog")

    def test_names_that_are_numbers(self, tmp_path):
        one = np.ones(1, np.float32)
        content = {2007000032: one, np.int64(2008000001): one, 9: one, np.str_("a"): one}
        rows = read_legacy_npy(legacy(tmp_path / "l.npy", content), ["cat"]).rows
        assert [row.image for row in rows] == ["2007_000032", "2008_000001", "9", "a"]
        finder = Finder(["2007_000032", "COCO_train2014_000000000009", "2008000001", "a"])
        assert [image_of(row, finder) for row in rows] == [
            "2007_000032", "2008000001", "COCO_train2014_000000000009", "a"
        ]  # fmt: skip

    def test_columns_first_and_views(self, tmp_path):
        both = np.asfortranarray(np.array([[1, 0], [0, 1]], np.float32))
        table = read_legacy_npy(legacy(tmp_path / "l.npy", {"a": both[0], "b": both[:, 1:]}), ["cat", "dog"])
        assert by_image(table) == {"a": ("cat",), "b": ("dog",)}

    def test_a_pickle_that_would_write_a_file_does_not(self, tmp_path):
        target = tmp_path / "written"
        for number, call in enumerate([
            Calls(os.system, f"touch {target}"), Calls(eval, f"open({str(target)!r}, 'w')"), Calls(target.touch)
        ]):  # fmt: skip
            path = legacy(tmp_path / f"{number}.npy", {"a": call})
            with pytest.raises(UserError, match=r"asks for .*which no array needs") as error:
                read_legacy_npy(path, ["cat"])
            assert "\n" not in str(error.value) and not target.exists()
        np.load(tmp_path / "0.npy", allow_pickle=True)  # it would have
        assert target.exists()

    @pytest.mark.parametrize(
        "program",
        [
            b"cnumpy\ndtype\n(dVmake\ncnumpy\nndarray\nsb.",  # change the function behind numpy.dtype
            b"cnumpy\ndtype\n(N(dVmake\nI1\nstb.",
            b"cbuiltins\ngetattr\n.",
            b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
            b"\x80\x04\x8c\x05numpy\x8c\x08f2py.run\x93.",
            b"\x80\x02Pperson\n.",
            b"garbage",
            b"",
        ],
    )
    def test_programs_by_hand(self, tmp_path, program):
        with io.BytesIO() as head:
            np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
            path = put(tmp_path / "l.npy", head.getvalue() + program)
        with pytest.raises(UserError) as error:
            read_legacy_npy(path, ["cat"])
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
        content = {"a": np.ones(1)}  # and nothing of it stays
        assert by_image(read_legacy_npy(legacy(tmp_path / "m.npy", content), ["cat"])) == {"a": ("cat",)}

    @pytest.mark.parametrize(
        "content, said",
        [
            ([1, 2], "is no .npy file with a dictionary|holds no dictionary"),
            ({}, "holds no dictionary"),
            ({"a": 1}, "entry 1 is no name with an array"),
            ({"a": np.array(["x"])}, "entry 1 is no name with an array"),
            ({"a": np.array([{}], dtype=object)}, "entry 1 is no name with an array"),
            ({(1, 2): np.ones(1)}, "entry 1 is no name with an array"),
            ({"a": np.ones(3)}, "entry 1 has 3 classes, but 1 are named"),
            ({"a": np.ones(1), "b": collections.deque()}, "asks for collections.deque"),
        ],
    )
    def test_other_content(self, tmp_path, content, said):
        array = np.empty((), dtype=object)
        array[()] = content
        np.save(tmp_path / "l.npy", array)
        with pytest.raises(UserError, match=said) as error:
            read_legacy_npy(tmp_path / "l.npy", ["cat"])
        assert "\n" not in str(error.value)

    def test_other_files(self, tmp_path):
        np.save(tmp_path / "plain.npy", np.ones((2, 2)))
        for path, said in [
            (tmp_path / "plain.npy", "holds a plain array"),
            (tmp_path / "none.npy", "cannot be opened"),
            (put(tmp_path / "text.npy", "image,cat"), "is no .npy file"),
        ]:
            with pytest.raises(UserError, match=said):
                read_legacy_npy(path, ["cat"])

    def test_values_between(self, tmp_path):
        table = read_legacy_npy(legacy(tmp_path / "l.npy", {"a": np.array([0.5])}), ["cat"])
        assert table.rows[0].problems == (("array", "values other than 0 and 1"),)

    def test_it_is_never_read_without_being_asked_for(self, tmp_path):
        refused(legacy(tmp_path / "l.npy", {"a": np.ones(1)}), "tags convert --legacy-npy l.npy", ["cat"])


def table_of(tags, order=()):
    return TagTable((), tuple(Row(name, names, f"row {n}") for n, (name, names) in enumerate(tags.items())), order)


class TestWriting:
    TAGS = {"b.jpg": ("dog", "ant"), "sub/ä, 1.jpg": (), 'x "y".png': ("cat",)}  # noqa: RUF012

    @pytest.mark.parametrize("form, name", [(None, "t.csv"), ("names", "t.csv"), (None, "t.json"), ("json", "t.json")])
    def test_round_trip(self, tmp_path, form, name):
        table = table_of(self.TAGS, ("dog", "cat", "ant"))
        write_tags(table, tmp_path / name, form)
        again = read_any(tmp_path / name)
        assert {n: set(t) for n, t in by_image(again).items()} == {n: set(t) for n, t in self.TAGS.items()}
        assert [row.image for row in again.rows] == list(self.TAGS) and sound(again)
        assert again.classes == (("dog", "cat", "ant") if (form, name) == (None, "t.csv") else ("ant", "cat", "dog"))
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_a_class_without_an_image_keeps_its_column(self, tmp_path):
        write_tags(table_of({"a": ("cat",)}, ("dog", "cat")), tmp_path / "t.csv")
        assert (tmp_path / "t.csv").read_text() == "image,dog,cat\na,0,1\n"

    def test_nothing_is_overwritten(self, tmp_path):
        path = put(tmp_path / "t.csv", "mine")
        with pytest.raises(UserError, match=r"t.csv: exists"):
            write_tags(table_of(self.TAGS), path)
        assert path.read_text() == "mine"

    @pytest.mark.parametrize(
        "name, form, said",
        [("t.json", "names", "written to a .csv"), ("t.txt", None, ".csv file"), ("no/t.csv", None, "no folder")],
    )
    def test_wrong_targets(self, tmp_path, name, form, said):
        with pytest.raises(UserError, match=said):
            write_tags(table_of(self.TAGS), tmp_path / name, form)

    @pytest.mark.parametrize(
        "tags, form",
        [
            ({"a": ("x;y",)}, "names"),
            ({"a": ("x|y",)}, "names"),
            ({"a": ("label",)}, "one-hot"),  # would be read as a column of names
            ({" a": ("x",)}, "one-hot"),
        ],
    )
    def test_what_would_read_back_differently_is_not_written(self, tmp_path, tags, form):
        with pytest.raises(UserError, match=r"do not survive in this form. Write .json"):
            write_tags(table_of(tags), tmp_path / "t.csv", form)
        assert list(tmp_path.iterdir()) == []
        write_tags(table_of(tags), tmp_path / "t.json")
        assert by_image(read_any(tmp_path / "t.json")) == tags


def in_labelme(root):
    for name in "abc":
        put(root / "in" / f"{name}.json", labelme(f"{name}.png", {"cat": name in "ab", "dog": name == "b"}))
    return root / "in"


def in_label_studio(root):
    tasks = [
        task(1, "/data/upload/1/8ab3c4d5-a.png", ["cat"]),
        task(2, "s3://x/b.png", ["cat", "dog"]),
        task(3, "/data/local-files/?d=set/deep/c.png", []),
    ]
    return put(root / "in.json", tasks)


def in_cvat(root):
    return put(root / "in.xml", CVAT.replace("sub/b &amp; c", "b").replace(".jpg", ".png"))


def in_coco(root):
    content = {
        "images": [{"id": 3 * k, "file_name": f"{name}.png"} for k, name in enumerate("abc")],
        "annotations": [{"image_id": i, "category_id": c} for i, c in ((0, 4), (3, 4), (3, 8))],
        "categories": [{"id": 8, "name": "dog"}, {"id": 4, "name": "cat"}],
    }
    return put(root / "in.json", content)


def in_hugging_face(root):
    lines = [{"file_name": f"{n}.png", "labels": t} for n, t in zip("abc", (["cat"], ["cat", "dog"], []), strict=True)]
    return put(root / "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


class TestConverting:
    @pytest.mark.parametrize("form", [in_labelme, in_label_studio, in_cvat, in_coco, in_hugging_face])
    @pytest.mark.parametrize("name", ["out.csv", "out.json"])
    def test_every_form_gives_the_same_table_again(self, tmp_path, form, name):
        for image in "abc":
            save(tmp_path / f"photos/deep/{image}.png", np.zeros((2, 2, 3), np.uint8))
        table = read_converted(form(tmp_path), images=tmp_path / "photos")
        expected = {"deep/a.png": {"cat"}, "deep/b.png": {"cat", "dog"}, "deep/c.png": set()}
        assert {n: set(t) for n, t in by_image(table).items()} == expected
        write_tags(table, tmp_path / name)
        again = read_any(tmp_path / name)
        assert {n: set(t) for n, t in by_image(again).items()} == expected
        assert set(again.classes) == {"cat", "dog"} and (name == "out.json" or again.classes == table.classes)

    def test_all_faults_in_one_report(self, tmp_path):
        for image in ("x/a", "y/a", "b"):
            save(tmp_path / f"photos/{image}.png", np.zeros((2, 2, 3), np.uint8))
        path = put(tmp_path / "t.csv", "image,tags\na,cat\nb,dgo\nb,dog\nnone,dog\n")
        with pytest.raises(UserError) as error:
            read_converted(path, ["cat", "dog"], tmp_path / "photos")
        said = str(error.value)
        for part in ("row 2: a (fits x/a and y/a", "row 5: none", "b: row 3 and row 4", "'dgo': did you mean 'dog'?"):
            assert part in said
        with pytest.raises(UserError, match="b: row 3 and row 4"):
            read_converted(path)

    def test_options_that_make_no_sense(self, tmp_path):
        path = put(tmp_path / "t.csv", "image,tags\na,cat\n")
        with pytest.raises(UserError, match=r"--images: .*none is no folder"):
            read_converted(path, images=tmp_path / "none")
        with pytest.raises(UserError, match="must name each class once"):
            read_converted(path, ["cat", "cat"])
        with pytest.raises(UserError, match="has no names of classes"):
            read_converted(path, legacy_npy=True)

    def test_images_that_are_left_over_are_counted(self, tmp_path):
        for image in "ab":
            save(tmp_path / f"photos/{image}.png", np.zeros((2, 2, 3), np.uint8))
        table = read_converted(put(tmp_path / "t.csv", "image,tags\na,cat\n"), images=tmp_path / "photos")
        assert "1 images of" in table.notes[0]


@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
def test_json_that_is_nested_too_deep(tmp_path, name):
    refused(put(tmp_path / name, "[" * 100_000), "is not valid JSON")


def test_a_packed_export_is_to_be_unpacked(tmp_path):
    refused(put(tmp_path / "t.zip", b"PK"), "Unpack it")


def slow_stats(table):
    """The numbers of tag_stats one by one."""
    classes = {}
    for name in table.classes:
        having = [row for row in table.rows if name in row.tags]
        together = collections.Counter(tag for row in having for tag in row.tags if tag != name)
        alone = sum(len(row.tags) == 1 for row in having)
        classes[name] = {"images": len(having), "alone": alone, "together": dict(together)}
    return classes


def test_stats():
    rng = np.random.default_rng(1)
    names = [f"c{k}" for k in range(8)]
    tags = {str(n): tuple(name for name in names if rng.random() < 0.3) for n in range(200)}
    table = table_of(tags, tuple(names))
    found = tag_stats(table)
    for name, expected in slow_stats(table).items():
        got = found["classes"][name]
        assert {key: got[key] for key in expected} == expected
        assert list(got["together"].values()) == sorted(got["together"].values(), reverse=True)
        assert got["share"] == pytest.approx(expected["images"] / 200)
    assert found["images"] == 200 and found["without_tag"] == sum(not t for t in tags.values())
    sizes = collections.Counter(len(t) for t in tags.values())
    assert found["tags_per_image"] == {str(size): sizes[size] for size in sorted(sizes)}
    assert found["mean_tags"] == pytest.approx(np.mean([len(t) for t in tags.values()]))
    assert json.loads(json.dumps(found)) == found
    rows = class_rows(found)
    assert [row["class"] for row in rows] == names and rows[0]["together with"].endswith("and 2 more")
