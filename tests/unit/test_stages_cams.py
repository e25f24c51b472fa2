"""From a classifier to soft maps and seeds: batched code against one image, scale, look and class at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tag2mask.backbones import BackboneSettings
from tag2mask.baselines.cam import CAM
from tag2mask.core import Method, Objective
from tag2mask.data.augment import Augment, normalise
from tag2mask.data.images import read_mask
from tag2mask.data.maps import map_path, map_size, read_maps
from tag2mask.data.source import Samples
from tag2mask.engine import Devices, Training
from tag2mask.errors import Interrupted, UserError
from tag2mask.pipeline import Stage, write_json
from tag2mask.stages.cams import cams, multi_scale
from tag2mask.stages.classify import (
    MODEL,
    WEIGHTS,
    check_classifier,
    classify,
    load_classifier,
    save_weights,
)
from tag2mask.stages.context import Context
from tag2mask.stages.labels import Background, labels, mask_path

BACKBONE = {"name": "test_resnet", "weights": None, "output_stride": 16, "freeze_norm": None}
NET = {"name": "cam", "backbone": BACKBONE, "dropout": 0.0}


def classifier(classes=3, methods=None):
    torch.manual_seed(1)
    net = CAM(classes, backbone=BackboneSettings(**BACKBONE))
    return Objective(net, methods, num_classes=classes).eval()


def loop_maps(objective, image, tags, scales, flip):
    """Maps [P h w] in float32 and logits [K] of one image [3 H W] with tags [K]."""
    height, width = image.shape[1:]
    target = -(-height // 4), -(-width // 4)
    own = []
    for k in tags.nonzero().flatten().tolist():
        total = torch.zeros(target)
        for scale in scales:
            size = max(32, round(height * scale)), max(32, round(width * scale))
            scaled = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)
            looks = [objective.infer(scaled, tags[None].float())[0][0, k].clamp(min=0)]
            if flip:
                mirrored = objective.infer(torch.flip(scaled, [3]), tags[None].float())[0][0, k]
                looks.append(torch.flip(mirrored, [1]).clamp(min=0))
            mean = sum(looks) / len(looks)
            total += F.interpolate(mean[None, None], size=target, mode="bilinear", align_corners=False)[0, 0]
        own.append(total / (total.max() + 1e-5))
    scale = sorted(scales, key=lambda s: abs(s - 1))[0]
    size = max(32, round(height * scale)), max(32, round(width * scale))
    scaled = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)
    scores = [objective.infer(x, tags[None].float())[1][0] for x in ([scaled, scaled.flip(3)] if flip else [scaled])]
    return (torch.stack(own) if own else torch.zeros(0, *target)), sum(scores) / len(scores)


class Doubling(Method):
    """Exports a map of its own that depends on the tags."""

    def cams(self, out, tags):
        return (out.cams + 0.1 * tags.sum(dim=1)[:, None, None, None]) * tags[:, :, None, None]


class TestMultiScale:
    def compare(self, objective, size, tags, scales, flip):
        tags = torch.tensor(tags, dtype=torch.uint8)
        images = torch.randn(len(tags), 3, *size, generator=torch.Generator().manual_seed(0))
        maps, logits = multi_scale(objective, images, tags, scales=scales, flip=flip)
        assert len(maps) == len(tags)
        for image, own_tags, own, scores in zip(images, tags, maps, logits, strict=True):
            expected, expected_scores = loop_maps(objective, image, own_tags, scales, flip)
            assert own.dtype == torch.float16
            assert own.shape == (int(own_tags.sum()), *map_size(size))
            assert torch.allclose(own.float(), expected, atol=2e-3)
            assert own.min() >= 0 if own.numel() else True
            assert own.max() <= 1 if own.numel() else True
            assert torch.allclose(scores, expected_scores, atol=1e-4)

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.5), (0.75, 1.5), (2.0, 1.0)])
    def test_against_a_loop(self, scales, flip):
        self.compare(classifier(), (48, 64), [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]], scales, flip)

    @pytest.mark.parametrize("size", [(1, 1), (1, 37), (41, 1), (13, 97), (31, 33)])
    def test_images_of_any_size(self, size):
        self.compare(classifier(), size, [[1, 1, 0], [0, 0, 1]], (0.5, 1.0), True)

    def test_one_image_of_one_class(self):
        self.compare(classifier(1), (40, 40), [[1]], (1.0, 1.5), True)

    def test_nobody_is_tagged(self):
        self.compare(classifier(), (40, 40), [[0, 0, 0], [0, 0, 0]], (1.0,), True)

    def test_the_map_of_a_method(self):
        self.compare(classifier(3, {"m": Doubling()}), (40, 48), [[1, 0, 1], [0, 1, 0]], (0.5, 1.0), True)

    def test_a_map_that_is_nowhere_positive_is_zero(self):
        objective = classifier()
        with torch.no_grad():
            objective.net.classifier.weight.zero_()
        maps, logits = multi_scale(
            objective, torch.randn(1, 3, 40, 40), torch.tensor([[1, 0, 1]]), scales=(1.0,), flip=True
        )
        assert maps[0].shape == (2, 10, 10)
        assert maps[0].eq(0).all()
        assert logits.eq(0).all()

    def test_a_mirror_image_has_the_mirrored_map(self):
        images, tags = torch.randn(1, 3, 48, 48), torch.tensor([[1, 1, 0]])
        plain, mirrored = (
            multi_scale(classifier(), x, tags, scales=(0.5, 1.0), flip=True)[0][0] for x in (images, images.flip(-1))
        )
        assert torch.allclose(plain.float(), mirrored.flip(-1).float(), atol=2e-3)

    def test_keeps_no_graph(self):
        _, logits = multi_scale(
            classifier(), torch.randn(1, 3, 40, 40), torch.tensor([[1, 0, 0]]), scales=(1.0,), flip=False
        )
        assert not logits.requires_grad


SIZES = [(40, 48), (33, 20), (40, 48), (1, 9), (40, 48), (33, 20)]
TAGS = np.array([[1, 0], [1, 1], [0, 0], [0, 1], [1, 0], [0, 0]], np.uint8)


class Source:
    """Six noisy images of three sizes, two classes, one untagged image."""

    classes, fingerprint = ("a", "b"), "f"

    def __init__(self):
        self.read = []

    def image(self, index):
        self.read.append(index)
        return np.random.default_rng(index).integers(0, 256, (*SIZES[index], 3), dtype=np.uint8)

    def split(self, name):
        return Samples([f"sub/{i}" for i in range(len(SIZES))], TAGS, self.image)


@pytest.fixture(scope="module")
def devices():
    return Devices("cpu")


@pytest.fixture
def trained(tmp_path):
    folder = tmp_path / "classify"
    folder.mkdir()
    save_weights(classifier(2), folder / WEIGHTS)
    write_json(folder / MODEL, {"net": NET, "methods": {}, "classes": ["a", "b"], "bf16": False})
    return folder


def context(out, devices, source=None, workers=0):
    out.mkdir(exist_ok=True)
    return Context(out, source or Source(), devices, workers=workers, save_every=2)


class TestStage:
    def test_writes_the_maps_of_every_image(self, tmp_path, devices, trained):
        cams(context(tmp_path / "cams", devices), of=trained, scales=(0.5, 1.0), flip=True, batch=2)
        source, objective = Source(), load_classifier(trained)
        for index, size in enumerate(SIZES):
            found = read_maps(map_path(tmp_path / "cams", f"sub/{index}"))
            assert found.size == size
            assert found.classes.tolist() == np.flatnonzero(TAGS[index]).tolist()
            image = normalise(torch.from_numpy(source.image(index)).permute(2, 0, 1))
            maps, logits = loop_maps(objective, image, torch.from_numpy(TAGS[index]), (0.5, 1.0), True)
            assert np.allclose(found.maps, maps.numpy(), atol=2e-3)
            assert np.allclose(found.logits, logits.numpy(), atol=1e-4)

    def test_a_killed_run_goes_on_bit_identically(self, tmp_path, devices, trained):
        def run(name, source=None, **more):
            cams(context(tmp_path / name, devices, source, **more), of=trained, scales=(1.0,), batch=2)

        def bytes_of(name):
            return [map_path(tmp_path / name, f"sub/{i}").read_bytes() for i in range(len(SIZES))]

        run("whole")
        run("helped", workers=3)
        assert bytes_of("helped") == bytes_of("whole")

        class Dying(Source):
            def image(self, index):
                if index == 4:
                    raise Interrupted(75)
                return super().image(index)

        with pytest.raises(Interrupted):
            run("killed", Dying())
        assert 0 < sum(map_path(tmp_path / "killed", f"sub/{i}").exists() for i in range(len(SIZES))) < len(SIZES)
        run("killed")
        assert bytes_of("killed") == bytes_of("whole")
        map_path(tmp_path / "killed", "sub/1").unlink()  # one of a batch of two
        run("killed")
        assert bytes_of("killed") == bytes_of("whole")

    def test_what_is_finished_is_not_even_read(self, tmp_path, devices, trained):
        first, second = Source(), Source()
        for source in (first, second):
            cams(context(tmp_path / "cams", devices, source), of=trained, scales=(1.0,))
        assert sorted(first.read) == list(range(len(SIZES)))
        assert second.read == []

    @pytest.mark.parametrize("background", [Background(score=0.4), Background(alpha=4.0)])
    def test_seeds(self, tmp_path, devices, trained, background):
        cams(context(tmp_path / "cams", devices), of=trained, scales=(1.0,))
        labels(context(tmp_path / "labels", devices), of=tmp_path / "cams", background=background)
        for index, size in enumerate(SIZES):
            mask = read_mask(mask_path(tmp_path / "labels", f"sub/{index}"), 2)
            stored = read_maps(map_path(tmp_path / "cams", f"sub/{index}"))
            maps = stored.full().numpy()
            assert mask.shape == size
            best = maps.max(axis=0) if len(maps) else np.zeros(size, np.float32)
            score = background.score if background.score is not None else (1 - best) ** 4
            classes = stored.classes[maps.argmax(axis=0)] + 1 if len(maps) else np.zeros(size)
            expected = np.where(best > score, classes, 0)
            sure = np.abs(best - score) > 1e-5
            assert np.array_equal(mask[sure], expected[sure])
        assert set(np.unique(mask)) == {0}  # the last image is untagged

    @pytest.mark.parametrize(
        ("faulty", "message"),
        [
            ({}, "give either"),
            ({"score": 0.3, "alpha": 4.0}, "give either"),
            ({"score": 1.0}, r"score 1\.0 is not in 0\.\.1"),
            ({"score": -0.1}, "score"),
            ({"alpha": 0.0}, "alpha 0.0 is not positive"),
        ],
    )
    def test_faults_of_the_background(self, faulty, message):
        with pytest.raises(UserError, match=message):
            Background(**faulty)


class TestClassify:
    SETTINGS = {  # noqa: RUF012
        "net": NET,
        "train": Training(steps=4, batch=2, lr=0.01),
        "augment": Augment(crop=32, long=(32, 40)),
    }

    def test_trains_stores_and_reads(self, tmp_path, devices):
        out = tmp_path / "classify"
        classify(context(out, devices), **self.SETTINGS)
        assert sorted(p.name for p in out.iterdir()) == [MODEL, WEIGHTS, "train.jsonl"]
        model = load_classifier(out)
        assert not model.training
        logits = model.look(torch.randn(1, 3, 32, 32)).logits
        assert logits.shape == (1, 2)
        assert torch.isfinite(logits).all()

    def test_a_killed_run_ends_bit_identically(self, tmp_path, devices):
        classify(context(tmp_path / "whole", devices), **self.SETTINGS)

        class Dying(Source):
            def image(self, index):
                if len(self.read) == 6:  # in step 3, after the checkpoint of step 2
                    raise MemoryError
                return super().image(index)

        with pytest.raises(MemoryError):
            classify(context(tmp_path / "killed", devices, Dying()), **self.SETTINGS)
        assert not (tmp_path / "killed" / WEIGHTS).exists()
        resumed = Source()
        classify(context(tmp_path / "killed", devices, resumed), **self.SETTINGS)
        assert len(resumed.read) == 4
        assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()

    def test_a_finished_training_is_left_alone(self, tmp_path, devices):
        classify(context(tmp_path / "classify", devices), **self.SETTINGS)
        again = Source()
        classify(context(tmp_path / "classify", devices, again), **self.SETTINGS)
        assert again.read == []

    def test_the_preflight(self):
        def check(net):
            settings = {"net": net, "methods": {}, "bf16": False}
            check_classifier(Source(), Stage("classify", "classify", 1, settings, {}, "data"))

        check(NET)
        with pytest.raises(UserError, match="timm has no model"):
            check(NET | {"backbone": BACKBONE | {"name": "test_resent"}})
        with pytest.raises(UserError, match=r"^net: eps needs saliency maps; give data\.saliency"):
            check({"name": "eps", "backbone": BACKBONE})
