"""MCTformer: the transformer, its attention, maps and losses against loops over heads, tokens, classes and places."""

import math

import pytest
import timm
import torch

from tag2mask import schema
from tag2mask.backbones import BackboneSettings
from tag2mask.backbones.class_tokens import ClassTokenViT, attend, resized_positions
from tag2mask.baselines.mctformer import MCTformer, TokenOutput, rank_pool, spread, token_contrast
from tag2mask.core import FULL, Batch, CamOutput, Objective, Progress
from tag2mask.errors import UserError
from tag2mask.methods import METHODS

BACKBONE = BackboneSettings(name="test_vit", weights=None, output_stride=16)
CLASSES = 3
NOW = Progress(epoch=1.0, done=0.5)
PLUS = {"maps": "root", "positions": "exact", "repeat": 2, "decay": 0.9, "token": 0.7}
VERSIONS = [{"maps": "attention"}, {"maps": "fused"}, PLUS, {"refine": False}, {"layers": 6}]


def net_of(**settings):
    """In double precision, with a conspicuous choice of weights: attention that is far from uniform."""
    torch.manual_seed(1)
    net = MCTformer(CLASSES, **{"backbone": BACKBONE} | settings).double()
    draw = torch.Generator().manual_seed(2)
    for name, parameter in net.named_parameters():
        if name.endswith(("qkv.weight", "tokens", "grid", "token_positions")):
            parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.2
        elif name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.1
    return net.eval()


def images(height, width, count=2):
    draw = torch.Generator().manual_seed(height + width)
    return torch.randn(count, 3, height, width, dtype=torch.float64, generator=draw)


def run(net, pixels):
    return net.classify(net.encode(pixels), pixels)


def data(pixels):
    tags = torch.tensor([[1.0, 0, 1], [0, 0, 0]], dtype=torch.float64)[: len(pixels)]
    return Batch(pixels, tags, torch.arange(len(pixels)), torch.ones_like(pixels[:, :1]))


# The slow transformer.


def loop_norm(x, layer):
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / (variance + layer.eps) ** 0.5 * layer.weight + layer.bias


def loop_attention(layer, tokens):
    """What one layer makes of a list of tokens, and the attention of every two of them, mean over the heads."""
    count, heads, width = len(tokens), layer.num_heads, len(tokens[0])
    size = width // heads
    parts = [layer.qkv.weight @ token + layer.qkv.bias for token in tokens]
    mean = [[torch.zeros((), dtype=torch.float64) for _ in range(count)] for _ in range(count)]
    found = []
    for i in range(count):
        pieces = []
        for head in range(heads):
            query = parts[i][head * size : (head + 1) * size]
            keys = [part[width + head * size : width + (head + 1) * size] for part in parts]
            scores = [torch.exp(torch.dot(query, key) / math.sqrt(size)) for key in keys]
            total = sum(scores)
            piece = torch.zeros(size, dtype=torch.float64)
            for j in range(count):
                share = scores[j] / total
                mean[i][j] = mean[i][j] + share / heads
                piece = piece + share * parts[j][2 * width + head * size : 2 * width + (head + 1) * size]
            pieces.append(piece)
        found.append(layer.proj.weight @ torch.cat(pieces) + layer.proj.bias)
    return found, mean


