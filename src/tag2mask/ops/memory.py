"""A memory of vectors from past batches, in slots that belong to classes: queues, rings, one slot per image and class.

Every write is slot <- m * slot + (1 - m) * vector. What differs is which slot, and m:

    first in, first out   capacity Q, momentum 0     a class's Q slots in turn; the oldest vector is overwritten
    ring of averages      capacity Q, momentum m     a class's Q slots in turn; m of what a slot held stays
    pairs                 capacity None, momentum m  each (image, class) of the training tags has a slot of its own

Order is that of the global batch, by image, then by class; a slot that a batch writes several times ends as if that
had happened one after the other. All processes hold the same.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tag2mask.core import TrainingOnly
from tag2mask.errors import UserError
from tag2mask.ops.gather import gather


class Memory(TrainingOnly):
    """Slots 0..S-1, those of class 0 first, then those of class 1, ...

    Buffers: rows [S D]; writes [S], how often each slot was written; cursor [K], the place among its Q slots where a
    class writes next (it stays 0 without a capacity); class_of [S], which follows from the rest and is not saved.

    capacity: slots per class; None: one for each pair of the tags given to `remember`, and none before that.
    start: "zero" means that a slot holds nothing until it is written, and that its average is bias-corrected: divided
    by 1 - m^writes, it is the weighted mean of what was written. "copy": a slot takes its first vector as it is.
    "random": N(0, 1) that counts as written.

    Raises UserError for a value out of range.
    """

    rows: Tensor
    writes: Tensor
    cursor: Tensor
    class_of: Tensor
    _slot: Tensor  # pairs: [N K], the slot of image and class, -1 where there is none
    _place: Tensor  # [K Q], the slots of every class, padded to the largest
    _inside: Tensor  # bool [K Q], False where padded

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        capacity: int | None,
        momentum: float = 0.0,
        start: Literal["zero", "copy", "random"] = "zero",
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1 or (capacity is not None and capacity < 1):
            raise UserError("memory: momentum must be in 0..1, below 1; give a capacity of at least 1, or none")
        self.capacity, self.momentum, self.start = capacity, momentum, start
        self.register_buffer("cursor", torch.zeros(num_classes, dtype=torch.long))
        self.register_buffer("rows", torch.zeros(0, dim))
        self.register_buffer("_slot", torch.zeros(0, num_classes, dtype=torch.long), persistent=False)
        self._lay_out(torch.full((num_classes,), capacity or 0))
        self._staged: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def remember(self, tags: Tensor) -> None:
        """Make the slots of the training images, whose tags are [N K] of 0/1; with a capacity there is nothing to do.

        Everything that the memory held is gone.
        """
        if self.capacity is None:
            pairs = tags.T > 0
            number = torch.where(pairs, pairs.flatten().long().cumsum(0).view(pairs.shape) - 1, -1)
            self._slot = number.T.contiguous().to(self.rows.device)
            self._lay_out(pairs.sum(dim=1))

    def _lay_out(self, sizes: Tensor) -> None:
        """Make sizes[k] slots for every class."""
        device, total = self.rows.device, int(sizes.sum())
        fill = torch.randn if self.start == "random" else torch.zeros
        self.register_buffer("rows", fill(total, self.rows.shape[1], dtype=self.rows.dtype, device=device))
        self.register_buffer("writes", torch.zeros(total, dtype=torch.long, device=device))
        class_of = torch.arange(len(sizes)).repeat_interleave(sizes)
        place = torch.arange(int(sizes.max()))
        inside = place < sizes[:, None]
        place = torch.where(inside, place + (sizes.cumsum(0) - sizes)[:, None], 0)
        for name, value in {"class_of": class_of, "_place": place, "_inside": inside}.items():
            self.register_buffer(name, value.to(device), persistent=False)

    @torch.no_grad()
    def stage(self, vectors: Tensor, present: Tensor, index: Tensor, classes: Tensor | None = None) -> None:
        """Note what `write` will put into the memory: vectors [n K D] of this process's n images, where `present`.

        present bool [n K]; index [n], the positions of the images in the data set. What an image of no pair shows, and
        a pair that was not remembered, is left out. classes [n M]: vectors [n M D] and present [n M] are of these
        classes alone, each of which is there once. Raises UserError where pairs were to be remembered and were not.
        """
        if self.capacity is None and len(self._slot) == 0:
            raise UserError("memory: give `remember` the tags of the training images first, or set a capacity")
        if classes is None:
            classes = torch.arange(present.shape[1], device=present.device).expand(present.shape)
        facts = gather(torch.stack([present.long(), classes], dim=1))
        self._staged = gather(vectors).to(self.rows.dtype), facts[:, 0] > 0, facts[:, 1], gather(index)

    @torch.no_grad()
    def write(self) -> None:
        """Put what was staged last, if anything, into the slots."""
        if self._staged is None or len(self.rows) == 0:
            return
        vectors, written, classes, index = self._staged
        self._staged = None
        present = torch.zeros(len(index), len(self.cursor), dtype=torch.long, device=index.device)
        present.scatter_(1, classes, written.long())
        if self.capacity is None:
            slot = self._slot[index].gather(1, classes)
            written = written & (slot >= 0)
            again = (index[:, None] == index).triu(1).to(vectors.dtype)  # an image may be in a batch twice
            later = (again @ present.to(vectors.dtype)).gather(1, classes)
            slot = slot.clamp(min=0)
        else:
            turn = present.cumsum(dim=0)  # from 1; where nothing is written it is that of another, to no effect
            slot = ((self.cursor + turn - 1) % self.capacity).gather(1, classes) + classes * self.capacity
            later = ((turn[-1] - turn) // self.capacity).gather(1, classes)
            self.cursor.add_(turn[-1]).remainder_(self.capacity)
        self._mix(vectors.flatten(0, 1), written.flatten(), slot.flatten(), later.flatten())

    def _mix(self, vectors: Tensor, present: Tensor, slot: Tensor, later: Tensor) -> None:
        """slot <- m^t slot + sum_j (1 - m) m^later_j vector_j for the t vectors of a slot.

        vectors [P D]; present [P]: which of them count; slot [P]; later [P]: how many vectors of the same slot follow.
        """
        counts = torch.zeros_like(self.writes).index_add_(0, slot, present.long())
        times = counts[slot]
        weight = (1 - self.momentum) * self.momentum ** later.to(vectors.dtype)
        if self.start == "copy":
            first = (self.writes[slot] == 0) & (later == times - 1)
            weight = torch.where(first, weight / (1 - self.momentum), weight)
        kept = self.rows[slot].mul_((self.momentum ** times.to(vectors.dtype))[:, None])
        self.rows.index_copy_(0, slot, kept)  # all that name a slot write the same, and 1 times it if none is present
        self.rows.index_add_(0, slot, vectors.masked_fill(~present[:, None], 0).mul_(weight[:, None]))
        self.writes.add_(counts)

    def filled(self) -> Tensor:
        """bool [S], which slots hold something."""
        return torch.ones_like(self.writes, dtype=torch.bool) if self.start == "random" else self.writes > 0

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows [S D], bias-corrected; bool [S], which hold something; class_of [S])."""
        rows = self.rows
        if self.start == "zero" and self.momentum > 0:
            times = self.writes.clamp(min=1).to(rows.dtype)
            rows = rows / -torch.expm1(times * math.log(self.momentum))[:, None]  # 1 - m^writes
        return rows, self.filled(), self.class_of

    def by_class(self) -> tuple[Tensor, Tensor]:
        """(rows [K Q D], bias-corrected; bool [K Q], which hold something), Q the slots of the largest class."""
        rows, valid, _ = self.entries()
        if len(rows) == 0:
            return rows.new_zeros(*self._place.shape, rows.shape[1]), self._inside
        return rows[self._place], valid[self._place] & self._inside

    def slots_by_class(self) -> tuple[Tensor, Tensor]:
        """(numbers of every class's slots [K Q], bool [K Q], False where padded), Q the slots of the largest class."""
        return self._place, self._inside

    def slots_of(self, index: Tensor) -> Tensor:
        """The slot of every pair of the images `index` [n], -1 where there is none: [n K]. Without a capacity only."""
        return self._slot[index]
