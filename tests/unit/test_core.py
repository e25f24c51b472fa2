"""Views, batches, outputs, the objective that joins them, and the functions that reach over processes."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tag2mask.core import (
    FULL,
    Baseline,
    Batch,
    CamOutput,
    Method,
    Objective,
    Progress,
    TrainingOnly,
    View,
    inference_state,
    load_inference_state,
)
from tag2mask.errors import UserError
from tag2mask.ops.gather import gather, mean_over_processes, processes, rank, sum_over_processes
from tag2mask.ops.seed import seed_of

NOW = Progress(epoch=0.5, done=0.25, seed=3)


def make_batch(images=2, classes=3, size=12):
    torch.manual_seed(0)
    return Batch(
        images=torch.randn(images, 3, size, size),
        tags=(torch.rand(images, classes) > 0.5).float(),
        index=torch.arange(images),
        valid=torch.ones(images, 1, size, size),
        side={"saliency": torch.rand(images, 1, size, size)},
        target=torch.zeros(images, size, size, dtype=torch.long),
    )


class TestView:
    def test_as_loaded_is_the_same_tensor(self):
        images = torch.rand(1, 3, 5, 7)
        assert FULL(images) is images
        assert View(scale=1.0).nearest(images) is images

    @pytest.mark.parametrize(("view", "size"), [(View(scale=0.5), (2, 3)), (View(size=6), (6, 6))])
    @pytest.mark.parametrize("corners", [False, True])
    def test_resizes(self, view, size, corners):
        images = torch.rand(2, 3, 5, 7)
        view = View(size=view.size, scale=view.scale, align_corners=corners)
        expected = F.interpolate(images, size=size, mode="bilinear", align_corners=corners)
        assert torch.equal(view(images), expected)

    def test_a_square_of_that_size_stays(self):
        images = torch.rand(1, 3, 6, 6)
        assert View(size=6)(images) is images

    def test_nearest_keeps_values_and_takes_the_pixel_under_the_centre(self):
        mask = torch.tensor([0.0, 1, 2, 255, 4]).view(1, 1, 1, 5)
        found = View(size=3).nearest(mask)
        centres = [int((i + 0.5) * 5 / 3) for i in range(3)]
        assert found[0, 0, 1].tolist() == mask.flatten()[centres].tolist()

    def test_same_look_is_the_same_key(self):
        looks = {FULL: 1, View(scale=0.3, align_corners=True): 2}
        assert looks[View()] == 1
        assert looks[View(scale=0.3, align_corners=True)] == 2
        assert View(scale=0.3) not in looks

    def test_size_and_scale_exclude_each_other(self):
        with pytest.raises(ValueError, match="a size or a scale"):
            View(size=128, scale=0.5)


class TestBatch:
    def test_to_moves_every_tensor(self):
        moved = make_batch().to(torch.device("meta"))
        tensors = [moved.images, moved.tags, moved.index, moved.valid, *moved.side.values(), moved.target]
        assert [x.device.type for x in tensors] == ["meta"] * 6
        assert set(moved.side) == {"saliency"}

    def test_to_without_target(self):
        batch = make_batch()
        batch.target = None
        assert batch.to(torch.device("cpu")).target is None


class TestCamOutput:
    @staticmethod
    def output(**more):
        half = torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16)
        return CamOutput(logits=half.mean((2, 3)), cams=half, features={"last": half}, **more)

    def test_best_is_the_refined_map_where_there_is_one(self):
        refined = torch.ones(1, 2, 3, 3)
        assert self.output().best is not None
        assert self.output(refined=refined).best is refined
        plain = self.output()
        assert plain.best is plain.cams

    def test_float_converts_everything(self):
        half = torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16)
        out = self.output(refined=half, background=half[:, :1]).float()
        tensors = [out.logits, out.cams, out.features["last"], out.refined, out.background]
        assert {x.dtype for x in tensors} == {torch.float32}
        assert self.output().float().refined is None
        assert self.output().float().background is None

    def test_float_keeps_the_kind_of_an_output_that_holds_more(self):
        @dataclass
        class More(CamOutput):
            extra: int = 0

        half = torch.zeros(1, 1, 1, 1)
        assert More(half, half, {}, extra=5).float() == More(half, half, {}, extra=5)


class Net(Baseline):
    """One 1x1 convolution each way, and a record of the looks that it was shown."""

    views = (FULL, View(scale=0.5))
    dims = {"last": 4}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.body, self.classifier = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)
        self.seen, self.dtypes, self.steps = [], [], 0

    def encode(self, images):
        self.seen.append(tuple(images.shape[-2:]))
        features = {"last": self.body(images)}
        self.dtypes.append(features["last"].dtype)
        return features

    def classify(self, features, images):
        cams = self.classifier(features["last"])
        return CamOutput(cams.mean((2, 3)), cams, features)

    def losses(self, batch, outs, progress):
        return {"cls": sum(out.logits.square().mean() for out in outs.values())}

    def after_step(self):
        self.steps += 1


class Adapting(Method):
    def adapt(self, features):
        return {"last": features["last"] * 2}


class Mapping(Method):
    def cams(self, out, tags):
        return out.cams * 0 + tags[:, :, None, None]


class Losing(Method):
    views = (FULL, View(size=8))

    def bind(self, net, num_classes):
        self.head = nn.Linear(net.dims["last"], num_classes)
        self.told = []

    def losses(self, batch, outs, progress):
        value = outs[View(size=8)].features["last"].mean((2, 3))
        return {"x": self.head(value).mean() * progress.done}

    def on_epoch_start(self, epoch):
        self.told.append(epoch)

    def after_step(self, net):
        self.told.append(net.steps)


class TestObjective:
    def test_views_that_several_parts_share_are_computed_once(self):
        objective = Objective(Net(), {"a": Losing(), "b": Losing()}, num_classes=3)
        assert objective.views == (FULL, View(scale=0.5), View(size=8))
        objective(make_batch(), NOW)
        assert objective.net.seen == [(12, 12), (6, 6), (8, 8)]

    def test_losses_carry_the_name_of_their_part(self):
        torch.manual_seed(0)
        objective = Objective(Net(), {"a": Losing(), "b": Losing()}, num_classes=3)
        batch = make_batch()
        losses = objective(batch, NOW)
        assert list(losses) == ["net/cls", "a/x", "b/x"]
        small = objective.look(View(size=8)(batch.images)).features["last"].mean((2, 3))
        assert torch.allclose(losses["b/x"], objective.methods["b"].head(small).mean() * 0.25)

    def test_heads_of_methods_are_trained_with_it(self):
        names = dict(Objective(Net(), {"a": Losing()}, num_classes=3).named_parameters())
        assert {"methods.a.head.weight", "net.body.weight"} <= set(names)
        assert names["methods.a.head.weight"].shape == (3, 4)

    def test_hooks_run_baseline_first(self):
        objective = Objective(Net(), {"a": Losing()}, num_classes=3)
        objective.on_epoch_start(4)
        objective.after_step()
        assert objective.methods["a"].told == [4, 1]  # the baseline's step had counted already

    def test_adapted_features_reach_the_classifier_and_the_methods(self):
        plain, adapting = Net(), Objective(Net(), {"a": Adapting()}, num_classes=3)
        adapting.net.load_state_dict(plain.state_dict())
        images = make_batch().images
        doubled = plain.encode(images)["last"] * 2
        out = adapting.look(images)
        assert torch.allclose(out.features["last"], doubled)
        assert torch.allclose(out.cams, plain.classifier(doubled))

    def test_exports_the_map_of_the_method_that_has_one(self):
        batch = make_batch()
        plain, mapping = (Objective(Net(), m, num_classes=3) for m in ({}, {"a": Losing(), "m": Mapping()}))
        maps, logits = plain.infer(batch.images, batch.tags)
        out = plain.look(batch.images)
        assert torch.equal(maps, out.best)
        assert torch.equal(logits, out.logits)
        assert not maps.requires_grad
        maps, _ = mapping.infer(batch.images, batch.tags)
        assert torch.equal(maps, batch.tags[:, :, None, None].expand(-1, -1, 12, 12))

    @pytest.mark.parametrize(("kind", "hook"), [(Adapting, "adapt"), (Mapping, "cams")])
    def test_two_methods_that_claim_the_same_are_refused(self, kind, hook):
        with pytest.raises(UserError, match=rf"^methods: one and two cannot be combined, both define {hook}\(\)"):
            Objective(Net(), {"one": kind(), "two": kind()}, num_classes=3)
        Objective(Net(), {"one": Adapting(), "two": Mapping()}, num_classes=3)

    def test_bfloat16_is_for_the_networks_alone(self):
        objective = Objective(Net(), num_classes=3, bf16=True)
        out = objective.look(make_batch().images)
        assert objective.net.dtypes == [torch.bfloat16]
        assert {out.logits.dtype, out.cams.dtype, out.features["last"].dtype} == {torch.float32}
        assert objective(make_batch(), NOW)["net/cls"].dtype == torch.float32

    def test_a_method_that_overrides_nothing_changes_nothing(self):
        net, batch = Net(), make_batch()
        plain, with_method = Objective(net, num_classes=3), Objective(net, {"m": Method()}, num_classes=3)
        assert plain(batch, NOW).keys() == with_method(batch, NOW).keys()
        assert torch.equal(plain.infer(batch.images, batch.tags)[0], with_method.infer(batch.images, batch.tags)[0])
        with_method.on_epoch_start(0)
        with_method.after_step()
        assert plain.state_dict().keys() == with_method.state_dict().keys()


class Appending(Method):
    def bind(self, net, num_classes):
        net.widen(2)

    def adapt(self, features):
        return {"last": torch.cat([features["last"], features["last"][:, :2]], dim=1)}


class Remembering(Method):
    def bind(self, net, num_classes):
        self.head = nn.Linear(net.dims["last"], 1)
        self.memory = TrainingOnly()

    def remember(self, tags):
        self.memory.register_buffer("rows", tags.float())


class TestMemories:
    def test_a_wider_classifier_is_there_before_other_methods_are_bound(self):
        methods = {"r": Remembering(), "a": Appending()}
        objective = Objective(Net(), methods, num_classes=3)
        assert objective.net.classifier.weight.shape == (3, 6, 1, 1)
        assert (objective.net.dims, objective.net.widened) == ({"last": 6}, 2)
        assert Net.dims == {"last": 4}
        assert objective.methods["r"].head.in_features == 6
        assert objective.look(make_batch().images).features["last"].shape[1] == 6

    def test_what_only_training_needs_is_in_checkpoints_and_not_in_exported_weights(self):
        torch.manual_seed(0)
        trained, fresh = (Objective(Net(), {"r": Remembering()}, num_classes=3) for _ in range(2))
        trained.remember(torch.tensor([[0, 1, 0], [1, 1, 1]]))
        assert "methods.r.memory.rows" in trained.state_dict()
        state = inference_state(trained)
        assert set(state) == set(trained.state_dict()) - {"methods.r.memory.rows"}
        load_inference_state(fresh, state)
        assert all(torch.equal(x, trained.state_dict()[name]) for name, x in fresh.state_dict().items())

    def test_weights_of_another_network_are_refused(self):
        fresh = Objective(Net(), {"r": Remembering()}, num_classes=3)
        state = inference_state(fresh)
        with pytest.raises(RuntimeError, match=r"missing: \['net.body.bias'\], unexpected: \['x'\]"):
            load_inference_state(fresh, {n: v for n, v in state.items() if n != "net.body.bias"} | {"x": torch.ones(1)})


class TestSeed:
    def test_is_the_same_everywhere(self):
        assert seed_of(0) == (3677149159 << 32 | 2968811710) % 2**63  # numpy's SeedSequence(0) on every platform
        assert seed_of(1, 2, 3) == 3773880422699760768

    def test_differs_with_each_number_and_their_order(self):
        seeds = [seed_of(a, b, c) for a in range(8) for b in range(8) for c in range(8)]
        assert len(set(seeds)) == 512
        assert all(0 <= seed < 2**63 for seed in seeds)


class TestOverProcesses:
    def test_alone(self):
        x = torch.rand(3, 2, requires_grad=True)
        assert (processes(), rank()) == (1, 0)
        for function in (gather, sum_over_processes, mean_over_processes):
            assert torch.equal(function(x), x)
            assert not function(x).requires_grad
        total = sum_over_processes(x)
        total.zero_()
        assert x.abs().sum() > 0  # the sum is a copy

    def test_two_processes_see_the_global_batch_in_its_order(self, tmp_path):
        whole = torch.randn(6, 4, 3, 5)
        torch.save(whole, tmp_path / "global.pt")
        script = Path(__file__).with_name("two_processes.py")
        running = [subprocess.Popen([sys.executable, script, tmp_path, str(own)]) for own in range(2)]
        assert [process.wait(timeout=90) for process in running] == [0, 0]
        for own in range(2):
            found = torch.load(tmp_path / f"{own}.pt", weights_only=True)
            assert (found["processes"], found["rank"]) == (2, own)
            assert torch.equal(found["gathered"], whole)
            assert torch.equal(found["channels_last"], whole)
            assert torch.equal(found["transposed"], whole.transpose(1, 3))
            assert torch.equal(found["flags"], whole > 0)
            assert torch.allclose(found["sum"], whole.sum(0), atol=1e-6)
            assert torch.allclose(found["sum_transposed"], whole.sum(0).transpose(0, 2), atol=1e-6)
            assert torch.allclose(found["mean"], whole.mean(), atol=1e-6)
            assert found["counts"] == 1.5
            assert torch.equal(found["untouched"], whole[own::2])
