"""OAA: the accumulation against loops over steps, images, classes and cells."""

import math

import pytest
import torch
from test_place import loop_warp, some_places

from tag2mask.backbones import BackboneSettings
from tag2mask.baselines.oaa import OAA, Attention, in_last_epoch, likely
from tag2mask.core import FULL, Batch, CamOutput, Objective, Progress, inference_state
from tag2mask.engine.stream import StepSampler
from tag2mask.errors import UserError

BACKBONE = BackboneSettings(name="test_resnet", weights=None, output_stride=16)
GRID, CLASSES = 6, 4
TAGS = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 0]])
MIDDLE, LAST = Progress(epoch=2.0, done=0.2), Progress(epoch=9.5, done=0.95)  # of ten epochs


def attention(above=None, tags=TAGS):
    """In double precision, so that rounding does not hide mistakes."""
    made = Attention(CLASSES, GRID, above=above).double()
    made.remember(tags)
    return made


def output(images, seed, size=(5, 7)):
    draw = torch.Generator().manual_seed(seed)
    cams = torch.randn(images, CLASSES, *size, dtype=torch.float64, generator=draw)
    cams[0, 1] = -1.0  # a map that is nowhere positive
    return CamOutput(torch.randn(images, CLASSES, dtype=torch.float64, generator=draw), cams, {})


def batch(index, place=None, tags=TAGS):
    index = torch.tensor(index)
    return Batch(
        torch.zeros(len(index), 3, 8, 8), tags[index].float(), index, torch.ones(len(index), 1, 8, 8), place=place
    )


def step(memory, out, data, progress):
    memory.stage(out, data, progress)
    memory.write()


class Loop:
    """{(image, class): map}, written as the definition says, one pair after the other."""

    def __init__(self, tags=TAGS, above=None):
        self.above = above
        self.maps = {pair: torch.zeros(GRID, GRID, dtype=torch.float64) for pair in pairs(tags)}

    def step(self, out, data, begun, last):
        before = {pair: values.clone() for pair, values in self.maps.items()}
        for b, image in enumerate(data.index.tolist()):
            for k in range(CLASSES):
                if (image, k) not in self.maps:
                    continue
                score, wanted = out.logits[b, k].item(), int(data.tags[b].sum())
                if self.above is None:
                    passes = sum(other > score for other in out.logits[b].tolist()) < wanted
                else:
                    passes = 1 / (1 + math.exp(-score)) >= self.above
                forced = last and not before[image, k].any()
                if not (begun and passes) and not forced:
                    continue
                place = torch.eye(2, 3) if data.place is None else data.place[b]
                a = loop_warp(out.cams[b : b + 1, k : k + 1].clamp(min=0), place[None], (GRID, GRID))[0][0, 0]
                if a.max() > 0:
                    self.maps[image, k] = torch.maximum(self.maps[image, k], a / a.max())


def pairs(tags=TAGS):
    return [(i, k) for i in range(len(tags)) for k in range(CLASSES) if tags[i, k]]


def assert_same(memory, loop, atol=1e-10):
    for i in range(len(memory.slot)):
        for k in range(CLASSES):
            slot = int(memory.slot[i, k])
            if (i, k) not in loop.maps:
                assert slot == -1
            else:
                assert torch.allclose(memory.maps[slot].double(), loop.maps[i, k], atol=atol), (i, k)
    assert len(memory.maps) == len(loop.maps) == len({int(s) for s in memory.slot.flatten() if s >= 0})


