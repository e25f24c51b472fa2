"""Few true masks: which images they are of, what is trained on them, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tag2mask import schema
from tag2mask.data.scenes import Scenes
from tag2mask.engine import Devices
from tag2mask.errors import UserError
from tag2mask.pipeline import Stage
from tag2mask.stages import STAGES, Context
from tag2mask.stages.few_masks import check_few_masks, chosen, few_masks
from tag2mask.stages.segment import load_segmenter

SETTINGS = {
    "count": 3,
    "net": {"name": "deeplab", "backbone": {"name": "test_resnet", "weights": None, "output_stride": 16}, "width": 8},
    "train": {"epochs": 2, "batch": 4, "lr": 0.001},
    "augment": {"crop": 32, "long": [32, 48]},
}


class TestChosen:
    @pytest.mark.parametrize("seed", range(5))
    def test_each_time_the_class_with_the_fewest(self, seed):
        tags = (np.random.default_rng(seed).random((20, 4)) < 0.25).astype(np.uint8)
        found = chosen(tags, 20, seed)
        assert sorted(found) == list(range(20))
        assert [chosen(tags, n, seed) for n in (1, 7, 30)] == [found[:1], found[:7], found]
        for place in range(20):
            had = tags[found[:place]].sum(axis=0)
            left = tags[found[place:]].sum(axis=0)
            if left.any():
                wanted = min((had[k], k) for k in range(4) if left[k])[1]
                assert tags[found[place], wanted]
            else:
                assert not tags[found[place]].any()

    def test_other_seeds_are_other_images(self):
        tags = np.ones((30, 1), np.uint8)
        assert chosen(tags, 5, 0) != chosen(tags, 5, 1)
        assert chosen(np.zeros((3, 2), np.uint8), 2, 0) == np.random.default_rng(0).permutation(3)[:2].tolist()


class Watched(Scenes):
    """Remembers which true masks and which tags were looked at."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.seen = []

    def split(self, name):
        samples = super().split(name)

        def mask(index):
            self.seen.append(index)
            return samples.mask(index)

        return type(samples)(samples.names, samples.tags, samples.image, mask)


def test_it_trains_as_long_as_on_all_images_and_sees_these_masks_alone(tmp_path):
    source = Watched(images=12, test=1, size=32)
    settings = schema.check(few_masks, SETTINGS, "few")
    schema.make(few_masks, settings, ctx=Context(tmp_path, source, Devices("cpu"), workers=0, log_every=1))
    assert set(source.seen) == set(chosen(source.split("score").tags, 3, 0))
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 6  # two passes over the twelve train images, four at a time
    found = load_segmenter(tmp_path)
    assert found.classes == source.classes and found.scales == (0.75, 1.0, 1.25)
    assert {path.name for path in tmp_path.iterdir()} == {"model.json", "model.safetensors", "train.jsonl"}


def stage(**changed):
    settings = schema.check(STAGES["few_masks"].function, SETTINGS | changed, "few")
    return Stage("few", "few_masks", 1, settings, {}, "data")


def test_what_cannot_work_is_said_before_anything_runs():
    source = Scenes(images=8, test=1, size=32)
    check_few_masks(source, stage(count=8))
    with pytest.raises(UserError, match="count: 9, but the score split has 8"):
        check_few_masks(source, stage(count=9))

    class Blind(Scenes):
        def split(self, name):
            samples = super().split(name)
            return type(samples)(samples.names, samples.tags, samples.image)

    with pytest.raises(UserError, match="needs true masks"):
        check_few_masks(Blind(images=8, test=1, size=32), stage())

    class Leaky(Scenes):
        def split(self, name):
            return super().split("train")

    with pytest.raises(UserError, match="tested on"):
        check_few_masks(Leaky(images=8, test=1, size=32), stage())
