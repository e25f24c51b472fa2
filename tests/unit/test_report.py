"""The report page: what it says, that it is one safe file, and the geometry of its plots."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tag2mask.report import GalleryItem, Panel, RunSummary, StageRow, TrainingCurve, render, words
from tag2mask.report.data import data_view
from tag2mask.report.gallery import THUMBNAIL, gallery, thumbnail
from tag2mask.report.plots import threshold_plots, training_plots
from tag2mask.report.results import cards, class_table

NASTY = "<script>alert('x')</script>\" onload=\"y"
VOID = {"meta", "link", "img", "br", "line", "circle", "path"}


class Balanced(HTMLParser):
    """Fails on tags that are closed in the wrong order; collects the tags and the visible text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def picture(seed=0, shape=(60, 90)):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def measured(of, kind, split, miou, **more):
    scores = {"background": 0.9, "cat": miou, NASTY: None}
    head = {"stage": f"score-{of}", "kind": kind, "of": of, "split": split, "images": 1464, "seed": 3}
    body = {"miou": miou, "iou": scores, "precision": scores, "recall": scores, "pixel_accuracy": 0.91, "coverage": 1.0}
    return {**head, "classes": ["cat", NASTY], **body, **more}


def curve(peak, points=20):
    at = [i / points for i in range(points)]
    values = [max(0.0, 0.6 - abs(t - peak)) for t in at]
    return {"threshold": at, "miou": values, "precision": [None, *values[1:]], "recall": values}


def whole(**changes):
    fields = {
        "title": f"A run {NASTY}",
        "recipe": "ppc",
        "created": "2026-03-01T14:05:59+00:00",
        "command": "tag2mask run ppc -s a.b=1",
        "seconds": 812.0,
        "device": "cpu",
        "versions": {"torch": "2.6.0"},
        "data": {
            "name": "photos",
            "images": 12345,
            "splits": {"train": 10582, "test": 50},
            "classes": {"cat": {"train": 5291, "test": 7}, NASTY: {"train": 0}},
            "negatives": {"train": 3},
        },
        "supervision": ["image tags", "ImageNet weights"],
        "stages": [StageRow("predict", "predict", "work/p-1", 7.0, 3200.0, "cpu", {"train": {"lr": 0.0125}})],
        "curves": [TrainingCurve("classify", [{"step": i, "lr": 0.1, "total": 2.0 - i, "ppc": 1.0} for i in range(3)])],
        "results": [
            {**measured("classify", "classifier", "score", 0.0), "map": 0.9876, "ap": {"cat": 0.9753, NASTY: None}},
            measured("cams", "maps", "score", 0.5432, threshold=0.25, threshold_by="val-masks n=20", curve=curve(0.3)),
            measured("crf", "masks", "score", 0.6543, coverage=0.8766),
            measured("predict", "masks", "test", 0.7654),
        ],
        "gallery": [
            GalleryItem(
                f"img/{i}{NASTY}", ["cat", NASTY], score, [Panel("image", picture(i)), Panel("mask", picture(9))]
            )
            for i, score in enumerate([0.1, 0.9, 0.5, 0.7])
        ],
        "notes": ["A note."],
        "legend": {"cat": (128, 0, 0), NASTY: (0, 128, 0)},
    }
    return RunSummary(**(fields | changes))


@pytest.fixture
def page(tmp_path):
    def make(summary):
        path = tmp_path / "new" / "report.html"
        render(summary, path)
        assert list(path.parent.iterdir()) == [path]
        source = path.read_text("utf-8")
        parser = Balanced()
        parser.feed(source)
        assert parser.open == []
        return source, parser

    return make


