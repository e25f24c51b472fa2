"""What the report says beyond scores: areas, confidence, tags in doubt, other runs, few masks, advice."""

from __future__ import annotations

import csv
import math
import statistics

import numpy as np
import pytest
from test_report import NASTY, Balanced, measured, picture, whole

from tag2mask import findings
from tag2mask.data.maps import Maps, map_path, write_maps
from tag2mask.data.source import Samples
from tag2mask.metrics.confidence import BINS, DOUBT, QUANTILES, MapConfidence
from tag2mask.metrics.suspicion import tag_losses, tag_probabilities
from tag2mask.pipeline import write_json
from tag2mask.report import Compared, Confidence, FewMasks, StageRow, check_tags, render, suspects_to_picture, write_csv
from tag2mask.report.advice import advice
from tag2mask.report.areas import area_table, in_its_images
from tag2mask.report.beside import beside_rows, class_rows, equal_masks, few_plot, spread
from tag2mask.report.confidence import confidence_rows
from tag2mask.report.peers import Peers


@pytest.fixture
def page(tmp_path):
    def make(summary):
        render(summary, tmp_path / "report.html")
        parser = Balanced()
        parser.feed((tmp_path / "report.html").read_text("utf-8").replace("<rect ", "<line "))
        assert parser.open == []
        return parser

    return make


class TestConfidence:
    @pytest.mark.parametrize("constant", [True, False])
    def test_against_a_loop_over_pixels(self, constant):
        rng = np.random.default_rng(0)
        counts = MapConfidence(4)
        values, leads, shares, images = ({k: [] for k in range(4)} for _ in range(4))
        for number in range(6):
            classes = np.flatnonzero(rng.random(3) < 0.6)  # class 3 never shows; an image may have none
            maps = rng.random((len(classes), 5, 7)).astype(np.float16)
            ground = 0.4 if constant else rng.random((5, 7)).astype(np.float32)
            counts.update(maps, classes, ground)
            for place, k in enumerate(classes):
                inside = 0
                for i, j in np.ndindex(5, 7):
                    floor = ground if constant else float(ground[i, j])
                    others = [float(maps[p, i, j]) for p in range(len(classes)) if p != place]
                    own = float(maps[place, i, j])
                    if own > floor and all(own > other for other in others):
                        inside += 1
                        values[k].append(own)
                        leads[k].append(own - max([floor, *others]))
                shares[k].append(inside / 35)
                images[k].append(number)
        for k in range(4):
            found = counts.of_class(k)
            assert (found.images, found.pixels) == (len(images[k]), len(values[k]))
            if not values[k]:
                assert math.isnan(found.lead) and math.isnan(found.doubtful) and math.isnan(found.quantiles[2])
                continue
            assert found.share == pytest.approx(statistics.fmean(shares[k]))
            assert found.lead == pytest.approx(statistics.fmean(leads[k]), abs=1e-6)
            assert found.doubtful == pytest.approx(statistics.fmean(lead < DOUBT for lead in leads[k]))
            for share, quantile in zip(QUANTILES, found.quantiles, strict=True):
                at = sorted(values[k])[max(0, math.ceil(share * len(values[k]) - 1e-9) - 1)]
                assert abs(quantile - at) <= 0.5 / BINS + 1e-6
        assert counts.of_class(3).images == 0 and math.isnan(counts.of_class(3).share)

    def test_on_the_page_the_least_clear_class_is_first(self, page):
        counts = MapConfidence(3)
        counts.update(np.full((1, 2, 2), 0.9), np.array([0]), 0.5)
        counts.update(np.full((1, 2, 2), 0.55), np.array([1]), 0.5)
        names = {"cat": 0, NASTY: 1, "none": 2}
        by_class = {name: counts.of_class(k) for name, k in names.items()}
        summary = whole(confidence=Confidence("cams", 2, "0.5 (no-mask)", by_class))
        rows = confidence_rows(summary)
        assert [row.name for row in rows] == [NASTY, "cat", "none"]
        assert [(row.lead, row.doubtful) for row in rows] == [("0.05", "100.0"), ("0.40", "0.0"), ("–", "–")]
        assert [row.iou for row in rows] == ["–", "65.4", "–"]
        assert (rows[2].box, rows[2].spoken) == ([], "no region")
        text = page(summary).text
        assert "background score, 0.5 (no-mask)" in text and "no region" in text
        assert "How clearly" not in page(whole()).text


