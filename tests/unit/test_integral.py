"""OAA+: the loss against a loop over images, classes and pixels; crops that bring maps; the stages around it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_place import loop_warp
from test_stages_cams import Source, context

from tag2mask.backbones import BackboneSettings
from tag2mask.baselines.cam import CAM
from tag2mask.baselines.integral import TARGET, IntegralObjective, integral_loss
from tag2mask.baselines.oaa import OAA
from tag2mask.core import Baseline, Batch, Objective, Progress
from tag2mask.data.augment import Augment, Crops, collate
from tag2mask.data.map_crops import MapCrops
from tag2mask.data.maps import Maps, map_path, map_size, read_maps, write_maps
from tag2mask.engine import Devices, Training
from tag2mask.errors import Interrupted, UserError
from tag2mask.ops.cams import min_max_norm
from tag2mask.pipeline import Stage
from tag2mask.stages.attention import accumulated, attention, check_attention, check_integrate, integrate
from tag2mask.stages.cams import cams
from tag2mask.stages.classify import MEMORY, MODEL, WEIGHTS, classify, load_classifier

BACKBONE = {"name": "test_resnet", "weights": None, "output_stride": 16}
NET = {"name": "oaa", "backbone": BACKBONE, "width": 8, "std": 0.1, "grid": 6}
SIZES = [(40, 48), (33, 20), (40, 48), (1, 9), (40, 48), (33, 20)]  # of the images of `Source`


def loop_loss(cams, target, valid, guard=0.0):
    """L as it is printed: two means for every image, then the mean over images. guard: the released code has 1e-8."""
    total = 0
    images, classes, height, width = cams.shape
    for b in range(images):
        sums, counts = [0.0, 0.0], [0, 0]
        for k in range(classes):
            for i in range(height):
                for j in range(width):
                    if not valid[b, i, j]:
                        continue
                    s, t = torch.sigmoid(cams[b, k, i, j]), target[b, k, i, j]
                    if t > 0.001:
                        sums[0], counts[0] = sums[0] - t * torch.log(s), counts[0] + 1
                    else:
                        sums[1], counts[1] = sums[1] - torch.log(1 - s + guard), counts[1] + 1
        total = total + sum(s / n for s, n in zip(sums, counts, strict=True) if n)
    return total / images


def maps(*shape, seed=0, share=0.5):
    """Values in 0..1 of which only a share is above zero."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=draw, dtype=torch.float64)
    return values * (torch.rand(shape, generator=draw, dtype=torch.float64) < share)


class TestLoss:
    def both(self, cams, target, valid):
        one, two = cams.clone().requires_grad_(), cams.clone().requires_grad_()
        found, expected = integral_loss(one, target, valid), loop_loss(two, target, valid)
        assert found.item() == pytest.approx(expected.item(), rel=1e-9)
        assert found.item() == pytest.approx(loop_loss(cams, target, valid, guard=1e-8).item(), rel=1e-5)
        expected.backward()
        found.backward()
        assert torch.allclose(one.grad, two.grad, atol=1e-10)
        return found

    @pytest.mark.parametrize("share", [0.5, 0.0, 1.0])
    def test_against_a_loop(self, share):
        cams = 3 * torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        valid = maps(3, 5, 6, seed=2, share=0.7) > 0
        self.both(cams, maps(3, 4, 5, 6, share=share), valid)

    def test_the_edge_between_positive_and_negative(self):
        target = torch.tensor([0.0, 0.0009, 0.001, 0.0011, 1.0]).double().view(1, 1, 1, 5)
        self.both(torch.ones(1, 1, 1, 5, dtype=torch.float64), target, torch.ones(1, 1, 5, dtype=torch.bool))

    def test_one_class_is_never_seen_one_image_has_no_tag_one_is_all_padding(self):
        target = maps(3, 2, 3, 3)
        target[:, 1], target[1] = 0, 0
        valid = torch.ones(3, 3, 3, dtype=torch.bool)
        valid[2] = False
        found = self.both(torch.randn(3, 2, 3, 3, dtype=torch.float64), target, valid)
        assert found.item() > 0

    def test_no_image_has_a_pixel(self):
        cams = torch.randn(2, 2, 3, 3, requires_grad=True)
        loss = integral_loss(cams, torch.zeros(2, 2, 3, 3), torch.zeros(2, 3, 3, dtype=torch.bool))
        loss.backward()
        assert loss.item() == 0 and not cams.grad.any()

    def test_the_mean_over_two_halves_is_that_of_the_batch(self):
        cams, target, valid = torch.randn(4, 3, 5, 5), maps(4, 3, 5, 5).float(), maps(4, 5, 5, seed=1, share=0.6) > 0
        halves = [integral_loss(cams[r::2], target[r::2], valid[r::2]) for r in (0, 1)]
        assert torch.allclose(sum(halves) / 2, integral_loss(cams, target, valid))

    def test_scores_of_any_size_are_finite(self):
        cams = torch.tensor([[[[-300.0, 300], [300, -300]]]], requires_grad=True)
        target = torch.tensor([[[[1.0, 0], [1, 0]]]])
        loss = integral_loss(cams, target, torch.ones(1, 2, 2, dtype=torch.bool))
        loss.backward()
        assert loss.item() == pytest.approx(300 / 2 + 300 / 2)
        assert cams.grad.isfinite().all() and cams.grad[0, 0, 0, 1] > 0  # the released guard would stop learning there

    def test_a_pixel_is_pushed_as_far_as_it_was_attended_to(self):
        cams = torch.zeros(1, 1, 1, 3, requires_grad=True)
        integral_loss(cams, torch.tensor([[[[0.2, 0.8, 0]]]]), torch.ones(1, 1, 3, dtype=torch.bool)).backward()
        assert cams.grad.flatten().tolist() == pytest.approx([-0.2 * 0.5 / 2, -0.8 * 0.5 / 2, 0.5])


