"""From the official layouts to masks, scores, a report and the server's archive, through the command line."""

import json
import tarfile
from pathlib import Path

import pytest
from commands import NETS, settings
from miniature import draw_coco, draw_voc

QUICK = [
    *NETS, "classify.train.batch=4", "segment.train.batch=3", "cams.scales=[1.0]", "seeds.thresholds.last=0.59",
]  # fmt: skip


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return draw_voc(tmp_path_factory.mktemp("voc"))


def run(tag2mask, work, data, *more):
    words = settings(*QUICK, f"data={data}", *more)
    done = tag2mask("run", "demo", *words, "--work", work, "--device", "cpu", "--workers", "0", "--json")
    assert done.code == 0, done.err
    results = {result["stage"]: result for result in json.loads(done.out)["results"]}
    return results, json.loads(done.out)["report"]


def test_voc(tag2mask, voc, tmp_path):
    results, page = run(tag2mask, tmp_path / "work", f"{{name: voc12, root: {voc.root}}}")
    assert results["seeds"]["thresholds"] == {"first": 0.0, "last": 0.59, "step": 0.01}
    assert (results["seeds"]["images"], results["segmenter-quality"]["images"]) == (5, 3)
    assert len(results["segmenter-quality"]["iou"]) == 21
    assert all(0 <= results[stage]["miou"] <= 1 for stage in ("seeds", "mask-quality", "segmenter-quality"))
    text = Path(page).read_text(encoding="utf-8")
    assert "best of 0 to 0.59 in steps of 0.01" in text and "tvmonitor" in text and "train_aug" in text


def test_the_server_set(tag2mask, voc, tmp_path):
    """Images without masks: nothing is scored, but their masks can be handed in."""
    results, _ = run(tag2mask, tmp_path / "work", f"{{name: voc12, root: {voc.root}, test: test}}")
    assert results["segmenter-quality"]["skipped"] == "there are no truth masks for this split"
    (masks,) = (tmp_path / "work").glob("predict-*")
    done = tag2mask("export", "voc-server", masks, tmp_path / "r.tar.gz", "--root", voc.root)
    assert done.code == 0, done.err
    with tarfile.open(tmp_path / "r.tar.gz") as archive:
        assert len(archive.getnames()) == 2


def test_coco(tag2mask, tmp_path):
    drawn = draw_coco(tmp_path / "coco")
    data = f"{{name: coco14, root: {drawn.root}, cache: {tmp_path / 'cache'}}}"
    results, _ = run(tag2mask, tmp_path / "work", data)
    assert (results["seeds"]["images"], results["segmenter-quality"]["images"]) == (8, 4)
    assert len(results["seeds"]["iou"]) == 81
    assert results["mask-quality"]["miou"] is not None


def test_a_folder_that_is_not_there_is_one_line(tag2mask, tmp_path):
    for name in ("voc12", "coco14"):
        done = tag2mask("plan", "demo", *settings(f"data={{name: {name}, root: {tmp_path}}}"), "--work", tmp_path / "w")
        assert done.code == 2
        assert len(done.err.strip().splitlines()) == 1
        assert f"`tag2mask data prepare {name} --root {tmp_path}`" in done.err