class TestSuspicions:
    def test_losses_against_the_formula(self):
        rng = np.random.default_rng(1)
        logits, tags = rng.normal(0, 3, (5, 3)).astype(np.float32), rng.integers(0, 2, (5, 3))
        for i, k in np.ndindex(5, 3):
            p = 1 / (1 + math.exp(-float(logits[i, k])))
            assert tag_probabilities(logits)[i, k] == pytest.approx(p)
            assert tag_losses(logits, tags)[i, k] == pytest.approx(-math.log(p if tags[i, k] else 1 - p), rel=1e-4)
        assert np.isfinite(tag_losses(np.array([[1e4, -1e4]]), np.array([[0, 1]]))).all()
        with pytest.raises(ValueError, match="one shape"):
            tag_losses(logits, tags[:, :2])

    names = ("a", "b", "c", "d")
    tags = np.array([[1, 0], [1, 1], [0, 0], [1, 1]], np.uint8)
    logits = np.array([[3.0, 4.0], [-2.0, 1.0], [0.5, -1.0], [np.nan, np.nan]], np.float32)

    def test_rank_and_file(self, tmp_path):
        found = check_tags(self.names, ("cat", NASTY), self.tags, self.logits)
        told = [(s.image, s.label, s.tagged) for s in found.suspects]
        assert told == [("a", NASTY, False), ("b", "cat", True), ("c", "cat", False)]
        assert found.images == 3 and suspects_to_picture(found.suspects) == ["a", "b"]
        assert found.suspects[1].score == pytest.approx(1 / (1 + math.exp(2)))
        assert found.suspects[1].loss == pytest.approx(math.log(1 + math.exp(2)))
        both = [1 / (1 + math.exp(-x)) for x in (3, -2)]
        assert found.medians["cat"] == pytest.approx(statistics.median(both))
        assert found.map == pytest.approx(((1 + 2 / 3) / 2 + 0.5) / 2)  # cat: places 1 and 3; the other: place 2
        write_csv(tmp_path / "doubt.csv", found.suspects)
        assert list(tmp_path.iterdir()) == [tmp_path / "doubt.csv"]
        with (tmp_path / "doubt.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows[0] == {"image": "a", "class": NASTY, "tagged": "0", "score": "0.9820", "loss": "4.0181"}
        assert [row["image"] for row in rows] == ["a", "b", "c"]

    def test_one_class_and_agreement(self, page):
        found = check_tags(("a", "b"), ("cat",), np.array([[1], [0]]), np.array([[2.0], [-2.0]]))
        assert found.suspects == [] and found.map == 1.0
        assert "agrees with every tag of 2 training images" in page(whole(tags=found)).text

    def test_on_the_page(self, page):
        checked = check_tags(self.names, ("cat", NASTY), self.tags, self.logits)
        changed = {"pictures": {"a": picture(), "b": picture(1)}, "file": "ppc-suspicions.csv"}
        parser = page(whole(tags=type(checked)(**(vars(checked) | changed))))
        for text in ("contradicts 3 tags of 3 images", "on 2 images", "ppc-suspicions.csv", "tagged cat, score 11.9 %",
                     f"not tagged {NASTY}, score 98.2 %", "These are training images"):  # fmt: skip
            assert text in parser.text, text
        assert {"image of a", "image of b"} <= {attributes.get("alt") for _, attributes in parser.tags}


class TestMapsOnDisk:
    """What is read from a work folder: maps without logits, without masks, with a power as the background score."""

    @staticmethod
    def work(tmp_path, logits, **masks):
        stages = {"cams": {"kind": "cams", "folder": "cams-m", "inputs": {}}}
        finish(tmp_path, "cams", "m")
        maps = np.array([[[0.9, 0.2], [0.6, 0.1]]], np.float16)
        for name in ("a", "b"):
            stored = Maps(np.array([1]), maps, (8, 8), np.array(logits, np.float32))
            write_maps(map_path(tmp_path / "cams-m", name), stored)
        if masks:
            finish(tmp_path, "labels", "l", {"of": "m"}, background={"score": None, "alpha": None} | masks)
            stages["masks"] = {"kind": "labels", "folder": "labels-l", "inputs": {"of": "cams"}}
        tags = np.array([[0, 1], [0, 1]], np.uint8)
        samples = Samples(("a", "b"), tags, lambda index: picture(index))
        return {"name": "r", "stages": stages}, lambda name: samples

    def test_without_logits(self, tmp_path):
        record, split = self.work(tmp_path, [np.nan, np.nan])
        assert findings.tag_check(tmp_path, record, split, ("x", "y")) is None
        assert findings.confidence(tmp_path, record, split, ("x", "y")) is None  # nothing says where regions end

    def test_with_them(self, tmp_path):
        record, split = self.work(tmp_path, [3.0, 1.0], score=0.5)
        found = findings.tag_check(tmp_path, record, split, ("x", "y"))
        assert [(s.image, s.label) for s in found.suspects] == [("a", "x"), ("b", "x")] and found.file
        assert list(found.pictures) == ["a", "b"] and (found.pictures["b"] == picture(1)).all()

    @pytest.mark.parametrize("masks, words, share", [({"score": 0.5}, "0.5", 0.5), ({"alpha": 1.0}, "map)^1", 0.5)])
    def test_the_score_of_the_masks_bounds_the_regions(self, tmp_path, masks, words, share):
        record, split = self.work(tmp_path, [0, 0], **masks)
        found = findings.confidence(tmp_path, record, split, ("x", "y"))
        assert found.of == "cams" and found.images == 2 and found.background.endswith(words)
        assert found.classes["y"].share == share and found.classes["x"].images == 0
        lead = {"0.5": (0.4 + 0.1) / 2, "map)^1": (0.8 + 0.2) / 2}[words]
        assert found.classes["y"].lead == pytest.approx(lead, abs=1e-3)


class TestAreas:
    def test_shares_beside_the_truth_and_in_tagged_images(self):
        shares = {"shares": {"background": 0.8, "cat": 0.2}, "truth_shares": {"background": 0.7, "cat": 0.3}}
        data = {"splits": {"train": 100, "score": 100}, "classes": {"cat": {"train": 40}}}
        masks = measured("crf", "masks", "score", 0.5, **shares) | {"images": 100, "coverage": 0.9}
        summary = whole(results=[masks, measured("predict", "masks", "test", 0.5)], data=data)
        table = area_table(summary)
        assert table.rows == ["background", "cat"] and [column.mean for column in table.columns] == ["90.0"]
        assert [cell.small for cell in table.columns[0].cells] == ["truth 70.0", "truth 30.0  in its images 50.0"]
        assert "Below it the same in the true masks and the mean over the images that have" in table.caption
        blind = area_table(whole(results=[masks | {"truth_shares": None}], data=data))
        assert blind.caption.endswith("Below it the mean over the images that have the class as a tag.")
        assert area_table(whole(results=[masks | {"truth_shares": None}], data={})).caption.endswith("in percent.")
        assert in_its_images(summary, masks, "cat") == pytest.approx(0.2 * 100 / 40)
        assert in_its_images(whole(data={}), masks, "cat") is None
        assert in_its_images(summary, masks | {"images": 50}, "cat") is None  # these are other images
        assert area_table(whole(results=[])) is None


def finish(work, kind, key, inputs=(), result=None, **settings):
    """A stage as `pipeline.execute` leaves it."""
    folder = work / f"{kind}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    about = {"kind": kind, "version": 1, "key": key, "settings": settings, "inputs": dict(inputs), "data": "d"}
    write_json(folder / "manifest.json", about)
    if result is not None:
        write_json(folder / "result.json", result)


def train_run(work, name, *, seed=0, methods=(), epochs=1, miou=0.5):
    train = {"epochs": epochs, "seed": seed}
    finish(work, "classify", f"c{name}", net={"name": "cam"}, methods={m: {} for m in methods}, train=train)
    finish(work, "cams", f"m{name}", {"of": f"c{name}"}, scales=[1.0])
    finish(work, "evaluate_maps", f"e{name}", {"of": f"m{name}"}, {"kind": "maps", "miou": miou}, split="score")


class TestPeers:
    def test_runs_that_differ_in_the_seed_or_have_no_methods(self, tmp_path):
        first, second = tmp_path / "first", tmp_path / "second"
        train_run(first, "0", methods=["ppc"])
        train_run(second, "0", methods=["ppc"])  # the same run in two folders counts once
        train_run(second, "1", methods=["ppc"], seed=1)
        train_run(first, "longer", methods=["ppc"], epochs=2)
        train_run(first, "plain", seed=5)
        train_run(second, "hsc", methods=["hsc"])
        finish(second, "cams", "torn", {"of": "not there"})
        (second / "cams-broken").mkdir()
        (second / "cams-broken/manifest.json").write_text('{"kind": "cams"')
        peers = Peers([first, second])
        assert [made.manifest["key"] for made in peers.like("e0")] == ["e0", "e1"]
        assert [made.manifest["key"] for made in peers.like("e1")] == ["e1", "e0"]
        assert [made.manifest["key"] for made in peers.like("e0", methods=False)] == ["eplain"]
        assert [made.manifest["key"] for made in peers.like("eplain", methods=False)] == ["eplain"]
        assert [peers.seeds(made) for made in peers.like("e0")] == ["0", "1"]
        assert peers.methods("e0") == {"ppc": "cam"} and peers.methods("eplain") == {}
        assert peers.like("torn") == [] and peers.like("nothing") == []

    def test_seeds_of_several_trainings(self, tmp_path):
        train_run(tmp_path, "0", seed=3)
        finish(tmp_path, "segment", "s", {"of": "m0"}, train={"seed": 4})
        peers = Peers([tmp_path])
        assert peers.seeds(peers.made["s"]) == "3, 4"


class TestBeside:
    @staticmethod
    def results(*values, kind="masks"):
        return [measured("crf", kind, "score", v, seed=str(seed)) for seed, v in enumerate(values)]

    def test_mean_and_deviation(self):
        found = spread(self.results(0.5, 0.53, 0.59))
        assert found.mean == pytest.approx(54.0) and found.deviation == pytest.approx(statistics.stdev([50, 53, 59]))
        assert str(found) == "54.0 ± 4.6 (n=3)" and found.each == [("0", "50.0"), ("1", "53.0"), ("2", "59.0")]
        assert str(spread(self.results(0.5))) == "50.0"
        assert spread([{"kind": "masks", "skipped": "no masks"}]) is None and spread([]) is None

    def test_one_run_says_how_to_make_more(self, page):
        alone = [Compared(self.results(0.5))]
        commands = {"plain": "run plain", "seed": "run seed"}
        text = page(whole(compared=alone, plain="plain CAM", commands=commands)).text
        assert "There is no other run" in text and "run plain" in text and "run seed" in text
        assert "run plain" not in page(whole(compared=alone, commands={"seed": "run seed"})).text

    def test_with_and_without_methods(self, page):
        compared = [Compared(self.results(0.5, 0.6), self.results(0.6, 0.64))]
        summary = whole(compared=compared, plain="plain CAM", commands={"plain": "run plain", "seed": "run seed"})
        (row,) = beside_rows(summary)
        assert (str(row.runs), str(row.plain), row.difference) == ("55.0 ± 7.1 (n=2)", "62.0 ± 2.8 (n=2)", "−7.0")
        whose, rows = class_rows(summary)
        assert whose == "Pseudo-masks · crf · score"
        assert rows == [
            ("background", "90.0", "90.0", "+0.0"), ("cat", "55.0", "62.0", "−7.0"), (NASTY, "–", "–", ""),
        ]  # fmt: skip
        text = page(summary).text
        assert "55.0 ± 7.1 (n=2)" in text and "run plain" not in text and "run seed" not in text
        (found,) = [a for a in advice(summary) if "plain CAM" in a.seen]
        assert "55.0 % mIoU with the methods, 62.0 % with plain CAM. That is within the spread" in found.seen


class TestFewMasks:
    @pytest.mark.parametrize(
        "tags, expected",
        [(0.1, "fewer than 5"), (0.2, "about 5"), (0.3, "about 7"), (0.4, "about 10"), (0.7, "more than 20")],
    )
    def test_crossing(self, tags, expected):
        few = FewMasks("predict", "test", tags, [(5, [0.1, 0.3]), (10, [0.4]), (20, [0.6])])
        at, words = equal_masks(few)
        assert words == expected
        if at is not None and 5 < at < 10:  # half of the way in mIoU is half of the way in the logarithm
            assert at == pytest.approx(math.sqrt(5 * 10))

    def test_on_the_page(self, page):
        few = FewMasks("predict", "test", 0.3, [(5, [0.1, 0.3]), (10, [0.4])])
        text = page(whole(few_masks=few)).text
        for words in ("about 7 masks are worth as much", "learnt from tags 30.0 % mIoU",
                      "learnt from 5 masks 20.0 ± 14.1 (n=2) %", "learnt from 10 masks 40.0 %"):  # fmt: skip
            assert words in text, words
        found = few_plot(few)
        assert [mark.label for mark in found.plot.marks] == ["", "", "about 7 masks"]
        assert found.plot.marks[2].x == pytest.approx((found.plot.left + found.plot.right) / 2)
        assert few_plot(FewMasks("p", "test", 0.3, [(5, [0.0])])).plot.marks[0].y == 244  # one point, of zero
        assert few_plot(None) is None
        asked = whole(commands={"few-masks": "tag2mask few-masks work"})
        assert "tag2mask few-masks work" in page(asked).text
        assert "few-masks" not in page(whole(results=[], commands={"few-masks": "tag2mask few-masks work"})).text


class TestAdvice:
    @staticmethod
    def of(*words, **changes):
        return [(a.do, a.change) for a in advice(whole(**changes)) if all(word in a.seen for word in words)]

    def test_nothing_to_say(self):
        assert advice(whole(data={}, results=[])) == []

    def test_few_images(self):
        data = {"classes": {"cat": {"train": 20}, "dog": {"train": 19}, "cow": {"train": 3}}}
        assert self.of("cow (3), dog (19).", data=data)
        assert not self.of("Fewer than", data={"classes": {"cat": {"train": 20}}})

    def test_few_steps(self):
        def told(images, **train):
            stages = [StageRow("seg", "segment", "", 1.0, settings={"train": {"batch": 16} | train})]
            return self.of("was trained for", data={"splits": {"train": images}}, stages=stages)

        assert told(240, epochs=5.0) == [("On few images let it see each more often.", "-s seg.train.epochs=20")]
        assert told(240, epochs=20.0) == told(240, epochs=None, steps=75) == told(0, epochs=5.0) == []

    def test_weak_classifier_and_gap(self):
        weak = {**measured("classify", "classifier", "test", 0), "map": 0.7, "ap": {"cat": 0.9, "dog": 0.5, "x": None}}
        stages = [
            StageRow("classify", "classify", "", 1.0, settings={"train": {"epochs": 5.0, "batch": 16}, "net": {}})
        ]
        ((_, change),) = self.of("70.0 %", "50.0 % for dog", results=[weak], stages=stages)
        assert change == "-s classify.train.epochs=10"
        strong = weak | {"map": 0.81, "ap": {"cat": 0.81}}
        assert not self.of("The classifier", results=[strong])
        known = check_tags(("a", "b"), ("cat",), np.array([[1], [0]]), np.array([[2.0], [-2.0]]))
        assert self.of("by heart: 100.0 %", "81.0 %", results=[strong], tags=known)
        assert not self.of("by heart", results=[weak | {"map": 0.86}], tags=known)

    def test_thresholds(self):
        tried = {"first": 0.1, "last": 0.9, "step": 0.1}
        for at, words, change in ((0.1, "lowest", "first=0"), (0.9, "highest", "last=0.99"), (0.5, "one tried", None)):
            maps = measured("cams", "maps", "score", 0.5, threshold=at, thresholds=tried, threshold_by="oracle")
            wanted = [("Try a wider range.", f"-s score-cams.thresholds.{change}")] if change else []
            assert self.of(words, results=[maps]) == wanted
        curve = {"threshold": [0.2, 0.4], "miou": [0.3, 0.5]}
        maps = measured("cams", "maps", "score", 0.5, threshold=0.4, curve=curve)
        masks = measured("seeds", "masks", "score", 0.3)
        settings = {"background": {"score": 0.2, "alpha": None}}
        stages = [StageRow("seeds", "labels", "", 1.0, settings=settings, inputs={"of": "cams"})]
        ((_, change),) = self.of("costs 20.0 points", results=[maps, masks], stages=stages)
        assert change == "-s seeds.background.score=0.4"
        blind = [{k: v for k, v in masks.items() if k != "miou"} | {"skipped": "no masks"}]
        ((_, change),) = self.of("fixed in the recipe", results=blind, stages=stages)
        assert change == "-s seeds.background.score=auto"
        assert [c for _, c in self.of("cut at a threshold", results=blind, stages=stages)] == ["-s seeds.do=crf"]
        refined = [*stages, StageRow("crf", "crf", "", 1.0)]
        assert not self.of("cut at a threshold", results=blind, stages=refined)

    def test_areas(self):
        settings = {"background": {"score": 0.3}}
        stages = [StageRow("crf", "crf", "", 1.0, settings=settings)]
        masks = measured("crf", "masks", "score", 0.5, shares={"background": 0.6, "cat": 0.4, "dog": 0.001})
        data = {"splits": {"score": 1464}, "classes": {"cat": {"score": 800}, "dog": {"score": 700}}}
        ((_, low),) = self.of("very small", "dog (0.2 %)", results=[masks], stages=stages, data=data)
        ((_, high),) = self.of("very large", "cat (73.2 %)", results=[masks], stages=stages, data=data)
        assert (low, high) == ("-s crf.background.score=0.2", "-s crf.background.score=0.4")
        true = masks | {"truth_shares": {"background": 0.7, "cat": 0.3, "dog": 0.001}}
        assert not self.of("very", results=[true], stages=stages, data=data)
        true = masks | {"truth_shares": {"cat": 0.1, "dog": 0.1}}
        assert self.of("very large", "cat (4 times)", results=[true], stages=stages)
        assert self.of("very small", "dog (0.01 times)", results=[true], stages=stages)

    def test_from_scratch(self):
        net = {"net": {"name": "cam", "backbone": {"name": "resnet50", "weights": None}}}
        ((_, change),) = self.of("random weights", stages=[StageRow("first", "classify", "", 1.0, settings=net)],
                                 data={"splits": {"train": 30}})  # fmt: skip
        assert change == "-s first.net.backbone.weights=hub"

    def test_each_stands_on_the_page_with_its_number(self, page):
        weak = {**measured("classify", "classifier", "test", 0), "map": 0.7, "ap": {"cat": 0.5}}
        text = page(whole(results=[weak])).text
        assert "What to try next" in text and "The classifier reaches 70.0 % mean AP on “test”" in text
