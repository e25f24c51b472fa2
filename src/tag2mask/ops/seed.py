"""Randomness as a function of where we are, so that a run that was killed goes on as if it had not been."""

from __future__ import annotations

import numpy as np


def seed_of(*numbers: int) -> int:
    """A well-mixed 63-bit seed from non-negative integers such as (seed, epoch, index); the same on every platform."""
    low, high = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) & (2**63 - 1)