def loop_cubic(distance):
    """The bicubic kernel that torch has (a = -0.75)."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def loop_positions(grid, size, how):
    """Embeddings [D g g'] at h x w places, by the formula of the kernel."""
    own = grid.shape[1:]
    if tuple(own) == tuple(size):
        return grid
    steps = [o / (s + 0.1) if how == "released" else o / s for o, s in zip(own, size, strict=True)]
    rows = []
    for i in range(size[0]):
        row = []
        for j in range(size[1]):
            y, x = (i + 0.5) * steps[0] - 0.5, (j + 0.5) * steps[1] - 0.5
            value = torch.zeros(len(grid), dtype=grid.dtype)
            for m in range(math.floor(y) - 1, math.floor(y) + 3):
                for n in range(math.floor(x) - 1, math.floor(x) + 3):
                    place = grid[:, min(max(m, 0), own[0] - 1), min(max(n, 0), own[1] - 1)]
                    value = value + loop_cubic(y - m) * loop_cubic(x - n) * place
            row.append(value)
        rows.append(torch.stack(row, dim=1))
    return torch.stack(rows, dim=1)


def loop_net(net, pixels, *, how="released"):
    """(logits, patch logits or None, maps, exported maps, class tokens by layer) of one image [3 H W]."""
    trunk, side = net.backbone, net.backbone.patch
    height, width = pixels.shape[1] // side, pixels.shape[2] // side
    places = [(i, j) for i in range(height) for j in range(width)]
    at = loop_positions(trunk.grid[0], (height, width), how)
    tokens = [trunk.tokens[k] + trunk.token_positions[k] for k in range(CLASSES)]
    for i, j in places:
        patch = pixels[:, i * side : (i + 1) * side, j * side : (j + 1) * side]
        made = [(w * patch).sum() + b for w, b in zip(trunk.embed.weight, trunk.embed.bias, strict=True)]
        tokens.append(torch.stack(made) + at[:, i, j])
    depth, by_layer, attention = len(trunk.blocks), [], []
    for block in trunk.blocks:
        found, mean = loop_attention(block.attn, [loop_norm(token, block.norm1) for token in tokens])
        tokens = [token + more for token, more in zip(tokens, found, strict=True)]
        for n, token in enumerate(tokens):
            hidden = block.mlp.fc1.weight @ loop_norm(token, block.norm2) + block.mlp.fc1.bias
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            tokens[n] = token + block.mlp.fc2.weight @ hidden + block.mlp.fc2.bias
        by_layer.append(torch.stack(tokens[:CLASSES]))
        attention.append(mean)
    logits = torch.stack([sum(tokens[k]) / len(tokens[k]) for k in range(CLASSES)])

    def to_patches(k, n):
        last = attention[depth - net.backbone.layers :]
        return sum(mean[k][CLASSES + n] for mean in last) / len(last) * len(places)

    a = [[to_patches(k, n) for n in range(len(places))] for k in range(CLASSES)]
    if net.maps == "attention":
        m, pooled, fused = a, None, a
    else:
        by_place = dict(zip(places, tokens[CLASSES:], strict=True))
        m, fused, pooled = [], [], []
        for k in range(CLASSES):
            row = []
            for i, j in places:
                value = net.classifier.bias[k]
                for y in (-1, 0, 1):
                    for x in (-1, 0, 1):
                        if (i + y, j + x) in by_place:
                            near = by_place[i + y, j + x]
                            value = value + torch.dot(net.classifier.weight[k, :, y + 1, x + 1], near)
                row.append(value)
            m.append(row)
            ranked = sorted(row, key=lambda s: s.item(), reverse=True)
            pooled.append(
                sum(net.decay**r * s for r, s in enumerate(ranked)) / sum(net.decay**r for r in range(len(ranked)))
            )
            both = [share.detach() * value.clamp(min=0) for share, value in zip(a[k], row, strict=True)]
            fused.append([value if net.maps == "fused" or value == 0 else value.sqrt() for value in both])
        pooled = torch.stack(pooled)
    exported = fused
    if net.refine:
        between = [
            [sum(mean[CLASSES + i][CLASSES + j] for mean in attention) / depth for j in range(len(places))]
            for i in range(len(places))
        ]
        exported = [
            [sum(between[i][j].detach() * fused[k][j] for j in range(len(places))) for i in range(len(places))]
            for k in range(CLASSES)
        ]

    def as_map(rows):
        return torch.stack([torch.stack(list(row)) for row in rows]).view(CLASSES, height, width)

    return logits, pooled, as_map(m), as_map(exported), by_layer


def loop_contrast(by_layer):
    """L_token of class tokens [[K D], ...] of one image."""
    total = 0.0
    for tokens in by_layer:
        for j in range(len(tokens)):
            cosines = [torch.dot(tokens[j], t) / (tokens[j].norm() * t.norm()) for t in tokens]
            total = total - torch.log(torch.exp(cosines[j]) / sum(torch.exp(c) for c in cosines))
    return total / (len(by_layer) * len(by_layer[0]))


class TestAgainstLoops:
    @pytest.mark.parametrize("settings", VERSIONS, ids=str)
    @pytest.mark.parametrize("size", [(32, 48), (48, 16)], ids=str)
    def test_scores_maps_and_refinement(self, settings, size):
        net, pixels = net_of(**settings), images(*size)
        found = run(net, pixels)
        for b in range(len(pixels)):
            expected = loop_net(net, pixels[b], how=settings.get("positions", "released"))
            logits, pooled, maps, exported, by_layer = expected
            assert torch.allclose(found.logits[b], logits, atol=1e-9)
            assert torch.allclose(found.cams[b], maps, atol=1e-9)
            assert torch.allclose(found.refined[b], exported, atol=1e-9) and exported.max() > 1e-3
            assert torch.allclose(found.class_tokens[b], torch.stack(by_layer), atol=1e-9)
            assert (found.patch_logits is None) == (pooled is None)
            assert pooled is None or torch.allclose(found.patch_logits[b], pooled, atol=1e-9)
        assert found.best is found.refined and found.cams.shape[2:] == (size[0] // 16, size[1] // 16)

    @pytest.mark.parametrize("settings", VERSIONS[:3], ids=str)
    def test_losses_and_their_gradients(self, settings):
        net, batch = net_of(**settings), data(images(32, 48))
        losses = net.losses(batch, {FULL: run(net, batch.images)}, NOW)
        rows = [loop_net(net, x, how=settings.get("positions", "released")) for x in batch.images]
        expected = {"cls": 0.0, "patch": 0.0, "token": 0.0}
        for row, tags in zip(rows, batch.tags, strict=True):
            for name, logits in (("cls", row[0]), ("patch", row[1])):
                for k in range(CLASSES if logits is not None else 0):
                    p = torch.sigmoid(logits[k])
                    expected[name] -= torch.log(p if tags[k] else 1 - p) / (CLASSES * len(rows))
            expected["token"] += settings.get("token", 0) * loop_contrast(row[4]) / len(rows)
        used = {name for name, value in expected.items() if torch.is_tensor(value) and value.requires_grad}
        assert losses.keys() == used - (set() if net.token else {"token"})
        for name, loss in losses.items():
            assert loss.item() == pytest.approx(expected[name].item(), abs=1e-9)
        self.same_gradients(net, sum(losses.values()), sum(expected[name] for name in losses))

    @pytest.mark.parametrize("settings", VERSIONS[:3], ids=str)
    def test_gradients_of_the_exported_map(self, settings):
        net, pixels = net_of(**settings), images(32, 32, count=1)
        wanted = torch.randn(CLASSES, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        exported = loop_net(net, pixels[0], how=settings.get("positions", "released"))[3]
        self.same_gradients(net, (run(net, pixels).refined[0] * wanted).sum(), (exported * wanted).sum())

    @staticmethod
    def same_gradients(net, one, two):
        parameters = dict(net.named_parameters())
        found, expected = (torch.autograd.grad(x, list(parameters.values()), allow_unused=True) for x in (one, two))
        touched = 0
        for name, a, b in zip(parameters, found, expected, strict=True):
            zero = torch.zeros_like(parameters[name])
            assert torch.allclose(zero if a is None else a, zero if b is None else b, atol=1e-8), name
            touched += int(b is not None and bool(b.any()))
        assert touched > 20

    def test_the_exported_map_is_stretched(self):
        net, pixels = net_of(), images(32, 48)
        found, logits = Objective(net, num_classes=CLASSES).infer(pixels.float().double(), torch.ones(2, CLASSES))
        out = run(net, pixels.float().double())
        assert torch.allclose(logits, out.logits.float()) and found.min() >= 0 and found.max() <= 1
        for b in range(2):
            for k in range(CLASSES):
                values = out.refined[b, k].flatten().tolist()
                low, high = min(values), max(values)
                for value, given in zip(values, found[b, k].flatten().tolist(), strict=True):
                    stretched = max(value - low - 1e-5, 0) / (high - low + 1e-5)
                    assert given == pytest.approx(stretched, abs=1e-4)

    def test_a_token_that_attends_to_all_alike_leaves_the_map_as_it_is(self):
        net, pixels = net_of(refine=False), images(48, 32)
        features = net.encode(pixels)
        features["class_attention"] = torch.full((2, CLASSES, 3, 2), 1 / 6, dtype=torch.float64)
        out = net.classify(features, pixels)
        assert torch.allclose(out.refined, out.cams.clamp(min=0))

    @pytest.mark.parametrize("decay", [1.0, 0.9, 0.5])
    def test_rank_weighted_pooling(self, decay):
        cams = torch.randn(2, CLASSES, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        cams[0, 1] = 0.25  # ties alone
        found = rank_pool(cams, decay)
        for b in range(2):
            for k in range(CLASSES):
                ranked = sorted(cams[b, k].flatten().tolist(), reverse=True)
                weights = [decay**r for r in range(12)]
                mean = sum(w * s for w, s in zip(weights, ranked, strict=True)) / sum(weights)
                assert found[b, k].item() == pytest.approx(mean, rel=1e-9)
        assert found[0, 1].item() == pytest.approx(0.25, rel=1e-9)

    def test_spreading(self):
        maps = torch.rand(1, 2, 2, 3, dtype=torch.float64)
        attention = torch.rand(1, 6, 2, 3, dtype=torch.float64)
        for k in range(2):
            for i in range(6):
                value = sum(attention[0, i].flatten()[j] * maps[0, k].flatten()[j] for j in range(6))
                assert spread(maps, attention)[0, k].flatten()[i].item() == pytest.approx(value.item(), rel=1e-9)
        flat = torch.full((1, 6, 2, 3), 1 / 6, dtype=torch.float64)
        assert torch.allclose(spread(maps, flat), maps.mean(dim=(2, 3), keepdim=True).expand_as(maps))

    def test_token_contrast(self):
        tokens = torch.randn(2, 4, CLASSES, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        expected = sum(loop_contrast(list(image)) for image in tokens) / 2
        assert token_contrast(tokens).item() == pytest.approx(expected.item(), rel=1e-9)
        assert token_contrast(tokens * 7).item() == pytest.approx(expected.item(), rel=1e-9)
        assert token_contrast(tokens[:, :, :1]).item() == pytest.approx(0, abs=1e-12)
        alike = tokens[:, :, :1].expand(-1, -1, 4, -1)
        assert token_contrast(alike).item() == pytest.approx(math.log(4))
        apart = torch.eye(4, dtype=torch.float64).expand(1, 1, -1, -1)
        assert token_contrast(apart).item() < math.log(4) / 1.5


class TestPositions:
    @pytest.mark.parametrize("how", ["exact", "released"])
    @pytest.mark.parametrize("size", [(5, 9), (14, 3), (20, 31), (7, 28), (28, 28)], ids=str)
    def test_resizing_against_the_kernel(self, how, size):
        grid = torch.randn(1, 2, 14, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
        found = resized_positions(grid, size, how)
        assert found.shape == (1, 2, *size)
        assert torch.allclose(found[0], loop_positions(grid[0], size, how), atol=1e-9)

    @pytest.mark.parametrize("size", [(1, 1), (2, 71), (13, 14), (45, 33), (64, 85)], ids=str)
    def test_the_number_of_places_is_right_with_the_odd_factor(self, size):
        for side in (14, 28, 10):
            assert resized_positions(torch.zeros(1, 1, side, side), size, "released").shape[2:] == size

    def test_the_odd_factor_shows(self):
        grid = torch.randn(1, 4, 14, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        released, exact = (resized_positions(grid, (24, 32), how) for how in ("released", "exact"))
        assert (released - exact).abs().max() > 0.02

    def test_as_many_patches_in_another_shape_are_not_taken_for_the_own_ones(self):
        grid = torch.randn(1, 4, 14, 14)
        own = resized_positions(grid, (14, 14), "released")
        assert torch.equal(own, grid)
        other = resized_positions(grid, (7, 28), "released")
        assert not torch.allclose(other.flatten(), grid.flatten(), atol=1e-2)

    def test_a_wide_image_of_as_many_patches_as_a_square_one(self):
        """What is done is up to the grid of the patches, not to how many there are."""
        net = net_of()
        side = int(net.backbone.grid.shape[2])
        assert side == 10
        for pixels in (images(80, 320, count=1), images(320, 80, count=1)):
            out = run(net, pixels)
            assert out.cams.shape[2:] == (pixels.shape[2] // 16, pixels.shape[3] // 16)

    def test_turning_the_image_turns_nothing_but_the_shape(self):
        shapes = [run(net_of(), images(*size, count=1)).refined.shape[2:] for size in ((48, 96), (96, 48), (64, 64))]
        assert shapes == [(3, 6), (6, 3), (4, 4)]

    def test_repeated_places(self):
        one, two = net_of(), MCTformer(CLASSES, backbone=BACKBONE, repeat=2)
        torch.manual_seed(1)
        plain = ClassTokenViT(BACKBONE, CLASSES)
        torch.manual_seed(1)
        twice = ClassTokenViT(BACKBONE, CLASSES, repeat=2)
        assert two.backbone.grid.shape == (1, 64, 20, 20) and one.backbone.grid.shape == (1, 64, 10, 10)
        for i in range(20):
            for j in range(20):
                assert torch.equal(twice.grid[0, :, i, j], plain.grid[0, :, i // 2, j // 2])

    @pytest.mark.parametrize("size, whole", [((40, 33), (3, 3)), ((32, 47), (2, 3)), ((17, 32), (2, 2))])
    def test_images_that_are_no_whole_patches(self, size, whole):
        pixels = images(*size)
        resized, dropped = net_of(border="resize"), net_of(border="drop")
        assert run(resized, pixels).cams.shape[2:] == whole
        larger = torch.nn.functional.interpolate(pixels, size=(16 * whole[0], 16 * whole[1]), mode="bilinear")
        assert torch.allclose(run(resized, pixels).refined, run(resized, larger).refined)
        inside = pixels[..., : size[0] // 16 * 16, : size[1] // 16 * 16]
        assert torch.equal(run(dropped, pixels).refined, run(dropped, inside).refined)


class TestTransformer:
    def test_with_one_class_it_is_timms(self):
        torch.manual_seed(0)
        body = timm.create_model("test_vit", num_classes=0, global_pool="").eval()
        torch.nn.init.normal_(body.cls_token)
        net = ClassTokenViT(BACKBONE, 1).eval()
        net.blocks.load_state_dict(body.blocks.state_dict())
        net.embed.load_state_dict(body.patch_embed.proj.state_dict())
        net.tokens.data, net.token_positions.data = body.cls_token.data[0], body.pos_embed.data[0, :1]
        net.grid.data = body.pos_embed.data[:, 1:].mT.unflatten(2, (10, 10))
        pixels = images(160, 160).float()
        found = net(pixels)
        steps = body.forward_intermediates(pixels, norm=False, return_prefix_tokens=True, intermediates_only=True)
        assert len(steps) == found["class_tokens"].shape[1] == 6
        for number, (patches, prefix) in enumerate(steps):
            assert torch.allclose(found["class_tokens"][:, number], prefix, atol=1e-4)
            for tap, layer in {"c2": 2, "c3": 3, "c4": 4, "c5": 6, "last": 6}.items():
                assert layer != number + 1 or torch.allclose(found[tap], patches, atol=1e-4)

    def test_attention_is_a_distribution(self):
        net = net_of().backbone
        found, attention = attend(net.blocks[0].attn, torch.randn(2, 7, 64, dtype=torch.float64))
        assert found.shape == (2, 7, 64) and torch.allclose(attention.sum(dim=2), torch.ones(2, 7).double())

    def test_from_weights_all_classes_start_alike(self, tmp_path):
        torch.manual_seed(0)
        body = timm.create_model("test_vit", num_classes=0)
        path = tmp_path / "vit.pth"
        torch.save(body.state_dict(), path)
        settings = BackboneSettings(name="test_vit", weights=str(path), output_stride=16)
        net = ClassTokenViT(settings, 4)
        assert torch.equal(net.tokens, body.cls_token[0].expand(4, -1))
        assert torch.equal(net.token_positions, body.pos_embed[0, :1].expand(4, -1))
        assert torch.equal(net.grid[0, :, 2, 7], body.pos_embed[0, 1 + 27])
        scratch = ClassTokenViT(BACKBONE, 4)
        assert not torch.allclose(scratch.tokens[0], scratch.tokens[1])

    def test_no_parameter_is_idle_and_all_are_the_trunks(self):
        net = net_of(**PLUS)
        sum(net.losses(data(images(32, 48)), {FULL: run(net, images(32, 48))}, NOW).values()).backward()
        assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
        assert (
            net.backbone.trunk is True and {"backbone.tokens", "backbone.grid"} <= dict(net.named_parameters()).keys()
        )

    def test_branches_are_dropped_in_training_alone(self):
        net, pixels = net_of(drop_path=0.5), images(32, 32)
        still = [run(net.eval(), pixels).logits for _ in range(2)]
        moving = [run(net.train(), pixels).logits for _ in range(2)]
        assert torch.equal(*still) and not torch.allclose(*moving)

    @pytest.mark.parametrize(
        "name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_small_patch16_224", "vit_small_patch8_224"]
    )
    def test_vits_of_timm(self, name):
        stride = 8 if "patch8" in name else 16
        net = ClassTokenViT(BackboneSettings(name=name, weights=None, output_stride=stride), 2)
        assert net.grid.shape[2:] == (224 // stride, 224 // stride)

    def test_from_scratch_patches_are_of_any_size(self):
        net = ClassTokenViT(BackboneSettings(name="test_vit", weights=None, output_stride=8), 2)
        assert net.embed.weight.shape[2:] == (8, 8) and net(torch.zeros(1, 3, 40, 24))["last"].shape[2:] == (5, 3)


class TestGradientsAndMethods:
    def test_attention_gets_no_gradient_through_the_exported_map(self):
        net, pixels = net_of(), images(32, 48)
        features = {tap: x.detach().requires_grad_() for tap, x in net.encode(pixels).items()}
        net.classify(features, pixels).refined.sum().backward()
        assert features["last"].grad.any()
        assert features["class_attention"].grad is None and features["patch_attention"].grad is None

    def test_in_the_first_version_the_map_is_attention_and_learns(self):
        net, pixels = net_of(maps="attention"), images(32, 48)
        run(net, pixels).cams.square().sum().backward()
        assert net.backbone.tokens.grad.any() and net.backbone.blocks[0].attn.qkv.weight.grad.any()
        assert [name for name, _ in net.named_parameters() if name.startswith("classifier")] == []

    def test_the_root_of_nothing_has_a_gradient(self):
        net, pixels = net_of(maps="root"), images(32, 32)
        net.classifier.bias.data.fill_(-100.0)  # no map is positive anywhere
        out = run(net, pixels)
        out.refined.sum().backward()
        assert not out.refined.any() and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())

    def test_float_keeps_what_is_its_own(self):
        net, pixels = net_of(), images(32, 32)
        out = run(net, pixels).float()
        assert isinstance(out, TokenOutput)
        assert {out.patch_logits.dtype, out.class_tokens.dtype, out.refined.dtype, out.cams.dtype} == {torch.float32}
        assert run(net_of(maps="attention"), pixels).float().patch_logits is None

    def test_under_bfloat16_places_are_still_told_apart(self):
        net = net_of().float()
        pixels = images(64, 64).float()
        exact, rough = (Objective(net, num_classes=CLASSES, bf16=bf16).look(pixels) for bf16 in (False, True))
        assert rough.refined.dtype == torch.float32
        assert torch.allclose(exact.refined, rough.refined, rtol=0.1, atol=0.05 * exact.refined.max().item())

    def test_wider(self):
        net, pixels = net_of().float(), images(32, 32).float()
        net.widen(5)
        assert net.dims["last"] == 69 and net.widened == 5 and net.classifier.weight.shape == (CLASSES, 69, 3, 3)
        features = net.encode(pixels)
        features["last"] = torch.cat([features["last"], torch.ones(2, 5, 2, 2)], dim=1)
        assert net.classify(features, pixels).features["last"].shape[1] == 69

    def bound(self, method, settings, **net):
        made = schema.make(METHODS[method], schema.check(METHODS[method], settings, method))
        return Objective(net_of(**net).float(), {method: made}, num_classes=CLASSES)

    @pytest.mark.parametrize("method", ["ppc", "hsc", "rca", "rcm_mam"])
    def test_methods_that_train_features_say_that_the_first_version_has_none(self, method):
        with pytest.raises(UserError, match=f"^{method}.*'last'; mctformer has none that can be trained$"):
            self.bound(method, {}, maps="attention")

    def test_cpal_says_that_the_first_version_has_no_features(self):
        with pytest.raises(UserError, match=r"^projection: conv reads last; this network has no last$"):
            self.bound("cpal", {}, maps="attention")

    @pytest.mark.parametrize("projection", ["conv", "hierarchical", "identity"])
    def test_cpal_takes_patch_tokens_and_the_maps_of_patches(self, projection):
        objective = self.bound("cpal", {"projection": projection, "dim": 12, "detach": False, "prototypes": 2})
        cpal, net = objective.methods["cpal"], objective.net
        cpal.found.fill_(True)
        torch.nn.init.normal_(cpal.contexts)
        batch = data(images(64, 48).float())
        batch.tags = batch.tags.float()
        out = objective.look(batch.images)
        assert isinstance(out, CamOutput)
        out.cams.retain_grad()
        (loss,) = cpal.losses(batch, {FULL: out}, NOW).values()
        loss.backward()
        assert out.cams.grad.any() and net.classifier.weight.grad.any() and net.backbone.embed.weight.grad.any()


class TestFaults:
    @pytest.mark.parametrize(
        "faulty", [{"decay": 0.0}, {"decay": 1.5}, {"drop_path": 1.0}, {"token": -1.0}, {"repeat": 0}], ids=str
    )
    def test_out_of_range(self, faulty):
        with pytest.raises(UserError, match=r"^mctformer: decay must be above 0 and at most 1, drop_path"):
            net_of(**faulty)

    @pytest.mark.parametrize("layers", [0, 7])
    def test_layers(self, layers):
        with pytest.raises(UserError, match=r"^layers: test_vit has 6 layers, this must be in 1\.\.6$"):
            net_of(layers=layers)

    @pytest.mark.parametrize(
        "name",
        [
            "resnet18",
            "test_vit2",
            "test_vit3",
            "eva02_tiny_patch14_224",
            "deit_tiny_distilled_patch16_224",
            "deit3_small_patch16_224",
        ],
    )
    def test_networks_of_another_kind(self, name):
        with pytest.raises(UserError, match=rf"^backbone.name: {name} is no transformer with one class token and"):
            net_of(backbone=BackboneSettings(name=name, weights=None, output_stride=16))

    def test_unknown_name(self):
        with pytest.raises(UserError, match=r"^backbone.name: timm has no model 'deit_little'; take a plain ViT"):
            net_of(backbone=BackboneSettings(name="deit_little", weights=None))

    @pytest.mark.parametrize("faulty", [{"freeze": "c2"}, {"freeze_norm": True}, {"dilate": False}], ids=str)
    def test_what_only_cnns_have(self, faulty):
        with pytest.raises(UserError, match=r"leave freeze, freeze_norm and dilate out$"):
            net_of(backbone=BackboneSettings(name="test_vit", weights=None, **faulty))

    def test_weights_need_their_own_patches(self, tmp_path):
        settings = BackboneSettings(name="test_vit", weights=str(tmp_path / "some.pth"), output_stride=8)
        with pytest.raises(UserError, match=r"^backbone.output_stride: the patches of test_vit have 16 pixels; give"):
            net_of(backbone=settings)
