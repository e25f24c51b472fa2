"""The background score that nobody gives: from maps alone, from a few masks, from all of them."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tag2mask import schema
from tag2mask.data.images import read_mask
from tag2mask.data.maps import Maps, map_path, map_size, read_maps, write_maps
from tag2mask.data.scenes import Scenes
from tag2mask.data.source import Samples
from tag2mask.engine import Devices
from tag2mask.errors import UserError
from tag2mask.metrics import Confusion
from tag2mask.ops.cams import to_mask
from tag2mask.ops.threshold import crossing, moments, spread_score
from tag2mask.pipeline import Stage, read_json, write_json
from tag2mask.recipe import load
from tag2mask.stages.background import TRIED, Background, check_background, chosen, evenly
from tag2mask.stages.context import Context
from tag2mask.stages.crf import crf
from tag2mask.stages.evaluate import evaluate_masks
from tag2mask.stages.labels import labels, mask_path

CLASSES, SIZE, COUNT = Scenes.classes, 48, 14


class Drawn:
    """Scenes, the last of them without tags; `lifted` maps have a high floor, as some methods make them."""

    classes, fingerprint = CLASSES, "f"
    scenes = Scenes(images=COUNT, test=1, size=SIZE).split("train")

    def __init__(self, masks=True, scored=COUNT):
        tags = self.scenes.tags.copy()
        tags[-1] = 0
        self.samples = Samples(self.scenes.names, tags, self.scenes.image, self.scenes.mask if masks else None)
        self.scored = Samples(self.scenes.names[:scored], tags[:scored], self.scenes.image, self.samples.mask)

    def split(self, name):
        return self.scored if name == "score" else self.samples


@pytest.fixture(scope="module")
def devices():
    return Devices("cpu")


@pytest.fixture(scope="module")
def cams(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cams"), floor=0.0)


@pytest.fixture(scope="module")
def lifted(tmp_path_factory):
    return write(tmp_path_factory.mktemp("lifted"), floor=0.5)


def write(folder, floor):
    """Blurred, noisy masks as maps in floor..1."""
    samples = Drawn().samples
    for index, name in enumerate(samples.names):
        draws, mask = np.random.default_rng(index), samples.mask(index)
        height, width = map_size(mask.shape)
        found = []
        for k in np.flatnonzero(samples.tags[index]):
            exact = Image.fromarray(255 * (mask == k + 1).astype(np.uint8))
            small = np.asarray(exact.resize((width // 2, height // 2), Image.Resampling.BOX)) / 255
            small = np.clip(0.8 * small + 0.3 * draws.random(small.shape), 0, 1)
            large = np.asarray(Image.fromarray(small.astype(np.float32)).resize((width, height)))
            found.append(floor + (1 - floor) * large / large.max())
        maps = np.array(found, np.float16).reshape(-1, height, width)
        classes = np.flatnonzero(samples.tags[index])
        write_maps(map_path(folder, name), Maps(classes, maps, mask.shape, np.zeros(len(CLASSES), np.float32)))
    return folder


def context(out, devices, source=None):
    out.mkdir(parents=True, exist_ok=True)
    return Context(out, source or Drawn(), devices, workers=0)


def miou(folder, indices):
    samples, total = Drawn().samples, Confusion(len(CLASSES))
    for index in indices:
        total.update(read_mask(mask_path(folder, samples.names[index]), len(CLASSES)), samples.mask(index))
    return total.scores().miou


def made_at(folder, devices, of, score, *, refine=False):
    background = Background(score=score)
    if refine:
        crf(context(folder, devices), of=of, background=background, preset="deeplab")
    else:
        labels(context(folder, devices), of=of, background=background)
    return folder


def loop_spread_score(images, spread):
    """Every pixel of every image, weighted so that all images count the same."""
    weighted = []
    for maps in images:
        pixels = [(y, x) for y in range(maps.shape[1]) for x in range(maps.shape[2])]
        weighted += [(max(float(maps[k, y, x]) for k in range(len(maps))), 1 / len(pixels)) for y, x in pixels]
    mean = sum(value * weight for value, weight in weighted) / len(images)
    variance = sum(weight * (value - mean) ** 2 for value, weight in weighted) / len(images)
    return min(0.99, mean + spread * math.sqrt(variance))


@pytest.mark.parametrize("shapes", [[(1, 5, 7)], [(3, 4, 4), (1, 2, 9)], [(2, 1, 1), (4, 1, 9), (1, 6, 2)]])
@pytest.mark.parametrize("spread", [0.0, 0.75, 2.0])
def test_score_of_maps_against_a_loop(shapes, spread):
    draws = torch.Generator().manual_seed(len(shapes))
    images = [0.8 * torch.rand(shape, generator=draws) for shape in shapes]
    assert spread_score([moments(maps) for maps in images], spread) == pytest.approx(
        loop_spread_score(images, spread), abs=1e-6
    )
    halves = [maps.half() for maps in images]
    assert spread_score([moments(maps) for maps in halves]) == pytest.approx(loop_spread_score(halves, 0.75), abs=1e-6)


def test_edges_of_the_score_of_maps():
    assert spread_score([moments(torch.zeros(2, 3, 3))]) == 0
    assert spread_score([moments(torch.full((1, 3, 3), 0.3))]) == pytest.approx(0.3)  # rounding never makes it NaN
    assert spread_score([moments(torch.ones(1, 3, 3))]) == 0.99
    with pytest.raises(ValueError, match="without tags"):
        moments(torch.zeros(0, 3, 3))
    with pytest.raises(ValueError, match="no image"):
        spread_score([])


@pytest.mark.parametrize("share", [0.02, 0.25, 0.6, 0.95])
def test_maps_that_are_masks_stay_what_they_are(share):
    """A fixed share of foreground would not leave them so."""
    maps = (torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(3)) < share).float()
    assert torch.equal(maps > spread_score([moments(maps)]), maps > 0)


@pytest.mark.parametrize("at", [0.004, 0.01, 0.3, 0.305, 0.77, 0.985, 2.0])
def test_crossing_against_a_loop(at):
    asked = []

    def falling(t):
        asked.append(t)
        return 1 - t

    first = next((n / 100 for n in range(1, 99) if 1 - n / 100 <= 1 - at), 0.99)
    assert crossing(falling, 1 - at) == first and len(asked) <= 7


def test_evenly_over_a_list():
    assert evenly([3, 5, 8], 5) == [3, 5, 8]
    assert evenly(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert evenly(list(range(7)), 3) == [0, 2, 4]


class TestAuto:
    def test_is_that_of_tagged_images(self, tmp_path, devices, cams):
        made_at(tmp_path / "auto", devices, cams, "auto")
        samples = Drawn().samples
        own = [read_maps(map_path(cams, name)).maps for name in samples.names[:-1]]
        told = chosen(tmp_path / "auto")
        assert told == {"threshold": round(loop_spread_score(own, 0.75), 2), "threshold_by": "no-mask", "looked_at": []}
        for name in samples.names:
            stored = read_maps(map_path(cams, name))
            expected = to_mask(stored.full(), torch.from_numpy(stored.classes), told["threshold"]).numpy()
            assert np.array_equal(read_mask(mask_path(tmp_path / "auto", name), len(CLASSES)), expected)

    def test_follows_maps_that_a_constant_does_not_suit(self, tmp_path, devices, cams, lifted):
        """The same maps in 0.5..1: 0.4 is foreground everywhere, the chosen score gives almost the same masks."""
        same = [miou(made_at(tmp_path / str(of == cams), devices, of, "auto"), range(COUNT)) for of in (cams, lifted)]
        constant = [miou(made_at(tmp_path / f"c{of == cams}", devices, of, 0.4), range(COUNT)) for of in (cams, lifted)]
        assert abs(same[0] - same[1]) < 0.02
        assert same[1] > constant[1] + 0.2 and same[0] > constant[0] - 0.05

    def test_after_a_crf_masks_cover_what_the_seeds_do(self, tmp_path, devices, cams):
        made_at(tmp_path / "seeds", devices, cams, "auto")
        made_at(tmp_path / "crf", devices, cams, "auto", refine=True)
        score = chosen(tmp_path / "crf")["threshold"]
        assert score != chosen(tmp_path / "seeds")["threshold"]

        def covered(folder):
            names = Drawn().samples.names[:-1]
            return np.mean([(read_mask(mask_path(folder, name), len(CLASSES)) > 0).mean() for name in names])

        target = covered(tmp_path / "seeds")
        one_less = made_at(tmp_path / "less", devices, cams, round(score - 0.01, 2), refine=True)
        assert covered(tmp_path / "crf") <= target < covered(one_less)

    def test_is_kept_through_a_kill(self, tmp_path, devices, cams):
        whole = made_at(tmp_path / "whole", devices, cams, "auto")
        (tmp_path / "killed").mkdir()
        write_json(tmp_path / "killed" / "threshold.json", chosen(whole) | {"threshold": 0.9})
        again = made_at(tmp_path / "killed", devices, cams, "auto")
        assert chosen(again)["threshold"] == 0.9
        assert miou(again, range(COUNT)) == miou(made_at(tmp_path / "told", devices, cams, 0.9), range(COUNT))

    def test_nobody_has_tags(self, tmp_path, devices, cams):
        source = Drawn()
        source.samples.tags[:] = 0
        empty = tmp_path / "empty"
        for name in source.samples.names:
            nothing = Maps(
                np.zeros(0, np.int64), np.zeros((0, 12, 12), np.float16), (SIZE, SIZE), np.zeros(5, np.float32)
            )
            write_maps(map_path(empty, name), nothing)
        for stage in (labels, crf):
            out = tmp_path / stage.__name__
            stage(context(out, devices, source), of=empty, background=Background(score="auto"))
            assert chosen(out)["threshold"] == 0.5
            assert not read_mask(mask_path(out, source.samples.names[0]), len(CLASSES)).any()

    @pytest.mark.parametrize("fault", ["missing", "not finite"])
    def test_bad_maps_are_one_line_with_their_file(self, tmp_path, devices, fault):
        cams = write(tmp_path / "cams", 0.0)
        path = map_path(cams, Drawn().samples.names[3])
        if fault == "missing":
            path.unlink()
        else:
            stored = read_maps(path)
            write_maps(path, Maps(stored.classes, stored.maps * np.float16("nan"), stored.size, stored.logits))
        with pytest.raises(UserError) as told:
            made_at(tmp_path / "out", devices, cams, "auto")
        assert str(told.value).startswith(f"{path}: ") and "\n" not in str(told.value)
        assert chosen(tmp_path / "out") is None


class TestWithMasks:
    def test_oracle_is_the_best_of_all(self, tmp_path, devices, cams):
        made_at(tmp_path / "oracle", devices, cams, "oracle")
        found = miou(tmp_path / "oracle", range(COUNT))
        rivals = [miou(made_at(tmp_path / str(t), devices, cams, t), range(COUNT)) for t in (0.2, 0.3, 0.4, 0.5, 0.6)]
        assert found >= max(rivals)
        assert chosen(tmp_path / "oracle")["threshold_by"] == "oracle"
        assert chosen(tmp_path / "oracle")["looked_at"] == list(Drawn().samples.names)

    def test_a_few_masks_are_the_best_on_these(self, tmp_path, devices, cams):
        made_at(tmp_path / "few", devices, cams, "val-masks n=4")
        told, held = chosen(tmp_path / "few"), evenly(list(range(COUNT - 1)), 4)
        assert told["looked_at"] == [Drawn().samples.names[index] for index in held]
        tried = {t: miou(made_at(tmp_path / str(t), devices, cams, t), held) for t in (0.25, 0.35, 0.45, 0.55)}
        assert miou(tmp_path / "few", held) >= max(tried.values())

    def test_refined_masks_against_a_loop(self, tmp_path, devices, cams):
        made_at(tmp_path / "few", devices, cams, "val-masks n=2", refine=True)
        held = evenly(list(range(COUNT - 1)), 2)
        every = [miou(made_at(tmp_path / str(t), devices, cams, t, refine=True), held) for t in TRIED]
        assert chosen(tmp_path / "few")["threshold"] == TRIED[int(np.argmax(every))]

    def test_results_say_how_and_leave_out_what_was_looked_at(self, tmp_path, devices, cams):
        expected = {
            "auto": ("no-mask", range(COUNT)),
            "val-masks n=4": ("val-masks n=4", sorted({*range(COUNT)} - {*evenly(list(range(COUNT - 1)), 4)})),
            "oracle": ("oracle", range(COUNT)),
        }
        for score, (by, kept) in expected.items():
            made = made_at(tmp_path / score, devices, cams, score)
            out = context(tmp_path / f"{score} scored", devices)
            evaluate_masks(out, of=made)
            result = read_json(out.out / "result.json")
            assert (result["threshold_by"], result["threshold"]) == (by, chosen(made)["threshold"])
            assert result["images"] == len(kept) and result["miou"] == pytest.approx(miou(made, kept))

    def test_where_no_image_is_left_it_is_an_oracle(self, tmp_path, devices, cams):
        few = Drawn(scored=3)
        labels(context(tmp_path / "made", devices, few), of=cams, background=Background(score="val-masks n=3"))
        evaluate_masks(context(tmp_path / "scored", devices, few), of=tmp_path / "made")
        result = read_json(tmp_path / "scored" / "result.json")
        assert (result["threshold_by"], result["images"]) == ("oracle", 3)

    def test_without_truth_the_choice_is_told_too(self, tmp_path, devices, cams):
        blind = Drawn(masks=False)
        labels(context(tmp_path / "made", devices, blind), of=cams, background=Background(score="auto"))
        evaluate_masks(context(tmp_path / "scored", devices, blind), of=tmp_path / "made")
        result = json.loads((tmp_path / "scored" / "result.json").read_text())
        assert result["threshold_by"] == "no-mask" and "miou" not in result and result["images"] == COUNT


@pytest.mark.parametrize(
    ("source", "score", "told"),
    [
        (Drawn(masks=False), "oracle", "oracle needs true masks of the score split; give data.masks, or score: auto"),
        (Drawn(masks=False), "val-masks n=3", "val-masks n=3 needs true masks"),
        (Drawn(), "val-masks n=14", "has 13 tagged images; ask for fewer"),
    ],
)
def test_faults_are_seen_before_any_stage(source, score, told):
    settings = {"background": {"score": score, "alpha": None}}
    with pytest.raises(UserError, match=told) as fault:
        check_background(source, Stage("masks", "labels", 1, settings, {}, "f"))
    assert "\n" not in str(fault.value)


def test_what_needs_no_look_at_the_data():
    for score in ("auto", 0.3, None):
        settings = {"background": {"score": score, "alpha": None if score else 4}}
        check_background(Drawn(masks=False), Stage("masks", "labels", 1, settings, {}, "f"))


@pytest.mark.parametrize("word", ["automatic", "val-masks", "val-masks n=0", "val-masks n=-2", "best", ""])
def test_words_that_are_none(word):
    with pytest.raises(UserError, match=r"masks\.background: .*neither a number nor auto, val-masks n=20 or oracle"):
        load("demo", [f"masks.background={json.dumps({'score': word})}"])


@pytest.mark.parametrize("score", [0.25, 0, "auto", "oracle", "val-masks n=20"])
def test_scores_of_a_recipe(score):
    found = load("demo", [f"masks.background={json.dumps({'score': score})}"]).stages["masks"]["background"]
    assert found == {"score": score, "alpha": None}
    assert schema.make(Background, found) == Background(score=score)