class TestObjective:
    def objective(self, bf16=False):
        torch.manual_seed(0)
        net = OAA(3, backbone=BackboneSettings(**BACKBONE), width=8, std=0.1)
        return IntegralObjective(Objective(net, num_classes=3, bf16=bf16))

    @pytest.mark.parametrize("crop", [64, 72, 97])
    def test_a_step(self, crop):
        objective = self.objective()
        grid = objective.grid(crop)
        assert objective.training
        valid = torch.ones(2, 1, crop, crop)
        valid[0, :, : crop // 2] = 0
        target = maps(2, 3, *grid).float()
        tags = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
        batch = Batch(torch.randn(2, 3, crop, crop), tags, torch.arange(2), valid, {TARGET: target})
        losses = objective(batch, Progress(0.0, 0.0))
        found = objective.model.look(batch.images).cams.detach()
        inside = F.interpolate(valid, size=grid, mode="nearest-exact")[:, 0] > 0.5
        assert 0 < inside[0].sum() < inside[1].sum()
        assert losses["integral"].item() == pytest.approx(loop_loss(found, target, inside).item(), rel=1e-5)
        losses["integral"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters() if p.requires_grad)

    def test_bfloat16_changes_little(self):
        exact, rough = self.objective(), self.objective(bf16=True)
        rough.load_state_dict(exact.state_dict())
        batch = Batch(
            torch.randn(2, 3, 64, 64), torch.ones(2, 3), torch.arange(2), torch.ones(2, 1, 64, 64),
            {TARGET: maps(2, 3, 4, 4).float()},
        )  # fmt: skip
        one, two = (o(batch, Progress(0.0, 0.0))["integral"] for o in (exact, rough))
        assert two.dtype == torch.float32 and one.item() == pytest.approx(two.item(), rel=0.05)


def write_some(folder, source):
    """Maps of every image of `Source`, of its tagged classes."""
    samples = source.split("train")
    for index, name in enumerate(samples.names):
        classes = np.flatnonzero(samples.tags[index])
        drawn = np.random.default_rng(index).random((len(classes), *map_size(SIZES[index]))).astype(np.float16)
        write_maps(map_path(folder, name), Maps(classes, drawn, SIZES[index], np.zeros(2, np.float32)))


class TestMapCrops:
    def crops(self, tmp_path, **moves):
        write_some(tmp_path, Source())
        settings = Augment(**{"crop": 32, "long": (24, 64), "jitter": 0.0} | moves)
        crops = Crops(Source().split("train"), settings, seed=0)
        return crops, MapCrops(crops, tmp_path, side="m", num_classes=2, grid=(5, 5))

    @pytest.mark.parametrize("moves", [{}, {"rotate": True}])
    def test_against_a_loop(self, tmp_path, moves):
        crops, with_maps = self.crops(tmp_path, **moves)
        assert len(with_maps) == len(SIZES)
        padded = 0
        for epoch, index in [(e, i) for e in range(3) for i in range(len(SIZES))]:
            plain, sample = crops[epoch, index], with_maps[epoch, index]
            assert torch.equal(plain.image, sample.image) and sample.side.keys() == {"m"}
            stored = read_maps(map_path(tmp_path, f"sub/{index}"))
            square = torch.cat([sample.place.double(), torch.tensor([[0.0, 0, 1]])])
            expected = torch.zeros(2, 5, 5, dtype=torch.float64)
            for k, own in zip(stored.classes, torch.from_numpy(stored.maps).double(), strict=True):
                values, there = loop_warp(own[None, None], torch.linalg.inv(square)[None, :2], (5, 5))
                expected[k] = values[0, 0]
                padded += int((there == 0).sum())
            assert torch.allclose(sample.side["m"].double(), expected, atol=1e-4)
        assert padded > 0

    def test_what_is_missing_is_named(self, tmp_path):
        _, with_maps = self.crops(tmp_path)
        map_path(tmp_path, "sub/1").unlink()
        with pytest.raises(UserError, match=r"sub/1\.npz: no maps of this image"):
            with_maps[0, 1]

    def test_batches(self, tmp_path):
        _, with_maps = self.crops(tmp_path)
        batch = collate([with_maps[0, index] for index in (0, 2)])
        assert batch.side["m"].shape == (2, 2, 5, 5) and batch.side["m"].dtype == torch.float32
        assert batch.side["m"][0].any() and not batch.side["m"][1].any()  # image 2 has no tag


class TestAccumulated:
    def test_resized_and_stretched(self):
        stored = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(0)).half()
        classes, found = accumulated(stored, torch.tensor([-1, 2, -1, 0], dtype=torch.int32), (40, 33))
        assert classes.tolist() == [1, 3] and found.dtype == np.float16 and found.shape == (2, 10, 9)
        large = F.interpolate(stored[[2, 0]].float()[None], size=(10, 9), mode="bicubic")[0]
        assert np.allclose(found, min_max_norm(large).numpy(), atol=1e-3)
        assert found.min() == 0 and found.max() > 0.99

    def test_nothing_was_seen(self):
        _, found = accumulated(torch.zeros(2, 6, 6).half(), torch.tensor([1, -1]), (9, 9))
        assert found.shape == (1, 3, 3) and not found.any()
        classes, found = accumulated(torch.zeros(0, 6, 6).half(), torch.tensor([-1, -1]), (9, 9))
        assert classes.tolist() == [] and found.shape == (0, 3, 3)


