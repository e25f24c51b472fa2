"""The memory against one of Python lists that writes vector by vector, and what it must keep."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tag2mask.core import inference_state
from tag2mask.errors import UserError
from tag2mask.ops.memory import Memory

CLASSES, DIM = 4, 3
# Image 1 has no tag, class 3 is on one image only.
TAGS = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 0, 0]])
KINDS = {
    "queue": {"capacity": 3},
    "queue of one": {"capacity": 1},
    "large queue": {"capacity": 50},
    "ring": {"capacity": 3, "momentum": 0.9},
    "ring, copy": {"capacity": 2, "momentum": 0.9, "start": "copy"},
    "ring, random": {"capacity": 3, "momentum": 0.9, "start": "random"},
    "pairs": {"capacity": None, "momentum": 0.9},
    "pairs, copy": {"capacity": None, "momentum": 0.9, "start": "copy"},
    "pairs, random": {"capacity": None, "momentum": 0.9, "start": "random"},
    "latest of pairs": {"capacity": None},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Loop:
    """The same by lists: one vector at a time, slots by class."""

    def __init__(self, memory, tags):
        self.o, self.next = memory, [0] * CLASSES
        if memory.capacity is None:
            names = [[(i, k) for i in range(len(tags)) if tags[i, k]] for k in range(CLASSES)]
        else:
            names = [[(place, k) for place in range(memory.capacity)] for k in range(CLASSES)]
        self.names = [name for group in names for name in group]
        self.sum = {name: row.clone() for name, row in zip(self.names, memory.rows, strict=True)}
        self.times = dict.fromkeys(self.names, 0)

    def write(self, vectors, present, index):
        m = self.o.momentum
        for n in range(len(vectors)):
            for k in range(CLASSES):
                if not present[n, k]:
                    continue
                name = (int(index[n]), k)
                if self.o.capacity is not None:
                    name = (self.next[k], k)
                    self.next[k] = (self.next[k] + 1) % self.o.capacity
                elif name not in self.sum:
                    continue
                first = self.o.start == "copy" and self.times[name] == 0
                self.sum[name] = vectors[n, k] if first else m * self.sum[name] + (1 - m) * vectors[n, k]
                self.times[name] += 1

    def entries(self):
        rows, valid = [], []
        for name in self.names:
            correct = self.o.start == "zero" and self.times[name]
            rows.append(self.sum[name] / (1 - self.o.momentum ** self.times[name]) if correct else self.sum[name])
            valid.append(self.times[name] > 0 or self.o.start == "random")
        return torch.stack(rows), torch.tensor(valid), torch.tensor([k for _, k in self.names])


def make(kind, tags=TAGS):
    torch.manual_seed(0)
    memory = Memory(CLASSES, DIM, **KINDS[kind]).double()
    memory.remember(tags)
    return memory.double()


def batches(count=6, images=4, share=0.7, seed=1):
    """Vectors of random images, some of which come twice; a pair that is not tagged is no news."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(count):
        index = torch.randint(len(TAGS), (images,), generator=random)
        present = (TAGS[index] > 0) & (torch.rand(images, CLASSES, generator=random) < share)
        vectors = torch.randn(images, CLASSES, DIM, generator=random, dtype=torch.float64)
        yield vectors.masked_fill(~present[..., None], torch.nan), present, index


def assert_same(memory, loop):
    rows, valid, class_of = memory.entries()
    wanted = loop.entries()
    torch.testing.assert_close(rows[valid], wanted[0][valid], rtol=1e-10, atol=1e-12)
    assert torch.equal(valid, wanted[1]) and torch.equal(class_of, wanted[2])
    assert memory.writes.tolist() == list(loop.times.values())
    assert memory.cursor.tolist() == loop.next


@every_kind
def test_it_is_as_if_vectors_came_one_by_one(kind):
    memory = make(kind)
    loop = Loop(memory, TAGS)
    repeated = 0
    for batch in batches():
        memory.stage(*batch)
        memory.write()
        loop.write(*batch)
        assert_same(memory, loop)
        repeated += len(batch[2]) - len(batch[2].unique())
    assert repeated > 2 and memory.writes.sum() > 10
    assert memory.writes.max() > 1 or kind == "large queue"


