"""Accelerate behind a few verbs: which device, which process, wait, agree."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from tag2mask.errors import UserError
from tag2mask.ops.gather import mean_over_processes

Device = Literal["auto", "cpu", "cuda", "mps"]


class Devices:
    """The processes and devices of this run: one CPU, one GPU, or what `torchrun`/`accelerate launch` started.

    Raises UserError when the device asked for does not exist.
    """

    def __init__(self, device: Device = "auto") -> None:
        from accelerate import Accelerator, DataLoaderConfiguration
        from accelerate.utils import DistributedDataParallelKwargs

        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: no CUDA GPU is visible to PyTorch; use --device auto or cpu")
        if device == "mps" and not torch.backends.mps.is_available():
            raise UserError("--device mps: no Apple GPU is visible to PyTorch; use --device auto or cpu")
        # Banks and teachers are kept alike on all ranks by gathering what is written; broadcasting buffers would
        # overwrite every rank's with rank 0's and breaks several forward passes in one step.
        plain_ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        self._accelerator = Accelerator(
            cpu=device == "cpu", kwargs_handlers=[plain_ddp], dataloader_config=DataLoaderConfiguration()
        )
        self.device: torch.device = self._accelerator.device
        if self.device.type == "cpu":
            _keep_freed_memory()
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes

    @property
    def main(self) -> bool:
        """True on the process that writes shared files and talks to the user."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """The device in words, for reports."""
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"{self.world} x {kind}{threads}" if self.world > 1 else f"{kind}{threads}"

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move `model` to the device (in place) and wrap it for data-parallel training where there are several."""
        model.to(self.device)
        if self.world > 1 and any(p.requires_grad for p in model.parameters()):
            with warnings.catch_warnings():  # the new name of broadcast_buffers is unknown to older torch
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                wrapped: nn.Module = self._accelerator.prepare_model(model)
            return wrapped
        return model

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, averaged over processes."""
        self._accelerator.backward(loss)

    def any(self, flag: bool) -> bool:
        """True on all processes if `flag` is set on one of them."""
        if self.world == 1:
            return flag
        return bool(mean_over_processes(torch.tensor(float(flag), device=self.device)) > 0)

    def wait(self) -> None:
        """Until every process is here."""
        self._accelerator.wait_for_everyone()

    def share(self, count: int) -> range:
        """This process's part of `count` independent items."""
        return range(self.rank, count, self.world)

    def start_counting_memory(self) -> None:
        """Peaks are counted from here (on a GPU; a process's resident peak cannot be reset)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_mb(self) -> float:
        """Peak memory in MB: of the GPU if there is one, else of this process (resident)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _keep_freed_memory() -> None:
    """Let this process keep the memory that tensors on the CPU free (glibc only; elsewhere nothing happens).

    By default glibc returns every large block to the system at once and gets it back zeroed, page by page: for
    convolutions on images that costs more than the arithmetic, inference runs 2 to 3 times as fast without.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)
