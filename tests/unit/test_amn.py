"""AMN: its loss and its maps against loops over images, pixels and classes; its stages against one image at a time."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_stages_affinity import SIZES, TAGS, Dying, Source, context, maps, train

from tag2mask.backbones import BackboneSettings
from tag2mask.core import Batch, Progress
from tag2mask.data.augment import Augment, normalise
from tag2mask.data.images import read_mask
from tag2mask.data.maps import Maps, map_path, map_size, read_maps, write_maps
from tag2mask.engine import Devices, Training
from tag2mask.engine.training import make_optimizer
from tag2mask.errors import Interrupted, UserError
from tag2mask.pipeline import Stage
from tag2mask.recipe import load
from tag2mask.refine.irn import confident_labels
from tag2mask.runner import Options, run
from tag2mask.segment import amn as module
from tag2mask.segment.amn import AMN, AMNObjective, balanced_losses, check_smoothing, on_grid, shares, soft_maps
from tag2mask.stages.amn import amn, amn_maps, check_amn, load_amn
from tag2mask.stages.classify import MODEL, WEIGHTS
from tag2mask.stages.cost import COSTS, cost_of
from tag2mask.stages.labels import Background, labels
from tag2mask.stages.walk import walk

maps = maps  # a fixture, for the classes below
BACKBONE = {"name": "test_resnet", "weights": None, "output_stride": 8}
NET = {"name": "amn", "backbone": BACKBONE, "dropout": 0.1, "dilations": (1, 2)}
TRAIN = {"train": Training(steps=4, batch=2, lr=0.001), "augment": Augment(crop=32, long=(32, 40))}
START = Progress(epoch=0.0, done=0.0)


@pytest.fixture(scope="module")
def devices():
    return Devices("cpu")


def network(classes=3, seed=0, **settings):
    torch.manual_seed(seed)
    return AMN(classes, backbone=BackboneSettings(**BACKBONE), dilations=(1, 2), **settings)


def loop_loss(scores, labels, smoothing):
    """(background, foreground), pixel by pixel and class by class, from probabilities."""
    images, outputs, height, width = scores.shape
    sums, counts = [scores.sum() * 0, scores.sum() * 0], [0, 0]
    for b in range(images):
        for y in range(height):
            for x in range(width):
                label = int(labels[b, y, x])
                if label == 255:
                    continue
                total = sum(torch.exp(scores[b, c, y, x]) for c in range(outputs))
                loss = 0
                for c in range(outputs):
                    wanted = 1 - smoothing if c == label else smoothing / (outputs - 1)
                    loss = loss - wanted * torch.log(torch.exp(scores[b, c, y, x]) / total)
                which = 0 if label == 0 else 1
                sums[which], counts[which] = sums[which] + loss, counts[which] + 1
    return [s / n / 2 if n else s for s, n in zip(sums, counts, strict=True)]


def some_labels(kind, shape, classes):
    draw = torch.Generator().manual_seed(7)
    found = torch.randint(0, classes + 1, shape, generator=draw)
    found[torch.rand(shape, generator=draw) < 0.3] = 255
    match kind:
        case "no background":
            found[found == 0] = 255
        case "no foreground":
            found[(found > 0) & (found < 255)] = 255
        case "nothing":
            found[:] = 255
        case "one image unsure":
            found[0] = 255
    return found


class TestLoss:
    @pytest.mark.parametrize("kind", ["all", "no background", "no foreground", "nothing", "one image unsure"])
    @pytest.mark.parametrize(("images", "classes", "smoothing"), [(3, 4, 0.4), (1, 1, 0.4), (2, 3, 0.0)])
    def test_values_and_gradients_against_a_loop(self, kind, images, classes, smoothing):
        draw = torch.Generator().manual_seed(images)
        scores = 3 * torch.randn(images, classes + 1, 4, 5, dtype=torch.float64, generator=draw)
        found_labels = some_labels(kind, (images, 4, 5), classes)
        one, two = scores.clone().requires_grad_(), scores.clone().requires_grad_()
        found = balanced_losses(one, found_labels, smoothing)
        background, foreground = loop_loss(two, found_labels, smoothing)
        torch.testing.assert_close(found["background"], background, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found["foreground"], foreground, rtol=1e-10, atol=1e-12)
        (found["background"] + found["foreground"]).backward()
        (background + foreground).backward()
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12)
        assert (one.grad.abs().sum() > 0) == bool((found_labels != 255).any())

    def test_both_sets_weigh_the_same(self):
        """A batch with one pixel of a class among a hundred of background: each half is a mean of its own."""
        scores = torch.zeros(1, 3, 10, 10)
        target = torch.zeros(1, 10, 10, dtype=torch.long)
        target[0, 4, 4] = 2
        found = balanced_losses(scores, target, 0.4)
        assert found["background"].item() == pytest.approx(math.log(3) / 2)
        assert found["foreground"].item() == pytest.approx(math.log(3) / 2)

    def test_the_best_probability_is_the_smoothed_target(self):
        scores = torch.zeros(1, 4, 1, 1, dtype=torch.float64)
        scores[0, :, 0, 0] = torch.log(torch.tensor([0.4 / 3, 0.6, 0.4 / 3, 0.4 / 3]))
        scores.requires_grad_()
        balanced_losses(scores, torch.ones(1, 1, 1, dtype=torch.long), 0.4)["foreground"].backward()
        torch.testing.assert_close(scores.grad, torch.zeros_like(scores), atol=1e-7, rtol=0)

    def test_the_mean_over_processes_is_the_loss_of_the_global_batch(self, monkeypatch):
        scores = torch.randn(4, 4, 5, 6, dtype=torch.float64)
        target = some_labels("one image unsure", (4, 5, 6), 3)
        whole = balanced_losses(scores, target, 0.4)
        parts = [target[:2], target[2:]]
        sets = [torch.stack([(p == 0).sum(), ((p > 0) & (p < 255)).sum()]).double() for p in parts]
        monkeypatch.setattr(module, "mean_over_processes", lambda x: (sets[0] + sets[1]) / 2)
        monkeypatch.setattr(module, "processes", lambda: 2)
        halves = [balanced_losses(scores[2 * r : 2 * r + 2], parts[r], 0.4) for r in range(2)]
        assert not torch.equal(sets[0], sets[1])
        for name, loss in whole.items():
            torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, loss)

    def test_the_objective_takes_labels_to_the_grid(self):
        net = network().eval()
        target = some_labels("all", (2, 32, 40), 3)
        images, tags = torch.randn(2, 3, 32, 40), torch.tensor([[1.0, 0, 1], [0, 0, 0]])
        batch = Batch(images, tags, torch.arange(2), torch.ones(2, 1, 32, 40), target=target)
        found = AMNObjective(net, smoothing=0.2)(batch, START)
        grid = torch.empty(2, 4, 5, dtype=torch.long)
        for b in range(2):
            for y in range(4):
                for x in range(5):
                    grid[b, y, x] = target[b, 8 * y + 4, 8 * x + 4]
        expected = loop_loss(net(images, tags), grid, 0.2)
        assert found["background"].item() == pytest.approx(expected[0].item(), rel=1e-5)
        assert found["foreground"].item() == pytest.approx(expected[1].item(), rel=1e-5)
        with pytest.raises(ValueError, match="with a target"):
            AMNObjective(net)(Batch(images, tags, torch.arange(2), torch.ones(2, 1, 32, 40)), START)

    def test_a_step_never_waits_for_the_device(self, monkeypatch):
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / "contract")
        from watch import no_host_sync

        target = some_labels("all", (2, 32, 32), 3)
        batch = Batch(torch.randn(2, 3, 32, 32), torch.ones(2, 3), torch.arange(2), torch.ones(2, 1, 32, 32))
        batch.target = target
        objective = AMNObjective(network())
        with no_host_sync() as operations:
            sum(objective(batch, START).values()).backward()
        assert operations.count > 20

    def test_bfloat16_reaches_the_same_loss(self):
        net = network().eval()
        target = some_labels("all", (2, 32, 32), 3)
        batch = Batch(torch.randn(2, 3, 32, 32), torch.ones(2, 3), torch.arange(2), torch.ones(2, 1, 32, 32))
        batch.target = target
        one, two = (AMNObjective(net, bf16=bf16)(batch, START) for bf16 in (False, True))
        assert all(loss.dtype == torch.float32 for loss in two.values())
        assert all(two[name].item() == pytest.approx(one[name].item(), rel=0.05) for name in one)

    @pytest.mark.parametrize(("smoothing", "classes"), [(-0.1, 3), (0.75, 3), (0.5, 1), (float("nan"), 3)])
    def test_faults_of_the_smoothing(self, smoothing, classes):
        with pytest.raises(UserError, match=rf"^smoothing: {smoothing} must be from 0 to less than"):
            check_smoothing(smoothing, classes)
        check_smoothing(0.4, classes)


class TestNetwork:
    def test_conditioning_against_a_loop(self):
        net = network().double().eval()
        with torch.no_grad():
            net.condition.bias.normal_()
        images, tags = torch.randn(3, 3, 24, 33, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[:, [2, 0, 1]]
        tags[1] = 0  # an image without tags: the factors are b
        features = net.backbone(images)["last"]
        conditioned = torch.zeros_like(features)
        for b in range(3):
            for d in range(features.shape[1]):
                factor = net.condition.bias[d]
                for k in range(3):
                    factor = factor + net.condition.weight[d, k] * tags[b, k]
                conditioned[b, d] = features[b, d] * factor
        expected = sum(branch(conditioned) for branch in net.head.branches)
        found = net(images, tags)
        assert found.shape == (3, 4, 3, 5)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        assert net.condition.weight.grad[:, 1].abs().sum() > 0
        assert next(net.backbone.parameters()).grad.abs().sum() > 0  # the trunk learns

    def test_a_class_that_no_image_has_gets_no_gradient(self):
        net = network()
        net(torch.randn(2, 3, 32, 32), torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])).sum().backward()
        assert not net.condition.weight.grad[:, 2].any() and net.condition.weight.grad[:, 1].any()

    def test_tags_change_the_scores_of_the_same_image(self):
        net, image = network().eval(), torch.randn(1, 3, 32, 32)
        assert not torch.allclose(net(image, torch.tensor([[1.0, 0, 0]])), net(image, torch.tensor([[0, 0, 1.0]])))

    def test_dropout_is_for_training(self):
        net, image, tags = network(dropout=0.5), torch.randn(1, 3, 32, 32), torch.ones(1, 3)
        for norm in net.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.eval()
        assert not torch.equal(net(image, tags), net(image, tags))
        net.eval()
        assert torch.equal(net(image, tags), net(image, tags))

    def test_the_trunk_has_a_learning_rate_of_its_own(self):
        settings = Training(steps=1, optimizer="adam", lr=5e-6, lr_new=20, weight_decay=1e-4, power=0)
        net = network()
        optimizer = make_optimizer(net, settings)
        assert type(optimizer) is torch.optim.Adam
        factor = {id(p): (g["factor"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        assert factor[id(net.condition.weight)] == factor[id(net.head.branches[0].weight)] == (20, 1e-4)
        assert {factor[id(p)] for p in net.backbone.parameters() if p.ndim > 1} == {(1, 1e-4)}
        assert settings.lr_at(0, 9) == settings.lr_at(8, 9) == 1


class TestMaps:
    @pytest.mark.parametrize(("height", "width", "size"), [(32, 32, (4, 4)), (33, 20, (9, 5)), (5, 29, (2, 8))])
    def test_labels_are_those_under_the_centres(self, height, width, size):
        target = torch.randint(0, 5, (2, height, width))
        found = on_grid(target, size)
        for b in range(2):
            for y in range(size[0]):
                for x in range(size[1]):
                    row, column = math.floor((y + 0.5) * height / size[0]), math.floor((x + 0.5) * width / size[1])
                    assert found[b, y, x] == target[b, row, column]

    def test_soft_maps_against_a_loop(self):
        own = torch.rand(3, 4, 5, dtype=torch.float64) * 0.3
        own[2] = 0.2  # the same everywhere
        target = some_labels("all", (1, 4, 5), 3)[0]
        found = soft_maps(own, target)
        for p in range(3):
            low, high = own[p].min(), own[p].max()
            for y in range(4):
                for x in range(5):
                    stretched = max((own[p, y, x] - low).item() - 1e-5, 0) / (high - low + 1e-5).item()
                    expected = own[p, y, x].item() if target[y, x] == 0 else stretched
                    assert found[p, y, x].item() == pytest.approx(expected, abs=1e-9)
        assert (target == 0).any() and (target == 255).any() and found.min() >= 0 and found.max() <= 1
        assert soft_maps(own[:0], target).shape == (0, 4, 5)

    def test_surely_background_stays_weak(self):
        """The place where a class is strongest is sure background: it keeps its probability, and the rest is bright."""
        own, target = torch.tensor([[[0.10, 0.02, 0.09]]]), torch.tensor([[0, 255, 1]])
        found = soft_maps(own, target)[0, 0]
        assert found[0].item() == pytest.approx(0.10) and found[2] > 0.8 and found[1] == 0

    @pytest.mark.parametrize("flip", [False, True])
    def test_shares_are_of_mean_scores(self, flip):
        net, scales, size = network().eval(), (0.75, 1.0, 2.0), (10, 13)
        images, tags = torch.randn(2, 3, 40, 52), torch.tensor([[1.0, 0, 1], [0, 0, 0]])
        found = shares(net, images, tags, scales=scales, flip=flip, size=size)
        for b in range(2):
            seen = []
            for scale in scales:
                inner = max(32, round(40 * scale)), max(32, round(52 * scale))
                image = F.interpolate(images[b : b + 1], size=inner, mode="bilinear", align_corners=False)
                looks = [net(image, tags[b : b + 1])]
                if flip:
                    looks.append(net(image.flip(3), tags[b : b + 1]).flip(3))
                seen += [F.interpolate(x, size=size, mode="bilinear", align_corners=False)[0] for x in looks]
            expected = torch.stack(seen).mean(dim=0).exp()
            torch.testing.assert_close(found[b], expected / expected.sum(dim=0), rtol=1e-4, atol=1e-5)


def learn(out, devices, folder, source=None, workers=0, **settings):
    amn(context(out, devices, source, workers), of=folder, net=NET, **(TRAIN | settings))


@pytest.fixture
def trained(tmp_path, devices, maps):
    """The folder of an amn stage after a few steps."""
    learn(tmp_path / "amn", devices, maps)
    return tmp_path / "amn"


class TestStages:
    SETTINGS = {"scales": (1.0, 1.5), "batch": 2}  # noqa: RUF012

    def go(self, name, tmp_path, devices, trained, source=None, workers=0, **more):
        amn_maps(context(tmp_path / name, devices, source, workers), of=trained, **(self.SETTINGS | more))
        return [map_path(tmp_path / name, f"sub/{i}").read_bytes() for i in range(len(SIZES))]

    def test_trains_stores_and_reads(self, trained):
        assert sorted(p.name for p in trained.iterdir()) == ["labels", MODEL, WEIGHTS, "train.jsonl"]
        rows = [json.loads(line) for line in (trained / "train.jsonl").read_text().splitlines()]
        assert set(rows[-1]) >= {"background", "foreground", "total"}
        net = load_amn(trained)
        assert not net.training and net.head.branches[0].out_channels == 3
        assert net(torch.randn(1, 3, 33, 50), torch.ones(1, 2)).isfinite().all()

    def test_the_labels_are_irns(self, tmp_path, devices, maps):
        learn(tmp_path / "net", devices, maps, workers=1, foreground=0.6, background=0.2)
        for index in range(len(SIZES)):
            stored = read_maps(map_path(maps, f"sub/{index}"))
            expected = confident_labels(
                Source().image(index), stored.full(), torch.from_numpy(stored.classes), foreground=0.6, background=0.2
            )
            assert np.array_equal(read_mask(tmp_path / f"net/labels/sub/{index}.png", 2), expected)
        assert not read_mask(tmp_path / "net/labels/sub/2.png", 2).any()  # untagged: all background

    @pytest.mark.parametrize("after", [4, 12])  # while labels are made; in step 3, after the checkpoint of step 2
    def test_a_killed_training_ends_bit_identically(self, after, tmp_path, devices, maps):
        learn(tmp_path / "whole", devices, maps)
        with pytest.raises(Interrupted):
            learn(tmp_path / "killed", devices, maps, Dying(after))
        assert not (tmp_path / "killed" / WEIGHTS).exists()
        learn(tmp_path / "killed", devices, maps)
        for name in (WEIGHTS, "labels/sub/1.png", "labels/sub/5.png"):
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        again = Source()
        learn(tmp_path / "killed", devices, maps, again)
        assert again.read == []

    def test_maps_against_one_image_at_a_time(self, tmp_path, devices, trained):
        self.go("maps", tmp_path, devices, trained)
        net = load_amn(trained)
        for index, size in enumerate(SIZES):
            found = read_maps(map_path(tmp_path / "maps", f"sub/{index}"))
            assert found.classes.tolist() == np.flatnonzero(TAGS[index]).tolist() and found.size == size
            assert found.maps.shape[1:] == map_size(size) and np.isnan(found.logits).all()
            image = normalise(torch.from_numpy(Source().image(index)).permute(2, 0, 1))[None]
            tags = torch.from_numpy(TAGS[index : index + 1]).float()
            own = shares(net, image, tags, scales=(1.0, 1.5), flip=True, size=map_size(size))[0]
            target = torch.from_numpy(read_mask(trained / f"labels/sub/{index}.png", 2))
            target = on_grid(target[None], map_size(size))[0]
            for place, k in enumerate(found.classes):
                expected = soft_maps(own[k + 1][None], target)[0]
                assert np.allclose(found.maps[place], expected.numpy(), atol=1e-3)

    @pytest.mark.parametrize("dropout", [False, True])
    def test_killed_maps_go_on_bit_identically(self, dropout, tmp_path, devices, trained):
        whole = self.go("whole", tmp_path, devices, trained, dropout=dropout)
        assert self.go("helped", tmp_path, devices, trained, workers=2, dropout=dropout) == whole
        with pytest.raises(Interrupted):
            self.go("killed", tmp_path, devices, trained, Dying(4), dropout=dropout)
        torch.rand(7)  # whatever happened in between
        assert self.go("killed", tmp_path, devices, trained, dropout=dropout) == whole
        assert (self.go("plain", tmp_path, devices, trained) == whole) is not dropout

    def test_other_stages_read_the_maps(self, tmp_path, devices, trained):
        self.go("maps", tmp_path, devices, trained)
        labels(context(tmp_path / "masks", devices), of=tmp_path / "maps", background=Background(score=0.25))
        assert len(list((tmp_path / "masks").rglob("*.png"))) == len(SIZES)
        train("irn", tmp_path / "irn", devices, tmp_path / "maps")
        learn(tmp_path / "again", devices, tmp_path / "maps")
        assert (tmp_path / "again" / WEIGHTS).exists()

    def test_a_walk_starts_from_a_power_of_the_maps(self, tmp_path, devices, maps):
        train("irn", tmp_path / "irn", devices, maps)
        for index in range(len(SIZES)):
            stored = read_maps(map_path(maps, f"sub/{index}"))
            powered = (stored.maps.astype(np.float64) ** 1.3).astype(np.float16)
            write_maps(map_path(tmp_path / "powered", f"sub/{index}"), Maps(stored.classes, powered, stored.size,
                                                                            stored.logits))  # fmt: skip
        settings = {"of": tmp_path / "irn", "beta": 2.0, "steps": 5, "radius": 3}
        walk(context(tmp_path / "one", devices), maps=maps, power=1.3, **settings)
        walk(context(tmp_path / "two", devices), maps=tmp_path / "powered", **settings)
        walk(context(tmp_path / "plain", devices), maps=maps, **settings)
        for index in (0, 1, 3, 4, 5):
            one, two, plain = (
                read_maps(map_path(tmp_path / name, f"sub/{index}")).maps for name in ("one", "two", "plain")
            )
            assert np.allclose(one, two, atol=2e-3) and not np.allclose(one, plain, atol=2e-3)

    def test_it_learns_what_is_sure(self, tmp_path, devices):
        """Two classes with colours of their own; maps are sure of a part of each: AMN finds the rest."""

        class Coloured(Source):
            def image(self, index):
                self.read.append(index)
                pixels = np.full((*SIZES[0], 3), 30, np.uint8)
                pixels[:, :24, TAGS[index].argmax() if TAGS[index].any() else slice(0, 0)] = 220
                return pixels

        samples = Coloured().split("train")
        for index, name in enumerate(samples.names):
            classes = np.flatnonzero(TAGS[index])[:1]
            seen = np.zeros((len(classes), 10, 12), np.float16)
            seen[:, :5, :6] = 1  # the upper half of what is bright
            seen[:, 5:, :6] = 0.2  # the lower half is not sure
            write_maps(map_path(tmp_path / "cams", name), Maps(classes, seen, SIZES[0], np.zeros(2, np.float32)))
        settings = {
            "train": Training(steps=40, batch=4, lr=0.003, lr_new=1.0, optimizer="adam", power=0),
            "augment": Augment(crop=48, long=(48, 56), jitter=0.0),
        }
        learn(tmp_path / "amn", devices, tmp_path / "cams", Coloured(), **settings)
        amn_maps(context(tmp_path / "maps", devices, Coloured()), of=tmp_path / "amn", scales=(1.0,))
        for index in (0, 3, 4):
            found = read_maps(map_path(tmp_path / "maps", samples.names[index])).maps[0].astype(float)
            assert found[6:9, 1:5].mean() > 0.5 > 2 * found[:, 8:].mean(), found.round(2)


class TestPreflight:
    def check(self, net=None, **settings):
        base = {"net": NET | (net or {}), "foreground": 0.3, "background": 0.05, "smoothing": 0.4} | settings
        check_amn(Source(), Stage("amn", "amn", 1, base, {}, "data"))

    def test_what_works(self):
        self.check()

    @pytest.mark.parametrize(
        ("faults", "message"),
        [
            ({"net": {"backbone": BACKBONE | {"name": "test_resent"}}}, "timm has no model"),
            ({"background": 0.4}, r"^foreground 0\.3, background 0\.4"),
            ({"smoothing": 0.7}, r"^smoothing: 0\.7 must be from 0 to less than 0\.667"),
        ],
    )
    def test_what_does_not(self, faults, message):
        with pytest.raises(UserError, match=message) as caught:
            self.check(**faults)
        assert "\n" not in str(caught.value)


class TestRecipes:
    def test_runs_from_end_to_end(self, tmp_path):
        small = ["data.images=16", "data.test=4", "data.size=40"]
        for stage in ("classify", "amn", "boundaries"):
            small += [f"{stage}.train.epochs=1", f"{stage}.augment.crop=32"]
        done = run(load("scenes-amn", [*small, "boundaries.net.radius=3"]), tmp_path, Options("cpu", workers=0))
        assert all(stage.state(tmp_path) == "done" for stage in done.stages)
        for name in ("seeds", "walked", "mask-quality"):
            assert 0 <= json.loads((done.folder(name) / "result.json").read_text())["miou"] <= 1
        assert len(list((done.folder("maps") / "maps").rglob("*.npz"))) == 16

    def test_shares_the_classifier_of_plain_cam(self):
        plain, other = load("scenes-cam").plan("f"), load("scenes-amn").plan("f")
        assert {stage.key for stage in plain if stage.kind in ("classify", "cams")} < {stage.key for stage in other}

    def test_the_cost_is_counted(self):
        recipe = load("scenes-amn", ["data.images=8", "data.test=2", "data.size=48"])
        source = recipe.source()
        stages = {stage.kind: stage for stage in recipe.plan("f")}
        training, making = (cost_of(stages[kind], source, (48, 48)) for kind in ("amn", "amn_maps"))
        assert training.flops > 0 and making.flops > 0 and training.cpu_seconds > 0 and making.disk > 0
        one_scale = load("scenes-amn", ["data.images=8", "data.test=2", "data.size=48", "maps.scales=[1.0]"])
        less = next(stage for stage in one_scale.plan("f") if stage.kind == "amn_maps")
        assert cost_of(less, source, (48, 48)).flops < making.flops / 2
        assert {"amn", "amn_maps"} <= COSTS.keys()

    def test_what_amns_code_sets_is_in_the_recipes(self):
        """Constants of the second training, of IRN after it and of the walk; VOC and COCO differ in the last score."""
        for name, score in (("voc12-cpal-amn", 0.25), ("coco14-cpal-baseline-amn", 0.22)):
            stages = load(name, ["data.root=somewhere"]).stages
            train = stages["amn"]["train"]
            assert (train["optimizer"], train["lr"], train["lr"] * train["lr_new"]) == (
                "adam",
                5e-6,
                pytest.approx(1e-4),
            )
            assert (train["epochs"], train["batch"], train["power"]) == (5, 16, 0)
            assert stages["amn"]["smoothing"] == 0.4 and stages["amn"]["net"]["dilations"] == (6, 12, 18, 24)
            assert stages["amn"]["net"]["backbone"]["freeze"] == "c1"
            assert (stages["boundaries"]["foreground"], stages["boundaries"]["background"]) == (0.45, 0.15)
            assert stages["walk"]["power"] == 1.3 and stages["walk"]["maps"] == stages["boundaries"]["of"] == "maps"
            assert stages["masks"]["background"]["score"] == score

    def test_maps_are_made_by_an_amn_stage(self):
        with pytest.raises(UserError, match=r"^maps\.of: cams is a cams stage, this needs amn$"):
            load("scenes-amn", ["maps.of=cams"])
