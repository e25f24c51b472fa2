"""Started twice by test_core: the functions of ops.gather on two processes that share a file."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tag2mask.ops.gather import gather, mean_over_processes, processes, rank, sum_over_processes

here, own = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group(
    "gloo", init_method=f"file://{here / 'meet'}", rank=own, world_size=2, timeout=timedelta(seconds=60)
)
whole = torch.load(here / "global.pt", weights_only=True)
share = whole[own::2].requires_grad_()
found = {
    "processes": processes(),
    "rank": rank(),
    "gathered": gather(share),
    "channels_last": gather(share.to(memory_format=torch.channels_last)),
    "transposed": gather(share.transpose(1, 3)),
    "flags": gather(share > 0),
    "sum": sum_over_processes(share.sum(0).to(memory_format=torch.contiguous_format)),
    "sum_transposed": sum_over_processes(share.sum(0).transpose(0, 2)),
    "mean": mean_over_processes(share.mean()),
    "counts": mean_over_processes(torch.tensor(own + 1)),
    "untouched": share,
}
torch.save(found, here / f"{own}.pt")
dist.destroy_process_group()
