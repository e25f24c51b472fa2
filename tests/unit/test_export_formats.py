"""Every format of `tag2mask export` is read back by somebody else's reader, or by one written from its description."""

from __future__ import annotations

import io
import json
import runpy
import zipfile
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from scipy import ndimage

from tag2mask.data.images import read_image
from tag2mask.errors import UserError
from tag2mask.export import voc_palette, write_mask
from tag2mask.export.coco import export_coco
from tag2mask.export.cvat import export_cvat
from tag2mask.export.folders import new_folder
from tag2mask.export.huggingface import export_huggingface
from tag2mask.export.label_studio import brush_code, export_label_studio
from tag2mask.export.labelme import export_labelme
from tag2mask.export.mask_set import Item, MaskSet
from tag2mask.export.mmseg import export_mmseg
from tag2mask.export.objects import components, numbered_objects
from tag2mask.export.pictures import export_pictures
from tag2mask.export.polygons import polygon
from tag2mask.exporting import collect_masks

CLASSES = ("fox", "sea urchin", "<a> & 'b'")
NAMES = ("b", "sub folder/ü 1", "sub folder/a", "empty", "dots")
SIZES = ((40, 61), (33, 20), (24, 24), (9, 30), (48, 48))


def blobs(rng, height, width):
    """A mask with holes, islands in holes, parts that touch at corners, single pixels and ignored pixels."""
    smooth = ndimage.gaussian_filter(rng.random((3, height, width)), (0, 1.5, 1.5))
    mask = np.where(smooth.max(axis=0) > np.median(smooth.max(axis=0)), smooth.argmax(axis=0) + 1, 0)
    mask[rng.random(mask.shape) > 0.97] = 0
    mask[rng.random(mask.shape) > 0.98] = 2
    mask[:3, : width // 2] = 255
    return mask.astype(np.uint8)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(root, name -> mask): images in root/images, their masks in root/masks."""
    root, rng, masks = tmp_path_factory.mktemp("drawn"), np.random.default_rng(0), {}
    for name, (height, width) in zip(NAMES, SIZES, strict=True):
        masks[name] = blobs(rng, height, width)
        if name == "empty":
            masks[name][:] = 0
        if name == "dots":
            masks[name][:] = 0
            masks[name][::2, ::2] = 1  # 576 objects
            masks[name][40:, 40:] = 3
        write_mask(root / "masks" / f"{name}.png", masks[name])
        path = root / "images" / f"{name}.{'jpg' if name == 'b' else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    return root, masks


@pytest.fixture(scope="module")
def masks(drawn):
    return collect_masks(images=drawn[0] / "images", masks=drawn[0] / "masks", classes=CLASSES)


def seen(mask):
    """What is left of a mask in a format of objects: ignored pixels are in none."""
    return np.where(mask == 255, 0, mask)


def assert_same(found, wanted, names=NAMES):
    assert set(found) == set(names)
    for name in names:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


# Objects and outlines


def flooded(mask):
    """{(class, pixels), ...}: connected parts by flood fill, one pixel after the other."""
    left = {(y, x) for y, x in np.argwhere((mask > 0) & (mask < 255)).tolist()}
    parts = set()
    while left:
        queue = [left.pop()]
        label = mask[queue[0]]
        part = set(queue)
        while queue:
            y, x = queue.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            for place in near:
                if mask[place] == label:
                    left.remove(place)
                    part.add(place)
                    queue.append(place)
        parts.add((int(label), frozenset(part)))
    return parts


def pixels_of(one):
    x, y = one.corner
    return frozenset((int(py) + y, int(px) + x) for py, px in np.argwhere(one.pixels))


def test_components_are_those_of_a_flood_fill(drawn):
    for mask in drawn[1].values():
        found = [(one.label, pixels_of(one)) for one in components(mask)]
        assert len(found) == len(set(found))
        assert set(found) == flooded(mask)


def test_objects_beyond_the_numbers_that_there_are_share_one(drawn):
    mask = drawn[1]["dots"]
    every, few = numbered_objects(mask, 1000), numbered_objects(mask, 254)
    assert every.max() == len(flooded(mask)) > 254 >= few.max() > 250
    for numbers in (every, few):
        assert ((numbers > 0) == (mask > 0)).all()
        assert all(len(np.unique(mask[numbers == number])) == 1 for number in range(1, numbers.max() + 1))
    largest = few[mask == 3]
    assert (largest == largest[0]).all() and (few == largest[0]).sum() == (mask == 3).sum()


def painted(points, shape):
    """A polygon filled, its line painted too, as labelme does."""
    picture = PIL.Image.new("L", (shape[1], shape[0]))
    PIL.ImageDraw.Draw(picture).polygon([tuple(p) for p in points], outline=1, fill=1)
    return np.asarray(picture).astype(bool)


def even_odd(points, shape):
    """A polygon filled by its definition: a pixel is inside if a line to the right crosses an odd number of edges."""
    inside = np.zeros(shape, dtype=bool)
    pairs = list(zip(points, points[1:] + points[:1], strict=True))
    for y in range(shape[0]):
        for x in range(shape[1]):
            crossed = [a[0] for a, b in pairs if a[0] == b[0] and min(a[1], b[1]) <= y < max(a[1], b[1])]
            inside[y, x] = sum(place > x for place in crossed) % 2
    return inside


def assert_outlines_are_exact(mask):
    for one in components(mask):
        shape = one.pixels.shape
        edges = polygon(one.pixels, "edges")
        assert all(a[0] == b[0] or a[1] == b[1] for a, b in zip(edges, edges[1:] + edges[:1], strict=True))
        np.testing.assert_array_equal(even_odd(edges, shape), one.pixels)
        code = run_lengths.merge(run_lengths.frPyObjects([[float(v) for p in edges for v in p]], *shape))
        np.testing.assert_array_equal(run_lengths.decode(code), one.pixels)
        centres = polygon(one.pixels, "centres")
        assert all(one.pixels[y, x] for x, y in centres)
        np.testing.assert_array_equal(painted(centres + centres[-1:] * 2, shape), one.pixels)


@settings(max_examples=100, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 1, 1])))
def test_outlines_of_anything_are_exact(mask):
    assert_outlines_are_exact(mask)


def test_outlines_of_holes_in_islands_in_holes_are_exact():
    rings = np.zeros((17, 17), np.uint8)
    for step in range(0, 8, 2):
        rings[step : 17 - step, step : 17 - step] = 1
        rings[step + 1 : 16 - step, step + 1 : 16 - step] = 0
    rings[8, :] = 1  # one object, eight holes
    assert len(list(components(rings))) == 1
    assert_outlines_are_exact(rings)
    assert_outlines_are_exact(blobs(np.random.default_rng(1), 60, 50))


# COCO


@pytest.mark.parametrize("shapes", ["rle", "polygons"])
def test_coco(masks, drawn, tmp_path, shapes, capsys):
    path = export_coco(masks, tmp_path / "out", shapes=shapes)
    read = COCO(str(path))
    assert [category["name"] for category in read.loadCats(read.getCatIds())] == list(CLASSES)
    assert read.getCatIds() == [1, 2, 3]
    found = {}
    for image in read.loadImgs(read.getImgIds()):
        mask = np.zeros((image["height"], image["width"]), np.uint8)
        notes = read.loadAnns(read.getAnnIds(imgIds=[image["id"]]))
        assert len(notes) == len(flooded(drawn[1][Path(image["file_name"]).with_suffix("").as_posix()]))
        for note in notes:
            pixels = read.annToMask(note).astype(bool)
            assert not mask[pixels].any() and note["area"] == pixels.sum() and note["iscrowd"] == 0
            np.testing.assert_array_equal(run_lengths.toBbox(read.annToRLE(note)), note["bbox"])
            mask[pixels] = note["category_id"]
        assert (drawn[0] / "images" / image["file_name"]).is_file()
        found[Path(image["file_name"]).with_suffix("").as_posix()] = mask
    assert_same(found, {name: seen(mask) for name, mask in drawn[1].items()})


# CVAT


def test_cvat(masks, drawn, tmp_path):
    with zipfile.ZipFile(export_cvat(masks, tmp_path / "out")) as archive:
        read = {name: archive.read(name) for name in archive.namelist()}
    lines = [line for line in read["labelmap.txt"].decode().splitlines() if not line.startswith("#")]
    labels = {}
    for line in lines:
        label, colour, parts, actions = line.split(":")
        assert (parts, actions) == ("", "")
        labels[tuple(map(int, colour.split(",")))] = label
    assert list(labels.values()) == ["background", *CLASSES] and labels[0, 0, 0] == "background"
    names = read["ImageSets/Segmentation/default.txt"].decode().splitlines()
    value = {label: index for index, label in enumerate(["background", *CLASSES])}
    found = {}
    for name in names:
        pictures = []
        for folder in ("SegmentationClass", "SegmentationObject"):
            with PIL.Image.open(io.BytesIO(read[f"{folder}/{name}.png"])) as picture:
                assert picture.mode == "RGB"
                pictures.append(np.asarray(picture))
        colours, which = np.unique(pictures[0].reshape(-1, 3), axis=0, return_inverse=True)
        assert all(tuple(colour) in labels for colour in colours.tolist())  # CVAT refuses any other
        wanted = np.array([value[labels[tuple(colour)]] for colour in colours.tolist()])
        found[name] = wanted[which].reshape(pictures[0].shape[:2])
        objects = {tuple(c) for c in pictures[1].reshape(-1, 3).tolist()} - {(0, 0, 0)}
        assert objects <= {tuple(c) for c in voc_palette()[1:255].tolist()}
        assert ((pictures[1] > 0).any(axis=2) == (found[name] > 0)).all()
        if name != "dots":
            parts = set()
            for colour in objects:
                where = (pictures[1] == colour).all(axis=2)
                (label,) = np.unique(found[name][where])
                parts.add((int(label), frozenset((int(y), int(x)) for y, x in np.argwhere(where))))
            assert parts == flooded(drawn[1][name])
    assert_same(found, {name: seen(mask) for name, mask in drawn[1].items()})


def test_cvat_is_the_same_bytes_again(masks, tmp_path):
    first, second = (export_cvat(masks, tmp_path / name).read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize("name", ["a:b", "#a", " a"])
def test_cvat_refuses_what_its_label_map_cannot_hold(masks, tmp_path, name):
    with pytest.raises(UserError, match="label map"):
        export_cvat(replace(masks, classes=("x", "y", name)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Label Studio


def unpacked(code):
    """The bytes of an "rle-pack" code, bit by bit."""
    bits = "".join(f"{byte:08b}" for byte in code)
    place = 0

    def take(count):
        nonlocal place
        place += count
        assert place <= len(bits)
        return int(bits[place - count : place], 2)

    total, word = take(32), take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    found = []
    while len(found) < total:
        same = take(1)
        length = take(sizes[take(2)]) + 1
        found += [take(word)] * length if same else [take(word) for _ in range(length)]
    assert len(found) == total and len(bits) - place < 8
    return found


def alpha(code, height, width):
    return np.array(unpacked(code), np.uint8).reshape(height, width, 4)[..., 3]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3), (200, 170)])
def test_brush_code(shape):
    rng = np.random.default_rng(0)
    for share in (0, 0.01, 0.5, 1):
        pixels = rng.random(shape) < share
        np.testing.assert_array_equal(alpha(brush_code(pixels), *shape), pixels * 255)


def label_studio_masks(path, decode):
    """name -> mask, from tasks and config together."""
    view = ElementTree.parse(path.with_name("config.xml")).getroot()
    image, brush = view.find("Image"), view.find("BrushLabels")
    names = [label.get("value") for label in brush.findall("Label")]
    assert names == list(CLASSES) and image.get("value") == "$image" and brush.get("toName") == image.get("name")
    found = {}
    for task in json.loads(path.read_text(encoding="utf-8")):
        (prediction,) = task["predictions"]
        key = Path(unquote(task["data"]["image"].split("?d=", 1)[1])).with_suffix("").as_posix()
        mask = None
        for region in prediction["result"]:
            assert (region["from_name"], region["to_name"]) == (brush.get("name"), image.get("name"))
            assert region["type"] == "brushlabels" and region["value"]["format"] == "rle"
            height, width = region["original_height"], region["original_width"]
            mask = np.zeros((height, width), np.uint8) if mask is None else mask
            pixels = decode(region["value"]["rle"], height, width)
            assert set(np.unique(pixels).tolist()) <= {0, 255} and not mask[pixels > 0].any()
            (label,) = region["value"]["brushlabels"]
            mask[pixels > 0] = names.index(label) + 1
        found[key] = mask
    return found


def test_label_studio(masks, drawn, tmp_path):
    path = export_label_studio(masks, tmp_path / "out", from_name="seg", to_name="photo")
    found = label_studio_masks(path, alpha)
    assert found.pop("empty") is None
    assert_same(found, {name: seen(mask) for name, mask in drawn[1].items()}, [n for n in NAMES if n != "empty"])


def test_label_studio_by_its_own_converter(masks, drawn, tmp_path):
    pytest.importorskip("label_studio_sdk", reason="needs label-studio-sdk")
    from label_studio_sdk.converter.brush import decode_rle

    path = export_label_studio(masks, tmp_path / "out")
    found = label_studio_masks(path, lambda code, h, w: np.reshape(decode_rle(code), [h, w, 4])[:, :, 3])
    assert found.pop("empty") is None
    assert_same(found, {name: seen(mask) for name, mask in drawn[1].items()}, [n for n in NAMES if n != "empty"])


@pytest.mark.parametrize(
    "prefix, wanted",
    [
        ("https://host/x/", "https://host/x/sub%20folder/%C3%BC%201.png"),
        ("/data/local-files/?d=set/", "/data/local-files/?d=set/sub%20folder/%C3%BC%201.png"),
        ("s3://bucket/", "s3://bucket/sub folder/ü 1.png"),
    ],
)
def test_label_studio_finds_the_images_under_a_prefix(masks, tmp_path, prefix, wanted):
    path = export_label_studio(masks, tmp_path / "out", image_prefix=prefix)
    assert wanted in [task["data"]["image"] for task in json.loads(path.read_text(encoding="utf-8"))]


# labelme


def labelme_files(out):
    return {path.relative_to(out).with_suffix("").as_posix(): path for path in out.rglob("*.json")}


@pytest.mark.parametrize("copy", [False, True])
def test_labelme(masks, drawn, tmp_path, copy):
    out = export_labelme(masks, tmp_path / "some where" / "out", copy_images=copy)
    found = {}
    for name, path in labelme_files(out).items():
        read = json.loads(path.read_text(encoding="utf-8"))
        assert {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"} == read.keys()
        assert read["imageData"] is None and not Path(read["imagePath"]).is_absolute()
        np.testing.assert_array_equal(
            read_image(path.parent / read["imagePath"]),
            read_image(next((drawn[0] / "images").glob(f"{name}.*"))),
        )
        found[name] = np.zeros((read["imageHeight"], read["imageWidth"]), np.uint8)
        assert len(read["shapes"]) == len(flooded(drawn[1][name]))
        for shape in read["shapes"]:
            assert shape["shape_type"] == "polygon" and len(shape["points"]) > 2
            pixels = painted(shape["points"], found[name].shape)
            assert not found[name][pixels].any()
            found[name][pixels] = CLASSES.index(shape["label"]) + 1
    assert_same(found, {name: seen(mask) for name, mask in drawn[1].items()})


def test_labelme_by_its_own_loader(masks, drawn, tmp_path):
    labelme = pytest.importorskip("labelme", reason="needs labelme", exc_type=ImportError)
    out, found = export_labelme(masks, tmp_path / "out"), {}
    values = {"_background_": 0, **{name: value for value, name in enumerate(CLASSES, start=1)}}
    for name, path in labelme_files(out).items():
        read = labelme.LabelFile(str(path))
        image = labelme.utils.img_data_to_arr(read.image_data if hasattr(read, "image_data") else read.imageData)
        assert image.shape[:2] == drawn[1][name].shape
        found[name], _ = labelme.utils.shapes_to_label(image.shape, read.shapes, values)
    assert_same(found, {name: seen(mask) for name, mask in drawn[1].items()})


# MMSegmentation


def test_mmseg(masks, drawn, tmp_path):
    out = tmp_path / "out"
    config = runpy.run_path(str(export_mmseg(masks, out, val={"empty", "sub folder/a"})))
    assert config["metainfo"]["classes"] == ("background", *CLASSES)
    assert config["metainfo"]["palette"] == voc_palette()[:4].tolist()
    found = {}
    for split, names in (("train", {"b", "sub folder/ü 1", "dots"}), ("val", {"empty", "sub folder/a"})):
        data = config[f"{split}_dataloader"]["dataset"]
        images, notes = (out / data["data_prefix"][key] for key in ("img_path", "seg_map_path"))
        read = {}
        for path in images.rglob(f"*{data['img_suffix']}"):  # as BaseSegDataset pairs them
            name = path.relative_to(images).as_posix().removesuffix(data["img_suffix"])
            with PIL.Image.open(notes / (name + data["seg_map_suffix"])) as picture:
                assert picture.mode == "P"
                read[name] = np.asarray(picture)
            original = next((drawn[0] / "images").glob(f"{name}.*"))
            np.testing.assert_array_equal(read_image(path), read_image(original))
        assert read.keys() == names
        found |= read
    assert_same(found, drawn[1])  # 255 stays


def test_mmseg_copies_images_that_have_one_ending_and_says_nothing_of_val(masks, tmp_path):
    few = replace(masks, items=[item for item in masks.items if item.name == "b"])
    config = runpy.run_path(str(export_mmseg(few, tmp_path / "out")))
    assert (tmp_path / "out/img_dir/train/b.jpg").read_bytes() == few.items[0].file.read_bytes()
    assert config["train_dataloader"]["dataset"]["img_suffix"] == ".jpg" and "val_dataloader" not in config


# Hugging Face


def test_huggingface(masks, drawn, tmp_path):
    out = export_huggingface(masks, tmp_path / "out", val={"b"})
    labels = json.loads((out / "id2label.json").read_text(encoding="utf-8"))
    assert labels == {"0": "background", "1": CLASSES[0], "2": CLASSES[1], "3": CLASSES[2]}
    found = {}
    for split, count in (("train", 4), ("validation", 1)):
        rows = [json.loads(row) for row in (out / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(rows) == count
        for row in rows:
            name = Path(row["file_name"]).relative_to("images").with_suffix("").as_posix()
            with PIL.Image.open(out / split / row["mask_file_name"]) as picture:
                assert picture.mode == "L"
                found[name] = np.asarray(picture)
            original = next((drawn[0] / "images").glob(f"{name}.*"))
            assert (out / split / row["file_name"]).read_bytes() == original.read_bytes()
            assert row["classes"] == ";".join(CLASSES[v - 1] for v in np.unique(found[name]) if 0 < v < 255)
    assert_same(found, drawn[1])


@pytest.mark.parametrize("val", [{"b"}, {"empty"}])  # one of which has no class
def test_huggingface_by_datasets(masks, drawn, tmp_path, val):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    out = export_huggingface(masks, tmp_path / "out", val=val)
    read = datasets.load_dataset("imagefolder", data_dir=str(out), cache_dir=str(tmp_path / "cache"))
    assert {split: rows.num_rows for split, rows in read.items()} == {"train": 4, "validation": 1}
    assert set(read["train"].column_names) == {"image", "mask", "classes"}
    left = {name: (read_image(next((drawn[0] / "images").glob(f"{name}.*"))), mask) for name, mask in drawn[1].items()}
    for row in [*read["train"], *read["validation"]]:
        image = np.asarray(row["image"].convert("RGB"))
        (name,) = [name for name, (other, _) in left.items() if np.array_equal(other, image)]
        np.testing.assert_array_equal(np.asarray(row["mask"]), left.pop(name)[1])
    assert not left


# Pictures


def test_pictures(masks, drawn, tmp_path):
    out, found = export_pictures(masks, tmp_path / "out"), {}
    for name in NAMES:
        with PIL.Image.open(out / "masks" / f"{name}.png") as picture:
            assert picture.mode == "P"
            found[name] = np.asarray(picture)
            painted = np.asarray(picture.convert("RGB"))
        np.testing.assert_array_equal(painted, voc_palette()[drawn[1][name]])
        over, image = (
            read_image(path)
            for path in (out / "overlays" / f"{name}.png", next((drawn[0] / "images").glob(f"{name}.*")))
        )
        changed = (over != image).any(axis=2)
        assert not changed[found[name] == 0].any() and changed.sum() >= 0.9 * (found[name] > 0).sum()
    assert_same(found, drawn[1])  # 255 stays
    rows = json.loads((out / "classes.json").read_text(encoding="utf-8"))
    assert [(row["value"], row["name"]) for row in rows] == list(enumerate(["background", *CLASSES]))
    assert not (export_pictures(masks, tmp_path / "bare", overlays=False) / "overlays").exists()


# What all have in common


def test_images_that_others_read_otherwise_are_written_anew(tmp_path):
    """A photo with an EXIF rotation, 16 bits, transparency: the pixels that its mask was made for."""
    rng, root = np.random.default_rng(0), tmp_path / "images"
    root.mkdir()
    turned = PIL.Image.fromarray(rng.integers(0, 256, (8, 12, 3)).astype(np.uint8))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned.save(root / "turned.jpg", exif=exif)
    PIL.Image.fromarray(rng.integers(0, 65536, (12, 8)).astype(np.uint16)).save(root / "deep.png")
    PIL.Image.fromarray(rng.integers(0, 256, (12, 8, 4)).astype(np.uint8)).save(root / "clear.png")
    PIL.Image.fromarray(rng.integers(0, 256, (12, 8)).astype(np.uint8)).save(root / "other.tif")
    for name in ("turned", "deep", "clear", "other"):
        write_mask(tmp_path / "masks" / f"{name}.png", np.ones((12, 8), np.uint8))
    masks = collect_masks(images=root, masks=tmp_path / "masks", classes=["a"])
    out = export_huggingface(masks, tmp_path / "out")
    for item in masks.items:
        with PIL.Image.open(out / "train/images" / f"{item.name}.png") as picture:
            assert picture.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(picture), item.image())


def test_an_export_that_fails_leaves_nothing_and_what_was_there(masks, tmp_path):
    out = tmp_path / "out"
    export_coco(masks, out)
    before = (out / "annotations.json").read_bytes()
    broken = replace(masks, items=[*masks.items, replace(masks.items[0], mask_file=tmp_path / "lost.png")])
    with pytest.raises(UserError, match=r"lost\.png"):
        export_coco(broken, out, overwrite=True)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "new", "coco") as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "annotations.json").read_bytes() == before


def test_an_export_takes_the_place_of_an_export_only(masks, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export_labelme(masks, out)  # an empty folder is welcome
    with pytest.raises(UserError, match="--overwrite"):
        export_coco(masks, out)
    export_coco(masks, out, overwrite=True)
    assert not list(out.rglob("b.json")) and (out / "annotations.json").is_file()
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        export_coco(masks, own, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        export_coco(masks, tmp_path / "file", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "own"]
    assert [path.name for path in own.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "classes, said",
    [
        ([f"c{k}" for k in range(255)], "room for 254"),
        (["a", "a"], "twice"),
        (["a", ""], "no name"),
        (["a", "x\ny"], "no name"),
        (["Background", "b"], "value 0"),
    ],
)
def test_names_that_cannot_be_classes(masks, classes, said):
    with pytest.raises(UserError, match=said):
        MaskSet(tuple(classes), masks.items)


def test_no_mask_is_read_before_its_turn(masks, tmp_path):
    late = Item("late", tmp_path / "late.png", masks.items[0].image)
    read = replace(masks, items=[masks.items[0], late]).read("test")
    assert next(read)[0].name == masks.items[0].name
    write_mask(tmp_path / "late.png", np.full((3, 4), 3, np.uint8))
    assert next(read)[1].tolist() == [[3] * 4] * 3