@pytest.mark.parametrize("kind", ["queue", "ring", "ring, copy"])
def test_more_vectors_in_a_batch_than_slots(kind):
    """Twice round the ring and a little more, from a cursor in the middle."""
    memory = make(kind)
    loop = Loop(memory, TAGS)
    for images in (1, 2 * memory.capacity + 1):
        batch = torch.randn(images, CLASSES, DIM).double(), torch.ones(images, CLASSES) > 0, torch.zeros(images).long()
        memory.stage(*batch)
        memory.write()
        loop.write(*batch)
    assert_same(memory, loop)
    assert memory.cursor.tolist() == [(2 * memory.capacity + 2) % memory.capacity] * CLASSES


@every_kind
def test_vectors_of_some_classes_only(kind):
    """The same, given as the classes in question, in any order."""
    whole, part = make(kind), make(kind)
    for step, (vectors, present, index) in enumerate(batches()):
        whole.stage(vectors, present, index)
        keys = present + torch.rand(present.shape, generator=torch.Generator().manual_seed(step))
        classes = keys.argsort(dim=1, descending=True)[:, :3]  # no image has more
        classes = classes.gather(1, torch.tensor([[2, 0, 1]]).expand(len(classes), -1))
        chosen = vectors.gather(1, classes[..., None].expand(-1, -1, DIM))
        part.stage(chosen, present.gather(1, classes), index, classes)
        whole.write()
        part.write()
    assert all(torch.equal(x, part.state_dict()[name]) for name, x in whole.state_dict().items())


def test_a_queue_holds_the_latest_and_overwrites_the_oldest():
    memory = Memory(2, 1, capacity=3)
    for value in (1.0, 2.0, 3.0, 4.0):
        memory.stage(torch.full((1, 2, 1), value), torch.tensor([[True, False]]), torch.zeros(1).long())
        memory.write()
    rows, valid = memory.by_class()
    assert rows[0, :, 0].tolist() == [4, 2, 3] and valid.tolist() == [[True] * 3, [False] * 3]
    memory.rows.fill_(1e30)  # and what was there leaves no trace, not even of rounding
    for value in (0.1, 0.2, 0.3):
        memory.stage(torch.full((1, 2, 1), value), torch.tensor([[True, True]]), torch.zeros(1).long())
        memory.write()
    assert sorted(memory.rows[:3, 0].tolist()) == torch.tensor([0.1, 0.2, 0.3]).tolist()


@pytest.mark.parametrize("kind", ["ring", "ring, copy", "pairs", "pairs, copy"])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.9999])
def test_a_constant_is_remembered_as_it_is(kind, momentum):
    """Bias correction: after any number of writes of one vector a slot holds that vector, in single precision too."""
    memory = Memory(CLASSES, DIM, **(KINDS[kind] | {"momentum": momentum}))
    memory.remember(TAGS)
    constant = torch.randn(CLASSES, DIM)
    for _ in range(5):
        memory.stage(constant.expand(len(TAGS), -1, -1), TAGS > 0, torch.arange(len(TAGS)))
        memory.write()
        rows, valid, class_of = memory.entries()
        torch.testing.assert_close(rows[valid], constant[class_of[valid]], rtol=2e-6, atol=0)
    assert valid.sum() == len(rows)


@every_kind
def test_by_class_has_every_entry_in_its_place(kind):
    memory = make(kind)
    for batch in batches():
        memory.stage(*batch)
        memory.write()
    rows, valid, class_of = memory.entries()
    grouped, there = memory.by_class()
    assert grouped.shape[:2] == there.shape == (CLASSES, max((class_of == k).sum().item() for k in range(CLASSES)))
    for k in range(CLASSES):
        mine = rows[class_of == k]
        assert torch.equal(grouped[k, : len(mine)], mine)
        assert torch.equal(there[k, : len(mine)], valid[class_of == k])
        assert not there[k, len(mine) :].any()


@every_kind
def test_a_fresh_memory_holds_nothing_unless_it_is_random(kind):
    memory = make(kind)
    random = "random" in kind
    for rows, valid in (memory.entries()[:2], memory.by_class()):
        assert rows.isfinite().all()
        if random:
            assert valid.sum() == len(memory.rows) and rows.abs().sum() > 0
        else:
            assert not valid.any() and not rows.any()