@pytest.fixture(scope="module")
def devices():
    return Devices("cpu")


TRAIN = Training(epochs=3, batch=2, lr=0.01, lr_new=1.0)
AUGMENT = Augment(crop=32, long=(32, 40))


class TestStages:
    @pytest.fixture
    def trained(self, tmp_path, devices):
        classify(context(tmp_path / "classify", devices), net=NET, train=TRAIN, augment=AUGMENT)
        return tmp_path / "classify"

    def test_classify_keeps_the_attention(self, trained):
        memory = load_file(trained / MEMORY)
        tags = torch.from_numpy(Source().split("train").tags)
        assert memory["maps"].shape == (int(tags.sum()), 6, 6) and memory["maps"].dtype == torch.float16
        assert torch.equal(memory["slot"] >= 0, tags > 0)
        assert memory["maps"].amax(dim=(1, 2)).eq(1).float().mean() > 0.5
        assert not [name for name in load_file(trained / WEIGHTS) if "attention" in name]
        assert isinstance(load_classifier(trained).net, OAA)

    def test_attention_writes_the_maps_of_every_image(self, tmp_path, devices, trained):
        attention(context(tmp_path / "attention", devices), of=trained)
        memory, samples = load_file(trained / MEMORY), Source().split("train")
        for index, size in enumerate(SIZES):
            found = read_maps(map_path(tmp_path / "attention", f"sub/{index}"))
            assert found.size == size and found.classes.tolist() == np.flatnonzero(samples.tags[index]).tolist()
            _, expected = accumulated(memory["maps"], memory["slot"][index], size)
            assert np.array_equal(found.maps, expected) and found.maps.shape[1:] == map_size(size)
            assert np.isnan(found.logits).all()

    def test_a_killed_attention_goes_on(self, tmp_path, devices, trained):
        class Dying(Source):
            def image(self, index):
                if index == 4:
                    raise Interrupted(75)
                return super().image(index)

        with pytest.raises(Interrupted):
            attention(context(tmp_path / "killed", devices, Dying()), of=trained)
        resumed = Source()
        attention(context(tmp_path / "killed", devices, resumed), of=trained)
        assert resumed.read == [4, 5]
        attention(context(tmp_path / "whole", devices, workers=2), of=trained)
        for index in range(len(SIZES)):
            one, two = (map_path(tmp_path / name, f"sub/{index}").read_bytes() for name in ("killed", "whole"))
            assert one == two

    def test_a_network_without_attention(self, tmp_path, devices):
        (tmp_path / "classify").mkdir()
        with pytest.raises(UserError, match=r"accumulated no attention; train one with net\.name: oaa"):
            attention(context(tmp_path / "attention", devices), of=tmp_path / "classify")

    @pytest.mark.parametrize("name", ["oaa", "cam"])
    def test_integrate_trains_and_cams_reads_it(self, tmp_path, devices, name):
        write_some(tmp_path / "attention", Source())
        net = NET if name == "oaa" else {"name": "cam", "backbone": BACKBONE}
        out = tmp_path / "integrate"
        integrate(context(out, devices), of=tmp_path / "attention", net=net, train=TRAIN, augment=AUGMENT)
        assert sorted(path.name for path in out.iterdir()) == [MODEL, WEIGHTS, "train.jsonl"]
        assert '"integral"' in (out / "train.jsonl").read_text()
        assert isinstance(load_classifier(out).net, OAA if name == "oaa" else CAM)
        cams(context(tmp_path / "cams", devices), of=out, scales=(1.0,), flip=False)
        assert read_maps(map_path(tmp_path / "cams", "sub/1")).maps.shape == (2, *map_size(SIZES[1]))

    def test_a_killed_integrate_ends_bit_identically(self, tmp_path, devices):
        write_some(tmp_path / "attention", Source())
        settings = {"of": tmp_path / "attention", "net": NET, "train": TRAIN, "augment": AUGMENT}
        integrate(context(tmp_path / "whole", devices), **settings)

        class Dying(Source):
            def image(self, index):
                if len(self.read) == 6:
                    raise MemoryError
                return super().image(index)

        with pytest.raises(MemoryError):
            integrate(context(tmp_path / "killed", devices, Dying()), **settings)
        integrate(context(tmp_path / "killed", devices), **settings)
        assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()

    def test_it_learns_what_the_maps_show(self, tmp_path, devices):
        """Images that are bright on one side, attention to the bright side: the maps find it."""

        class Bright(Source):
            def image(self, index):
                self.read.append(index)
                pixels = np.full((*SIZES[0], 3), 40, np.uint8)
                pixels[:, 24 * (index % 2) : 24 * (index % 2) + 24] = 220
                return pixels

        samples = Bright().split("train")
        for index, name in enumerate(samples.names):
            classes = np.flatnonzero(samples.tags[index])
            seen = np.zeros((len(classes), 10, 12), np.float16)
            seen[:, :, 6 * (index % 2) : 6 * (index % 2) + 6] = 1
            write_maps(map_path(tmp_path / "attention", name), Maps(classes, seen, SIZES[0], np.zeros(2, np.float32)))
        train = Training(steps=30, batch=4, lr=0.003, lr_new=1.0, optimizer="adamw")
        net = NET | {"backbone": BACKBONE | {"output_stride": 8}, "width": 16}
        integrate(
            context(tmp_path / "net", devices, Bright()), of=tmp_path / "attention", net=net, train=train,
            augment=Augment(crop=48, long=(48, 56), jitter=0.0),
        )  # fmt: skip
        cams(context(tmp_path / "cams", devices, Bright()), of=tmp_path / "net", scales=(1.0,), flip=False)
        for index in (0, 1, 3, 4):
            found = read_maps(map_path(tmp_path / "cams", samples.names[index])).maps.astype(float)
            sides = found[:, :, :6].mean(), found[:, :, 6:].mean()
            assert sides[index % 2] > 2 * sides[1 - index % 2], (index, sides)


class TestPreflight:
    def stage(self, name, settings=None):
        classifier = Stage("first", "classify", 1, {"net": {"name": name}}, {}, "data")
        return Stage("second", "attention", 1, settings or {}, {"of": classifier}, "data")

    def test_attention_needs_a_network_that_accumulates(self):
        check_attention(Source(), self.stage("oaa"))
        with pytest.raises(UserError, match=r"^of: first trains seam, which accumulates no attention; set first\.net"):
            check_attention(Source(), self.stage("seam"))

    def test_integrate_builds_its_network(self):
        check_integrate(Source(), self.stage("oaa", {"net": NET, "bf16": False}))
        with pytest.raises(UserError, match="timm has no model"):
            wrong = NET | {"backbone": BACKBONE | {"name": "test_resent"}}
            check_integrate(Source(), self.stage("oaa", {"net": wrong, "bf16": False}))


def test_only_oaa_hands_on_a_memory():
    assert OAA.export_memory is not Baseline.export_memory and CAM.export_memory is Baseline.export_memory