class TestAccumulation:
    @pytest.mark.parametrize("above", [None, 0.4])
    @pytest.mark.parametrize("placed", [False, True])
    def test_against_a_loop(self, above, placed):
        memory, loop = attention(above), Loop(above=above)
        draw = torch.Generator().manual_seed(4)
        for number in range(24):
            index = torch.randint(0, len(TAGS), (4,), generator=draw).tolist()  # images may meet themselves
            place = some_places(4, seed=number) if placed else None
            out, data = output(4, number), batch(index, place)
            progress = Progress(epoch=number / 4, done=number / 24)
            step(memory, out, data, progress)
            loop.step(out, data, begun=number >= 4, last=number >= 20)
            assert_same(memory, loop)
        taken = [values.max().item() for values in loop.maps.values()]
        assert taken.count(1.0) >= len(taken) - 1

    def test_half_precision(self):
        memory, loop = Attention(CLASSES, GRID), Loop()
        memory.remember(TAGS)
        for number in range(8):
            out, data = output(6, number), batch(range(6), some_places(6, seed=number))
            step(memory, out, data, MIDDLE)
            loop.step(out, data, begun=True, last=False)
        assert memory.maps.dtype == torch.float16
        assert_same(memory, loop, atol=1e-3)

    def test_nothing_in_the_first_epoch(self):
        memory = attention()
        for epoch in (0.0, 0.3, 0.99):
            step(memory, output(6, 0), batch(range(6)), Progress(epoch, epoch / 10))
        assert not memory.maps.any()
        step(memory, output(6, 0), batch(range(6)), Progress(1.0, 0.1))
        assert memory.maps.any()

    def test_what_the_crop_does_not_show_stays(self):
        memory = attention()
        memory.maps.fill_(0.25)
        left = torch.tensor([[[2.0, 0, 1], [0, 1, 0]]])  # the left half of the image is the crop
        out = CamOutput(torch.ones(1, CLASSES), torch.full((1, CLASSES, 4, 4), 3.0, dtype=torch.float64), {})
        step(memory, out, batch([0], left), MIDDLE)
        own = memory.maps[memory.slot[0, 0].item()]
        assert torch.allclose(own[:, : GRID // 2], torch.ones((), dtype=own.dtype))
        assert own[:, GRID // 2 :].eq(0.25).all()
        assert memory.maps[memory.slot[1, 1].item()].eq(0.25).all()  # of another image

    def test_padding_is_no_part_of_the_maximum(self):
        memory = attention()
        cams = torch.ones(1, CLASSES, 4, 4, dtype=torch.float64)
        cams[..., 2:] = 50  # on padding: the image is the left half of the crop
        place = torch.tensor([[[0.5, 0, -0.5], [0, 1, 0]]])
        cams[..., 1] = 2
        step(memory, CamOutput(torch.ones(1, CLASSES), cams, {}), batch([0], place), MIDDLE)
        own = memory.maps[memory.slot[0, 0].item()]
        assert own.max() == 1 and own[:, 0].eq(own.min()).all() and own.min() > 0.04

    @pytest.mark.parametrize("size", [GRID, 9])
    def test_shuffled_and_mirrored_is_the_same(self, size):
        plain, other = attention(), attention()
        mirrors = torch.tensor([[1.0, 1], [-1, 1], [1, -1], [-1, -1]])
        for number in range(6):
            draw = torch.Generator().manual_seed(number)
            out = output(6, number, (size, size))
            step(plain, out, batch(range(6)), MIDDLE if number < 5 else LAST)
            order = torch.randperm(6, generator=draw)
            mirror = mirrors[torch.randint(0, 4, (6,), generator=draw)]
            cams = torch.stack([
                torch.flip(out.cams[i], [axis for axis, sign in ((2, x), (1, y)) if sign < 0])
                for i, (x, y) in zip(order.tolist(), mirror.tolist(), strict=True)
            ])  # fmt: skip
            place = torch.diag_embed(torch.cat([mirror, torch.ones(6, 1)], dim=1))[:, :2]
            shuffled = CamOutput(out.logits[order], cams, {})
            step(other, shuffled, batch(order.tolist(), place), MIDDLE if number < 5 else LAST)
        assert plain.maps.amax(dim=(1, 2)).eq(1).sum() > 8
        assert torch.allclose(plain.maps, other.maps, atol=1e-6)

    def test_an_image_that_a_batch_has_several_times(self):
        together, apart = attention(), attention()
        out = output(4, 3)
        step(together, out, batch([3, 3, 0, 3]), MIDDLE)
        for b, image in enumerate([3, 3, 0, 3]):
            one = CamOutput(out.logits[b : b + 1], out.cams[b : b + 1], {})
            step(apart, one, batch([image]), MIDDLE)
        assert together.maps.any()
        assert torch.equal(together.maps, apart.maps)

    def test_tags_that_were_not_remembered_are_left_out(self):
        memory = attention()
        out = output(2, 0)
        step(memory, out, batch([0, 1], tags=torch.zeros_like(TAGS)), LAST)
        assert not memory.maps.any()
        step(memory, out, batch([0, 1], tags=torch.ones_like(TAGS)), LAST)
        assert sorted(memory.slot[memory.slot >= 0].tolist()) == list(range(len(memory.maps)))
        touched = {int(s) for s in range(len(memory.maps)) if memory.maps[s].any()}
        assert touched == {int(memory.slot[0, 0]), int(memory.slot[0, 2]), int(memory.slot[1, 1])}

    @pytest.mark.parametrize("tags", [torch.zeros(3, CLASSES, dtype=torch.long), torch.ones(1, CLASSES)])
    def test_no_tags_at_all_and_one_image(self, tags):
        memory = attention(tags=tags)
        step(memory, output(1, 0), batch([0], tags=tags), LAST)
        assert len(memory.maps) == int(tags.sum())
        assert memory.maps.amax(dim=(1, 2)).eq(1).sum() == max(0, int(tags.sum()) - 1)  # the map of zeros stays so

    def test_without_remember_nothing_happens(self):
        memory = Attention(CLASSES, GRID)
        step(memory, output(2, 0), batch([0, 1]), LAST)
        assert memory.maps.shape == (0, GRID, GRID)

    def test_a_step_is_written_once(self):
        memory = attention()
        step(memory, output(6, 0), batch(range(6)), MIDDLE)
        before = memory.maps.clone()
        memory.maps.zero_()
        memory.write()
        assert before.any() and not memory.maps.any()


class TestGate:
    def test_the_most_likely_classes(self):
        logits = torch.tensor([[3.0, 1, 2, 0]] * 5)
        tags = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1]])
        assert likely(logits, tags, None).int().tolist() == [
            [0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1],
        ]  # fmt: skip

    def test_equal_classes_are_equally_likely(self):
        logits = torch.tensor([[1.0, 2, 2, 0]])
        assert likely(logits, torch.tensor([[1.0, 0, 0, 0]]), None).tolist() == [[False, True, True, False]]

    def test_a_probability(self):
        logits = torch.tensor([[math.log(0.2 / 0.8), math.log(0.1 / 0.9) + 1e-4, math.log(0.05), -9.0]])
        assert likely(logits, torch.zeros(1, 4), 0.1).tolist() == [[True, True, False, False]]
        assert likely(logits, torch.zeros(1, 4), 0.0).all()

    def test_what_is_not_likely_waits_for_the_last_epoch(self):
        memory, out, data = attention(), output(1, 1), batch([1])
        out.logits[0] = torch.tensor([1.0, -1, 2, 0])  # the image shows class 1
        out.cams[0, 1] = torch.rand(5, 7)
        step(memory, out, data, MIDDLE)
        assert not memory.maps.any()
        step(memory, out, data, LAST)
        first = memory.maps.clone()
        assert first.max() == 1
        out.cams[0, 1] = torch.rand(5, 7).flip(0)
        step(memory, out, data, LAST)  # now there is one: the gate alone counts
        assert torch.equal(memory.maps, first)

    @pytest.mark.parametrize("images, batch_size, epochs", [
        (8, 4, 3), (10, 4, 3), (7, 3, 2), (7, 3, 5.5), (5, 12, 8), (23, 4, 2.3), (9, 2, 15), (64, 16, 50), (6, 4, 1.2),
    ])  # fmt: skip
    def test_every_image_comes_once_more_in_the_last_epoch(self, images, batch_size, epochs):
        total = round(epochs * images / batch_size)
        sampler = StepSampler(images, batch_size, start=0, total=total, seed=0)
        flags, seen = [], set()
        for number, places in enumerate(sampler):
            now = Progress(number * batch_size / images, number / total)
            flags.append(in_last_epoch(now, batch_size / images))
            seen |= {index for _, index in places} if flags[-1] else set()
        assert flags == sorted(flags)
        whole = total * batch_size // images
        first = (max(whole, 1) - 1) * images // batch_size
        assert flags[max(first, 1) :] == [True] * (total - max(first, 1)) and not any(flags[:first])
        if whole >= 2:
            assert seen == set(range(images))


