"""ViTs as backbones: tokens, taps, position embeddings on any grid, what is frozen, weights, messages."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tag2mask import schema
from tag2mask.api import network_overrides
from tag2mask.backbones import BackboneSettings, TimmCNN, Trunk, ViT, build_backbone, patch_of
from tag2mask.backbones.vit import GRIDS, fold, is_vit
from tag2mask.baselines import BASELINES
from tag2mask.core import Objective, inference_state, load_inference_state
from tag2mask.errors import UserError
from tag2mask.methods import METHODS
from tag2mask.ops.teacher import Teacher
from tag2mask.recipe import load
from tag2mask.refine.psa import AffinityNet
from tag2mask.segment import SEGMENTERS

TINY = {"embed_dim": 32, "depth": 5, "num_heads": 2}
# model, its patch, tokens before the patches
FAMILIES = [
    ("test_vit", 16, 1),
    ("test_vit2", 16, 1),
    ("test_vit3", 16, 1),
    ("test_vit4", 16, 1),
    ("vit_tiny_patch16_224", 16, 1),
    ("vit_small_patch8_224", 8, 1),
    ("vit_small_patch32_224", 32, 1),
    ("deit_tiny_patch16_224", 16, 1),
    ("deit_tiny_distilled_patch16_224", 16, 2),
    ("deit3_small_patch16_224", 16, 1),
    ("vit_base_patch16_clip_224", 16, 1),
    ("vit_base_patch16_siglip_224", 16, 0),
    ("vit_base_patch16_siglip_gap_224", 16, 0),
    ("vit_small_patch14_dinov2", 14, 1),
    ("vit_small_patch14_reg4_dinov2", 14, 5),
    ("vit_small_patch16_dinov3", 16, 5),
    ("eva02_tiny_patch14_224", 14, 1),
    ("eva02_base_patch16_clip_224", 16, 1),
    ("vit_small_patch16_rope_mixed_224", 16, 1),
    ("beit3_base_patch16_224", 16, 1),
]
NATIVE = (10, 10)  # the grid of test_vit
every_family = pytest.mark.parametrize(("name", "patch", "prefix"), FAMILIES, ids=[row[0] for row in FAMILIES])


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """All models are built with few channels and blocks, but for timm's own small ones."""
    create = timm.create_model

    def small(name, *args, **given):
        return create(name, *args, **({} if name.startswith("test_") else TINY) | given)

    monkeypatch.setattr(timm, "create_model", small)


def vit(name="test_vit", weights=None, output_stride=16, seed=0, **settings):
    """With weights that all matter: layer scales near zero would let errors through."""
    torch.manual_seed(seed)
    body = build_backbone(BackboneSettings(name=name, weights=weights, output_stride=output_stride, **settings))
    assert isinstance(body, ViT)
    if weights is None:
        shake(body)
    return body


