"""AffinityNet and IRN: their networks on any backbone, their training step, and the labels they learn from."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loop_affinity import edge_affinity, feature_affinity, loop_displacement, loop_labels_on_grid, loop_losses

from tag2mask.backbones import BackboneSettings
from tag2mask.core import Batch, Progress
from tag2mask.engine import Training
from tag2mask.engine.training import make_optimizer
from tag2mask.errors import UserError
from tag2mask.refine import irn, psa
from tag2mask.refine.crf import PRESETS, DenseCRF
from tag2mask.refine.irn import IRNet, IRNObjective, edges
from tag2mask.refine.psa import AffinityNet, AffinityObjective

NOW = Progress(0, 0)


def backbone(name="test_resnet", stride=16):
    torch.manual_seed(0)
    return BackboneSettings(name=name, weights=None, output_stride=stride)


def batch_of(count, size, classes=3):
    target = torch.randint(0, classes + 1, (count, *(-(-n // 8) for n in size)))
    target = F.interpolate(target[:, None].float(), scale_factor=8, mode="nearest")[:, 0, : size[0], : size[1]].long()
    target[torch.rand(target.shape) < 0.3] = 255
    return Batch(
        torch.randn(count, 3, *size), torch.zeros(count, classes), torch.arange(count), torch.ones(count, 1, *size),
        target=target,
    )  # fmt: skip


class TestAffinityNet:
    @pytest.mark.parametrize("stride", [8, 16, 32])
    @pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
    @pytest.mark.parametrize("size", [(64, 96), (33, 50), (1, 1)])
    def test_one_vector_a_cell(self, name, stride, size):
        net = AffinityNet(backbone=backbone(name, stride)).eval()
        features = net(torch.randn(2, 3, *size))
        assert features.shape == (2, 448, -(-size[0] // 8), -(-size[1] // 8))
        assert (features > -1).all()  # ELU

    def test_everything_is_trained(self):
        net = AffinityNet(backbone=backbone())
        sum(AffinityObjective(net)(batch_of(2, (64, 64)), NOW).values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.mix.parameters())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        groups = make_optimizer(net, Training(steps=1, lr_new=10)).param_groups
        new = {id(p) for group in groups if group["factor"] == 10 for p in group["params"]}
        assert new == {id(p) for p in [*net.reduce.parameters(), *net.mix.parameters()]}

    @pytest.mark.parametrize("border", ["all", "psa"])
    def test_the_step_against_a_loop(self, border):
        net = AffinityNet(backbone=backbone(), radius=3, border=border).eval()
        batch = batch_of(2, (60, 64))
        losses = AffinityObjective(net)(batch, NOW)
        features = net(batch.images).detach().double()
        labels = loop_labels_on_grid(batch.target, (8, 8), 8, 3)
        expected = loop_losses(lambda b, i, j: feature_affinity(features[b], i, j), labels, 3, border)
        assert list(losses) == ["background", "foreground", "different"]
        assert [loss.item() for loss in losses.values()] == pytest.approx([x.item() for x in expected], rel=1e-4)

    def test_in_bfloat16_the_losses_are_single(self):
        losses = AffinityObjective(AffinityNet(backbone=backbone()), bf16=True)(batch_of(1, (64, 64)), NOW)
        assert {loss.dtype for loss in losses.values()} == {torch.float32}

    def test_needs_labels(self):
        batch = batch_of(1, (64, 64))
        batch.target = None
        with pytest.raises(ValueError, match="target"):
            AffinityObjective(AffinityNet(backbone=backbone()))(batch, NOW)

    def test_a_radius_without_pairs(self):
        with pytest.raises(UserError, match=r"^radius: 1 leaves no pairs"):
            AffinityNet(backbone=backbone(), radius=1)


class TestIRN:
    @pytest.mark.parametrize("stride", [8, 16, 32])
    @pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
    @pytest.mark.parametrize("size", [(64, 96), (33, 50), (1, 1)])
    def test_one_logit_a_cell(self, name, stride, size):
        net = IRNet(backbone=backbone(name, stride)).eval()
        assert len(net.sides) == (5 if name == "test_resnet" else 4)
        assert net(torch.randn(2, 3, *size)).shape == (2, 1, -(-size[0] // 4), -(-size[1] // 4))

    def test_a_frozen_backbone_stays_as_it_is(self):
        net = IRNet(backbone=backbone(), displacement=True).train()
        before = {name: x.clone() for name, x in net.backbone.state_dict().items()}
        sum(IRNObjective(net)(batch_of(2, (64, 64)), NOW).values()).backward()
        assert all(p.grad is None for p in net.backbone.parameters())
        own = [*net.sides.parameters(), *net.out.parameters(), *net.displacement.parameters()]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in own)
        assert all(torch.equal(x, before[name]) for name, x in net.backbone.state_dict().items())

    def test_without_freeze_everything_is_trained(self):
        net = IRNet(backbone=backbone(), freeze=False).train()
        sum(IRNObjective(net)(batch_of(2, (64, 64)), NOW).values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())

    @pytest.mark.parametrize("border", ["all", "psa"])
    def test_the_step_against_a_loop(self, border):
        net = IRNet(backbone=backbone(), radius=3, border=border, displacement=True).eval()
        batch = batch_of(2, (30, 32))
        losses = IRNObjective(net)(batch, NOW)
        edge = net(batch.images).detach().double().sigmoid()[:, 0]
        ways = net.displacement(net.look(batch.images))[..., :8, :8].detach().double()
        labels = loop_labels_on_grid(batch.target, (8, 8), 4, 3)
        expected = loop_losses(lambda b, i, j: edge_affinity(edge[b], i, j), labels, 3, border)
        expected += loop_displacement(ways, labels, 3, border)
        assert list(losses) == ["background", "foreground", "different", "centre", "still"]
        assert [loss.item() for loss in losses.values()] == pytest.approx([x.item() for x in expected], rel=1e-4)

    def test_displacements_share_no_parameter_with_boundaries(self):
        """Training the branch or not ends in the same boundaries, bit for bit."""
        found, branch = [], IRNet(backbone=backbone(), radius=3, displacement=True)
        for displacement in (False, True):
            torch.manual_seed(1)
            net = IRNet(backbone=backbone(), radius=3, displacement=displacement).train()
            net.load_state_dict(
                {name: x for name, x in branch.state_dict().items() if displacement or "displ" not in name}
            )
            optimizer = make_optimizer(net, Training(steps=3, lr=0.1))
            for step in range(3):
                torch.manual_seed(step)
                losses = IRNObjective(net)(batch_of(2, (32, 32)), NOW)
                optimizer.zero_grad()
                sum(losses.values()).backward()
                optimizer.step()
            torch.manual_seed(9)
            found.append(net.eval()(torch.randn(1, 3, 64, 64)))
        assert torch.equal(*found)

    @pytest.mark.parametrize("flip", [False, True])
    def test_edges_are_the_mean_logit_of_both_looks(self, flip):
        net, images = IRNet(backbone=backbone()).eval(), torch.randn(2, 3, 41, 54)
        found = edges(net, images, flip=flip)
        for image, edge in zip(images, found, strict=True):
            logits = net(image[None])[0, 0]
            if flip:
                logits = (logits + torch.flip(net(torch.flip(image[None], [3]))[0, 0], [1])) / 2
            torch.testing.assert_close(edge, logits.sigmoid(), rtol=1e-4, atol=1e-5)
        assert not found.requires_grad

    def test_a_backbone_without_the_levels(self):
        with pytest.raises(UserError, match="resnet38 has no levels"):
            IRNet(backbone=backbone("resnet38", 8))


def picture(size=(24, 30), seed=0):
    """A dark image with a light and a red square, and noisy maps of two classes, sure of a part of the first."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 40, (*size, 3), dtype=np.uint8)
    image[4:12, 4:16] += 150
    image[14:22, 18:28, 0] += 120
    maps = rng.random((2, *size)).astype(np.float32) * 0.3
    maps[0, 5:11, 6:14] += 0.6
    maps[1, 14:22, 18:28] += 0.2
    return image, torch.from_numpy(maps)


