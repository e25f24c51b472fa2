"""The numbers and pictures of `tag2mask analyse` by themselves; runs are in test_analyse_runs."""

import itertools
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from tag2mask.analyse import compare, scales, sensitivity
from tag2mask.analyse.embedding import _cam_region, _even, _truth_region, compactness
from tag2mask.analyse.panels import GAP, SIDE, write_grid
from tag2mask.analyse.svg import Curve, line_chart, scatter
from tag2mask.analyse.thresholds import plateau
from tag2mask.errors import UserError
from tag2mask.report import Panel

SVG = "{http://www.w3.org/2000/svg}"


class TestCompactness:
    def loops(self, vectors, labels, classes):
        units = [[x / math.sqrt(sum(v * v for v in row)) for x in row] for row in vectors]

        def distance(i, j):
            return math.sqrt(sum((a - b) ** 2 for a, b in zip(units[i], units[j], strict=True)))

        def mean(values):
            return sum(values) / len(values)

        groups = [[i for i, label in enumerate(labels) if label == k] for k in range(classes)]
        within = {k: mean([distance(*p) for p in itertools.combinations(g, 2)]) for k, g in enumerate(groups) if g[1:]}
        between = [
            mean([distance(i, j) for i in a for j in b]) for a, b in itertools.combinations(groups, 2) if a and b
        ]
        return within, mean(list(within.values())), mean(between)

    def test_against_loops(self):
        draws = np.random.default_rng(0)
        vectors, labels = draws.normal(size=(23, 6)) + 1, [0] * 9 + [2] * 10 + [3] + [0] * 3  # none of 1, one of 3
        found = compactness(torch.from_numpy(vectors), torch.tensor(labels), ("a", "b", "c", "d"))
        each, within, between = self.loops(vectors.tolist(), labels, 4)
        assert found["within"] == pytest.approx(within, rel=1e-9)
        assert found["between"] == pytest.approx(between, rel=1e-9)
        assert found["ratio"] == pytest.approx(within / between, rel=1e-9)
        assert {name: entry["points"] for name, entry in found["by_class"].items()} == {"a": 12, "c": 10, "d": 1}
        assert found["by_class"]["a"]["within"] == pytest.approx(each[0], rel=1e-9)
        assert found["by_class"]["d"]["within"] is None

    def test_lengths_do_not_count(self):
        vectors, labels = torch.randn(8, 5), torch.tensor([0, 1] * 4)
        longer = vectors * torch.arange(1, 9)[:, None]
        found, plain = (compactness(x, labels, ("a", "b")) for x in (longer, vectors))
        for key in ("within", "between", "ratio"):
            assert found[key] == pytest.approx(plain[key], rel=1e-5)

    def test_one_class_has_no_between(self):
        found = compactness(torch.randn(4, 3), torch.zeros(4, dtype=torch.long), ("a", "b"))
        assert found["within"] > 0 and found["between"] is None and found["ratio"] is None


class TestRegions:
    def test_of_maps(self):
        maps = torch.tensor([[[0.9, 0.2]], [[0.99, 0.99]], [[0.4, 0.3]]])  # the second class is not tagged
        assert _cam_region(maps, torch.tensor([0, 2]), 0.25).tolist() == [[0, 2]]
        assert _cam_region(maps, torch.tensor([0, 2]), 0.3).tolist() == [[0, -1]]

    def test_of_truth(self):
        mask = np.repeat(np.repeat(np.array([[0, 3], [255, 1]], np.uint8), 4, axis=0), 4, axis=1)
        assert _truth_region(mask, (2, 2)).tolist() == [[-1, 2], [254, 0]]

    def test_classes_share_the_points(self):
        labels = torch.tensor([0] * 10 + [4] * 3)
        kept = labels[_even(labels, 8)].tolist()
        assert kept == [0] * 4 + [4] * 3
        assert _even(labels, 1000).tolist() == list(range(13))