class TestPage:
    def test_says_the_numbers(self, page):
        _, parser = page(whole())
        for text in (
            "54.3 % mIoU",
            "threshold 0.25: chosen on 20 held-out masks (val-masks)",
            "65.4 % mIoU",
            "87.7 % of the pixels have an answer",
            "76.5 % mIoU",
            "98.8 % mAP",
            "97.5",
            "13.5 min",
            "It learnt from image tags and ImageNet weights , and from nothing else.",
            "10\u202f582 images in “train”",
            "train.lr 0.0125",
            "3.2 GB",
            "work/p-1",
            "torch 2.6.0",
            "2026-03-01 14:05",
            "A note.",
            "tag2mask run ppc -s a.b=1",
        ):
            assert " ".join(text.split()) in parser.text, text

    def test_the_users_text_is_escaped_everywhere(self, page):
        source, parser = page(whole())
        assert "<script" not in source
        assert not [tag for tag, attributes in parser.tags if tag == "script" or "onload" in attributes]
        assert parser.text.count("<script>alert('x')</script>") > 5

    def test_is_one_file_that_needs_nothing_else(self, page):
        source, parser = page(whole())
        assert not re.search(r"https?:", source)
        assert "url(" not in source
        assert "@import" not in source
        for _, attributes in parser.tags:
            for key in ("src", "href"):
                assert attributes.get(key, "data:").startswith("data:")

    def test_pictures_have_alternative_texts_and_tables_have_scopes(self, page):
        _, parser = page(whole())
        images = [attributes for tag, attributes in parser.tags if tag == "img"]
        assert len(images) == 8
        assert all(attributes["alt"].startswith(("image of img/", "mask of img/")) for attributes in images)
        assert all("scope" in attributes for tag, attributes in parser.tags if tag == "th")
        plots = [attributes for tag, attributes in parser.tags if tag == "svg"]
        assert len(plots) == 4
        assert all(attributes["aria-label"] for attributes in plots)

    def test_best_come_before_worst(self, page):
        _, parser = page(whole())
        order = [
            parser.text.index(text) for text in ("Best of those", "img/1", "img/3", "Worst of those", "img/0", "img/2")
        ]
        assert order == sorted(order)

    def test_without_truth_masks(self, page):
        reason = {"skipped": "no truth masks in this split"}
        head = {"split": "score", "images": 9, "classes": ["cat"]}
        shares = {"coverage": 0.931, "shares": {"background": 0.75, "cat": 0.25}}
        results = [
            {**head, "stage": "a", "of": "classify", "kind": "classifier", "map": 0.5, "ap": {"cat": 0.5}},
            {**head, "stage": "b", "of": "cams", "kind": "maps", **reason},
            {**head, "stage": "c", "of": "crf", "kind": "masks", **reason, **shares},
        ]
        items = [GalleryItem(str(i), [], None, [Panel("image", picture())]) for i in range(10)]
        _, parser = page(whole(results=results, gallery=items))
        for text in (
            "Seeds not measured no truth masks in this split",
            "Pseudo-masks 93.1 % coverage mIoU not measured: no truth masks in this split",
            "50.0 % mAP",
            "Share of each class",
            "75.0",
            "Examples",
            "More examples 2 images",
            "no tags",
        ):
            assert text in parser.text
        assert "mIoU 0" not in parser.text
        assert "Background threshold" not in parser.text

    def test_an_oracle_threshold_is_named_and_explained(self, page):
        oracle = measured("cams", "maps", "score", 0.6, threshold=0.3, threshold_by="oracle", curve=curve(0.3))
        honest = measured("cams", "maps", "score", 0.5, threshold=0.2, threshold_by="recipe", curve=curve(0.3))
        _, parser = page(whole(results=[oracle]))
        assert "found with the truth masks (oracle)" in parser.text
        assert "Numbers marked oracle" in parser.text
        _, parser = page(whole(results=[honest, oracle]))
        assert "Seeds 50.0 % mIoU" in parser.text
        assert "oracle: 60.0 at 0.3" in parser.text
        assert "50.0 % , 10.0 points below the best" in parser.text

    def test_a_run_that_has_nothing_to_show_yet(self, page):
        source, parser = page(RunSummary("Empty", "", "", "", 0.0, ""))
        assert "Total time 0.0 s" in parser.text
        assert "<table" not in source
        assert [tag for tag, _ in parser.tags].count("section") == 1

    def test_a_failed_write_leaves_the_old_page(self, tmp_path, monkeypatch):
        path = tmp_path / "report.html"
        path.write_text("old")

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            render(whole(), path)
        monkeypatch.undo()
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_text() == "old"


