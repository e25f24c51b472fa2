"""Started by torchrun: trains the slow pairs, or the others, for a few steps; writes down how each process ends.

One pair more must end differently, so that the comparison is known to see it.
"""

import sys
from pathlib import Path

import torch
from cases import BROKEN_PAIR, PAIRS, build, fit_in

from tag2mask.engine import Devices

out, devices = Path(sys.argv[1]), Devices("cpu")
slow = sys.argv[2] == "slow"
for pair in (*(p for p in PAIRS if p.slow == slow), BROKEN_PAIR):
    state = fit_in(out / str(pair), build(pair), steps=3, devices=devices)
    torch.save(state, out / f"{pair}.{devices.rank}.pt")
if devices.world > 1:
    torch.distributed.destroy_process_group()
