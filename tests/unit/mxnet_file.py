"""Writes files in the formats that MXNet had over the years, from the description in backbones/mxnet.py."""

import struct

import numpy as np

TYPES = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}


def shape_of(array, version):
    axes = array.ndim
    if version == 0:
        return struct.pack(f"<I{axes}I", axes, *array.shape)
    if version == 1:
        return struct.pack(f"<II{axes}q", 0xF993FAC8, axes, *array.shape)
    return struct.pack(f"<IiI{axes}q", 0xF993FAC9 if version == 2 else 0xF993FACA, 0, axes, *array.shape)


def array_of(array, version, device=1):
    kind = TYPES[array.dtype.name]
    return shape_of(array, version) + struct.pack("<iii", device, 0, kind) + np.ascontiguousarray(array).tobytes()


def file_of(arrays, version=0, device=1):
    """The bytes of a file with these arrays by name."""
    body = struct.pack("<QQQ", 0x112, 0, len(arrays))
    body += b"".join(array_of(array, version, device) for array in arrays.values())
    body += struct.pack("<Q", len(arrays))
    return body + b"".join(struct.pack("<Q", len(name.encode())) + name.encode() for name in arrays)