class TestResults:
    def test_cards_tell_segmenter_from_pseudo_masks_by_the_stage_that_made_them(self):
        assert [card.label for card in cards(whole())] == [
            "Seeds",
            "Pseudo-masks",
            "Segmenter",
            "Classifier",
            "Total time",
        ]
        stages = [StageRow("refined", "labels", "", 1.0), StageRow("net", "predict", "", 1.0)]
        results = [measured("refined", "masks", "test", 0.1), measured("net", "masks", "score", 0.2)]
        found = {card.label: card.value for card in cards(whole(stages=stages, results=results))}
        assert found["Pseudo-masks"] == "10.0"
        assert found["Segmenter"] == "20.0"

    def test_class_table(self):
        table = class_table(whole())
        assert table.rows == ["background", "cat", NASTY]
        assert [column.mean for column in table.columns] == ["98.8", "54.3", "65.4", "76.5"]
        ap, seeds = table.columns[:2]
        assert [cell.value for cell in ap.cells] == ["–", "97.5", "–"]
        assert [(cell.value, cell.bar) for cell in seeds.cells] == [("90.0", 90.0), ("54.3", 54.3), ("–", 0.0)]
        assert seeds.cells[1].small == "P 54.3  R 54.3"


class TestPlots:
    def test_threshold_curve(self):
        results = [
            measured("cams", "maps", "score", 0.55, threshold=0.25, threshold_by="recipe", curve=curve(0.3)),
            measured("cams", "maps", "score", 0.6, threshold=0.3, threshold_by="oracle", curve=curve(0.3)),
            measured("other", "maps", "score", 0.6, threshold=0.3, threshold_by="oracle"),
        ]
        (found,) = threshold_plots(results)
        assert (found.best, found.best_threshold, found.plateau) == ("60.0", "0.3", ("0.3", "0.3"))
        assert [(used.threshold, used.miou, used.lost) for used in found.used] == [("0.25", "55.0", "5.0")]
        assert [mark.label for mark in found.plot.marks] == ["0.25: 55.0 %", ""]
        left, right, top, bottom = found.plot.left, found.plot.right, found.plot.top, found.plot.bottom
        mark = found.plot.marks[0]
        assert mark.x == pytest.approx(left + (right - left) * 0.25 / 0.95)
        assert mark.y == pytest.approx(bottom - (bottom - top) * 0.55)
        # Precision has one undefined value, which is left out of its line.
        assert [line.path.count("L") for line in found.plot.lines] == [18, 19, 19]

    def test_training_curves(self):
        rows = [
            {"step": 10 * i, "epoch": 0, "lr": 0.1, "seconds": i, "total": 5.0 - i % 2, "a": None} for i in range(2000)
        ]
        total, rate = training_plots(TrainingCurve("x", rows))
        assert (total.title, rate.title) == ("total", "learning rate")
        raw, mean = total.lines
        assert raw.path.count("L") < 410
        assert [tick.label for tick in total.x_ticks] == ["0", "19\u202f990"]
        heights = [float(pair.split()[1]) for pair in mean.path[1:].split(" L")]
        middle = (total.top + total.bottom) / 2
        assert max(abs(height - middle) for height in heights) < 1
        assert heights[0] != float(raw.path[1:].split(" L")[0].split()[1])
        numbers = [float(tick.label) for tick in total.y_ticks]
        assert numbers == sorted(numbers)
        assert all(total.top <= tick.at <= total.bottom for tick in total.y_ticks)

    def test_one_row_or_a_constant(self):
        assert training_plots(TrainingCurve("x", [{"step": 0, "lr": 0.1, "total": 1.0}])) == []
        (total,) = training_plots(TrainingCurve("x", [{"step": 0, "total": 1.0}, {"step": 1, "total": 1.0}]))
        assert [tick.label for tick in total.y_ticks] == ["1"]


