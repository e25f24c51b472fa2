"""CLIP-ES on random tiny CLIPs made by open_clip: all pairs at once against loops over images, classes and places."""

import json
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from loop_clip_es import (
    loop_affinity,
    loop_block,
    loop_boxes,
    loop_embedding,
    loop_grad_cam,
    loop_maps,
    loop_positions,
    loop_refine,
    loop_text,
    loop_tower,
)
from miniature import COCO_CATEGORIES, VOC_CLASSES
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from tag2mask import recipe
from tag2mask.backbones import clip as clip_module
from tag2mask.backbones.clip import CLIP, CLIPSettings, load_clip
from tag2mask.baselines.clip_es import (
    BACKGROUND,
    CLIPES,
    TEMPLATES,
    affinity,
    boxes,
    codes,
    embed,
    refine,
    softmax_grad_cam,
    stretch,
)
from tag2mask.data.images import read_mask
from tag2mask.data.maps import map_path, map_size, read_maps
from tag2mask.data.scenes import Scenes
from tag2mask.engine import Devices
from tag2mask.errors import UserError
from tag2mask.ops.cams import resize
from tag2mask.pipeline import Stage
from tag2mask.stages import STAGES, Context
from tag2mask.stages.clip_es import check_clip_es, clip_es, words_for
from tag2mask.stages.cost import cost_of
from tag2mask.stages.labels import Background, labels, mask_path

open_clip = pytest.importorskip("open_clip")

PATCH, NATIVE, DEPTH = 8, 4, 3
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"layers": DEPTH, "width": 32, "head_width": 8, "patch_size": PATCH, "image_size": NATIVE * PATCH},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
NAME = "tiny-clip-of-the-tests"
TAGS = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.uint8)
WORDS, GROUND = ["bird avian", "cat", "train", "person with clothes"], ["sky", "grass"]


