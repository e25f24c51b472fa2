"""The CRF stage on built-in scenes whose maps are blurred, noisy masks: against one image at a time, killed, faulty."""

from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

from tag2mask.data.folder import Folder
from tag2mask.data.images import read_mask
from tag2mask.data.maps import Maps, map_path, map_size, read_maps, write_maps
from tag2mask.data.scenes import Scenes
from tag2mask.engine import Devices
from tag2mask.errors import Interrupted, UserError
from tag2mask.export import write_mask
from tag2mask.metrics import Confusion
from tag2mask.ops.cams import to_mask
from tag2mask.recipe import load
from tag2mask.refine.crf import PRESETS, Bilateral, DenseCRF, Gaussian
from tag2mask.stages.context import Context
from tag2mask.stages.crf import crf
from tag2mask.stages.labels import Background, labels, mask_path

CLASSES = Scenes.classes
module = import_module("tag2mask.stages.crf")  # the package has a function of that name


def blurred(mask, classes, index):
    """Maps as a network might give them: at a quarter of the size, smooth, noisy, up to 1."""
    size = map_size(mask.shape)
    draws = np.random.default_rng(index)
    found = []
    for k in classes:
        exact = Image.fromarray(255 * (mask == k + 1).astype(np.uint8))
        small = np.asarray(exact.resize((size[1] // 3, size[0] // 3), Image.Resampling.BOX)) / 255
        small = np.clip(0.7 * small + 0.35 * draws.random(small.shape), 0, 1).astype(np.float32)
        large = Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BILINEAR)
        found.append(np.asarray(large) / max(small.max(), 1e-5))
    return np.array(found, np.float16).reshape(len(classes), *size)


class Cropped:
    """Scenes of two sizes; says what was read, and stops the run when that is `after` images."""

    classes, fingerprint = CLASSES, "f"

    def __init__(self, after=None):
        self.scenes = Scenes(images=12, test=1, size=72).split("train")
        self.read, self.after = [], after

    def image(self, index):
        if len(self.read) == self.after:
            raise Interrupted(75)
        self.read.append(index)
        return self.scenes.image(index)[: 60 if index % 3 else 72]

    def mask(self, index):
        return self.scenes.mask(index)[: 60 if index % 3 else 72]

    def split(self, name):
        tags = self.scenes.tags.copy()
        tags[4] = 0
        return type(self.scenes)(self.scenes.names, tags, self.image, self.mask)


@pytest.fixture(scope="module")
def devices():
    return Devices("cpu")


@pytest.fixture
def cams(tmp_path):
    """The folder of a cams stage."""
    samples = Cropped().split("train")
    for index, name in enumerate(samples.names):
        mask, classes = samples.mask(index), np.flatnonzero(samples.tags[index])
        logits = np.zeros(len(CLASSES), np.float32)
        write_maps(map_path(tmp_path / "cams", name), Maps(classes, blurred(mask, classes, index), mask.shape, logits))
    return tmp_path / "cams"


def context(out, devices, source=None, workers=2):
    return Context(out, source or Cropped(), devices, workers=workers)


def masks(folder, source=None):
    samples = (source or Cropped()).split("train")
    return [read_mask(mask_path(folder, name), len(CLASSES)) for name in samples.names]


def miou(found):
    samples, total = Cropped().split("train"), Confusion(len(CLASSES))
    for index, mask in enumerate(found):
        total.update(mask, samples.mask(index))
    return total.scores().miou


def one_by_one(cams, background, kernels, unary, *, gt_prob=0.7, steps=10, sure=0.0):
    samples, found = Cropped().split("train"), []
    for index, name in enumerate(samples.names):
        stored = read_maps(map_path(cams, name))
        maps = stored.full()
        image = samples.image(index)
        if len(maps) == 0:
            found.append(np.zeros(image.shape[:2], np.uint8))
            continue
        score = torch.as_tensor(background(maps)).expand(maps.shape[1:])
        run = DenseCRF(image, **kernels, backend="torch")
        if unary == "scores":
            marginals = run(torch.cat([score[None], maps]).numpy(), steps=steps)
        else:
            seeds = to_mask(maps, torch.arange(len(maps)), score).numpy()
            marginals = run.from_labels(seeds, len(maps) + 1, gt_prob=gt_prob, steps=steps)
        mask = np.array([0, *(stored.classes + 1)], np.uint8)[marginals.argmax(axis=0)]
        mask[marginals.max(axis=0) < sure] = 255
        found.append(mask)
    return found


def almost_equal(one, two):
    same = np.concatenate([(a == b).flatten() for a, b in zip(one, two, strict=True)])
    return same.mean() > 0.9995


@pytest.mark.parametrize(
    ("settings", "kernels", "unary", "options"),
    [
        ({}, PRESETS["psa"], "scores", {}),
        ({"preset": "irn"}, PRESETS["irn"], "labels", {}),
        ({"preset": "irn", "unary": "scores"}, PRESETS["irn"], "scores", {}),
        ({"preset": "deeplab", "steps": 3}, PRESETS["deeplab"], "scores", {"steps": 3}),
        (
            {"unary": "labels", "gt_prob": 0.6, "gaussian": (2.0, 1.0), "bilateral": (30.0, 8.0, 5.0)},
            {"gaussian": Gaussian(2, 1), "bilateral": Bilateral(30, 8, 5)}, "labels", {"gt_prob": 0.6},
        ),
        ({"sure": 0.95, "preset": "deeplab"}, PRESETS["deeplab"], "scores", {"sure": 0.95}),
    ],
)  # fmt: skip
def test_presets_and_settings(tmp_path, devices, cams, settings, kernels, unary, options):
    background = Background(score=0.4)
    crf(context(tmp_path / "crf", devices), of=cams, background=background, **settings)
    assert almost_equal(masks(tmp_path / "crf"), one_by_one(cams, background, kernels, unary, **options))


def test_masks_are_better_than_seeds_and_hold_tagged_classes_only(tmp_path, devices, cams):
    background = Background(score=0.4)
    labels(context(tmp_path / "labels", devices), of=cams, background=background)
    crf(context(tmp_path / "crf", devices), of=cams, background=background, preset="deeplab")
    found, samples = masks(tmp_path / "crf"), Cropped().split("train")
    assert miou(found) > miou(masks(tmp_path / "labels")) + 0.05
    for mask, tags in zip(found, samples.tags, strict=True):
        assert set(np.unique(mask)) <= {0, *(np.flatnonzero(tags) + 1)}
    assert not found[4].any()
    crf(context(tmp_path / "power", devices), of=cams, background=Background(alpha=2.0))
    assert almost_equal(
        masks(tmp_path / "power"), one_by_one(cams, Background(alpha=2.0), PRESETS["psa"], "scores")
    )  # fmt: skip


def test_pixels_that_are_not_sure_are_255_and_the_others_what_they_were(tmp_path, devices, cams):
    background, samples = Background(score=0.4), Cropped().split("train")
    crf(context(tmp_path / "all", devices), of=cams, background=background)
    crf(context(tmp_path / "sure", devices), of=cams, background=background, sure=0.95)
    found, whole = masks(tmp_path / "sure"), masks(tmp_path / "all")
    left_out = np.concatenate([(mask == 255).flatten() for mask in found])
    assert 0.01 < left_out.mean() < 0.9 and not (found[4] == 255).any()
    assert all(np.array_equal(mask[mask != 255], full[mask != 255]) for mask, full in zip(found, whole, strict=True))
    refine = module.Refinement(background, "scores", 0.7, 10, PRESETS["psa"], 0.95)
    given = context(tmp_path / "batches", devices), cams, refine, samples, range(12)
    batches = dict(module._on_device(*given, frozenset(range(12)), 3))
    assert almost_equal([batches[index] for index in range(12)], found)


def test_a_killed_run_goes_on_where_it_was(tmp_path, devices, cams):
    background = Background(score=0.4)
    crf(context(tmp_path / "whole", devices), of=cams, background=background)
    with pytest.raises(Interrupted):
        crf(context(tmp_path / "killed", devices, Cropped(after=7)), of=cams, background=background)
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.png")}
    assert 0 < len(there) < 12
    again = Cropped()
    crf(context(tmp_path / "killed", devices, again, workers=0), of=cams, background=background)
    assert len(again.read) == 12 - len(there)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    for one, two in zip(masks(tmp_path / "whole"), masks(tmp_path / "killed"), strict=True):
        assert np.array_equal(one, two)
    last = Cropped()
    crf(context(tmp_path / "killed", devices, last), of=cams, background=background)
    assert last.read == []


def test_what_a_gpu_does_in_batches(tmp_path, devices, cams):
    background, samples = Background(score=0.4), Cropped().split("train")
    refine = module.Refinement(background, "scores", 0.7, 10, PRESETS["psa"])
    given = context(tmp_path / "batches", devices), cams, refine, samples, range(12)
    whole = dict(module._on_device(*given, frozenset(range(12)), 3))
    assert sorted(whole) == list(range(12))
    crf(context(tmp_path / "cores", devices), of=cams, background=background)
    assert almost_equal([whole[index] for index in range(12)], masks(tmp_path / "cores"))
    again = dict(module._on_device(*given, frozenset({1, 7, 8}), 3))  # single ones of several batches
    assert sorted(again) == [1, 7, 8] and all(np.array_equal(again[index], whole[index]) for index in again)


def test_the_bar_starts_after_the_compilation(tmp_path, devices, cams, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(module, "compile_for", lambda counts: seen.append((max(counts), capsys.readouterr().err)))
    crf(context(tmp_path / "crf", devices), of=cams, background=Background(score=0.4))
    assert seen == [(1 + Cropped().split("train").tags.sum(axis=1).max(), "")]
    assert capsys.readouterr().err.startswith("crf: 0/12\n")


def test_threads_of_torch_are_given_back(tmp_path, devices, cams):
    torch.set_num_threads(2)
    try:
        crf(context(tmp_path / "crf", devices), of=cams, background=Background(score=0.4))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def edit(cams, name, **changes):
    stored = read_maps(map_path(cams, name))
    fields = {"classes": stored.classes, "maps": stored.maps, "size": stored.size, "logits": stored.logits}
    write_maps(map_path(cams, name), Maps(**fields | changes))


@pytest.mark.parametrize("fault", ["no maps", "damaged maps", "another size", "not finite"])
def test_bad_maps_are_one_line_with_their_file(tmp_path, devices, cams, fault):
    name = Cropped().split("train").names[5]
    if fault == "no maps":
        map_path(cams, name).unlink()
    elif fault == "damaged maps":
        map_path(cams, name).write_bytes(b"PK nothing")
    elif fault == "another size":
        edit(cams, name, size=(72, 71))
    else:
        edit(cams, name, maps=np.full((1, 15, 18), np.nan, np.float16), classes=np.array([0]))
    with pytest.raises(UserError) as told:
        crf(context(tmp_path / "crf", devices), of=cams, background=Background(score=0.4))
    assert str(told.value).startswith(f"{map_path(cams, name)}: ") and "\n" not in str(told.value)


def test_maps_without_their_image_are_one_line(tmp_path, devices):
    """An image that disappeared between the stages."""
    rows = ["image,fox,cat"]
    for index in range(4):
        write_mask(tmp_path / f"images/{index}.png", np.full((40, 40), index, np.uint8))
        rows.append(f"{index},{index % 2},{(index + 1) % 2}")
        stored = Maps(np.array([0]), np.ones((1, 10, 10), np.float16), (40, 40), np.zeros(2, np.float32))
        write_maps(map_path(tmp_path / "cams", str(index)), stored)
    (tmp_path / "tags.csv").write_text("\n".join(rows))
    source = Folder(images=str(tmp_path / "images"), tags=str(tmp_path / "tags.csv"))
    source.split("train")
    (tmp_path / "images/1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png: cannot be opened") as told:
        crf(Context(tmp_path / "crf", source, devices), of=tmp_path / "cams", background=Background(score=0.4))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("masks.preset=vgg", "masks.preset"),
        ("masks.steps=-1", "masks.steps"),
        ("masks.gt_prob=1", "masks.gt_prob"),
        ("masks.gaussian=[3]", "masks.gaussian"),
        ("masks.bilateral=[80, 0, 10]", "masks.bilateral"),
        ("masks.background={}", "masks.background"),
        ("masks.compat=3", "masks.compat: unknown"),
        ("masks.of=classify", "classify is a classify stage"),
    ],
)
def test_faults_of_a_recipe(override, word):
    with pytest.raises(UserError, match=word):
        load("demo", [override])


def test_a_recipe_may_say_it_all():
    settings = ["masks.gaussian=[3, 3]", "masks.bilateral=[50, 5, 10]", "masks.unary=labels", "masks.steps=5"]
    loaded = load("demo", settings).stages["masks"]
    assert loaded["do"] == "crf" and tuple(loaded["bilateral"]) == (50, 5, 10) and loaded["preset"] == "deeplab"
