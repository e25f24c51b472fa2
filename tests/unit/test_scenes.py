"""The built-in scenes: exact tags and masks, determinism, and that each knob does what it says."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import tag2mask
from tag2mask.data.scene_drawing import OWN_GROUND, draw
from tag2mask.data.scene_figures import CLASSES
from tag2mask.data.scenes import Scenes
from tag2mask.errors import UserError

PLAIN = {"part": 0.0, "context": 0.0, "variety": 0.0, "alike": 0.0}


@cache
def scenes(count, **knobs):
    """The first `count` training scenes at 64 pixels, all knobs 0 but those given."""
    setup = Scenes(size=64, **(PLAIN | knobs)).setup
    return [draw.__wrapped__(setup, "train", k) for k in range(count)]


def patches(drawn, cue):
    """Mean colour of each class's cue or body in each scene where enough of it shows: [n 3] and classes [n]."""
    colours, labels = [], []
    for scene in drawn:
        for k in range(1, len(CLASSES) + 1):
            pixels = scene.image[(scene.mask == k) & (scene.cue == cue)]
            if len(pixels) >= 40:
                colours.append(pixels.mean(axis=0) / 255.0)
                labels.append(k)
    return np.array(colours), np.array(labels)


def nearest_mean_accuracy(colours, labels):
    """How often the class is told by the nearest class mean of colour, each patch left out of its own mean."""
    right = 0
    for k in range(len(labels)):
        rest = np.arange(len(labels)) != k
        means = [colours[rest & (labels == c)].mean(axis=0) for c in np.unique(labels)]
        right += np.unique(labels)[np.argmin([np.sum((colours[k] - m) ** 2) for m in means])] == labels[k]
    return right / len(labels)


def test_masks_and_tags_agree_exactly():
    source = Scenes(images=40, test=12, size=64, seed=5)
    for name in ("train", "score", "test"):
        samples = source.split(name)
        assert samples.has_masks
        assert samples.tags.shape == (len(samples), 5) and samples.tags.dtype == np.uint8
        assert len(set(samples.names)) == len(samples)
        for k in range(len(samples)):
            values = set(np.unique(samples.mask(k)).tolist())
            assert values <= set(range(6))
            assert {c + 1 for c in np.flatnonzero(samples.tags[k])} == values - {0}


def test_every_tagged_class_shows_enough():
    for scene in scenes(40, part=0.6, context=0.6, variety=0.5, alike=0.5):
        for k in set(np.unique(scene.mask).tolist()) - {0}:
            assert (scene.mask == k).sum() >= 0.015 * 64 * 64


@pytest.mark.parametrize("size", [64, 112, 256])
def test_shapes_types_and_ranges(size):
    samples = Scenes(images=8, test=1, size=size).split("train")
    image, mask, saliency = samples.image(3), samples.mask(3), samples.side["saliency"](3)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
    assert mask.shape == (size, size) and mask.dtype == np.uint8
    assert saliency.shape == (size, size) and saliency.dtype == np.float32
    assert saliency.min() >= 0.0 and saliency.max() <= 1.0


def test_the_same_scene_at_another_size():
    """Layout and looks do not depend on the size: masks agree when one is brought to the size of the other."""
    small, large = (Scenes(images=20, test=1, size=size).split("train") for size in (64, 128))
    same = [np.mean(small.mask(k) == large.mask(k)[::2, ::2]) for k in range(20)]
    assert np.mean(same) > 0.97


def test_deterministic_and_free_of_state():
    first, second = Scenes(images=8, test=8, size=64), Scenes(images=30, test=9, size=64)
    for name in ("train", "test"):
        a = [draw.__wrapped__(first.setup, name, k) for k in range(8)]
        np.random.seed(1)
        b = [draw.__wrapped__(second.setup, name, k) for k in reversed(range(8))][::-1]
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x.image, y.image)
            np.testing.assert_array_equal(x.mask, y.mask)
            np.testing.assert_array_equal(x.saliency, y.saliency)


