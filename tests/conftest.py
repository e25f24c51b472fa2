"""For all tests: one thread (sums in one order, and two test runs share a small machine), and no way to a hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
