"""A run beside others, as a user makes them: by the commands that its page names."""

from __future__ import annotations

import csv
import json
import shlex

import pytest
from commands import NETS, SCENES, settings

from tag2mask import collect
from tag2mask.collect import find_record, summarise

PLAIN_LABELS = "masks={do: labels, of: cams, background: {score: 0.3}}"
QUICK = settings(*NETS, *SCENES, PLAIN_LABELS, "classify.methods={rca: {}}")
HERE = ["--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("beside") / "work"


def run_all(tag2mask, line):
    """A command line with "&&", as the page prints it; the test's own device settings go with each run."""
    for words in line.split(" && "):
        program, command, *rest = shlex.split(words)
        assert program == "tag2mask"
        done = tag2mask(command, *rest, *(HERE if command != "report" else []))
        assert done.code == 0, done.err


def test_the_page_asks_for_what_it_lacks_and_its_commands_bring_it(work, tag2mask, monkeypatch):
    done = tag2mask("run", "demo", *HERE, *QUICK, "--work", work, "--json")
    assert done.code == 0, done.err
    page = work / "demo-report.html"
    assert json.loads(done.out)["report"] == str(page)
    summary = summarise(work, find_record(work, None))
    assert summary.plain == "plain CAM" and summary.tags.images == 24 and summary.confidence.images > 10
    assert set(summary.commands) == {"plain", "seed", "few-masks"}
    for line in summary.commands.values():
        assert line.replace("&&", "&amp;&amp;") in page.read_text()
    with (work / "demo-suspicions.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses and losses == sorted(losses, reverse=True)

    run_all(tag2mask, summary.commands["seed"])
    run_all(tag2mask, summary.commands["plain"])
    few = tag2mask("few-masks", work, "--counts", "2,4", "--name", "demo", *HERE)
    assert few.code == 0 and few.out.strip() == str(page), few.err

    text = page.read_text()
    assert "(n=2)" in text and "<b>plain CAM</b> is the same recipe" in text and "learnt from 4 masks" in text
    assert not any(line.replace("&&", "&amp;&amp;") in text for line in summary.commands.values())
    summary = summarise(work, find_record(work, "demo"))
    assert [(len(c.runs), len(c.plain)) for c in summary.compared] == [(2, 1)] * 4
    assert {r["seed"] for r in summary.compared[-1].runs} == {"0", "1"}
    assert [masks for masks, _ in summary.few_masks.points] == [2, 4]
    assert summary.few_masks.tags == summary.results[-1]["miou"]
    truth = summary.results[-2]["truth_shares"]
    assert sum(truth.values()) == pytest.approx(1)


def test_few_masks_are_no_tags_and_no_run_to_look_at(work, tag2mask):
    record = find_record(work, "demo-few-masks")
    assert collect.supervision(work, record) == ["up to 4 true masks"]
    assert find_record(work, None)["name"] != "demo-few-masks"
    again = tag2mask("few-masks", work, "--counts", "4,2,2", "--name", "demo", *HERE)
    assert again.code == 0 and again.err.count("already done") == 6


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--counts", "5,x"], "--counts: give whole numbers"),
        (["--counts", "500", "--name", "demo"], "masks-500: count: 500, but the score split has 24"),
        (["--name", "demo-few-masks"], "has no segmenter that is measured"),
    ],
)
def test_mistakes_are_one_line(work, tag2mask, arguments, words):
    done = tag2mask("few-masks", work, *arguments)
    assert done.code == 2 and words in done.err and "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_a_folder_to_compare_with_must_be_there(work, tag2mask):
    done = tag2mask("report", work, "--with", work / "nothing")
    assert done.code == 2 and "--with" in done.err and "no such folder" in done.err


def test_changed_data_are_said_and_their_maps_are_not_looked_at(work):
    record = find_record(work, "demo")
    record["data"] = record["data"] | {"images": 25}
    stages = {name: stage for name, stage in record["stages"].items() if stage["kind"] in ("classify", "cams")}
    summary = summarise(work, record | {"stages": stages})
    assert summary.tags is None and summary.confidence is None
    assert any("The data have changed" in note for note in summary.notes)