@every_kind
def test_only_write_changes_anything_and_only_once(kind):
    memory = make(kind)
    before = {name: x.clone() for name, x in memory.state_dict().items()}
    memory.write()
    vectors, present, index = next(iter(batches()))
    vectors = vectors.nan_to_num().requires_grad_()
    memory.stage(vectors, present, index)
    assert all(torch.equal(x, before[name]) for name, x in memory.state_dict().items())
    memory.write()
    after = {name: x.clone() for name, x in memory.state_dict().items()}
    assert not all(torch.equal(x, before[name]) for name, x in after.items())
    memory.write()
    assert all(torch.equal(x, after[name]) for name, x in memory.state_dict().items())
    assert not any(x.requires_grad for x in (*memory.entries(), *memory.by_class()))


@every_kind
def test_what_is_not_present_leaves_no_trace(kind):
    memory = make(kind)
    before = {name: x.clone() for name, x in memory.state_dict().items()}
    memory.stage(torch.full((4, CLASSES, DIM), torch.nan), torch.zeros(4, CLASSES) > 0, torch.arange(4))
    memory.write()
    assert all(torch.equal(x, before[name]) for name, x in memory.state_dict().items())


def test_pairs_that_were_not_remembered_are_left_out():
    memory = make("pairs")
    memory.stage(torch.ones(5, CLASSES, DIM), torch.ones(5, CLASSES) > 0, torch.arange(5))
    memory.write()
    assert memory.writes.tolist() == [1] * int(TAGS.sum())
    torch.testing.assert_close(memory.entries()[0], torch.ones(len(memory.rows), DIM).double())


@pytest.mark.parametrize("images", [0, 5])
def test_no_tag_at_all(images):
    memory = Memory(CLASSES, DIM, capacity=None, momentum=0.9)
    if images:
        memory.remember(torch.zeros(images, CLASSES))
        memory.stage(torch.ones(2, CLASSES, DIM), torch.ones(2, CLASSES) > 0, torch.arange(2))
        memory.write()
    else:
        with pytest.raises(UserError, match="remember"):
            memory.stage(torch.ones(2, CLASSES, DIM), torch.ones(2, CLASSES) > 0, torch.arange(2))
    assert memory.entries()[0].shape == (0, DIM) and memory.by_class()[0].shape == (CLASSES, 0, DIM)


def test_one_class_and_one_image():
    memory = Memory(1, DIM, capacity=None, momentum=0.9)
    memory.remember(torch.ones(1, 1))
    for _ in range(2):
        memory.stage(torch.ones(1, 1, DIM), torch.ones(1, 1) > 0, torch.zeros(1).long())
        memory.write()
    torch.testing.assert_close(memory.by_class()[0], torch.ones(1, 1, DIM))


@every_kind
def test_it_is_in_checkpoints_and_not_in_exported_weights(kind):
    memory, other = make(kind), make(kind)
    for batch in batches():
        memory.stage(*batch)
        memory.write()
    assert set(memory.state_dict()) == {"rows", "writes", "cursor"}
    assert inference_state(torch.nn.ModuleList([memory])) == {}
    other.load_state_dict(memory.state_dict())
    for one in (memory, other):
        one.stage(*next(iter(batches(seed=9))))
        one.write()
    assert all(torch.equal(x, y) for x, y in zip(memory.entries(), other.entries(), strict=True))


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": -0.1}, {"capacity": 0}])
def test_values_out_of_range(options):
    with pytest.raises(UserError, match="memory"):
        Memory(CLASSES, DIM, **({"capacity": 3} | options))


def test_two_processes_hold_what_one_does(tmp_path):
    kinds = {name: {"num_classes": CLASSES, "dim": DIM} | o for name, o in KINDS.items() if o.get("start") != "random"}
    given = {"kinds": kinds, "tags": TAGS, "batches": list(batches())}
    torch.save(given, tmp_path / "given.pt")
    script = Path(__file__).with_name("two_memories.py")
    running = [subprocess.Popen([sys.executable, script, tmp_path, str(own)]) for own in range(2)]
    assert [process.wait(timeout=90) for process in running] == [0, 0]
    one, two = (torch.load(tmp_path / f"{own}.pt", weights_only=True) for own in range(2))
    for name, options in kinds.items():
        memory = Memory(**options)
        memory.remember(TAGS)
        for batch in given["batches"]:
            memory.stage(*batch)
            memory.write()
        for key, value in memory.state_dict().items():
            assert torch.equal(one[name][key], value) and torch.equal(two[name][key], value), (name, key)