def test_same_bytes_in_a_fresh_process():
    code = (
        "import hashlib; from tag2mask.data.scenes import Scenes; s = Scenes(images=8, test=1, size=64).split('train');"
        "print(hashlib.sha256(s.image(1).tobytes() + s.mask(1).tobytes()).hexdigest())"
    )
    package = str(Path(tag2mask.__path__[0]).parent)
    fresh = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": package},
    )
    samples = Scenes(images=8, test=1, size=64).split("train")
    here = hashlib.sha256(samples.image(1).tobytes() + samples.mask(1).tobytes()).hexdigest()
    assert fresh.stdout.strip() == here


def test_seeds_splits_and_indices_differ():
    a, b = Scenes(images=8, test=8, size=64), Scenes(images=8, test=8, size=64, seed=1)
    pictures = [s.split(name).image(k) for s in (a, b) for name in ("train", "test") for k in range(8)]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_returned_arrays_are_the_callers_own():
    samples = Scenes(images=8, test=1, size=64).split("train")
    kept = samples.image(0).copy(), samples.mask(1).copy()
    samples.image(0)[:] = 0
    samples.mask(1)[:] = 9
    np.testing.assert_array_equal(samples.image(0), kept[0])
    np.testing.assert_array_equal(samples.mask(1), kept[1])


def test_samples_survive_pickling():
    samples = Scenes(images=8, test=1, size=64).split("train")
    again = pickle.loads(pickle.dumps(samples))
    np.testing.assert_array_equal(again.image(4), samples.image(4))
    np.testing.assert_array_equal(again.side["saliency"](4), samples.side["saliency"](4))


@pytest.mark.parametrize("seed", [0, 11])
def test_class_balance(seed):
    samples = Scenes(images=100, test=1, size=64, seed=seed).split("train")
    share, per_image = samples.tags.mean(axis=0), samples.tags.sum(axis=1)
    assert (share > 0.25).all() and (share < 0.45).all()
    assert 1.5 < per_image.mean() < 1.9
    assert per_image.max() == 3
    assert 0.03 < np.mean(per_image == 0) < 0.10


def test_few_images_still_show_every_class():
    assert (Scenes(images=8, test=1, size=64).split("train").tags.sum(axis=0) > 0).all()


def test_saliency_is_a_useful_but_imperfect_foreground():
    inside, outside, missed = [], [], 0
    drawn = scenes(60, **PLAIN)
    for scene in drawn:
        foreground = scene.mask > 0
        if foreground.any():
            level = scene.saliency[foreground].mean() / 255.0
            missed += level < 0.3
            inside.append(level)
            outside.append(scene.saliency[~foreground].mean() / 255.0)
    assert np.mean(inside) > np.mean(outside) + 0.4
    assert 0 < missed < len(drawn) // 4


def test_part_takes_the_class_out_of_the_body_and_leaves_it_in_the_cue():
    accuracy = {
        (part, cue): nearest_mean_accuracy(*patches(scenes(60, part=part), cue))
        for part in (0.0, 1.0)
        for cue in (False, True)
    }
    assert accuracy[0.0, False] > 0.8  # the body tells the class
    assert accuracy[1.0, False] < 0.45  # chance is 0.2; light and ground leave some colour
    assert accuracy[1.0, True] > 0.8


def test_part_makes_the_cue_a_smaller_share():
    def share(part):
        return np.mean([scene.cue.sum() / max((scene.mask > 0).sum(), 1) for scene in scenes(60, part=part)])

    assert share(1.0) < 0.85 * share(0.0)


def association(context):
    """Share of boats, sheep and mushrooms on their own ground, and share of such grounds under other classes."""
    pairs = [pair for scene in scenes(60, context=context) for pair in scene.grounds if pair[1]]
    own = np.mean([OWN_GROUND[name] == ground for name, ground in pairs if name in OWN_GROUND])
    strange = [OWN_GROUND.get(name) != ground for name, ground in pairs if ground in OWN_GROUND.values()]
    return own, np.mean(strange)


