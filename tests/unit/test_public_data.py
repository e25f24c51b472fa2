"""Downloads, checks and unpacking, against a web server on this machine."""

import gzip
import hashlib
import io
import os
import re
import shutil
import tarfile
import threading
import zipfile
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import PIL.Image
import pytest
from miniature import draw_coco, draw_voc

from tag2mask import cli, progress
from tag2mask.data import fetch as fetching
from tag2mask.data import sbd
from tag2mask.data.coco14 import Coco14
from tag2mask.data.fetch import Remote, fetch
from tag2mask.data.unpack import unpack
from tag2mask.data.voc12 import HOME, LISTS, Voc12
from tag2mask.errors import Interrupted, UserError
from tag2mask.public_data import ARCHIVES, Archive, prepare

CONTENT = np.random.default_rng(0).bytes(3_000_000)


class Site:
    """What a server gives, how it behaves, and what it was asked for."""

    def __init__(self):
        self.files = {}
        self.asked = []  # (path, first byte)
        self.breaks = []  # after how many bytes each of the next answers breaks off; "refuse" drops the connection
        self.ranges = True
        self.address = ""

    def remote(self, name, content=None, **other):
        content = self.files[name] if content is None else content
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        return Remote(**({"url": f"{self.address}/{name}", "size": len(content), "digest": digest} | other))


@pytest.fixture(scope="module")
def server():
    """One server for all tests; its `site` is changed by each of them."""

    class Handler(BaseHTTPRequestHandler):
        site = Site()

        def do_GET(self):
            site, name = self.site, self.path.rpartition("/")[2]
            first = int(re.match(r"bytes=(\d+)-$", self.headers.get("Range", "bytes=0-"))[1]) if site.ranges else 0
            site.asked.append((self.path, first))
            limit = site.breaks.pop(0) if site.breaks else None
            if limit == "refuse":
                self.close_connection = True
                return
            if limit == "busy":
                self.send_error(503)
                return
            if name not in site.files:
                self.send_error(404)
                return
            content = site.files[name]
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            with suppress(ConnectionError):  # the reader may have left
                self.wfile.write(content[first:] if limit is None else content[first : first + limit])
            self.close_connection = True

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        running.handler = Handler
        yield running
        running.shutdown()


@pytest.fixture
def site(server):
    server.handler.site = found = Site()
    found.address = f"http://127.0.0.1:{server.server_port}"
    found.files["data.tar"] = CONTENT
    return found


def one_line(fault):
    line = str(fault.value)
    assert "\n" not in line
    return line


