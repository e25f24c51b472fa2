"""Batches as a function of (seed, step)."""

import os
import signal

import pytest
import torch

from tag2mask.engine.stream import StepSampler, stream


def batches(length, batch, total, *, start=0, seed=0, rank=0, world=1):
    sampler = StepSampler(length, batch, start=start, total=total, seed=seed, rank=rank, world=world)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


class TestSampler:
    @pytest.mark.parametrize(("length", "batch"), [(7, 3), (8, 4), (5, 1), (3, 8), (1, 2)])
    def test_every_image_comes_once_an_epoch(self, length, batch):
        found = batches(length, batch, total=length * 3)
        assert all(len(places) == batch for places in found)
        flat = [place for places in found for place in places]
        assert [epoch for epoch, _ in flat] == [i // length for i in range(len(flat))]
        for epoch in range(3 * batch):
            assert sorted(index for e, index in flat if e == epoch) == list(range(length))

    def test_epochs_and_seeds_are_shuffled_differently(self):
        orders = [[index for _, index in batches(20, 20, total=4, seed=seed)[epoch]]
                  for seed in range(3) for epoch in range(4)]  # fmt: skip
        assert len({tuple(order) for order in orders}) == 12

    def test_a_later_start_gives_the_same_batches(self):
        whole = batches(7, 3, total=10, seed=5)
        for start in range(11):
            assert batches(7, 3, total=10, start=start, seed=5) == whole[start:]

    @pytest.mark.parametrize("world", [2, 3, 6])
    def test_processes_share_the_global_batch_in_turns(self, world):
        whole = batches(7, 6, total=5)
        shares = [batches(7, 6, total=5, rank=rank, world=world) for rank in range(world)]
        for step, places in enumerate(whole):
            for rank in range(world):
                assert shares[rank][step] == places[rank::world]


class Noise:
    """Sample (epoch, index) with the process that made it and what that process does on Ctrl-C and SIGTERM."""

    def __len__(self):
        return 7

    def __getitem__(self, place):
        ctrl_c = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        end = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        return torch.tensor([*place, os.getpid(), ctrl_c, end])


class TestStream:
    def load(self, workers):
        sampler = StepSampler(7, 3, start=2, total=9, seed=1)
        return torch.stack(list(stream(Noise(), sampler, torch.stack, workers=workers, pin=False)))

    def test_workers_change_nothing(self):
        alone, helped = self.load(0), self.load(2)
        assert alone.shape == (7, 3, 5)
        assert torch.equal(alone[..., :2], torch.tensor(batches(7, 3, total=9, start=2, seed=1)))
        assert torch.equal(alone[..., :2], helped[..., :2])
        assert set(alone[..., 2].flatten().tolist()) == {os.getpid()}
        assert os.getpid() not in helped[..., 2].flatten().tolist()

    def test_workers_leave_ctrl_c_to_the_main_process_and_end_on_sigterm(self):
        previous = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            assert self.load(1)[..., 3:].eq(1).all()
        finally:
            signal.signal(signal.SIGTERM, previous)
