"""Soft maps on disk."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tag2mask.data.maps import Maps, map_path, map_size, read_maps, write_maps
from tag2mask.errors import UserError


def example(count=2, size=(13, 6)):
    rng = np.random.default_rng(0)
    maps = rng.random((count, *map_size(size))).astype(np.float16)
    classes = np.arange(count, dtype=np.int64) * 3 + 1
    return Maps(classes, maps, size, rng.normal(size=8).astype(np.float32))


class TestFiles:
    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_what_is_written_is_read(self, tmp_path, count):
        stored, path = example(count), map_path(tmp_path, "a/b.c/0001")
        assert path == tmp_path / "maps" / "a" / "b.c" / "0001.npz"
        write_maps(path, stored)
        found = read_maps(path)
        assert found.size == (13, 6)
        for name in ("classes", "maps", "logits"):
            before, after = getattr(stored, name), getattr(found, name)
            assert before.dtype == after.dtype
            assert np.array_equal(before, after)

    def test_names_that_differ_in_a_dot_have_files_of_their_own(self, tmp_path):
        assert map_path(tmp_path, "a.1") != map_path(tmp_path, "a.2")

    def test_a_kill_during_the_write_leaves_no_file(self, tmp_path, monkeypatch):
        path = map_path(tmp_path, "x")

        def killed(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_maps(path, example())
        assert not path.exists()
        monkeypatch.undo()
        write_maps(path, example())
        assert [p.name for p in path.parent.iterdir()] == ["x.npz"]

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(UserError, match=r"x\.npz: no maps of this image"):
            read_maps(tmp_path / "x.npz")

    def broken(self, path, kind):
        write_maps(path, example())
        whole = path.read_bytes()
        match kind:
            case "empty":
                path.write_bytes(b"")
            case "cut":
                path.write_bytes(whole[: len(whole) // 2])
            case "bit":
                path.write_bytes(whole.replace(b"\x93NUMPY", b"\x93NAMPY"))
            case "text":
                path.write_text("maps")
            case "folder":
                path.unlink()
                path.mkdir()
            case "other":
                np.savez(path, x=np.zeros(3))
            case "array":
                with path.open("wb") as file:
                    np.save(file, np.zeros(3))
            case "pickle":
                np.savez(path, classes=np.array([{}]), maps=np.array([{}]), size=np.array([{}]), logits=np.array([{}]))

    @pytest.mark.parametrize("kind", ["empty", "cut", "bit", "text", "folder", "other", "array", "pickle"])
    def test_a_broken_file(self, tmp_path, kind):
        path = tmp_path / "x.npz"
        self.broken(path, kind)
        with pytest.raises(UserError, match=r"x\.npz: not a file of soft maps \(.*\); delete it") as caught:
            read_maps(path)
        assert "\n" not in str(caught.value)


class TestSizes:
    @pytest.mark.parametrize(
        ("size", "stored"), [((1, 1), (1, 1)), ((4, 5), (1, 2)), ((13, 8), (4, 2)), ((7, 11), (2, 3))]
    )
    def test_a_quarter_rounded_up(self, size, stored):
        assert map_size(size) == stored

    @pytest.mark.parametrize("size", [(1, 1), (7, 11), (13, 6)])
    def test_full_size_is_float32(self, size):
        stored = example(2, size)
        full = stored.full()
        assert full.dtype == torch.float32
        expected = F.interpolate(torch.from_numpy(stored.maps).float()[None], size=size, mode="bilinear")[0]
        assert torch.equal(full, expected)

    def test_full_size_of_an_untagged_image(self):
        assert example(0, (7, 11)).full().shape == (0, 7, 11)