class TestFetch:
    def test_a_whole_file(self, site, tmp_path):
        path = fetch(site.remote("data.tar"), tmp_path / "new" / "folder")
        assert path == tmp_path / "new/folder/data.tar" and path.read_bytes() == CONTENT
        assert site.asked == [("/data.tar", 0)]
        assert [*path.parent.iterdir()] == [path]

    def test_a_file_that_is_there_is_checked_and_not_asked_for(self, site, tmp_path):
        (tmp_path / "data.tar").write_bytes(CONTENT)
        fetch(site.remote("data.tar"), tmp_path)
        assert site.asked == []
        (tmp_path / "data.tar").write_bytes(CONTENT[:-1] + b"!")
        with pytest.raises(UserError, match=r"sha256 checksum .*, expected .*; replace") as fault:
            fetch(site.remote("data.tar"), tmp_path)
        one_line(fault)
        assert (tmp_path / "data.tar").exists()  # it is the user's
        (tmp_path / "data.tar").write_bytes(CONTENT[:10])
        with pytest.raises(UserError, match="has 10 bytes, expected 3,000,000; replace"):
            fetch(site.remote("data.tar"), tmp_path)

    @pytest.mark.parametrize("ranges", [True, False])
    def test_a_broken_connection_is_made_again_at_once(self, site, tmp_path, ranges):
        site.ranges, site.breaks = ranges, [1_000_000, "refuse", "busy", 700_000]
        assert fetch(site.remote("data.tar"), tmp_path, pause=0).read_bytes() == CONTENT
        starts = [first for _, first in site.asked]
        assert starts == ([0, 1_000_000, 1_000_000, 1_000_000, 1_700_000] if ranges else [0] * 5)

    @pytest.mark.parametrize("ranges", [True, False])
    def test_a_killed_download_goes_on(self, site, tmp_path, ranges, monkeypatch):
        site.ranges = ranges
        stopped = []

        @contextmanager
        def bar(*_):
            def advance(count):
                stopped.append(count)
                if len(stopped) == 6:
                    raise Interrupted(130)

            yield advance

        monkeypatch.setattr(progress, "bar", bar)
        with pytest.raises(Interrupted):
            fetch(site.remote("data.tar"), tmp_path)
        monkeypatch.undo()
        part = tmp_path / "data.tar.part"
        size = part.stat().st_size
        assert 0 < size < len(CONTENT) and not (tmp_path / "data.tar").exists()
        assert fetch(site.remote("data.tar"), tmp_path).read_bytes() == CONTENT
        assert [first for _, first in site.asked] == [0, size if ranges else 0]
        assert not part.exists()

    def test_all_but_the_renaming_was_done(self, site, tmp_path):
        (tmp_path / "data.tar.part").write_bytes(CONTENT)
        assert fetch(site.remote("data.tar"), tmp_path).read_bytes() == CONTENT
        assert site.asked == []

    def test_a_part_that_is_too_long_is_thrown_away(self, site, tmp_path):
        (tmp_path / "data.tar.part").write_bytes(CONTENT + b"more")
        assert fetch(site.remote("data.tar"), tmp_path).read_bytes() == CONTENT

    def test_a_wrong_checksum(self, site, tmp_path):
        with pytest.raises(UserError, match=r"has the md5 checksum .*, expected 0000; run the same command") as fault:
            fetch(site.remote("data.tar", digest="md5:0000"), tmp_path)
        one_line(fault)
        assert [*tmp_path.iterdir()] == []  # nothing that a later run could take for good

    def test_a_part_of_another_file_ends_in_a_wrong_checksum_once(self, site, tmp_path):
        (tmp_path / "data.tar.part").write_bytes(b"?" * 1000)
        with pytest.raises(UserError, match="checksum"):
            fetch(site.remote("data.tar"), tmp_path)
        assert fetch(site.remote("data.tar"), tmp_path).read_bytes() == CONTENT

    def test_a_file_of_another_size(self, site, tmp_path):
        with pytest.raises(
            UserError, match="gives a file of 3,000,000 bytes, expected 2,999,999; try another"
        ) as fault:
            fetch(site.remote("data.tar", size=2_999_999), tmp_path)
        one_line(fault)

    def test_no_such_file_says_what_to_put_where(self, site, tmp_path):
        with pytest.raises(UserError, match="404") as fault:
            fetch(site.remote("other.tar", content=b"12"), tmp_path)
        line = one_line(fault)
        digest = hashlib.sha256(b"12").hexdigest()
        assert f"put other.tar (2 bytes, sha256:{digest}) into {tmp_path} by hand and run the same command" in line
        assert len(site.asked) == 1

    def test_no_network_says_what_to_put_where(self, site, tmp_path):
        closed = site.remote("data.tar", url="http://127.0.0.1:9/data.tar")
        with pytest.raises(UserError, match=r"127.0.0.1:9/data.tar: cannot be reached \(.*refused") as fault:
            fetch(closed, tmp_path, pause=0)
        assert "put data.tar (3,000,000 bytes, sha256:" in one_line(fault)

    def test_a_server_that_never_gives_a_byte(self, site, tmp_path):
        site.breaks = ["refuse"] * 20
        with pytest.raises(UserError, match="cannot be reached"):
            fetch(site.remote("data.tar"), tmp_path, pause=0)
        assert len(site.asked) == fetching.TRIES

    def test_no_room(self, site, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 2_000_000))
        with pytest.raises(UserError, match=r"no room for data.tar \(2 MB free, 3 MB needed\); make room") as fault:
            fetch(site.remote("data.tar"), tmp_path)
        one_line(fault)
        assert site.asked == []

    def test_a_full_disk_is_not_the_networks_fault(self, site, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(fetching, "_start", full)
        with pytest.raises(OSError, match="No space"):
            fetch(site.remote("data.tar"), tmp_path, pause=0)
        assert len(site.asked) == 1


def tarred(files, mode="w", links=()):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, target in links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return sink.getvalue()


def zipped(files):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return sink.getvalue()


PACKED = {"tar": tarred, "tgz": lambda files: tarred(files, "w:gz"), "zip": zipped}
FILES = {"a/1.txt": b"one", "a/b/2.txt": b"two" * 1000, "3.txt": b""}


@pytest.mark.parametrize("kind", PACKED)
class TestUnpack:
    def archive(self, kind, tmp_path, files=FILES):
        path = tmp_path / f"data.{kind}"
        path.write_bytes(PACKED[kind](files))
        return path

    def test_everything(self, kind, tmp_path):
        assert unpack(self.archive(kind, tmp_path), tmp_path / "out") == 3
        found = {p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
        assert {name: path.read_bytes() for name, path in found.items()} == FILES

    def test_goes_on_and_leaves_alone_what_is_there(self, kind, tmp_path):
        archive, out = self.archive(kind, tmp_path), tmp_path / "out"
        unpack(archive, out)
        os.utime(out / "a/1.txt", ns=(1, 1))
        (out / "a/b/2.txt").write_bytes(b"two")  # a piece of it
        (out / "3.txt").unlink()
        unpack(archive, out)
        assert (out / "a/1.txt").stat().st_mtime_ns == 1
        assert (out / "a/b/2.txt").read_bytes() == FILES["a/b/2.txt"]
        assert (out / "3.txt").exists()

    @pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:\\evil.txt"])
    def test_nothing_is_written_outside(self, kind, tmp_path, name):
        archive, out = self.archive(kind, tmp_path, {"good.txt": b"1", name: b"2"}), tmp_path / "deep" / "out"
        with pytest.raises(UserError, match="which leads out of") as fault:
            unpack(archive, out)
        one_line(fault)
        assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {archive.name, "good.txt"}

    def test_a_damaged_archive(self, kind, tmp_path):
        archive = self.archive(kind, tmp_path, {"a": np.random.default_rng(0).bytes(200_000)})
        content = archive.read_bytes()
        archive.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=r"is damaged .*; delete it and download it again") as fault:
            unpack(archive, tmp_path / "out")
        one_line(fault)
        assert not (tmp_path / "out/a").exists()


def test_links_in_an_archive_are_passed_over(tmp_path):
    (tmp_path / "data.tar").write_bytes(tarred({"a": b"1"}, links=[("way", "/"), ("a2", "a")]))
    assert unpack(tmp_path / "data.tar", tmp_path / "out") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_what_is_no_archive(tmp_path):
    (tmp_path / "data.tgz").write_bytes(gzip.compress(b"hello"))
    with pytest.raises(UserError, match="is damaged"):
        unpack(tmp_path / "data.tgz", tmp_path / "out")


def folder(root, *below):
    """{path from the root: content} of the files in some folders."""
    paths = [path for name in below for path in sorted((root / name).rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return draw_voc(tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return draw_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture
def archives(site, voc, coco):
    """The miniature sets packed as the official ones are, on the server. train_aug is not in VOC's archive."""
    packed = folder(voc.root, HOME)
    del packed[f"{HOME}/{LISTS}/train_aug.txt"]
    site.files |= {
        "voc.tar": tarred(packed),
        "sbd.tgz": tarred(folder(voc.root, sbd.HOME), "w:gz"),
        "train2014.zip": zipped(folder(coco.root, "train2014")),
        "val2014.zip": zipped(folder(coco.root, "val2014")),
        "annotations.zip": zipped(folder(coco.root, "annotations")),
    }
    held = {"train2014": 9, "val2014": 5, "annotations": 2}
    images = {f"{HOME}/JPEGImages": 14, f"{HOME}/Annotations": 12, f"{HOME}/SegmentationClass": 8}
    return {
        "voc12": (Archive(site.remote("voc.tar"), images),),
        "sbd": (Archive(site.remote("sbd.tgz"), {f"{sbd.HOME}/cls": 8, sbd.HOME: 2}),),
        "coco14": tuple(Archive(site.remote(f"{name}.zip"), {name: count}) for name, count in held.items()),
    }


class TestPrepare:
    def test_voc_and_sbd(self, archives, site, voc, tmp_path):
        home = tmp_path / HOME
        assert str(home) in prepare("voc12", tmp_path, archives=archives)
        with pytest.raises(UserError, match=r"train_aug.txt: no such list; get it: `tag2mask data prepare sbd"):
            Voc12(root=str(tmp_path))
        assert "9 images" in prepare("sbd", tmp_path, archives=archives)
        source = Voc12(root=str(tmp_path))
        assert sorted(source.split("train").names) == sorted(voc.lists["train_aug"])
        assert [len(source.split(name)) for name in ("train", "score", "test")] == [9, 5, 3]

        asked = len(site.asked)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        prepare("voc12", tmp_path, archives=archives)
        assert len(site.asked) == asked == 2  # all is there
        assert {path: path.stat().st_mtime_ns for path in before} == before

    def test_a_list_of_ones_own_is_left_alone(self, archives, tmp_path):
        prepare("voc12", tmp_path, archives=archives)
        path = tmp_path / HOME / LISTS / "trainaug.txt"
        path.write_text("2007_000001\n")
        prepare("sbd", tmp_path, archives=archives)
        assert path.read_text() == "2007_000001\n" and not path.with_name("train_aug.txt").exists()

    def test_masks_for_train_aug(self, archives, voc, tmp_path):
        for name in ("voc12", "sbd"):
            prepare(name, tmp_path, archives=archives, show=False)
        home = tmp_path / HOME
        source = Voc12(root=str(tmp_path), score="train_aug", masks="SegmentationClassAug", test="test")
        samples = source.split("score")
        assert len(samples) == 9 and samples.has_masks
        for index, name in enumerate(samples.names):
            shown = {source.classes[k - 1] for k in np.unique(samples.mask(index)) if 0 < k < 255}
            assert shown == voc.tags(name)
            own = home / f"SegmentationClass/{name}.png"
            assert own.exists() == (name in voc.lists["train"]) == (255 in samples.mask(index))
            if own.exists():  # VOC's own masks go before SBD's
                np.testing.assert_array_equal(samples.mask(index), np.asarray(PIL.Image.open(own)))

    def test_coco(self, archives, site, coco, tmp_path):
        assert "COCO 2014" in prepare("coco14", tmp_path, archives=archives)
        masks = {path: path.stat().st_mtime_ns for path in tmp_path.glob("tag2mask/*/*.png")}
        assert len(masks) == 12
        source = Coco14(root=str(tmp_path))
        assert source.fingerprint == Coco14(root=str(coco.root)).fingerprint
        assert {path: path.stat().st_mtime_ns for path in masks} == masks
        assert len(site.asked) == 3

    def test_archives_put_there_by_hand(self, archives, site, tmp_path):
        (tmp_path / "voc.tar").write_bytes(site.files["voc.tar"])
        prepare("voc12", tmp_path, archives=archives)
        assert site.asked == []

    def test_a_half_unpacked_folder_is_completed(self, archives, site, tmp_path):
        prepare("voc12", tmp_path, archives=archives)
        lost = tmp_path / HOME / "JPEGImages/2007_000004.jpg"
        content = lost.read_bytes()
        lost.unlink()
        prepare("voc12", tmp_path, archives=archives)
        assert lost.read_bytes() == content
        assert len(site.asked) == 1  # the archive was still there

    def test_a_data_set_that_is_there_without_its_outer_folders(self, archives, site, voc, tmp_path):
        shutil.copytree(voc.root / HOME, tmp_path / "VOC2012")
        prepare("voc12", tmp_path / "VOC2012", archives=archives)
        prepare("voc12", tmp_path, archives=archives)
        assert site.asked == []
        assert "9 images" in prepare("sbd", tmp_path, archives=archives)

    def test_a_mirror(self, archives, site, tmp_path):
        prepare("voc12", tmp_path, archives=archives, mirror=f"{site.address}/pub/sets/")
        assert site.asked == [("/pub/sets/voc.tar", 0)]

    def test_sbd_needs_voc(self, archives, site, tmp_path):
        with pytest.raises(UserError, match=r"no PASCAL VOC 2012 here.*`tag2mask data prepare voc12") as fault:
            prepare("sbd", tmp_path, archives=archives)
        one_line(fault)
        assert site.asked == []

    def test_an_archive_that_lacks_files(self, archives, site, tmp_path):
        short = Archive(archives["coco14"][0].remote, {"train2014": 10})
        with pytest.raises(UserError, match="train2014 holds 9 of 10 files; delete the archive") as fault:
            prepare("coco14", tmp_path, archives={"coco14": (short,)})
        one_line(fault)

    def test_an_unknown_name(self, tmp_path):
        with pytest.raises(UserError, match="no data set 'voc' to prepare; there is voc12, sbd, coco14"):
            prepare("voc", tmp_path)

    def test_a_broken_mask_of_sbd(self, archives, tmp_path):
        prepare("voc12", tmp_path, archives=archives)
        prepare("sbd", tmp_path, archives=archives)
        shutil.rmtree(tmp_path / HOME / sbd.MASKS)
        (tmp_path / sbd.HOME / "cls/2007_000010.mat").write_bytes(b"not MATLAB")
        with pytest.raises(UserError, match=r"2007_000010.mat: is no mask of SBD .*; delete it and prepare sbd again"):
            prepare("sbd", tmp_path, archives=archives)

    def test_the_official_table(self):
        assert [*ARCHIVES] == ["voc12", "sbd", "coco14"]
        for archive in (archive for all_ in ARCHIVES.values() for archive in all_):
            kind, _, digest = archive.remote.digest.partition(":")
            assert len(digest) == 2 * hashlib.new(kind).digest_size
            assert archive.remote.size > 10**8 and archive.remote.name.endswith((".tar", ".tgz", ".zip"))
            assert archive.holds

    def test_the_command(self, site, tmp_path, monkeypatch, capsys):
        site.files["annotations_trainval2014.zip"] = b"12"
        words = ["data", "prepare", "coco14", "--root", tmp_path / "coco", "--mirror", site.address]
        monkeypatch.setattr("sys.argv", ["tag2mask", *map(str, words)])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 10**12))
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"tag2mask: {site.address}/annotations_trainval2014.zip: gives a file of 2 bytes, expected 252,872,794; "
            "try another address"
        )