def tiny(seed=0, dtype=torch.float64):
    """In double precision, so that rounding does not hide mistakes."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**CONFIG)
    with torch.no_grad():
        for name, p in model.visual.named_parameters():
            if p.ndim == 1 and "class" not in name:
                p.add_(torch.randn_like(p) * 0.1)  # biases and norms are not what they start as
    return CLIP(model.to(dtype), open_clip.get_tokenizer("ViT-B-16")).to(dtype)


def images(count, size, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=draw, dtype=dtype)
    return F.interpolate(coarse, size=size, mode="bilinear")


def texts(count, seed):
    return F.normalize(
        torch.randn(count, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1
    )


class TestTower:
    def test_tokens_and_blocks_are_open_clips_own_at_the_native_size(self):
        clip, pixels = tiny(), images(2, (32, 32))
        visual = clip.model.visual
        tokens = clip.tokens(pixels, (4, 4))
        expected = visual._embeds((pixels - clip.mean) / clip.std)
        assert torch.allclose(tokens, expected, atol=1e-12)
        entering, _ = clip.before_last(tokens, keep=1)
        found, _ = clip.last(entering, clip.enter(entering))
        assert torch.allclose(found, visual.transformer(expected), atol=1e-12)

    @pytest.mark.parametrize("grid", [(4, 4), (2, 5), (1, 3)])
    @pytest.mark.parametrize("keep", [0, 1, DEPTH - 1])
    def test_attention_against_a_loop_over_heads(self, grid, keep):
        clip = tiny()
        tokens = clip.tokens(images(2, (grid[0] * PATCH, grid[1] * PATCH)), grid)
        entering, total = clip.before_last(tokens, keep=keep)
        output, own = clip.last(entering, clip.enter(entering))
        for b in range(2):
            expected, attention = loop_tower(clip.model, tokens[b])
            assert torch.allclose(entering[b], expected, atol=1e-10)
            before = sum(attention[:-1][len(attention) - 1 - keep :], torch.zeros_like(own[b]))
            assert torch.allclose(total[b], before, atol=1e-10)
            assert torch.allclose(own[b], attention[-1], atol=1e-10)
            last = clip.model.visual.transformer.resblocks[-1]
            assert torch.allclose(output[b], loop_block(last, expected, last.ln_1(expected))[0], atol=1e-10)
            assert torch.allclose(clip.embedding(output)[b], loop_embedding(clip.model, output[b]), atol=1e-10)
        assert torch.allclose(own.sum(dim=2), torch.ones_like(own[..., 0]))

    def test_no_gradient_reaches_the_blocks_before_the_last(self):
        clip = tiny()
        entering, total = clip.before_last(clip.tokens(images(1, (32, 32)).requires_grad_(), (4, 4)), keep=2)
        assert not entering.requires_grad and not total.requires_grad
        assert not any(p.requires_grad for p in clip.parameters())
        assert not clip.train().training and not clip.model.training

    @pytest.mark.parametrize("grid", [(3, 7), (9, 2), (1, 1), (4, 6)])
    def test_positions_against_a_loop(self, grid):
        clip = tiny()
        learnt = clip.model.visual.positional_embedding
        found = clip.positions(grid)
        assert found.dtype == torch.float64 and torch.equal(found[0], learnt[0])
        assert torch.allclose(found, loop_positions(learnt, (NATIVE, NATIVE), grid), atol=1e-12)

    def test_positions_are_resized_once_per_grid(self, monkeypatch):
        clip, calls = tiny(), []
        real = F.interpolate
        monkeypatch.setattr(clip_module.F, "interpolate", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
        assert clip.positions((4, 4)) is clip.model.visual.positional_embedding and not calls
        first, other = clip.positions((4, 6)), clip.positions((6, 4))
        assert len(calls) == 2 and not torch.equal(first, other)
        assert clip.positions((4, 6)) is first and len(calls) == 2
        for rows in range(1, 2 * clip_module.GRIDS):
            clip.positions((rows, 9))
        assert len(clip._positions) <= clip_module.GRIDS  # a folder may have images of a thousand sizes

    def test_grids(self):
        clip = tiny()
        assert clip.grid((32, 40)) == (4, 5)
        assert clip.grid((33, 1)) == (5, 1)
        assert clip.grid((400, 100), longest=80) == (10, 3)
        assert clip.grid((80, 30), longest=80) == clip.grid((80, 30)) == (10, 4)

    @pytest.mark.parametrize("size, grid", [((30, 45), (4, 6)), ((90, 64), (4, 3))])
    def test_resizing_is_that_of_pillow(self, size, grid):
        clip = tiny()
        whole = (images(1, size, seed=3)[0] * 255).round()
        picture = PIL.Image.fromarray(whole.movedim(0, 2).numpy().astype(np.uint8))
        resized = np.asarray(picture.resize((grid[1] * PATCH, grid[0] * PATCH), PIL.Image.Resampling.BICUBIC))
        expected = torch.from_numpy(resized.copy()).movedim(2, 0)[None].double() / 255
        seen = []
        hook = clip.model.visual.conv1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        clip.tokens(whole[None] / 255, grid)
        hook.remove()
        assert (seen[0] * clip.std + clip.mean - expected).abs().max() < 1.01 / 255


class TestText:
    def test_prompts_and_templates_against_a_loop(self):
        clip = tiny()
        templates = ("a clean origami {}.", "{} in the wild", "a photo of a {}")
        for own in (templates, templates[:1], TEMPLATES):
            found = embed(clip, WORDS, own)
            assert torch.allclose(found.norm(dim=1), torch.ones(4, dtype=torch.float64))
            for row, word in zip(found, WORDS, strict=True):
                assert torch.allclose(row, loop_text(clip, word, own), atol=1e-12)

    def test_what_looks_like_a_format_is_a_word(self):
        clip = tiny()
        assert not torch.equal(embed(clip, ["a {0} b"], ["{}"]), embed(clip, ["a b"], ["{}"]))

    @pytest.mark.parametrize("template", ["a photo", "{} and {}", ""])
    def test_a_template_has_one_place(self, template):
        with pytest.raises(UserError, match=r"templates: .* needs one \{\}, where the name of the class goes$"):
            embed(tiny(), WORDS, [template])

    def test_what_clip_would_cut_is_an_error(self):
        clip = tiny()
        clip.text(["cat " * 75])
        with pytest.raises(UserError) as fault:
            embed(clip, ["dog", "cat " * 75 + "x"], ["{}"])
        assert str(fault.value).endswith("has 78 tokens, CLIP reads 77; make it shorter")
        assert "\n" not in str(fault.value)

    def test_a_class_is_not_its_own_background(self):
        net = CLIPES(tiny(), ["keyboard", "cat"], background=["sky", "keyboard", "sea"], blocks=2)
        assert torch.allclose(net.others, embed(net.clip, ["sky", "sea"], TEMPLATES))
        with pytest.raises(UserError, match="background: at least one word is needed that is no class"):
            CLIPES(tiny(), ["keyboard", "cat"], background=["cat"], blocks=2)

    def test_background_words(self):
        assert len(BACKGROUND) == len(set(BACKGROUND)) == 25

    def test_codes(self):
        voc = recipe.load("voc12-cpal-baseline-clip-es", ["data.root=somewhere"]).stages["cams"]["names"]
        known = ["car", "tv", "hot dog", "sky", "Cat", "猫头", "person with clothes,people,human", *voc.values()]
        unknown = ["Cr", "In", "RS", "c1", "class 12", "17", "label_3", "xyzzt"[0:1], "PS", "HCC"]
        assert codes([*known, *unknown]) == unknown

    def test_words(self):
        classes = ("bird", "traffic_light", "Cr")
        assert words_for(classes, None) == ["bird", "traffic light", "Cr"]
        assert words_for(classes, {"Cr": "crazing of steel"}) == ["bird", "traffic light", "crazing of steel"]
        with pytest.raises(UserError, match=r"^names: the data has no class 'brd'; did you mean bird\?$"):
            words_for(classes, {"brd": "bird avian"})


class TestGradCam:
    def compare(self, grid, seed=0, tags=TAGS):
        clip = tiny(seed)
        own, others = texts(tags.shape[1], 1), texts(3, 2)
        pixels = images(len(tags), (grid[0] * PATCH, grid[1] * PATCH), seed)
        tokens = clip.tokens(pixels, grid)
        entering, _ = clip.before_last(tokens, keep=0)
        image_of, class_of = tags.nonzero(as_tuple=True)
        found = softmax_grad_cam(clip, entering, image_of, class_of, tags > 0, own, others)
        assert found.shape == (int(tags.sum()), grid[0] * grid[1]) and not found.requires_grad
        for cam, image, k in zip(found, image_of.tolist(), class_of.tolist(), strict=True):
            expected = loop_grad_cam(clip.model, entering[image], k, tags[image], own, others)
            assert torch.allclose(cam, expected, atol=1e-8), (image, k)
            assert cam.max() == 1  # and not a map of zeros
        return found

    @pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
    @pytest.mark.parametrize("seed", range(3))
    def test_against_autograd_class_by_class(self, grid, seed):
        self.compare(grid, seed)

    def test_an_image_of_as_many_tokens_as_a_text(self):
        assert self.compare((4, 19), tags=TAGS[:1]).shape == (2, 77 - 1)

    def test_absent_classes_do_not_compete(self):
        clip, own, others = tiny(), texts(4, 1), texts(2, 2)
        entering, _ = clip.before_last(clip.tokens(images(1, (32, 32)), (4, 4)), keep=0)
        pair = torch.tensor([0]), torch.tensor([1])
        one, two, three = (
            softmax_grad_cam(clip, entering, *pair, torch.tensor([tags]) > 0, changed, others)
            for tags, changed in (
                ([0, 1, 0, 0], own),
                ([0, 1, 0, 0], torch.cat([own[:3], texts(1, 9)])),
                ([0, 1, 0, 1], own),
            )
        )
        assert torch.equal(one, two) and not torch.allclose(one, three, atol=1e-3)

    def test_a_class_that_clip_is_sure_of_keeps_its_map(self):
        clip = tiny(dtype=torch.float32)
        entering, _ = clip.before_last(clip.tokens(images(1, (32, 32), dtype=torch.float32), (4, 4)), keep=0)
        embedded = clip.embedding(clip.last(entering, clip.enter(entering))[0])
        own = F.normalize(embedded + 0.1 * texts(1, 4).float(), dim=1)
        others = F.normalize(-embedded + texts(2, 2).float(), dim=1)
        cosines = (embedded @ torch.cat([own, others]).T)[0]
        clip.model.logit_scale.fill_((20 / (cosines[0] - cosines[1:].max())).log())
        scores = clip.scale * embedded @ torch.cat([own, others]).T
        assert scores.softmax(dim=1)[0, 0] == 1  # its gradient is nothing, all of it was lost in rounding
        pair = torch.tensor([0]), torch.tensor([0])
        found = softmax_grad_cam(clip, entering, *pair, torch.ones(1, 1, dtype=torch.bool), own, others)
        exact = tiny()
        exact.model.logit_scale.fill_(clip.model.logit_scale.item())
        expected = loop_grad_cam(exact.model, entering[0].double(), 0, [1], own.double(), others.double())
        assert found.max() == 1 and torch.allclose(found[0].double(), expected, atol=1e-3)


class TestAffinity:
    @pytest.mark.parametrize("seed", range(3))
    def test_against_a_loop(self, seed):
        attention = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = affinity(attention)
        assert torch.equal(found, found.mT)
        for own, rows in zip(found, attention, strict=True):
            assert torch.allclose(own, loop_affinity(rows), atol=1e-12)

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("share", [0.0, 0.4, 0.7, 0.95])
    def test_boxes_against_flood_fill(self, seed, share):
        cams = torch.rand(5, 6, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
        cams[1] = 0
        found = boxes(cams, share)
        assert found.dtype == torch.bool and not found[1].any()
        for own, cam in zip(found, cams, strict=True):
            assert torch.equal(own, loop_boxes(cam, share))

    def test_last_row_and_last_column_are_in_boxes(self):
        cam = torch.zeros(1, 5, 6)
        cam[0, 3:, 4:] = 1.0
        assert torch.equal(boxes(cam, 0.4), cam > 0)
        assert boxes(torch.ones(1, 5, 6), 0.4).all()

    def test_parts_of_different_maps_do_not_touch(self):
        cams = torch.zeros(2, 4, 4)
        cams[0, 0, 0] = cams[1, 3, 3] = 1
        assert torch.equal(boxes(cams, 0.4), cams > 0)

    def test_corners_connect(self):
        cam = torch.eye(3)[None]
        assert boxes(cam, 0.4).all()

    def test_refinement_against_the_square_with_columns_dropped(self):
        draw = torch.Generator().manual_seed(0)
        alike = affinity(torch.rand(3, 8, 8, generator=draw, dtype=torch.float64))
        cams = torch.rand(4, 8, generator=draw, dtype=torch.float64)
        inside = torch.rand(4, 8, generator=draw) < 0.5
        image_of = torch.tensor([0, 0, 2, 1])
        found = refine(cams, inside, alike, image_of)
        for p, image in enumerate(image_of.tolist()):
            assert torch.allclose(found[p], loop_refine(cams[p], inside[p], alike[image].clone()), atol=1e-12)

    def test_stretch(self):
        maps = torch.tensor([[1e-9, 3e-9, 2e-9], [0.0, 0.0, 0.0], [5.0, 5.0, 5.0]])
        assert torch.allclose(stretch(maps), torch.tensor([[0, 1, 0.5], [0, 0, 0], [0, 0, 0]]))


class TestWhole:
    @pytest.mark.parametrize("blocks", [1, 2, 3])
    @pytest.mark.parametrize("size", [(32, 32), (20, 37)])
    def test_against_a_loop(self, blocks, size):
        net = CLIPES(tiny(), WORDS, background=GROUND, blocks=blocks, box=0.5)
        pixels = images(4, size)
        maps, logits = net(pixels, TAGS)
        grid = tuple(maps.shape[1:])
        assert grid == (-(-size[0] // PATCH), -(-size[1] // PATCH))
        expected = loop_maps(net.clip, pixels, TAGS, net.texts, net.others, blocks=blocks, box=0.5, grid=grid)
        assert len(maps) == len(expected) == int(TAGS.sum())
        for own, pair in zip(maps, TAGS.nonzero().tolist(), strict=True):
            assert torch.allclose(own, expected[tuple(pair)], atol=1e-7), pair
        for b in range(4):
            entering, _ = loop_tower(net.clip.model, net.clip.tokens(pixels, grid)[b])
            last = net.clip.model.visual.transformer.resblocks[-1]
            seen = loop_embedding(net.clip.model, loop_block(last, entering, last.ln_1(entering))[0])
            assert torch.allclose(logits[b], net.clip.scale * (net.texts @ seen), atol=1e-9)

    def test_images_without_tags(self):
        net = CLIPES(tiny(), WORDS, blocks=2)
        maps, logits = net(images(2, (32, 40)), torch.zeros(2, 4, dtype=torch.uint8))
        assert maps.shape == (0, 4, 5) and logits.shape == (2, 4)

    def test_images_do_not_look_at_each_other(self):
        net, pixels = CLIPES(tiny(), WORDS, blocks=2), images(4, (32, 40))
        together = net(pixels, TAGS)[0]
        alone = torch.cat([net(pixels[b : b + 1], TAGS[b : b + 1])[0] for b in range(4)])
        assert torch.allclose(together, alone, atol=1e-9)

    def test_large_images_are_made_smaller(self):
        net = CLIPES(tiny(), WORDS, blocks=2, longest=40)
        assert net(images(1, (120, 60)), TAGS[:1])[0].shape == (2, 5, 3)

    @pytest.mark.parametrize("blocks", [0, 4])
    def test_blocks_that_are_not_there(self, blocks):
        with pytest.raises(UserError, match=f"blocks: {blocks}, but the image tower has 3; take 1 to 3"):
            CLIPES(tiny(), WORDS, blocks=blocks)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with the weights of a CLIP whose name open_clip knows from now on."""
    root = tmp_path_factory.mktemp("clip")
    (root / f"{NAME}.json").write_text(json.dumps(CONFIG))
    resnet = CONFIG | {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}}
    (root / f"{NAME}-resnet.json").write_text(json.dumps(resnet))
    open_clip.add_model_config(root)
    path = root / "tiny.safetensors"
    save_file(tiny(dtype=torch.float32).model.state_dict(), path)
    return path