class TestGallery:
    @staticmethod
    def titles(scores, group=""):
        items = [GalleryItem(str(i), [], s, [Panel("image", picture())], group) for i, s in enumerate(scores)]
        return [
            (part.title, [int(row.name) for row in part.rows], part.folded)
            for _, parts in gallery(items)
            for part in parts
        ]

    def test_ranks(self):
        assert self.titles([0.5, 0.1, 0.9, 0.3, 0.7]) == [
            ("Best of those shown", [2, 4], False),
            ("Worst of those shown", [1, 3], False),
            ("In between", [0], True),
        ]
        assert self.titles([0.1, None, 0.9]) == [("Examples", [2, 0, 1], False)]
        assert self.titles([]) == []

    def test_groups_are_ranked_apart(self):
        items = [GalleryItem(str(i), [], i / 10, [], group) for group in ("masks", "segmenter") for i in range(4)]
        groups = gallery(items)
        assert [name for name, _ in groups] == ["masks", "segmenter"]
        assert [[row.name for row in part.rows] for part in groups[1][1]] == [["3", "2"], ["0", "1"]]

    def test_thumbnails_shrink_and_keep_flat_colours(self):
        def decode(shown):
            kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", shown.source).groups()
            return kind, np.asarray(Image.open(BytesIO(base64.b64decode(data))).convert("RGB"))

        mask = np.zeros((600, 900, 3), np.uint8)
        mask[100:300, 200:500] = 192, 128, 128
        kind, small = decode(thumbnail(mask, "mask", "a"))
        assert (kind, small.shape) == ("png", (267, THUMBNAIL, 3))
        assert {tuple(colour) for colour in small.reshape(-1, 3).tolist()} == {(0, 0, 0), (192, 128, 128)}
        kind, small = decode(thumbnail(picture(shape=(40, 30)), "image", "a"))
        assert (kind, small.shape) == ("jpeg", (40, 30, 3))

    def test_wrong_pictures_are_refused(self):
        with pytest.raises(ValueError, match="a, mask: expected"):
            gallery([GalleryItem("a", [], None, [Panel("mask", np.zeros((3, 3), np.uint8))])])


class TestData:
    def test_counts_by_split_become_columns(self):
        view = data_view(
            {
                "name": "x",
                "images": 12000,
                "splits": {"train": 10000, "test": 2000},
                "classes": {"cat": {"train": 2500, "test": 0}},
                "negatives": {"train": 7},
                "sizes": [[500, 375], [375, 500], [1, 2], [3, 4], [5, 6]],
                "width": {"min": 10, "median": 20.0, "max": 30},
                "height": {"min": 5, "median": 5.0, "max": 5},
            }
        )
        assert view.facts == [
            ("images", "12\u202f000"),
            ("sizes", "500 × 375, 375 × 500, 1 × 2 and 2 more"),
            ("width", "10 to 30, median 20"),
            ("height", "5"),
        ]
        assert view.columns == ["images", "negatives"]
        assert view.splits == [("train", ["10\u202f000", "7"]), ("test", ["2\u202f000", "–"])]
        assert view.positives == [("cat", [("2\u202f500", 25.0), ("0", 0.0)])]


class TestWords:
    def test_durations(self):
        seconds = [0.421, 8.34, 59.99, 723.4, 3599.7, 3900]
        shown = ["0.42 s", "8.3 s", "1 min 0 s", "12 min 3 s", "1 h 00 min", "1 h 05 min"]
        assert [words.duration(value) for value in seconds] == shown
        assert [words.headline_duration(value) for value in (8.34, 90, 5400)] == [
            ("8.3", "s"),
            ("1.5", "min"),
            ("1.5", "h"),
        ]

    def test_numbers(self):
        assert [words.percent(value) for value in (0.6154, 1.0, None)] == ["61.5", "100.0", "–"]
        assert [words.number(value) for value in (0.26, 0.0, 20000.0, 1.23456, 1.2e-5)] == [
            "0.26",
            "0",
            "20\u202f000",
            "1.23",
            "1.2e-05",
        ]
        assert [words.memory(value) for value in (640, 3200, None)] == ["640 MB", "3.2 GB", "–"]

    def test_settings_are_named_as_on_the_command_line(self):
        settings = {"net": {"name": "seam", "taps": [1, 2]}, "flip": True, "methods": {}, "lr": 0.01, "of": None}
        assert list(words.dotted(settings)) == [
            ("net.name", "seam"),
            ("net.taps", "1, 2"),
            ("flip", "true"),
            ("methods", "{}"),
            ("lr", "0.01"),
            ("of", "none"),
        ]
