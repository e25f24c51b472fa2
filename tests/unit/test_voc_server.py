"""The archive for the VOC evaluation server, and the validator that stands in for it."""

import io
import shutil
import tarfile

import numpy as np
import PIL.Image
import pytest
from miniature import draw_voc

from tag2mask import cli
from tag2mask.data.index_png import encode_mask, voc_palette, write_mask
from tag2mask.errors import UserError
from tag2mask.export.voc_server import check_voc_server, expected, export_voc_server

FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
SIZES = {"2007_000013": (64, 48), "2007_000014": (48, 64)}  # width, height


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_voc(tmp_path_factory.mktemp("voc"))


@pytest.fixture
def masks(tmp_path):
    """Masks of the two test images, as a predict stage leaves them."""
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        write_mask(tmp_path / f"predict/masks/{name}.png", rng.integers(0, 21, (height, width)).astype(np.uint8))
    return tmp_path / "predict"


def entries(path):
    with tarfile.open(path, "r:gz") as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


class TestExport:
    def test_holds_every_mask_in_the_right_folder(self, drawn, masks, tmp_path):
        out = tmp_path / "new/results.tar.gz"
        assert export_voc_server(masks, out, drawn.root) == 2
        found = entries(out)
        assert list(found) == [f"{FOLDER}/2007_000013.png", f"{FOLDER}/2007_000014.png"]
        for name, content in found.items():
            picture = PIL.Image.open(io.BytesIO(content))
            assert (picture.format, picture.mode) == ("PNG", "P")
            np.testing.assert_array_equal(np.reshape(picture.getpalette(), (-1, 3)), voc_palette())
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(PIL.Image.open(masks / "masks" / name[-15:])))
        assert [path.name for path in out.parent.iterdir()] == [out.name]

    def test_the_same_masks_give_the_same_bytes(self, drawn, masks, tmp_path):
        for name in ("a.tar.gz", "b.tar.gz"):
            export_voc_server(masks / "masks", tmp_path / name, drawn.root)
        assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()

    def test_a_grey_index_mask_gets_the_palette(self, drawn, masks, tmp_path):
        path = masks / "masks/2007_000013.png"
        grey = np.asarray(PIL.Image.open(path))
        PIL.Image.fromarray(grey).save(path)
        export_voc_server(masks, tmp_path / "r.tgz", drawn.root)
        picture = PIL.Image.open(io.BytesIO(entries(tmp_path / "r.tgz")[f"{FOLDER}/2007_000013.png"]))
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), grey)

    def test_other_sets_and_competitions(self, drawn, tmp_path):
        home = drawn.root / "VOCdevkit/VOC2012"
        for name in drawn.lists["val"]:
            mask = np.asarray(PIL.Image.open(home / f"SegmentationClass/{name}.png"))
            write_mask(tmp_path / f"masks/{name}.png", np.where(mask == 255, 0, mask).astype(np.uint8))
        export_voc_server(tmp_path, tmp_path / "r.tgz", home, images="val", competition="comp5")
        assert {name.rpartition("/")[0] for name in entries(tmp_path / "r.tgz")} == {
            "results/VOC2012/Segmentation/comp5_val_cls"
        }

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (None, "1 of 2 masks of the test images are missing, the first is 2007_000014.png; predict them"),
            (np.full((64, 48), 255), r"holds the value 255 \(no answer\), and the server takes 0..20"),
            (np.zeros((64, 40)), "has 40 x 64 pixels, but its image 48 x 64"),
            (np.full((64, 48), 21), "holds the value 21, which is no class"),
        ],
    )
    def test_what_the_server_would_refuse(self, drawn, masks, tmp_path, mask, message):
        path = masks / "masks/2007_000014.png"
        path.unlink()
        if mask is not None:
            write_mask(path, mask.astype(np.uint8))
        with pytest.raises(UserError, match=message) as fault:
            export_voc_server(masks, tmp_path / "r.tar.gz", drawn.root)
        assert "\n" not in str(fault.value)
        assert not [*tmp_path.glob("r.tar.gz*")]

    def test_other_mistakes(self, drawn, masks, tmp_path):
        with pytest.raises(UserError, match=r"takes \.tar\.gz; call it r\.tar\.gz"):
            export_voc_server(masks, tmp_path / "r.zip", drawn.root)
        with pytest.raises(UserError, match="no PASCAL VOC 2012 here"):
            export_voc_server(masks, tmp_path / "r.tgz", tmp_path)
        shutil.copytree(drawn.root, tmp_path / "copy")
        (tmp_path / "copy/VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt").unlink()
        with pytest.raises(UserError, match=r"VOC2012test\.tar"):
            export_voc_server(masks, tmp_path / "r.tgz", tmp_path / "copy")

    def test_the_command(self, drawn, masks, tmp_path, monkeypatch, capsys):
        words = ["export", "voc-server", masks, tmp_path / "r.tar.gz", "--root", drawn.root, "--competition", "comp5"]
        monkeypatch.setattr("sys.argv", ["tag2mask", *map(str, words)])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code
        assert capsys.readouterr().out == f"2 masks in {tmp_path / 'r.tar.gz'}, checked\n"
        assert {name.split("/")[3] for name in entries(tmp_path / "r.tar.gz")} == {"comp5_test_cls"}