class TestNetwork:
    def net(self, **settings):
        torch.manual_seed(0)
        return OAA(CLASSES, backbone=BACKBONE, **{"width": 8, "std": 0.1, "grid": GRID} | settings)

    def images(self, count=4):
        return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(2))

    def data(self, index):
        made = batch(index, some_places(len(index)).float())
        made.images = self.images(len(index))
        return made

    def test_maps_are_four_convolutions_and_logits_their_mean(self):
        net = self.net()
        out = Objective(net, num_classes=CLASSES).look(self.images())
        x = out.features["last"]
        for number in (0, 2, 4):
            layer = net.classifier[number]
            assert layer.weight.shape[2:] == (3, 3)
            x = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1).clamp(min=0)
        expected = torch.einsum("kd,bdhw->bkhw", net.classifier[6].weight[:, :, 0, 0], x)
        assert torch.allclose(out.cams, expected, atol=1e-6)
        assert torch.allclose(out.logits, expected.mean(dim=(2, 3)), atol=1e-6)
        assert out.logits.abs().max() > 1e-4

    def test_initial_weights(self):
        net = self.net(width=64, std=0.01)
        for layer in (net.classifier[0], net.classifier[2], net.classifier[4]):
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02) and abs(layer.weight.mean()) < 1e-4
            assert not layer.bias.any()
        assert net.classifier[6].weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert OAA(CLASSES, backbone=BACKBONE).classifier[4].weight.shape == (512, 512, 3, 3)

    def test_wider(self):
        net = self.net()
        was = net.dims["last"]
        net.widen(3)
        assert net.dims["last"] == was + 3 and net.widened == 3
        assert net.classifier[0].weight.shape == (8, was + 3, 3, 3)
        assert net.classifier[0].weight.std().item() == pytest.approx(0.1, rel=0.1)
        features = net.encode(self.images()) | {"last": torch.randn(2, was + 3, 4, 4)}
        assert net.classify(features, self.images()).cams.shape == (2, CLASSES, 4, 4)

    def test_a_step_writes_after_it_and_the_memory_is_handed_on(self):
        net = self.net()
        assert net.export_memory() == {}
        net.remember(TAGS)
        data = self.data([3, 0, 5, 4])
        out = net.classify(net.encode(data.images), data.images)
        losses = net.losses(data, {FULL: out}, LAST)
        expected = torch.nn.functional.multilabel_soft_margin_loss(out.logits, data.tags)
        assert losses.keys() == {"cls"} and torch.equal(losses["cls"], expected)
        assert not net.attention.maps.any()
        net.after_step()
        memory = net.export_memory()
        assert memory.keys() == {"maps", "slot"}
        assert memory["maps"].any() and memory["maps"].dtype == torch.float16
        assert memory["slot"].tolist() == [
            [0, -1, 1, -1],
            [-1, 2, -1, -1],
            [-1] * 4,
            [3, 4, 5, 6],
            [-1, -1, -1, 7],
            [-1, 8, 9, -1],
        ]

    def test_the_memory_is_in_checkpoints_and_not_in_weights(self):
        net = self.net()
        net.remember(TAGS)
        assert {"attention.maps", "attention.slot"} <= net.state_dict().keys()
        assert not [name for name in inference_state(net) if name.startswith("attention")]

    @pytest.mark.parametrize("share", [1.0, 0.5])
    def test_the_drop_layer(self, share):
        net = self.net(drop=share, drop_above=0.6).eval()
        net.remember(TAGS)
        net.attention.maps.copy_(torch.rand(net.attention.maps.shape, generator=torch.Generator().manual_seed(1)))
        data, now = self.data([0, 3, 2, 5]), Progress(3.0, 0.3, seed=5)
        with torch.no_grad():
            out = net.classify(net.encode(data.images), data.images)
            found = net.losses(data, {FULL: out}, now)["cls"]
        drawn = torch.rand(4, generator=torch.Generator().manual_seed(5)) < share
        features, size = out.features["last"].clone(), out.cams.shape[-2:]
        kept = 0
        for b, image in enumerate([0, 3, 2, 5]):
            own = [
                net.attention.maps[net.attention.slot[image, k].item()].float()
                for k in range(CLASSES)
                if TAGS[image, k]
            ]
            if not own or not drawn[b]:
                continue
            strongest = torch.stack(own).max(dim=0)[0]
            square = torch.cat([data.place[b].double(), torch.tensor([[0.0, 0, 1]])])
            crop = loop_warp(strongest[None, None].double(), torch.linalg.inv(square)[None, :2], tuple(size))[0][0, 0]
            for i in range(size[0]):
                for j in range(size[1]):
                    if crop[i, j] > 0.6:
                        features[b, :, i, j] = 0
                    kept += int(crop[i, j] <= 0.6)
        logits = net.classifier(features).mean(dim=(2, 3))
        expected = torch.nn.functional.multilabel_soft_margin_loss(logits, data.tags)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        assert kept > 0 and drawn.any() and not torch.equal(features, out.features["last"])

    def test_nothing_is_dropped_before_anything_was_seen(self):
        net = self.net(drop=1.0).eval()
        data = self.data([0, 1])
        for memory in (False, True):
            if memory:
                net.remember(TAGS)
            out = net.classify(net.encode(data.images), data.images)
            loss = net.losses(data, {FULL: out}, MIDDLE)["cls"]
            assert torch.allclose(loss, torch.nn.functional.multilabel_soft_margin_loss(out.logits, data.tags))

    @pytest.mark.parametrize("faulty", [{"width": 0}, {"grid": 0}, {"std": 0.0}])
    def test_faults_of_size(self, faulty):
        with pytest.raises(UserError, match=r"^oaa: width and grid must be at least 1, std above 0"):
            self.net(**faulty)

    @pytest.mark.parametrize("faulty", [{"above": 1.5}, {"drop": -0.1}, {"drop_above": float("nan")}])
    def test_faults_of_shares(self, faulty):
        with pytest.raises(UserError, match=r"^oaa: above, drop and drop_above must be in 0\.\.1"):
            self.net(**faulty)
