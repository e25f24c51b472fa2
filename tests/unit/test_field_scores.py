"""Evaluation as the field does it, against its own way of counting: one class and one threshold at a time."""

import json

import numpy as np
import PIL.Image
import pytest
from miniature import draw_voc

from tag2mask import tables
from tag2mask.data.index_png import write_mask
from tag2mask.data.maps import Maps, map_path, map_size, read_maps, write_maps
from tag2mask.data.voc12 import CLASSES, Voc12
from tag2mask.engine import Devices
from tag2mask.errors import UserError
from tag2mask.metrics import Confusion, ThresholdCurve
from tag2mask.report.results import class_table
from tag2mask.report.summary import RunSummary
from tag2mask.report.words import how_chosen
from tag2mask.stages.context import Context
from tag2mask.stages.evaluate import RESULT, Sweep, evaluate_maps, evaluate_masks
from tag2mask.stages.labels import mask_path


def field_ious(predictions, truths, num_classes):
    """IoU of background and each class, from the three counters of the field: TP, P and T; absent classes get 0."""
    tp, p, t = (np.zeros(num_classes + 1) for _ in range(3))
    for prediction, truth in zip(predictions, truths, strict=True):
        counted = truth < 255
        for c in range(num_classes + 1):
            p[c] += ((prediction == c) & counted).sum()
            t[c] += ((truth == c) & counted).sum()
            tp[c] += ((truth == c) & (prediction == truth) & counted).sum()
    return tp / (t + p - tp + 1e-10)


def field_seed(maps, classes, num_classes, threshold):
    """argmax over [background score, maps of the tagged classes, zeros of the others]; the first of equal ones wins."""
    stack = np.zeros((num_classes + 1, *maps.shape[1:]), np.float32)
    stack[0] = threshold
    for c, own in zip(classes, maps, strict=True):
        stack[c + 1] = own
    return stack.argmax(axis=0)


def random_truth(rng, k, size):
    return rng.choice([*range(k + 1), 255], size).astype(np.uint8)


class TestCounting:
    @pytest.mark.parametrize("k", [1, 3, 20, 80])
    def test_masks(self, k):
        rng = np.random.default_rng(k)
        truths = [random_truth(rng, k, (40, 31)) for _ in range(4)]
        predictions = [
            np.where(rng.random((40, 31)) < 0.5, truth % 255, rng.integers(0, k + 1, (40, 31))) for truth in truths
        ]
        confusion = Confusion(k)
        for prediction, truth in zip(predictions, truths, strict=True):
            confusion.update(prediction.astype(np.uint8), truth)
        expected = field_ious(predictions, truths, k)
        np.testing.assert_allclose(confusion.scores().iou, expected, atol=1e-9)
        assert confusion.scores().miou == pytest.approx(expected.mean(), abs=1e-9)

    @pytest.mark.parametrize("sweep", [Sweep(last=0.59), Sweep(first=0.1, last=0.5, step=0.04)])
    def test_seeds_over_a_range_of_thresholds(self, sweep):
        rng, k, size = np.random.default_rng(0), 4, (24, 20)
        curve = ThresholdCurve(k, sweep.values())
        images = []
        for number in range(5):
            classes = rng.choice(k, number % k, replace=False)  # the first has none
            maps = rng.integers(0, 101, (len(classes), *size)).astype(np.float32) / 100  # ties with the thresholds
            truth = random_truth(rng, k, size)
            best = classes[maps.argmax(0)] if len(classes) else np.zeros(size)
            curve.update(best.astype(np.uint8), maps.max(0) if len(classes) else np.zeros(size), truth)
            images.append((maps, classes, truth))
        truths = [truth for _, _, truth in images]
        mious = []
        for threshold, scores in zip(sweep.values(), curve.scores(), strict=True):
            seeds = [field_seed(maps, classes, k, threshold) for maps, classes, _ in images]
            expected = field_ious(seeds, truths, k)
            np.testing.assert_allclose(scores.iou, expected, atol=1e-9)
            mious.append(expected.mean())
        threshold, scores = curve.best()
        assert threshold == pytest.approx(sweep.values()[int(np.argmax(mious))])
        assert scores.miou == pytest.approx(max(mious), abs=1e-9)


class TestSweep:
    def test_of_the_field_has_sixty_values(self):
        assert Sweep(last=0.59).values() == [i / 100 for i in range(60)]
        assert Sweep().values() == [i / 100 for i in range(100)]

    def test_may_end_before_its_last_value(self):
        assert Sweep(first=0.2, last=0.4, step=0.15).values() == [0.2, 0.35]
        assert Sweep(first=0.1, last=0.7, step=0.2).values() == [0.1, 0.3, 0.5, 0.7]

    @pytest.mark.parametrize(
        "faulty", [{"first": -0.1}, {"last": 1.0}, {"first": 0.5, "last": 0.5}, {"step": 0}, {"last": 0.1, "step": 0.2}]
    )
    def test_faults(self, faulty):
        with pytest.raises(UserError, match="thresholds need 0 <= first < last < 1"):
            Sweep(**faulty)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Voc12(root=str(draw_voc(tmp_path_factory.mktemp("voc")).root))