def good(name):
    width, height = SIZES[name]
    return encode_mask(np.full((height, width), 20, np.uint8))


def saved(picture, **options):
    sink = io.BytesIO()
    picture.save(sink, **{"format": "PNG"} | options)
    return sink.getvalue()


def coloured(mask, mode):
    """The mask as somebody else saves it: RGB, grey, or a palette of its own."""
    colours = PIL.Image.fromarray(voc_palette()[mask])
    return colours if mode == "RGB" else colours.convert(mode, palette=PIL.Image.Palette.ADAPTIVE)


class TestValidator:
    def archive(self, tmp_path, files):
        with tarfile.open(tmp_path / "r.tar.gz", "w:gz") as opened:
            for name, content in files:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                opened.addfile(entry, io.BytesIO(content))
        return tmp_path / "r.tar.gz"

    def fault(self, tmp_path, files):
        with pytest.raises(UserError) as raised:
            check_voc_server(self.archive(tmp_path, files), SIZES)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    def both(self, **other):
        return [(f"{FOLDER}/{name}.png", other.get(name, good(name))) for name in SIZES]

    def test_takes_what_is_right(self, tmp_path, drawn):
        assert expected(drawn.root, "test") == SIZES
        check_voc_server(self.archive(tmp_path, self.both()), SIZES)

    def test_one_mask_for_each_image_and_nothing_else(self, tmp_path):
        both = self.both()
        assert "1 of 2 masks are missing, the first is 2007_000014.png" in self.fault(tmp_path, both[:1])
        for name in ("readme.txt", "2007_000099.png", "2007_000013.jpg"):
            assert f"{name} does not belong there" in self.fault(tmp_path, [*both, (f"{FOLDER}/{name}", b"")])
        assert "does not belong there" in self.fault(tmp_path, [*both, both[0]])

    @pytest.mark.parametrize("place", ["", "VOC2012/", f"{FOLDER.replace('comp6', 'comp5')}/", f"x/{FOLDER}/"])
    def test_in_the_right_folder(self, tmp_path, place):
        files = [(f"{place}{name}.png", good(name)) for name in SIZES]
        assert f"does not belong there; expected {FOLDER}/<image>.png" in self.fault(tmp_path, files)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (lambda mask: saved(coloured(mask, "RGB")), "is a PNG of mode RGB; write an index PNG"),
            (lambda mask: saved(PIL.Image.fromarray(mask)), "is a PNG of mode L"),
            (lambda mask: saved(coloured(mask, "P")), "has another palette than VOC"),
            (lambda mask: saved(coloured(mask, "RGB"), format="JPEG"), "is a JPEG of mode RGB"),
            (lambda mask: encode_mask(mask.T), "has 48 x 64 pixels, but its image 64 x 48"),
            (lambda mask: encode_mask(mask + 1), r"holds the value 21 (no class), and the server takes 0..20"),
            (lambda mask: encode_mask(mask * 0 + 255), "holds the value 255 (no answer)"),
            (lambda mask: encode_mask(mask)[:60], "is truncated"),
            (lambda mask: b"", "the file is empty"),
        ],
    )
    def test_of_every_file(self, tmp_path, content, message):
        mask = np.arange(48 * 64).reshape(48, 64).astype(np.uint8) % 21
        assert message in self.fault(tmp_path, self.both(**{"2007_000013": content(mask)}))

    def test_a_file_that_is_no_archive(self, tmp_path):
        (tmp_path / "r.tar.gz").write_bytes(b"hello")
        with pytest.raises(UserError, match=r"is no .tar.gz that can be read"):
            check_voc_server(tmp_path / "r.tar.gz", SIZES)