def fault(name, given):
    with pytest.raises(UserError) as found:
        load_clip(CLIPSettings(name=name, weights=given))
    assert "\n" not in str(found.value)
    return str(found.value)


class TestLoading:
    def test_a_file(self, weights):
        clip = load_clip(CLIPSettings(name=NAME, weights=str(weights)))
        expected = tiny(dtype=torch.float32)
        assert all(torch.equal(x, expected.model.state_dict()[name]) for name, x in clip.model.state_dict().items())
        assert torch.equal(clip.text(["a cat"]), expected.text(["a cat"]))
        assert torch.allclose(clip.mean.flatten(), torch.tensor([0.48145466, 0.4578275, 0.40821073]))

    def test_offline(self, monkeypatch, caplog):
        def offline(*_, **__):
            raise OSError("no\nnetwork")

        monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
        message = fault("ViT-B-16-quickgelu", "openai")
        assert message == (
            "clip.weights: cannot download the weights openai of ViT-B-16-quickgelu (RuntimeError); get "
            "open_clip_model.safetensors from https://huggingface.co/timm/vit_base_patch16_clip_224.openai on a "
            "machine with network and give its path as clip.weights"
        )
        assert not caplog.records  # open_clip tells the same in lines of its own

    def test_without_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "open_clip", None)
        assert fault(NAME, "openai").endswith('pip install "tag2mask[clip]"')

    def test_activations_must_fit(self):
        assert fault("ViT-B-16", "openai") == (
            "clip.name: the weights openai were trained with another activation; take name: ViT-B-16-quickgelu"
        )

    def test_names_and_files(self, weights, tmp_path):
        assert fault("ViT-B16", "openai") == "clip.name: open_clip has no model 'ViT-B16'; did you mean ViT-B-16?"
        assert fault("ViT-B-16", "laion2b_s34b_b88").endswith("did you mean laion2b_s34b_b88k?")
        assert fault(NAME, str(tmp_path / "no.pt")).startswith(f"clip.weights: no file {tmp_path / 'no.pt'}; get ")
        (tmp_path / "broken.safetensors").write_bytes(b"abc")
        assert fault(NAME, str(tmp_path / "broken.safetensors")).startswith("clip.weights: ")
        save_file({"visual.proj": torch.zeros(2)}, tmp_path / "other.safetensors")
        assert "is it of another model?" in fault(NAME, str(tmp_path / "other.safetensors"))
        assert fault(f"{NAME}-resnet", None).endswith("is no plain ViT; take ViT-B-16-quickgelu")
        for other in ("ViT-B-16-SigLIP", "coca_ViT-B-32", "RN50", "roberta-ViT-B-32"):
            assert fault(other, None).endswith("is no plain ViT; take ViT-B-16-quickgelu")


