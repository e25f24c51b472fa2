"""Killed runs: the same command goes on, and ends with the same bits as a run that was left alone.

One run is killed again and again, in every stage that takes long, with SIGKILL, SIGTERM and SIGINT; another one, beside
it, is not. Finished stages must stay untouched all the while.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from commands import ENVIRONMENT, NETS, TAG2MASK, settings
from safetensors.numpy import load_file

from tag2mask.pipeline import MANIFEST, read_json

WORDS = [
    "demo", "--device", "cpu", "--save-every", "3",
    *settings(
        *NETS, "data.images=40", "data.test=8", "data.size=48",
        "classify.train.epochs=24", "segment.train.epochs=24", "classify.train.batch=8", "segment.train.batch=8",
        "cams.batch=1", "cams.scales=[0.5,1,1.5,2,3]",
    ),
]  # fmt: skip
TORN = "a write that a kill cut short"


class Killed:
    """A run of the command line that is stopped at a given moment."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def start(self, workers: int = 0) -> subprocess.Popen:
        words = [*TAG2MASK, *WORDS, "--work", str(self.work), "--workers", str(workers)]
        return subprocess.Popen(
            words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def stop(self, number: int, stage: str, pattern: str, workers: int = 0) -> tuple[int, str]:
        """Send a signal once files that match `stage-*/pattern` were written; (exit code, stderr).

        The stage must not be finished by then: if this fails, the settings above must make it longer.
        """
        before, finished = self._seen(stage, pattern), self.finished()
        run = self.start(workers)
        end = time.monotonic() + 120
        while self._seen(stage, pattern) <= before:
            assert run.poll() is None and time.monotonic() < end, run.communicate()[1]
            time.sleep(0.002)
        os.killpg(run.pid, number)  # as a terminal does: the loader's processes get it too
        _, said = run.communicate(timeout=120)
        assert not list(self.work.glob(f"{stage}-*/{MANIFEST}")), f"{stage} was over before the signal came"
        assert {path: self.finished()[path] for path in finished} == finished
        return run.returncode, said

    def finish(self) -> None:
        finished = self.finished()
        run = self.start()
        _, said = run.communicate(timeout=240)
        assert run.returncode == 0, said
        assert {path: self.finished()[path] for path in finished} == finished

    def finished(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in self.work.glob(f"*/{MANIFEST}")}

    def folder(self, stage: str) -> Path:
        return next(self.work.glob(f"{stage}-*"))

    def _seen(self, stage: str, pattern: str) -> tuple[int, int]:
        times = [path.stat().st_mtime_ns for path in self.work.glob(f"{stage}-*/{pattern}")]
        return len(times), max(times, default=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(a run that was left alone, one that was killed all the time, exit codes and words of the latter)."""
    whole, killed = Killed(tmp_path_factory.mktemp("whole")), Killed(tmp_path_factory.mktemp("killed"))
    alone = whole.start()
    said = [
        killed.stop(signal.SIGKILL, "classify", "last.ckpt"),
        killed.stop(signal.SIGTERM, "classify", "last.ckpt"),
        killed.stop(signal.SIGINT, "classify", "last.ckpt", workers=2),
        killed.stop(signal.SIGKILL, "cams", "maps/*/*.npz"),
        killed.stop(signal.SIGTERM, "cams", "maps/*/*.npz"),
        killed.stop(signal.SIGKILL, "segment", "last.ckpt"),
    ]
    killed.finish()
    _, words = alone.communicate(timeout=240)
    assert alone.returncode == 0, words
    return whole, killed, said


def test_exit_codes_and_messages(runs):
    _, _, said = runs
    assert [code for code, _ in said] == [-signal.SIGKILL, 75, 130, -signal.SIGKILL, 75, -signal.SIGKILL]
    for code, words in said:
        assert "Traceback" not in words and "Error" not in words
        assert words.endswith("tag2mask: stopped; the same command goes on from here\n") == (code > 0), words
    assert "resuming" in said[1][1] and "classify: already done" in said[4][1]


def contents(work: Path) -> dict[str, object]:
    """What a run computed, by path: tensors, maps, masks, numbers; nothing of times and of the machine."""
    found: dict[str, object] = {}
    for path in sorted(work.glob("*-*/**/*")):
        name = str(path.relative_to(work))
        if path.suffix == ".safetensors":
            found |= {f"{name}:{key}": (x.dtype, x.shape, x.tobytes()) for key, x in load_file(path).items()}
        elif path.suffix == ".npz":
            with np.load(path) as file:
                found |= {f"{name}:{key}": (x.dtype, x.shape, x.tobytes()) for key, x in file.items()}
        elif path.suffix == ".png":
            with PIL.Image.open(path) as picture:
                found[name] = (picture.mode, picture.size, picture.tobytes(), picture.getpalette())
        elif path.name in ("result.json", "per_image.json", "model.json"):
            found[name] = read_json(path)
        elif path.name == "train.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        elif path.is_file() and path.name != ".lock":
            found[name] = path.name
    return found


def test_killed_runs_end_with_the_same_bits(runs):
    whole, killed, _ = runs
    expected, found = contents(whole.work), contents(killed.work)
    assert expected.keys() == found.keys() and len(expected) > 200
    assert [name for name in expected if expected[name] != found[name]] == []


def test_manifests_count_the_same_files(runs):
    whole, killed, _ = runs
    counts = [
        {path.parent.name: read_json(path)["files"] for path in run.work.glob(f"*/{MANIFEST}")}
        for run in (whole, killed)
    ]
    assert counts[0] == counts[1] and len(counts[0]) == 9


def test_masks_and_predictions_that_were_cut_short(runs, tag2mask):
    """A kill leaves a folder without manifest, some of its files, and perhaps a torn one under another name."""
    whole, killed, _ = runs
    untouched = killed.finished()
    for stage in ("crf", "predict", "evaluate_maps"):
        folder = killed.folder(stage)
        untouched.pop(folder / MANIFEST)
        (folder / MANIFEST).unlink()
        for number, path in enumerate(sorted([*folder.rglob("*.png"), *folder.glob("result.json")])):
            if number % 3 == 0:
                path.unlink()
            if number == 0:
                path.with_name(f".{path.name}.77.tmp").write_text(TORN)
                path.with_name(f"{path.name}.part").write_text(TORN)
    done = tag2mask(*WORDS, "--work", killed.work, "--workers", 0)
    assert done.code == 0 and done.err.count("resuming") == 3 and done.err.count("already done") == 6
    assert {path: killed.finished()[path] for path in untouched} == untouched
    left = {name: x for name, x in contents(killed.work).items() if not name.endswith((".tmp", ".part"))}
    assert left == contents(whole.work)


def test_two_runs_at_once_do_not_mix(tmp_path, tag2mask):
    one = Killed(tmp_path).start()
    try:
        end = time.monotonic() + 120
        while not list(tmp_path.glob("classify-*/last.ckpt")):
            assert one.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        two = tag2mask(*WORDS, "--work", tmp_path, "--workers", 0)
    finally:
        os.killpg(one.pid, signal.SIGKILL)
        one.communicate()
    assert two.code == 2 and "another run is working on this stage; wait for it or stop it" in two.err
