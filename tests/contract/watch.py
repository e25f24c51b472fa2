"""Watches every tensor operation of a block: raises on those that make the host wait for a GPU, counts the others."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Their result, or its shape, depends on values: on a GPU the host has to wait for them.
SYNCING = frozenset({
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "unique_dim_consecutive",
})  # fmt: skip
INDEXING = frozenset({"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"})
# On a CPU these never reach an operation, on a GPU they copy.
PYTHON = frozenset({"cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__array__"})


class HostSync(AssertionError):
    """The host would wait for the device here."""


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        name = func.overloadpacket.__name__
        if name in SYNCING:
            raise HostSync(f"aten.{name}")
        if name in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            raise HostSync(f"aten.{name} with a mask: use where or multiply")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            raise HostSync("aten.repeat_interleave without output_size")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in PYTHON:
            raise HostSync(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_sync():
    """Within the block a host sync raises; the value's `count` is the number of operations so far."""
    with _Methods(), _Operations() as operations:
        yield operations