def stage_of(weights, **settings):
    return {"clip": CLIPSettings(name=NAME, weights=str(weights)), "background": ("sky", "sea"), "blocks": 2} | settings


class TestStage:
    def test_maps_of_every_image(self, weights, tmp_path, capsys):
        source = Scenes(images=8, test=1, size=40)
        samples = source.split("train")
        names = {source.classes[0]: "a thing that is red"}
        settings = stage_of(weights, names=names, batch=4, box=0.9, longest=32)
        context = Context(tmp_path / "clip", source, Devices("cpu"), workers=0)
        clip_es(context, **settings)
        words = [names.get(name, name) for name in source.classes]
        clip = load_clip(CLIPSettings(name=NAME, weights=str(weights)))
        net = CLIPES(clip, words, background=("sky", "sea"), blocks=2, box=0.9, longest=32)
        for index, name in enumerate(samples.names):
            stored = read_maps(map_path(tmp_path / "clip", name))
            pixels = torch.from_numpy(samples.image(index).copy()).movedim(2, 0)[None] / 255
            maps, logits = net(pixels, torch.from_numpy(samples.tags[index : index + 1]))
            size = tuple(pixels.shape[2:])
            assert stored.size == size and stored.classes.tolist() == np.flatnonzero(samples.tags[index]).tolist()
            expected = resize(maps[:, None], map_size(size))[:, 0]
            assert np.allclose(stored.maps, expected, atol=5e-3) and stored.maps.dtype == np.float16
            assert np.allclose(stored.logits, logits[0], atol=1e-3)
        assert "warning" not in capsys.readouterr().err

        before = {name: map_path(tmp_path / "clip", name).read_bytes() for name in samples.names}
        map_path(tmp_path / "clip", samples.names[2]).unlink()
        clip_es(context, **settings)
        assert before == {name: map_path(tmp_path / "clip", name).read_bytes() for name in samples.names}

        out = Context(tmp_path / "labels", source, Devices("cpu"), workers=0)
        labels(out, of=tmp_path / "clip", background=Background(alpha=1))
        assert read_mask(mask_path(tmp_path / "labels", samples.names[0]), len(source.classes)).shape == (40, 40)

    def test_codes_get_a_warning(self, weights, tmp_path, capsys):
        source = Scenes(images=8, test=1, size=40)
        name = source.classes[1]
        clip_es(Context(tmp_path, source, Devices("cpu"), workers=0), **stage_of(weights, names={name: "Cr"}))
        lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert lines == ["warning: CLIP cannot know what is meant by Cr; give words that describe them as names"]

    @pytest.mark.parametrize(
        "changed, said",
        [
            ({"names": {"Fox": "x"}}, "names: the data has no class 'Fox'"),
            ({"templates": ("a photo",)}, "templates: 'a photo' needs one {}"),
            ({"blocks": 9}, "blocks: 9, but the image tower has 3"),
            ({"background": ("word " * 80,)}, "...' has 86 tokens, CLIP reads 77"),
            ({}, None),
        ],
    )
    def test_what_is_wrong_is_said_before_anything_runs(self, weights, changed, said):
        source = Scenes(images=8, test=1, size=40)
        settings = {"clip": {"name": NAME, "weights": str(weights)}, "names": None, "templates": TEMPLATES}
        settings |= {"background": ("sky",), "blocks": 2} | changed
        stage = Stage(name="cams", kind="clip_es", version=1, settings=settings, inputs={}, data="x", files={})
        if said is None:
            check_clip_es(source, stage)
        else:
            with pytest.raises(UserError) as found:
                check_clip_es(source, stage)
            assert said in str(found.value)

    def test_operations(self, weights):
        source = Scenes(images=8, test=1, size=40)
        settings = {"clip": {"name": NAME, "weights": "openai"}, "longest": None}
        stage = Stage(name="cams", kind="clip_es", version=1, settings=settings, inputs={}, data="x", files={})
        cost = cost_of(stage, source, (40, 64))
        images, pairs = 8, int(source.split("train").tags.sum())
        clip = tiny()
        entered = torch.zeros(1, 1 + 5 * 8, 32, dtype=torch.float64).requires_grad_()
        with FlopCounterMode(display=False) as forward:
            found = clip.last(torch.zeros_like(entered), entered)[0]
        with FlopCounterMode(display=False) as backward:
            found.sum().backward()
        block, again = forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()
        assert cost.flops == pytest.approx(images * DEPTH * block + pairs * again, rel=0.1)
        assert cost.disk == 2 * 10 * 16 * pairs

    def test_recipes(self, tmp_path):
        voc = recipe.load("voc12-cpal-baseline-clip-es", ["data.root=somewhere"])
        stage = voc.stages["cams"]
        assert STAGES[stage["do"]].function is clip_es
        assert tuple(stage["background"]) == BACKGROUND and tuple(stage["templates"]) == TEMPLATES
        assert stage["clip"] == {"name": "ViT-B-16-quickgelu", "weights": "openai"}
        coco = recipe.load("coco14-cpal-baseline-clip-es", ["data.root=somewhere"]).stages["cams"]
        assert set(BACKGROUND) - set(coco["background"]) == {"keyboard", "sign"} and len(coco["background"]) == 23
        assert (stage["box"], coco["box"]) == (0.4, 0.7)
        assert words_for(VOC_CLASSES, stage["names"])[-1] == "tvmonitor screen"
        assert words_for(tuple(COCO_CATEGORIES.values()), coco["names"])[0] == "person with clothes,people,human"
        assert voc.supervision == recipe.load("folder-clip-es", ["data.images=x", "data.tags=y"]).supervision
        (tmp_path / "own.safetensors").write_bytes(b"one")
        own = ["data.root=somewhere", f"cams.clip.weights={tmp_path / 'own.safetensors'}"]
        keys = []
        for content in (b"one", b"two"):  # the content of a file of weights is part of the key
            (tmp_path / "own.safetensors").write_bytes(content)
            keys.append(recipe.load("voc12-cpal-baseline-clip-es", own).plan("x")[0].key)
        assert keys[0] != keys[1]
