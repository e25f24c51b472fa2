"""Started by torchrun: trains every pair for a few steps and writes down what each process ends with.

One pair more must end differently, so that the comparison is known to see it.
"""

import sys
from pathlib import Path

import torch
from cases import BROKEN_PAIR, PAIRS, build, fit_in

from tag2mask.engine import Devices

out, devices = Path(sys.argv[1]), Devices("cpu")
for pair in (*PAIRS, BROKEN_PAIR):
    state = fit_in(out / str(pair), build(pair), steps=3, devices=devices)
    torch.save(state, out / f"{pair}.{devices.rank}.pt")
if devices.world > 1:
    torch.distributed.destroy_process_group()