class TestConfidentLabels:
    def test_of_psa_against_a_loop(self):
        (image, maps), classes = picture(), torch.tensor([1, 4])
        found = psa.confident_labels(image, maps, classes, low=2.0, high=8.0)
        assert found.dtype == np.uint8
        runs = []
        for alpha in (2.0, 8.0):
            scores = np.concatenate([((1 - maps.numpy().max(axis=0)) ** alpha)[None], maps.numpy()])
            runs.append(np.asarray(DenseCRF(image, **PRESETS["psa"])(scores, steps=10)))
        for y in range(found.shape[0]):
            for x in range(found.shape[1]):
                low, high = (int(run[:, y, x].argmax()) for run in runs)
                expected = 0 if high == 0 else 255 if low == 0 else int(classes[low - 1]) + 1
                assert found[y, x] == expected
        assert set(np.unique(found)) == {0, 2, 255}

    def test_of_irn_against_a_loop(self):
        (image, maps), classes = picture(), torch.tensor([0, 2])
        found = irn.confident_labels(image, maps, classes, foreground=0.4, background=0.28)
        runs = []
        for score in (0.4, 0.28):
            seeds = np.zeros(image.shape[:2], np.uint8)
            for y in range(seeds.shape[0]):
                for x in range(seeds.shape[1]):
                    values = [score, *maps[:, y, x].tolist()]
                    seeds[y, x] = max(range(3), key=lambda c: (values[c], -c))
            runs.append(np.asarray(DenseCRF(image, **PRESETS["irn"]).from_labels(seeds, 3, gt_prob=0.7)))
        for y in range(found.shape[0]):
            for x in range(found.shape[1]):
                high, low = (int(run[:, y, x].argmax()) for run in runs)
                expected = int(classes[high - 1]) + 1 if high else 0 if low == 0 else 255
                assert found[y, x] == expected
        assert set(np.unique(found)) == {0, 1, 3, 255}

    @pytest.mark.parametrize("labels_of", [psa.confident_labels, irn.confident_labels])
    def test_no_class_is_all_background(self, labels_of):
        image, maps = picture()
        found = labels_of(image, maps[:0], torch.zeros(0, dtype=torch.long))
        assert found.shape == image.shape[:2]
        assert not found.any()

    @pytest.mark.parametrize("labels_of", [psa.confident_labels, irn.confident_labels])
    def test_maps_of_zeros(self, labels_of):
        image, maps = picture()
        assert not labels_of(image, maps * 0, torch.tensor([0, 1])).any()

    @pytest.mark.parametrize("pair", [(4, 4), (8, 4), (0, 4), (-1, 4), (4, math.inf), (math.nan, 4)])
    def test_alphas_out_of_order(self, pair):
        with pytest.raises(UserError, match=r"^alpha_low .* the low one lower"):
            psa.confident_labels(*picture(), torch.tensor([0, 1]), low=pair[0], high=pair[1])

    @pytest.mark.parametrize("pair", [(0.05, 0.3), (1.0, 0.3), (0.3, -0.1), (math.nan, 0.1)])
    def test_scores_out_of_order(self, pair):
        with pytest.raises(UserError, match=r"^foreground .* at least the one for background"):
            irn.confident_labels(*picture(), torch.tensor([0, 1]), foreground=pair[0], background=pair[1])
