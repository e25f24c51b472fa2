"""MXNet files: what was written comes back, in every version of the layout, and nothing else is taken for one."""

import struct

import numpy as np
import pytest
from mxnet_file import TYPES, array_of, file_of

from tag2mask.backbones.mxnet import MalformedError, read


def arrays():
    draw = np.random.default_rng(0)
    return {
        "arg:conv1a_weight": draw.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "arg:bn2a_branch2a_gamma": draw.standard_normal(5).astype(np.float32),
        "aux:bn2a_branch2a_moving_var": draw.random(5).astype(np.float32),
        "plain": np.arange(6, dtype=np.int64).reshape(2, 1, 3),
    }


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "file.params"
        path.write_bytes(content)
        return path

    return write


class TestRead:
    @pytest.mark.parametrize("version", [0, 1, 2, 3])
    @pytest.mark.parametrize("device", [1, 2])  # of a CPU or a GPU: of no consequence
    def test_what_was_written(self, write, version, device):
        found = read(write(file_of(arrays(), version, device)))
        assert list(found) == ["conv1a_weight", "bn2a_branch2a_gamma", "bn2a_branch2a_moving_var", "plain"]
        for (name, array), wanted in zip(found.items(), arrays().values(), strict=True):
            assert array.dtype == wanted.dtype and np.array_equal(array, wanted), name

    @pytest.mark.parametrize("kind", TYPES)
    def test_every_type(self, write, kind):
        wanted = np.array([[1, 2, 3], [100, 5, 6]], kind)
        found = read(write(file_of({"x": wanted})))["x"]
        assert found.dtype == kind and np.array_equal(found, wanted)

    @pytest.mark.parametrize("version", [0, 1, 2])
    def test_arrays_without_axes_or_elements(self, write, version):
        empty = {0: struct.pack("<I", 0), 1: struct.pack("<II", 0xF993FAC8, 0),
                 2: struct.pack("<IiI", 0xF993FAC9, 0, 0)}[version]  # fmt: skip
        after, none = np.float32([1, 2]), np.zeros((0, 4), np.float32)
        content = struct.pack("<QQQ", 0x112, 0, 3) + empty + array_of(none, version) + array_of(after, version)
        content += struct.pack("<Q", 3) + b"".join(struct.pack("<Q", 1) + name for name in (b"a", b"b", b"c"))
        found = read(write(content))
        assert [array.size for array in found.values()] == [0, 0, 2]
        assert np.array_equal(found["c"], after)

    def test_no_arrays(self, write):
        assert read(write(file_of({}))) == {}


class TestMalformed:
    def fault(self, path):
        with pytest.raises(MalformedError) as caught:
            read(path)
        return str(caught.value)

    @pytest.mark.parametrize("version", [0, 1, 2])
    def test_cut_short_anywhere(self, write, version):
        content = file_of({"a": np.float32([1, 2]), "b": np.float32([[3]])}, version)
        for length in range(len(content)):
            assert self.fault(write(content[:length])) == "it is cut short"

    def test_something_behind_the_end(self, write):
        assert self.fault(write(file_of(arrays()) + b"\0")) == "1 bytes behind its end"

    @pytest.mark.parametrize("content", [b"PK\x03\x04" * 10, b"\x80\x02" + b"x" * 40, b"\0" * 64])
    def test_another_kind_of_file(self, write, content):
        assert self.fault(write(content)) == "it does not begin like an MXNet file"

    def test_numbers_that_cannot_be(self, write):
        head = struct.pack("<QQQ", 0x112, 0, 1)
        assert self.fault(write(head[:16] + struct.pack("<QQ", 2**63, 0))) == "it is cut short"
        assert self.fault(write(head + struct.pack("<I", 33) + b"\0" * 300)) == "an array of 33 axes"
        odd = struct.pack("<IIqiii", 0xF993FAC8, 1, -4, 1, 0, 0) + b"\0" * 64
        assert self.fault(write(head + odd)) == "an array of type 0 and shape [-4]"
        odd = struct.pack("<IIiii", 1, 4, 1, 0, 9) + b"\0" * 64
        assert self.fault(write(head + odd)) == "an array of type 9 and shape [4]"
        huge = struct.pack("<IIqqiii", 0xF993FAC8, 2, 2**62, 2**62, 1, 0, 0) + b"\0" * 64
        assert self.fault(write(head + huge)) == "it is cut short"
        sparse = struct.pack("<Ii", 0xF993FAC9, 1) + b"\0" * 64
        assert self.fault(write(head + sparse)) == "it holds sparse arrays"

    def test_names_that_do_not_match(self, write):
        content = struct.pack("<QQQ", 0x112, 0, 1) + array_of(np.float32([1]), 0)
        assert self.fault(write(content + struct.pack("<Q", 0))) == "0 names for 1 arrays"
        pair = struct.pack("<QQQ", 0x112, 0, 2) + array_of(np.float32([1]), 0) * 2
        twice = (struct.pack("<Q", 1) + b"a") * 2
        assert self.fault(write(pair + struct.pack("<Q", 2) + twice)) == "1 names for 2 arrays"