class FakeCurve:
    """Curve whose mIoUs are given."""

    def __init__(self, values):
        self.values = values

    def scores(self):
        return [type("Score", (), {"miou": v})() for v in self.values]

    def best(self):
        place = int(np.argmax(self.values))
        return place / 10, self.scores()[place]

    def to_dict(self):
        return {"threshold": [i / 10 for i in range(len(self.values))]}


class TestScales:
    @pytest.mark.parametrize(
        ("published", "mean", "spread"),
        [
            ((40.2, 47.0, 49.0, 47.9), 46.0, 3.4),
            ((49.4, 51.6, 52.3, 49.8), 50.8, 1.2),
            ((60.8, 62.8, 61.7, 59.7), 61.2, 1.1),
        ],
    )
    def test_the_spread_is_that_of_the_paper(self, published, mean, spread):
        found = scales.summary((0.5, 1, 1.5, 2), [FakeCurve([0.1, value / 100]) for value in published])
        assert 100 * found["mean"] == pytest.approx(mean, abs=0.051)
        assert 100 * found["spread"] == pytest.approx(spread, abs=0.051)

    def test_the_common_threshold_is_best_on_the_average(self):
        found = scales.summary((1, 2), [FakeCurve([0.5, 0.4, 0.1]), FakeCurve([0.1, 0.4, 0.6])])
        assert found["threshold_common"] == 0.1
        assert [row["miou_common"] for row in found["scales"]] == [0.4, 0.4]
        assert [row["miou"] for row in found["scales"]] == [0.5, 0.6]
        assert [row["threshold"] for row in found["scales"]] == [0.0, 0.2]


class TestPlateau:
    def test_ends_where_more_than_a_point_is_lost(self):
        points = [(0.1, 0.5), (0.2, 0.595), (0.3, 0.6), (0.4, 0.592), (0.5, 0.58), (0.6, 0.599)]
        assert plateau(points) == (0.3, 0.6, 0.2, 0.4)  # 0.6 lies behind a gap

    def test_may_be_one_threshold_or_all(self):
        assert plateau([(0.1, 0.2), (0.2, 0.6), (0.3, 0.1)]) == (0.2, 0.6, 0.2, 0.2)
        assert plateau([(0.1, 0.6), (0.2, 0.6)]) == (0.1, 0.6, 0.1, 0.2)


class TestOneSetting:
    def test_is_found_among_lists_and_groups(self):
        first = {"a": {"lr": 0.1, "scales": [1, 2], "methods": {}}, "b": {"x": None}}
        other = {"a": {"lr": 0.1, "scales": [1, 3], "methods": {}}, "b": {"x": None}}
        recipes = [dict(sensitivity.leaves(r)) for r in (first, other, first)]
        assert recipes[0] == {"a.lr": 0.1, "a.scales": [1, 2], "a.methods": {}, "b.x": None}
        assert sensitivity.only_difference(recipes) == "a.scales"

    def test_may_be_missing_in_some(self):
        assert sensitivity.only_difference([{"a": 1}, {"a": 1, "b": None}]) == "b"

    def test_several_or_none_are_one_line(self):
        many = [{f"s{i}": value for i in range(6)} for value in (1, 2)]
        with pytest.raises(UserError, match=r"differ in s0, s1, s2, s3 and 2 more; give") as fault:
            sensitivity.only_difference(many)
        assert "\n" not in str(fault.value)
        with pytest.raises(UserError, match="are the same"):
            sensitivity.only_difference([{"a": 1}, {"a": 1}])


class TestChosen:
    class Samples:
        names = tuple("abcdefgh")

    def chosen(self, gains, count):
        scores = {name: {"gain": gain} for name, gain in gains.items()}
        return "".join(self.Samples.names[i] for i in compare._chosen(self.Samples, list(range(8)), scores, count))

    def test_half_gain_and_half_lose(self):
        gains = {"a": 0.1, "b": -0.3, "c": 0.5, "e": 0.0, "g": -0.1}
        assert self.chosen(gains, 3) == "cab"
        assert self.chosen(gains, 2) == "cb"
        assert self.chosen(gains, 1) == "c"
        assert self.chosen(gains, 9) == "caegb"

    def test_without_scores_they_are_spread(self):
        assert self.chosen({}, 3) == "aeh"
        assert self.chosen({}, 1) == "a"