def test_context_ties_a_ground_to_a_class():
    none, some, full = association(0.0), association(0.6), association(1.0)
    assert none[0] < 0.4 and none[1] > 0.6
    assert none[0] < some[0] < full[0] == 1.0
    assert full[1] == 0.0


def test_context_shows_in_the_pixels_beside_the_object():
    """Around boats it gets bluer: mean blue minus red of the background in images with a boat and without."""

    def blue(context):
        values = {True: [], False: []}
        for scene in scenes(60, context=context):
            pixels = scene.image[scene.mask == 0].astype(float)
            values[bool((scene.mask == CLASSES.index("boat") + 1).any())].append((pixels[:, 2] - pixels[:, 0]).mean())
        return np.mean(values[True]) - np.mean(values[False])

    assert blue(1.0) > blue(0.0) + 10.0


def test_variety_spreads_the_colours_of_a_class():
    def spread(variety):
        colours, labels = patches(scenes(60, variety=variety), True)
        return np.mean([colours[labels == k].var(axis=0).sum() for k in np.unique(labels)])

    assert spread(0.0) < spread(0.5) < spread(1.0)
    assert spread(1.0) > 2.0 * spread(0.0)


def test_alike_draws_fox_and_cat_together():
    def distance(alike, other):
        colours, labels = patches(scenes(60, alike=alike), True)
        means = [colours[labels == CLASSES.index(name) + 1].mean(axis=0) for name in ("fox", other)]
        return np.linalg.norm(means[0] - means[1])

    assert distance(1.0, "cat") < 0.5 * distance(0.0, "cat")
    assert distance(1.0, "cat") > 0.01  # a subtle cue stays
    assert distance(1.0, "boat") > 0.6 * distance(0.0, "boat")


def test_knobs_do_not_move_things():
    """A knob changes looks, not who stands where: foregrounds overlap strongly between its two ends."""
    for knob in PLAIN:
        overlap = []
        for a, b in zip(scenes(60), scenes(60, **{knob: 1.0}), strict=True):
            if (a.mask > 0).any():
                both = ((a.mask > 0) & (b.mask > 0)).sum()
                overlap.append(both / ((a.mask > 0) | (b.mask > 0)).sum())
        assert np.mean(overlap) > 0.75, knob


def test_fingerprint_names_every_argument():
    base = {"images": 9, "test": 9, "size": 64, "seed": 0, "part": 0.5, "context": 0.5, "variety": 0.5, "alike": 0.5}
    others = [Scenes(**(base | {key: 40 if value > 1 else 1})) for key, value in base.items()]
    prints = {Scenes(**base).fingerprint, *(other.fingerprint for other in others)}
    assert len(prints) == len(base) + 1
    assert Scenes(**base).fingerprint == Scenes(**base).fingerprint
    assert Scenes(part=1).fingerprint == Scenes(part=1.0).fingerprint


def test_summary_counts():
    source = Scenes(images=20, test=8, size=64)
    summary = json.loads(json.dumps(source.summary()))
    tags = source.split("train").tags
    assert summary["images"] == 28
    assert summary["splits"] == {"train": 20, "score": 20, "test": 8}
    assert [summary["classes"][name]["train"] for name in source.classes] == tags.sum(axis=0).tolist()
    assert summary["negatives"]["train"] == int((tags.sum(axis=1) == 0).sum())
    assert summary["sizes"] == [[64, 64]]
    assert source.check() is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", 31),
        ("size", 64.0),
        ("images", 7),
        ("images", True),
        ("test", 0),
        ("seed", -1),
        ("part", 1.1),
        ("context", -0.1),
        ("variety", float("nan")),
        ("alike", "0.5"),
    ],
)
def test_bad_arguments_name_the_key(key, value):
    with pytest.raises(UserError, match=rf"data\.{key}"):
        Scenes(**{key: value})
