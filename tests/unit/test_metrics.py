"""Counts, curves and average precision against loops written from the definitions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tag2mask.metrics import Confusion, MaskShares, ThresholdCurve, average_precision, mean_average_precision

K = 3


def masks(seed, shape=(17, 13), k=K, ignore_pred=True):
    rng = np.random.default_rng(seed)
    values = [*range(k + 1), 255]
    truth = rng.choice(values, size=shape).astype(np.uint8)
    pred = rng.choice(values if ignore_pred else values[:-1], size=shape).astype(np.uint8)
    return pred, truth


def loop_scores(pairs, k):
    """(miou, iou, precision, recall, accuracy, coverage, miou_covered) by counting sets of pixels one at a time."""

    def ious(pixels):
        out = []
        for c in range(k + 1):
            both = sum(p == c and t == c for p, t in pixels)
            either = sum(p == c or t == c for p, t in pixels)
            out.append(both / either if either else math.nan)
        return out

    pixels = [(int(p), int(t)) for pred, truth in pairs for p, t in zip(pred.flat, truth.flat, strict=True)]
    pixels = [(p, t) for p, t in pixels if t != 255]
    answered = [(p, t) for p, t in pixels if p != 255]
    precision, recall = [], []
    for c in range(k + 1):
        of_pred = [t == c for p, t in pixels if p == c]
        of_truth = [p == c for p, t in pixels if t == c]
        precision.append(sum(of_pred) / len(of_pred) if of_pred else math.nan)
        recall.append(sum(of_truth) / len(of_truth) if of_truth else math.nan)
    return (
        np.nanmean(ious(pixels)),
        ious(pixels),
        precision,
        recall,
        sum(p == t for p, t in pixels) / len(pixels),
        len(answered) / len(pixels),
        np.nanmean(ious(answered)),
    )


def check(scores, expected):
    got = (
        scores.miou,
        scores.iou,
        scores.precision,
        scores.recall,
        scores.pixel_accuracy,
        scores.coverage,
        scores.miou_covered,
    )
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores.mean_precision, np.nanmean(expected[2]))
    np.testing.assert_allclose(scores.mean_recall, np.nanmean(expected[3]))


class TestConfusion:
    @pytest.mark.parametrize("k", [1, K, 7])
    def test_equals_the_loop(self, k):
        pairs = [masks(seed, k=k) for seed in range(3)]
        confusion = Confusion(k)
        for pred, truth in pairs:
            confusion.update(pred, truth)
        check(confusion.scores(), loop_scores(pairs, k))

    def test_absent_class_leaves_the_mean_and_a_predicted_one_does_not(self):
        truth = np.array([[0, 1, 1, 255]], np.uint8)
        confusion = Confusion(K)
        confusion.update(np.array([[0, 1, 2, 3]], np.uint8), truth)
        scores = confusion.scores()
        np.testing.assert_array_equal(scores.iou, [1, 0.5, 0, np.nan])
        assert scores.miou == 0.5
        check(scores, loop_scores([(np.array([[0, 1, 2, 3]]), truth)], K))

    def test_no_answer_is_a_miss_and_lowers_coverage(self):
        confusion = Confusion(1)
        confusion.update(np.array([[1, 255, 0, 255]], np.uint8), np.array([[1, 1, 0, 255]], np.uint8))
        scores = confusion.scores()
        np.testing.assert_allclose(scores.iou, [1, 0.5])
        np.testing.assert_allclose(scores.precision, [1, 1])
        assert scores.coverage == pytest.approx(2 / 3)
        assert scores.miou_covered == 1

    def test_empty_and_all_ignored(self):
        confusion = Confusion(K)
        confusion.update(np.zeros((0, 5), np.uint8), np.zeros((0, 5), np.uint8))
        confusion.update(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8))
        assert confusion.counts.sum() == 0
        scores = confusion.scores()
        assert math.isnan(scores.miou)
        assert math.isnan(scores.coverage)
        assert math.isnan(scores.pixel_accuracy)

    def test_merge_is_one_pass(self):
        pairs = [masks(seed) for seed in range(4)]
        whole, left, right = Confusion(K), Confusion(K), Confusion(K)
        for i, (pred, truth) in enumerate(pairs):
            whole.update(pred, truth)
            (left if i % 2 else right).update(pred, truth)
        left.merge(right)
        np.testing.assert_array_equal(left.counts, whole.counts)
        with pytest.raises(ValueError, match="merge"):
            left.merge(Confusion(K + 1))

    def test_dictionary_is_json_with_names(self):
        confusion = Confusion(2)
        confusion.update(np.array([[0, 1]], np.uint8), np.array([[0, 1]], np.uint8))
        result = confusion.scores().to_dict(["cat", "dog"])
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert result["iou"] == {"background": 1.0, "cat": 1.0, "dog": None}
        assert result["miou"] == 1.0
        with pytest.raises(ValueError, match="1 class names"):
            confusion.scores().to_dict(["cat"])

    @pytest.mark.parametrize(
        ("pred", "truth", "message"),
        [
            (np.full((2, 2), 4, np.uint8), np.zeros((2, 2), np.uint8), "mask value 4"),
            (np.zeros((2, 2), np.uint8), np.full((2, 2), 254, np.uint8), "mask value 254"),
            (np.zeros((2, 3), np.uint8), np.zeros((2, 2), np.uint8), "one shape"),
            (np.zeros((2, 2), np.int64), np.zeros((2, 2), np.uint8), "uint8"),
        ],
    )
    def test_wrong_masks_are_refused(self, pred, truth, message):
        confusion = Confusion(K)
        with pytest.raises(ValueError, match=message):
            confusion.update(pred, truth)
        assert confusion.counts.sum() == 0

    def test_largest_number_of_classes(self):
        confusion = Confusion(254)
        confusion.update(np.array([[254, 255]], np.uint8), np.array([[254, 254]], np.uint8))
        assert confusion.counts[254, 254] == 1
        assert confusion.counts[254, 255] == 1
        for bad in (0, 255):
            with pytest.raises(ValueError, match="num_classes"):
                Confusion(bad)


def threshold_alone(best_class, best_score, truth, threshold, k):
    """Counts [K+1, K+2] of one threshold, pixel by pixel."""
    counts = np.zeros((k + 1, k + 2), np.int64)
    for c, s, t in zip(best_class.flat, best_score.flat, truth.flat, strict=True):
        if t != 255:
            counts[t, int(c) + 1 if np.float32(s) > np.float32(threshold) else 0] += 1
    return counts


class TestThresholdCurve:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_every_threshold_equals_the_loop_also_on_exact_ties(self, dtype):
        rng = np.random.default_rng(0)
        thresholds = [i / 10 for i in range(10)]
        curve = ThresholdCurve(K, thresholds)
        expected = np.zeros((10, K + 1, K + 2), np.int64)
        for _ in range(3):
            truth = rng.choice([0, 1, 2, 3, 255], size=(9, 11)).astype(np.uint8)
            best = rng.integers(0, K, (9, 11)).astype(np.uint8)
            # One third random, one third on the thresholds, one third their neighbours among floats.
            score = rng.random((9, 11)).astype(dtype)
            score[:3] = rng.choice(thresholds, (3, 11)).astype(dtype)
            score[3:6] = np.nextafter(score[:3], rng.choice([-1, 2], (3, 11)).astype(dtype))
            curve.update(best, score, truth)
            for i, t in enumerate(thresholds):
                expected[i] += threshold_alone(best, score, truth, t, K)
        np.testing.assert_array_equal(curve.counts(), expected)

    def test_each_threshold_equals_confusion(self):
        rng = np.random.default_rng(1)
        truth = rng.choice([0, 1, 2, 3, 255], size=(20, 20)).astype(np.uint8)
        best, score = rng.integers(0, K, (20, 20)).astype(np.uint8), rng.random((20, 20), dtype=np.float32)
        curve = ThresholdCurve(K)
        curve.update(best, score, truth)
        assert len(curve.scores()) == 100
        for t, scores in list(zip(curve.thresholds, curve.scores(), strict=True))[::9]:
            confusion = Confusion(K)
            confusion.update(np.where(score > t, best + 1, 0).astype(np.uint8), truth)
            assert scores.to_dict("abc") == confusion.scores().to_dict("abc")

    def test_on_a_threshold_is_background_and_half_precision_counts_as_stored(self):
        one = np.zeros((1, 1), np.uint8)
        for dtype, foreground in [(np.float32, 0), (np.float16, 1)]:
            curve = ThresholdCurve(1, [0.3])
            curve.update(one, np.full((1, 1), 0.3, dtype), one + 1)
            assert curve.counts()[0, 1, 1] == foreground

    @pytest.mark.parametrize("score", [0.0, -1.0])
    def test_pixels_without_a_tag_are_background_everywhere(self, score):
        curve = ThresholdCurve(K)
        curve.update(np.zeros((4, 4), np.uint8), np.full((4, 4), score, np.float16), np.zeros((4, 4), np.uint8))
        np.testing.assert_array_equal(curve.counts()[:, 0, 0], 16)

    def test_best_is_the_largest_miou_and_the_first_of_equals(self):
        curve = ThresholdCurve(1, [0.1, 0.2, 0.3, 0.4])
        curve.update(np.zeros((1, 3), np.uint8), np.array([[0.15, 0.35, 0.38]]), np.array([[0, 1, 1]], np.uint8))
        threshold, scores = curve.best()
        assert threshold == 0.2
        assert scores.miou == 1
        assert [round(s.miou, 3) for s in curve.scores()] == [0.333, 1, 1, 0.167]
        assert curve.to_dict()["threshold"] == [0.1, 0.2, 0.3, 0.4]
        assert curve.to_dict()["precision"][0] == pytest.approx(2 / 3)

    def test_nothing_counted(self):
        curve = ThresholdCurve(2)
        curve.update(np.zeros((0, 4), np.uint8), np.zeros((0, 4)), np.zeros((0, 4), np.uint8))
        curve.update(np.zeros((1, 2), np.uint8), np.zeros((1, 2)), np.full((1, 2), 255, np.uint8))
        assert curve.histogram.sum() == 0
        assert set(curve.to_dict()["miou"]) == {None}
        with pytest.raises(ValueError, match="no pixel"):
            curve.best()

    def test_merge_is_one_pass(self):
        rng = np.random.default_rng(2)
        whole, left, right = (ThresholdCurve(K) for _ in range(3))
        for i in range(4):
            sample = (
                rng.integers(0, K, (6, 6)).astype(np.uint8),
                rng.random((6, 6)),
                rng.integers(0, K + 1, (6, 6)).astype(np.uint8),
            )
            whole.update(*sample)
            (left if i % 2 else right).update(*sample)
        left.merge(right)
        np.testing.assert_array_equal(left.histogram, whole.histogram)
        with pytest.raises(ValueError, match="merge"):
            left.merge(ThresholdCurve(K, [0.5]))

    def test_wrong_input_is_refused(self):
        zero = np.zeros((2, 2), np.uint8)
        curve = ThresholdCurve(K)
        for best, score, truth, message in [
            (zero + K, np.zeros((2, 2)), zero, "no class"),
            (zero, np.zeros((2, 2)), zero + K + 1, "no class"),
            (zero, np.full((2, 2), np.nan), zero, "NaN"),
            (zero, np.zeros((2, 3)), zero, "shapes"),
            (zero.astype(int), np.zeros((2, 2)), zero, "uint8"),
        ]:
            with pytest.raises(ValueError, match=message):
                curve.update(best, score, truth)
        for bad in ([], [0.2, 0.2], [0.2, 0.1]):
            with pytest.raises(ValueError, match="increasing"):
                ThresholdCurve(K, bad)


def loop_average_precision(scores, tags):
    """Walks down the distinct scores: at each, everything at or above it is returned."""
    total, previous, area = sum(tags), 0.0, 0.0
    for level in sorted(set(scores), reverse=True):
        returned = [t for s, t in zip(scores, tags, strict=True) if s >= level]
        recall = sum(returned) / total
        area += (recall - previous) * sum(returned) / len(returned)
        previous = recall
    return area


class TestAveragePrecision:
    @pytest.mark.parametrize("levels", [1, 2, 5, 1000])
    def test_equals_the_loop_with_ties(self, levels):
        rng = np.random.default_rng(levels)
        for _ in range(20):
            scores = rng.integers(0, levels, 30) / levels - 0.5
            tags = rng.integers(0, 2, 30)
            tags[0] = 1
            assert average_precision(scores, tags) == pytest.approx(loop_average_precision(scores, tags), abs=1e-12)

    def test_known_value(self):
        # Ranks of the positives are 1 and 3: (1/1 + 2/3) / 2.
        assert average_precision(np.array([0.9, 0.8, 0.7, 0.1]), np.array([1, 0, 1, 0])) == pytest.approx(5 / 6)

    def test_order_of_images_does_not_matter_under_ties(self):
        scores, tags = np.array([0.5, 0.5, 0.5, 0.2], np.float16), np.array([1, 0, 0, 1], np.uint8)
        assert average_precision(scores, tags) == average_precision(scores[::-1], tags[::-1])

    def test_mean_leaves_out_classes_without_a_positive(self):
        scores = np.array([[0.9, 0.2, 0.4], [0.1, 0.3, 0.6]])
        tags = np.array([[1, 0, 1], [0, 0, 0]], np.uint8)
        mean, ap = mean_average_precision(scores, tags)
        np.testing.assert_allclose(ap, [1, np.nan, 0.5])
        assert mean == 0.75
        mean, ap = mean_average_precision(scores, np.zeros_like(tags))
        assert math.isnan(mean)
        assert np.isnan(ap).all()

    def test_wrong_input_is_refused(self):
        with pytest.raises(ValueError, match="length"):
            average_precision(np.zeros(3), np.zeros(2, int))
        with pytest.raises(ValueError, match="NaN"):
            average_precision(np.array([np.nan]), np.array([1]))
        with pytest.raises(ValueError, match="shape"):
            mean_average_precision(np.zeros((2, 3)), np.zeros((3, 2), int))


class TestMaskShares:
    def test_coverage_and_shares(self):
        shares, other = MaskShares(2), MaskShares(2)
        shares.update(np.array([[0, 0, 1, 255]], np.uint8))
        other.update(np.array([[1, 255, 255, 255]], np.uint8))
        shares.merge(other)
        assert shares.to_dict(["a", "b"]) == {"coverage": 0.5, "shares": {"background": 0.5, "a": 0.5, "b": 0.0}}

    def test_nothing_counted_and_wrong_input(self):
        shares = MaskShares(1)
        assert shares.to_dict(["a"]) == {"coverage": None, "shares": {"background": None, "a": None}}
        with pytest.raises(ValueError, match="values"):
            shares.update(np.full((1, 1), 2, np.uint8))
        with pytest.raises(ValueError, match="merge"):
            shares.merge(MaskShares(2))
