"""Momentum prototypes: representations that follow the weights of the network as moving averages over the steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MomentumPrototypes(nn.Module):
    """rows <- share * new + (1 - share) * rows; a row that was never written takes the first value as it is.

    A buffer `rows` [*shape] and a buffer `known`, bool, without the last axis: which rows hold something. `random`:
    all rows start from N(0, 1) and count as known. Rows change in `write` alone, so that all losses of a step see the
    same; give `merge` the same values on every process.
    """

    rows: Tensor
    known: Tensor

    def __init__(self, *shape: int, share: float, random: bool = False) -> None:
        super().__init__()
        self.share = share
        self.register_buffer("rows", torch.randn(shape) if random else torch.zeros(shape))
        self.register_buffer("known", torch.full(shape[:-1], random))
        self._next: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def merge(self, new: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, known) with `new` [*shape] merged in where `present`; in force from the next `write` on."""
        mixed = torch.where(self.known[..., None], self.share * new + (1 - self.share) * self.rows, new)
        self._next = torch.where(present[..., None], mixed, self.rows), self.known | present
        return self._next

    @torch.no_grad()
    def write(self) -> None:
        """Put the last merge, if there was one, into the buffers."""
        if self._next is not None:
            self.rows.copy_(self._next[0])
            self.known.copy_(self._next[1])
            self._next = None