def shake(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("rope.freqs"):
                p.add_(torch.randn_like(p) * 0.2)


def fault(name="test_vit", weights=None, **settings):
    with pytest.raises(UserError) as caught:
        build_backbone(BackboneSettings(name=name, weights=weights, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def close(x, y):
    return torch.allclose(x, y, atol=1e-4, rtol=1e-4)


def by_hand(tokens, h, w):
    """Patch tokens [B hw D] -> [B D h w], one after the other."""
    out = torch.empty(len(tokens), tokens.shape[2], h, w)
    for row in range(h):
        for column in range(w):
            out[:, :, row, column] = tokens[:, row * w + column]
    return out


class TestTokens:
    @every_family
    def test_last_is_what_timm_gives_at_the_native_size(self, name, patch, prefix):
        net = vit(name, output_stride=patch).eval()
        native = timm.create_model(name, num_classes=0).eval()
        native.load_state_dict(net.body.state_dict(), strict=False)
        h, w = native.patch_embed.grid_size
        images = torch.randn(2, 3, h * patch, w * patch)
        with torch.no_grad():
            found, wanted = net(images)["last"], native.fc_norm(native.forward_features(images))
        assert wanted.shape[1] == prefix + h * w
        assert close(found, by_hand(wanted[:, prefix:], h, w))
        assert found.std() > 0.1

    @every_family
    @pytest.mark.parametrize("grid", [(2, 5), (5, 2), (3, 3)])
    def test_all_taps_are_what_timm_gives_on_grids_of_any_shape(self, name, patch, prefix, grid):
        net = vit(name, output_stride=patch).eval()
        images = torch.randn(1, 3, grid[0] * patch, grid[1] * patch)
        with torch.no_grad():
            found = net(images)
            last, blocks = net.body.forward_intermediates(images, norm=False)
        depth = len(blocks)
        assert list(found) == ["c2", "c3", "c4", "c5", "last"] == list(net.dims)
        for number, tap in enumerate(("c2", "c3", "c4", "c5"), 1):
            assert close(found[tap], blocks[math.ceil(depth * number / 4) - 1])
        assert close(found["last"], by_hand(net.body.fc_norm(last)[:, prefix:], *grid))
        assert all(x.shape == (1, net.dims[tap], *grid) for tap, x in found.items())

    def test_evenly_spaced_blocks(self):
        assert vit("vit_tiny_patch16_224")._ends == {"c2": 1, "c3": 2, "c4": 3, "c5": 4}  # of five blocks
        assert vit("test_vit")._ends == {"c2": 1, "c3": 2, "c4": 4, "c5": 5}  # of six
        assert vit("test_vit2")._ends == {"c2": 1, "c3": 3, "c4": 5, "c5": 7}  # of eight

    @pytest.mark.parametrize("size", [(16, 16), (17, 33), (1, 1), (5, 100), (64, 48)])
    @pytest.mark.parametrize(("name", "patch"), [("test_vit", 16), ("eva02_tiny_patch14_224", 14)])
    def test_images_of_any_size_are_padded_at_their_ends(self, name, patch, size):
        net, images = vit(name, output_stride=patch).eval(), torch.randn(2, 3, *size)
        h, w = (-(-side // patch) for side in size)
        padded = torch.zeros(2, 3, h * patch, w * patch)
        padded[:, :, : size[0], : size[1]] = images
        with torch.no_grad():
            found, wanted = net(images), net(padded)
        assert all(found[tap].shape[2:] == (h, w) and torch.equal(found[tap], wanted[tap]) for tap in found)

    def test_fold_goes_row_by_row(self):
        tokens = torch.randn(2, 12, 3)
        assert torch.equal(fold(tokens, (3, 4)), by_hand(tokens, 3, 4))

    def test_one_patch_reaches_the_others_and_prefix_tokens_take_part(self):
        net, images = vit("vit_small_patch14_reg4_dinov2", output_stride=14).eval(), torch.randn(1, 3, 28, 42)
        with torch.no_grad():
            before = net(images)["last"]
            images[:, :, :14, :14] += 1
            assert (net(images)["last"] - before).abs().amin() > 0
            before = net(images)["last"]
            net.body.reg_token += torch.randn_like(net.body.reg_token)
            assert not close(net(images)["last"], before)

    def test_the_norm_behind_a_pooling_is_taken_at_every_place(self):
        net, images = vit("test_vit2").eval(), torch.randn(1, 3, 32, 48)
        assert isinstance(net.body.norm, nn.Identity) and isinstance(net.body.fc_norm, nn.LayerNorm)
        with torch.no_grad():
            found = net(images)
            assert close(found["last"].movedim(1, -1), net.body.fc_norm(found["c5"].movedim(1, -1)))


class TestPositions:
    """Traps: sizes by a factor, grids told by their number of tokens, a class token that is resized along."""

    def resized(self, net, grid):
        """Timm's own function, outside."""
        body = net.body
        prefix = 0 if body.no_embed_class else body.num_prefix_tokens
        return resample_abs_pos_embed(body.pos_embed, list(grid), list(body.patch_embed.grid_size), prefix)

    @pytest.mark.parametrize("name, patch", [row[:2] for row in FAMILIES if "dinov3" not in row[0]])
    @pytest.mark.parametrize("grid", [(3, 7), (7, 3), (1, 1), (20, 18)])
    def test_they_are_timms(self, name, patch, grid):
        net = vit(name, output_stride=patch)
        if net.body.pos_embed is None:
            assert net.positions(grid) is None
            return
        assert torch.equal(net.positions(grid), self.resized(net, grid))
        net.requires_grad_(False)
        assert all(torch.equal(net.positions(grid), self.resized(net, grid)) for _ in range(2))

    def test_at_the_native_grid_nothing_is_resized(self):
        net = vit()
        assert net.positions(NATIVE) is net.body.pos_embed

    def test_as_many_tokens_on_another_grid_are_resized(self):
        """10 x 10 = 4 x 25: what only counts tokens takes the native embeddings as they are."""
        net = vit()
        found = net.positions((4, 25))
        assert found.shape == net.body.pos_embed.shape
        assert not close(found, net.body.pos_embed)
        assert torch.equal(found, self.resized(net, (4, 25)))

    @pytest.mark.parametrize("grid", [(4, 19), (19, 4), (2, 38)])
    def test_77_tokens_are_no_text(self, grid):
        net = vit("vit_base_patch16_clip_224").eval()
        images = torch.randn(1, 3, 16 * grid[0], 16 * grid[1])
        with torch.no_grad():
            wanted = by_hand(net.body.forward_features(images)[:, 1:], *grid)
            assert close(net(images)["last"], wanted)

    def test_rows_and_columns_are_not_swapped(self):
        net = vit()
        with torch.no_grad():
            net.body.pos_embed[:, 1:] = torch.arange(10.0).repeat_interleave(10)[None, :, None]  # the row
        found = net.positions((3, 5))[0, 1:, 0].reshape(3, 5)
        assert (found.diff(dim=0) > 1).all() and found.diff(dim=1).abs().max() < 1e-4

    def test_the_size_is_exact_not_a_factor_with_an_offset(self):
        """Released code of the field scales by (h + 0.1) / h_0, and the sampling grid with it; `size` means h / h_0."""
        net = vit()
        patches = net.body.pos_embed.detach()[:, 1:].unflatten(1, NATIVE).permute(0, 3, 1, 2)
        options = {"mode": "bicubic", "antialias": True}
        exact = F.interpolate(patches, size=(20, 28), **options)
        factors = ((20 + 0.1) / 10, (28 + 0.1) / 10)
        shifted = F.interpolate(patches, scale_factor=factors, recompute_scale_factor=False, **options)
        found = by_hand(net.positions((20, 28))[:, 1:], 20, 28)
        assert shifted.shape == exact.shape
        assert close(found, exact) and not torch.allclose(found, shifted, atol=1e-3)

    def test_the_class_token_keeps_its_own(self):
        net = vit("deit_tiny_distilled_patch16_224")
        assert torch.equal(net.positions((3, 5))[:, :2], net.body.pos_embed[:, :2])


class TestKept:
    def calls(self, monkeypatch):
        """The grids that timm's function is called for."""
        import timm.layers

        seen, resample = [], timm.layers.resample_abs_pos_embed

        def counted(embeddings, grid, *args, **given):
            seen.append(tuple(grid))
            return resample(embeddings, grid, *args, **given)

        monkeypatch.setattr(timm.layers, "resample_abs_pos_embed", counted)
        return seen

    def test_once_per_grid_where_frozen(self, monkeypatch):
        seen, net = self.calls(monkeypatch), vit(freeze="c1")
        for size in ((32, 48), (48, 32), (32, 48), (33, 40), (32, 48)):
            net(torch.randn(1, 3, *size))
        assert seen == [(2, 3), (3, 2), (3, 3)]

    def test_once_per_grid_without_gradients(self, monkeypatch):
        seen, net = self.calls(monkeypatch), vit().eval()
        with torch.no_grad():
            found = [net(torch.ones(1, 3, 32, 48))["last"] for _ in range(3)]
        assert seen == [(2, 3)] and torch.equal(found[0], found[2])

    @pytest.mark.parametrize("change", ["optimiser", "fused", "load", "lerp", "dtype"])
    def test_changed_weights_are_resized_anew(self, change):
        net = vit().eval()
        with torch.no_grad():
            old = net.positions((2, 3)).clone()
        if change in ("optimiser", "fused"):
            optimiser = torch.optim.AdamW(net.parameters(), lr=0.1, fused=change == "fused")
            net.train()(torch.randn(1, 3, 32, 48))["last"].square().sum().backward()
            optimiser.step()
            net.eval()
        elif change == "load":
            net.load_state_dict(vit(seed=1).state_dict())
        elif change == "lerp":
            with torch.no_grad():
                torch._foreach_lerp_([net.body.pos_embed], [torch.ones_like(net.body.pos_embed)], 0.5)
        else:
            net.double()
        with torch.no_grad():
            new = net.positions((2, 3))
        assert torch.equal(new, self.native(net)) and new.dtype == net.body.pos_embed.dtype
        assert change == "dtype" or not close(new, old)

    def native(self, net):
        return resample_abs_pos_embed(net.body.pos_embed.detach(), [2, 3], NATIVE)

    def test_a_teacher_follows(self):
        net = vit()
        teacher = Teacher(net, momentum=0.0)
        images = torch.randn(1, 3, 32, 48)
        for _ in range(2):
            shake(net)
            teacher.follow(net)
            with torch.no_grad():
                assert torch.equal(teacher.model(images)["last"], net(images)["last"])

    def test_copies_do_not_share(self):
        net = vit(freeze="c5")
        net.positions((2, 3))
        other = copy.deepcopy(net)
        shake(other)
        assert torch.equal(other.positions((2, 3)), self.native(other))
        assert torch.equal(net.positions((2, 3)), self.native(net))

    def test_only_so_many_and_in_no_state(self):
        net = vit(freeze="c1")
        for width in range(1, GRIDS + 9):
            net.positions((1, width))
        assert len(net._resized) == GRIDS and (1, GRIDS + 8) in net._resized and (1, 1) not in net._resized
        assert net.state_dict().keys() == vit().state_dict().keys()

    def test_what_was_used_last_stays(self):
        net = vit(freeze="c1")
        for width in range(1, GRIDS + 9):
            net.positions((1, width))
            net.positions((1, 1))
        assert len(net._resized) == GRIDS and (1, 1) in net._resized and (1, 2) not in net._resized

    def test_a_dry_run_leaves_nothing_behind(self):
        net = vit(freeze="c1").eval()
        for _ in range(2):
            with FakeTensorMode(allow_non_fake_inputs=True):
                net(torch.zeros(1, 3, 32, 48))
        assert type(net(torch.zeros(1, 3, 32, 48))["last"]) is torch.Tensor


class TestTraining:
    @every_family
    def test_whatever_is_trained_gets_a_gradient_from_last(self, name, patch, prefix):
        net = vit(name, output_stride=patch)
        net(torch.randn(2, 3, 2 * patch, 3 * patch))["last"].square().sum().backward()
        assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_gradients_are_timms(self):
        net, images = vit(), torch.randn(2, 3, 32, 48)
        other = copy.deepcopy(net)
        weights = torch.randn(2, 64, 2, 3)
        (net(images)["last"] * weights).sum().backward()
        (by_hand_graph(other.body.forward_features(images)[:, 1:], 2, 3) * weights).sum().backward()
        for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-4), name

    def test_it_is_a_trunk_all_of_which_is_trained(self):
        net = vit()
        assert isinstance(net, Trunk) and net.trunk is True
        assert all(p.requires_grad for p in net.parameters())

    @pytest.mark.parametrize(("level", "blocks"), [("c1", 0), ("c2", 2), ("c3", 3), ("c4", 5), ("c5", 6)])
    def test_frozen_up_to_a_level(self, level, blocks):
        net = vit(freeze=level)
        stem = ("body.cls_token", "body.pos_embed", "body.patch_embed.")
        beginnings = stem + tuple(f"body.blocks.{number}." for number in range(blocks))
        frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
        wanted = {name for name, _ in net.named_parameters() if name.startswith(beginnings) or level == "c5"}
        assert frozen == wanted
        found = net.train()(torch.randn(1, 3, 32, 32))
        learns = [tap for tap, x in found.items() if x.requires_grad]
        assert learns == ([] if level == "c5" else [tap for tap in found if tap > level])

    @every_family
    def test_all_of_it_frozen(self, name, patch, prefix):
        net = vit(name, output_stride=patch, freeze="c5").train()
        assert not any(p.requires_grad for p in net.parameters())
        assert not any(x.requires_grad for x in net(torch.randn(1, 3, patch, 2 * patch)).values())

    def test_bfloat16(self):
        net, images = vit("vit_small_patch16_dinov3").eval(), torch.randn(1, 3, 32, 48)
        with torch.no_grad():
            exact = net(images)["last"]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                rough = net(images)["last"]
        assert (exact - rough).abs().mean() < 0.05 * exact.abs().mean() + 0.05

    @pytest.mark.parametrize("net", ["cam", "seam", "eps", "oaa"])
    @pytest.mark.parametrize("method", [None, "ppc", "rcm_mam", "hsc", "rca", "cpal"])
    def test_every_baseline_and_method_can_be_put_on_a_frozen_one(self, net, method):
        settings = {"backbone": {"name": "vit_small_patch14_reg4_dinov2", "weights": None, "output_stride": 14}}
        settings["backbone"]["freeze"] = "c5"
        made = schema.make(BASELINES[net], schema.check(BASELINES[net], settings, "net"), num_classes=3)
        methods = {} if method is None else {method: schema.make(METHODS[method], {})}
        objective = Objective(made, methods, num_classes=3)
        out = objective.look(torch.randn(2, 3, 42, 57))
        assert out.cams.shape == (2, 3, 3, 5) and out.cams.requires_grad
        state = inference_state(objective)
        load_inference_state(objective, state)

    @pytest.mark.parametrize("stride", [8, 14, 16])
    def test_an_affinity_net_has_cells_of_8_pixels(self, stride):
        net = AffinityNet(backbone=BackboneSettings(name="test_vit", weights=None, output_stride=stride), radius=2)
        assert net(torch.randn(2, 3, 50, 71)).shape == (2, 448, 7, 9)

    def test_a_segmenter(self):
        settings = {"backbone": {"name": "test_vit", "weights": None, "freeze": "c5"}, "width": 8}
        made = schema.make(SEGMENTERS["deeplab"], schema.check(SEGMENTERS["deeplab"], settings, "net"), num_classes=3)
        assert made(torch.randn(2, 3, 40, 57)).shape[:2] == (2, 4)


def by_hand_graph(tokens, h, w):
    rows = [torch.stack([tokens[:, r * w + c] for c in range(w)], dim=-1) for r in range(h)]
    return torch.stack(rows, dim=-2)


class TestWeights:
    @every_family
    def test_a_file_with_heads_and_all(self, name, patch, prefix, tmp_path):
        torch.manual_seed(1)
        source = timm.create_model(name)
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        net = vit(name, str(tmp_path / "w.safetensors"), patch)
        wanted = source.state_dict()
        assert all(torch.equal(x, wanted[key]) for key, x in net.body.state_dict().items())
        assert not any(key.startswith(("attn_pool", "head")) for key in net.body.state_dict())

    def test_a_file_of_another_image_size_is_resized(self, tmp_path):
        torch.manual_seed(1)
        source = timm.create_model("vit_small_patch14_dinov2", img_size=70)
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        net = vit("vit_small_patch14_dinov2", str(tmp_path / "w.safetensors"), 14)
        wanted = resample_abs_pos_embed(source.pos_embed, list(net.body.patch_embed.grid_size), [5, 5])
        assert torch.equal(net.body.pos_embed, wanted)

    def test_names_of_other_publishers(self, tmp_path):
        """An image tower as OpenCLIP stores it."""
        source = timm.create_model("vit_base_patch16_siglip_224")
        state = {f"visual.trunk.{name}": x for name, x in source.state_dict().items()}
        torch.save(state | {"logit_scale": torch.zeros(())}, tmp_path / "w.pth")
        net = vit("vit_base_patch16_siglip_224", str(tmp_path / "w.pth"))
        wanted = source.state_dict()
        assert all(torch.equal(x, wanted[key]) for key, x in net.body.state_dict().items())


class TestHub:
    @pytest.fixture
    def published(self, monkeypatch):
        """All of loading but the network: a file has what the model has, its pooling head, and a classifier."""
        import timm.models._builder as builder

        def serve(state):
            for name in ("load_state_dict_from_hf", "load_state_dict_from_url"):
                monkeypatch.setattr(builder, name, lambda *_, **__: dict(state))

        return serve

    @pytest.mark.parametrize(("name", "patch", "prefix"), [row for row in FAMILIES if row[0] != "test_vit4"])
    def test_all_of_it_is_read(self, name, patch, prefix, published):
        torch.manual_seed(1)
        source = timm.create_model(name, num_classes=7).state_dict()
        published(source)
        net = vit(name, "hub", patch)
        assert all(torch.equal(x, source[key]) for key, x in net.body.state_dict().items())

    def test_none_are_published(self):
        assert fault("test_vit4", "hub") == (
            "backbone.weights: timm has no weights for test_vit4; use null (from scratch) or a file"
        )

    def test_offline(self, monkeypatch):
        def offline(*_, **__):
            raise OSError("a\nlong\nstory")

        monkeypatch.setattr(timm.models, "load_pretrained", offline)
        message = fault("vit_small_patch14_reg4_dinov2", "hub", output_stride=14)
        assert message.startswith(
            "backbone.weights: cannot download the weights of vit_small_patch14_reg4_dinov2 (OSError)"
        )
        assert "https://huggingface.co/timm/vit_small_patch14_reg4_dinov2.lvd142m" in message


class TestChoosing:
    """`--backbone` on the command line."""

    @pytest.mark.parametrize("recipe", ["folder", "folder-vit"])
    @pytest.mark.parametrize(
        ("name", "patch"),
        [("vit_small_patch14_dinov2.lvd142m", 14), ("vit_small_patch16_dinov3", 16), ("eva02_tiny_patch14_224", 14)],
    )
    def test_a_vit_brings_its_stride(self, recipe, name, patch):
        found = network_overrides(recipe, backbone=name)
        assert [line for line in found if "stride" in line] == [
            f"classify.net.backbone.output_stride={patch}", f"segment.net.backbone.output_stride={patch}",
        ]  # fmt: skip
        loaded = load(recipe, [*found, "data.images=.", "data.tags=tags.csv"])
        backbone = loaded.stages["segment"]["net"]["backbone"]
        assert (backbone["name"], backbone["output_stride"]) == (name, patch)

    @pytest.mark.parametrize("name", ["resnet50", "resnet38", "nonsense", "test_vit_relpos"])
    def test_others_do_not(self, name):
        assert patch_of(name) is None
        assert not any("stride" in line for line in network_overrides("folder", backbone=name))

    @pytest.mark.parametrize(("name", "patch"), [row[:2] for row in FAMILIES])
    def test_the_width_of_patches(self, name, patch):
        assert patch_of(name) == patch


class TestUserErrors:
    @pytest.mark.parametrize(
        ("name", "stride", "patch"),
        [("test_vit", 8, 16), ("vit_small_patch14_dinov2", 16, 14), ("vit_small_patch8_224", 32, 8)],
    )
    def test_another_stride(self, name, stride, patch):
        assert fault(name, "hub", output_stride=stride) == (
            f"backbone: the patches of {name} are {patch} pixels wide, its only stride; set output_stride: {patch}"
        )

    def test_from_scratch_the_patches_are_as_wide_as_the_stride(self):
        net = vit("test_vit", output_stride=8)
        assert net.body.patch_embed.patch_size == (8, 8)
        assert net(torch.randn(1, 3, 40, 65))["last"].shape == (1, 64, 5, 9)

    def test_nothing_is_dilated(self):
        assert fault(dilate=False) == "backbone: nothing of test_vit is dilated; leave dilate out"

    def test_a_level_of_stride_two(self):
        with pytest.raises(UserError, match="test_vit has no levels of strides 2, 4, 8 and 16; take resnet50"):
            build_backbone(BackboneSettings(name="test_vit", weights=None), stem=True)

    def test_an_unknown_tag(self):
        assert fault("test_vit.none").startswith("backbone.name: Invalid pretrained tag (none) for test_vit.")

    @pytest.mark.parametrize("other", ["test_vit2", "test_vit3", "test_resnet", "eva02_tiny_patch14_224"])
    def test_weights_of_another_model(self, tmp_path, other):
        path = tmp_path / "w.safetensors"
        save_file(timm.create_model(other).state_dict(), path)
        message = fault(weights=str(path))
        assert message.startswith(f"backbone.weights: {path} does not fit VisionTransformer")
        assert message.endswith("is it of another model?")

    def test_a_missing_file(self, tmp_path):
        assert fault(weights=str(tmp_path / "no.safetensors")).startswith(
            f"backbone.weights: no file {tmp_path / 'no.safetensors'}; give an existing file"
        )

    def test_a_name_with_a_slip(self):
        assert fault("vit_small_patch14_dinov22") == (
            "backbone.name: timm has no model 'vit_small_patch14_dinov22'; did you mean vit_small_patch14_dinov2?"
        )

    @pytest.mark.parametrize("name", ["test_vit_relpos", "test_resnet", "resnet38", "nonsense"])
    def test_what_is_none(self, name):
        assert not is_vit(name)

    def test_a_cnn_has_no_patches_of_14(self):
        assert "test_resnet cannot be built with output stride 14" in fault("test_resnet", output_stride=14)
        assert isinstance(build_backbone(BackboneSettings(name="test_resnet", weights=None)), TimmCNN)