@pytest.fixture(scope="module")
def devices():
    return Devices("cpu")


def context(out, source, devices):
    out.mkdir()
    return Context(out, source, devices, workers=0)


@pytest.fixture
def cams(source, tmp_path):
    """Maps of the train images that look like their masks, with noise."""
    rng, scored = np.random.default_rng(0), source.split("score")
    for index, name in enumerate(scored.names):
        truth = scored.mask(index)
        small = np.asarray(PIL.Image.fromarray(truth).resize(map_size(truth.shape)[::-1], PIL.Image.Resampling.NEAREST))
        classes = np.flatnonzero(scored.tags[index])
        maps = np.stack([0.6 * (small == c + 1) + 0.4 * rng.random(small.shape) for c in classes])
        logits = np.zeros(len(CLASSES), np.float32)
        write_maps(map_path(tmp_path / "cams", name), Maps(classes, maps.astype(np.float16), truth.shape, logits))
    return tmp_path / "cams"


class TestOnTheMiniature:
    def test_seeds_on_the_train_list(self, source, devices, cams, tmp_path):
        evaluate_maps(context(tmp_path / "e", source, devices), of=cams, thresholds=Sweep(last=0.59))
        result = json.loads((tmp_path / "e" / RESULT).read_text())
        samples = source.split("score")
        truths = [samples.mask(index) for index in range(len(samples))]
        mious = []
        for threshold in Sweep(last=0.59).values():
            seeds = []
            for name in samples.names:
                stored = read_maps(map_path(cams, name))
                seeds.append(field_seed(stored.full().numpy(), stored.classes, len(CLASSES), threshold))
            # the classes that occur: on VOC's own lists all of them do
            present = [c for c in range(21) if any((truth == c).any() for truth in truths)]
            mious.append(field_ious(seeds, truths, len(CLASSES))[present].mean())
        assert result["images"] == 5 and result["split"] == "score"
        assert result["thresholds"] == {"first": 0.0, "last": 0.59, "step": 0.01}
        assert result["threshold"] == np.argmax(mious) / 100
        np.testing.assert_allclose(result["curve"]["miou"], mious, atol=1e-9)
        assert result["miou"] == pytest.approx(max(mious), abs=1e-9) and result["miou"] > 0.3

    def test_the_range_bounds_the_choice(self, source, devices, cams, tmp_path):
        found = {}
        for last in (0.99, 0.2):
            evaluate_maps(context(tmp_path / f"{last}", source, devices), of=cams, thresholds=Sweep(last=last))
            found[last] = json.loads((tmp_path / f"{last}" / RESULT).read_text())
        assert found[0.99]["threshold"] > 0.2 >= found[0.2]["threshold"]
        assert found[0.99]["miou"] > found[0.2]["miou"]
        assert len(found[0.2]["curve"]["miou"]) == 21

    def test_masks_and_the_table_of_classes(self, source, devices, tmp_path):
        rng, samples = np.random.default_rng(0), source.split("test")
        predictions, truths = [], []
        for index, name in enumerate(samples.names):
            truth = samples.mask(index)
            noisy = np.where(rng.random(truth.shape) < 0.3, rng.integers(0, 21, truth.shape), truth % 255)
            write_mask(mask_path(tmp_path / "predict", name), noisy.astype(np.uint8))
            predictions.append(noisy)
            truths.append(truth)
        evaluate_masks(context(tmp_path / "e", source, devices), of=tmp_path / "predict", split="test")
        result = json.loads((tmp_path / "e" / RESULT).read_text())
        expected = field_ious(predictions, truths, len(CLASSES))
        assert list(result["iou"]) == ["background", *CLASSES]
        np.testing.assert_allclose(list(result["iou"].values()), expected, atol=1e-9)
        assert result["miou"] == pytest.approx(expected.mean(), abs=1e-9)

        printed = tables.per_class(result)
        assert [line.split()[0] for line in printed.splitlines()[1:-1]] == ["background", *CLASSES]
        assert f"{100 * expected[15]:.1f}" in printed
        row = {"stage": "val", "of": "predict", **result}
        page = class_table(RunSummary("", "", "", "", 0.0, "cpu", results=[row]))
        assert page.rows == ["background", *CLASSES]
        assert [cell.value for cell in page.columns[0].cells] == [f"{100 * value:.1f}" for value in expected]

    def test_the_range_stands_beside_the_number(self, source, devices, cams, tmp_path):
        evaluate_maps(context(tmp_path / "e", source, devices), of=cams, thresholds=Sweep(last=0.59))
        result = {"stage": "seeds", "of": "cams", **json.loads((tmp_path / "e" / RESULT).read_text())}
        assert "(oracle), best of 0..0.59 step 0.01" in tables._result_row(result)["note"]
        said = how_chosen("oracle", result["thresholds"])
        assert said == "best of 0 to 0.59 in steps of 0.01, found with the truth masks (oracle)"
