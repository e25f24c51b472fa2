"""Started twice by test_memory: a memory of each kind on two processes that share a file."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tag2mask.ops.memory import Memory

here, own = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group(
    "gloo", init_method=f"file://{here / 'meet'}", rank=own, world_size=2, timeout=timedelta(seconds=60)
)
given = torch.load(here / "given.pt", weights_only=True)
found = {}
for name, options in given["kinds"].items():
    memory = Memory(**options)
    memory.remember(given["tags"])
    for vectors, present, index in given["batches"]:
        memory.stage(vectors[own::2], present[own::2], index[own::2])
        memory.write()
    found[name] = memory.state_dict()
torch.save(found, here / f"{own}.pt")
dist.destroy_process_group()