class TestPictures:
    def test_a_line_chart_puts_points_where_they_belong(self, tmp_path):
        curves = [Curve("a <b>", [(0.0, 10.0), (0.5, 30.0), (1.0, 20.0)], strong=(0.4, 1.0)), Curve("c", [(0.5, 20.0)])]
        line_chart(tmp_path / "x.svg", curves, title="T & t", x_label="x", y_label="y")
        root = ET.parse(tmp_path / "x.svg").getroot()
        texts = [node.text for node in root.iter(f"{SVG}text")]
        assert "T & t" in texts and "a <b>" in texts and {"0", "0.2", "1", "10", "30"} <= set(texts)
        lines = [node.get("d") for node in root.iter(f"{SVG}path") if node.get("fill") == "none"]
        (whole, thick, single) = ([float(v) for v in re.findall(r"[\d.]+", line)] for line in lines)
        assert whole[2:] == thick  # the last two of three points
        assert whole[0] < whole[2] < whole[4] and whole[2] - whole[0] == pytest.approx(whole[4] - whole[2], abs=0.1)
        assert whole[1] > whole[5] > whole[3]  # up is smaller
        assert single == [whole[2], whole[5]]
        ticks = {node.text: float(node.get("y")) for node in root.iter(f"{SVG}text")}
        assert ticks["30"] - 4 == pytest.approx(whole[3], abs=0.1)

    def test_names_instead_of_numbers(self, tmp_path):
        line_chart(
            tmp_path / "x.svg", [Curve("a", [(1, 5.0)], dots=True)], title="", x_label="", y_label="",
            x_names=["off", "on", "both"],
        )  # fmt: skip
        root = ET.parse(tmp_path / "x.svg").getroot()
        at = {node.text: float(node.get("x")) for node in root.iter(f"{SVG}text")}
        assert at["off"] < at["on"] < at["both"]
        assert float(next(root.iter(f"{SVG}circle")).get("cx")) == at["on"]

    def test_a_scatter_has_every_point_and_a_legend(self, tmp_path):
        points, colours = [(0.0, 0.0), (2.0, 1.0), (2.0, 0.0)], ["#000001", "#000002", "#000003"]
        scatter(tmp_path / "x.svg", points, [0, 2, 2], ["a", "b", "c&"], colours, "T")
        root = ET.parse(tmp_path / "x.svg").getroot()
        dots = [node for node in root.iter(f"{SVG}circle") if node.get("r") == "3"]
        assert [dot.get("fill") for dot in dots] == ["#000001", "#000003", "#000003"]
        x, y = ([float(dot.get(key)) for dot in dots] for key in ("cx", "cy"))
        assert x[1] == x[2] > x[0] and y[0] == y[2] > y[1]
        assert x[1] - x[0] == pytest.approx(2 * (y[0] - y[1]), abs=0.2)  # the same scale on both axes
        assert [node.text for node in root.iter(f"{SVG}text")] == ["T", "a (1)", "c& (2)"]

    def test_a_grid_holds_its_pictures(self, tmp_path):
        red, blue = np.zeros((50, 100, 3), np.uint8), np.zeros((80, 40, 3), np.uint8)
        red[..., 0], blue[..., 2] = 255, 255
        write_grid(tmp_path / "x.png", [[Panel("a", red), Panel("b" * 99 + "\nc", blue)], [Panel("d", red)]])
        sheet = np.asarray(Image.open(tmp_path / "x.png"))
        assert sheet.shape[1] == GAP + 2 * (SIDE + GAP)
        for colour, area in (((255, 0, 0), 2 * SIDE * SIDE / 2), ((0, 0, 255), SIDE * SIDE / 2)):
            assert (sheet == colour).all(axis=2).sum() == area
        assert (sheet[:, :GAP] == 255).all() and (sheet[:, -GAP:] == 255).all()  # captions stay inside
