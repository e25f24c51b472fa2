"""Stages into folders: keys, what is skipped, what is resumed, what is sealed."""

import json
import os
import threading
from dataclasses import replace

import pytest

from tag2mask.errors import UserError
from tag2mask.pipeline import LOCK, MANIFEST, Stage, digest, execute, read_json, write_json


def stage(name="maps", settings=None, inputs=None, **more):
    return Stage(name, "cams", 1, {"scale": 1.0} if settings is None else settings, inputs or {}, "data", **more)


FIRST = stage("first", {"lr": 0.1})
SECOND = stage("second", {"x": 1}, {"of": FIRST})
THIRD = stage("third", {"x": 2}, {"of": SECOND, "also": FIRST})


class Runner:
    """Writes a file per stage and remembers what it was asked for."""

    def __init__(self, fail=()):
        self.ran, self.inputs, self.fail = [], {}, fail

    def __call__(self, asked, folder, inputs):
        self.ran.append(asked.name)
        self.inputs[asked.name] = dict(inputs)
        assert not (folder / MANIFEST).exists()
        (folder / "out.txt").write_text(asked.name)
        if asked.name in self.fail:
            raise RuntimeError(asked.name)
        return {"device": "cpu"}


def run(work, stages, runner=None, **more):
    said, runner = [], runner or Runner()
    execute(stages, work, runner, say=said.append, **more)
    return runner, said


class TestKeys:
    def test_everything_that_can_change_the_numbers_is_in_it(self):
        others = [
            replace(SECOND, kind="labels"),
            replace(SECOND, version=2),
            replace(SECOND, settings={"x": 2}),
            replace(SECOND, settings={"y": 1}),
            replace(SECOND, data="other data"),
            replace(SECOND, files={"/w": "abc"}),
            replace(SECOND, files={"/w": "abd"}),
            replace(SECOND, inputs={}),
            replace(SECOND, inputs={"from": FIRST}),
            replace(SECOND, inputs={"of": replace(FIRST, settings={"lr": 0.2})}),
        ]
        keys = {SECOND.key, *(other.key for other in others)}
        assert len(keys) == 11
        assert all(len(key) == 64 for key in keys)

    def test_names_and_the_order_of_settings_are_not(self):
        assert replace(SECOND, name="x").key == SECOND.key
        assert replace(SECOND, inputs={"of": replace(FIRST, name="y")}).key == SECOND.key
        assert stage(settings={"a": 1, "b": [2]}).key == stage(settings={"b": [2], "a": 1}).key
        assert stage(files={"/a": "1", "/b": "2"}).key == stage(files={"/c": "2", "/d": "1"}).key

    def test_a_tuple_is_a_list(self):
        assert digest({"a": (1, 2)}) == digest({"a": [1, 2]})

    def test_is_the_same_in_every_process(self):
        # printf '{"a":[1,null,true,0.1,"\\u00e4"]}' | sha256sum
        assert digest({"a": [1, None, True, 0.1, "ä"]})[:12] == "b7437444ce81"


class TestExecute:
    def test_runs_in_order_with_the_folders_of_the_inputs(self, tmp_path):
        runner, said = run(tmp_path, [FIRST, SECOND, THIRD])
        assert runner.ran == ["first", "second", "third"]
        assert runner.inputs["third"] == {"of": SECOND.folder(tmp_path), "also": FIRST.folder(tmp_path)}
        assert said == [f"{s.name}: start ({s.folder(tmp_path).name})" for s in (FIRST, SECOND, THIRD)]
        assert all(s.state(tmp_path) == "done" for s in (FIRST, SECOND, THIRD))
        assert FIRST.folder(tmp_path).name == f"cams-{FIRST.key[:10]}"

    def test_skips_what_is_done(self, tmp_path):
        run(tmp_path, [FIRST, SECOND])
        before = (SECOND.folder(tmp_path) / MANIFEST).read_text()
        runner, said = run(tmp_path, [FIRST, SECOND, THIRD])
        assert runner.ran == ["third"]
        assert said[0] == f"first: already done ({FIRST.folder(tmp_path).name})"
        assert (SECOND.folder(tmp_path) / MANIFEST).read_text() == before

    def test_a_stage_that_failed_is_partial_and_goes_on(self, tmp_path):
        with pytest.raises(RuntimeError):
            run(tmp_path, [FIRST, SECOND, THIRD], Runner(fail=("second",)))
        assert [s.state(tmp_path) for s in (FIRST, SECOND, THIRD)] == ["done", "partial", "to do"]
        assert (SECOND.folder(tmp_path) / "out.txt").exists()
        runner, said = run(tmp_path, [FIRST, SECOND, THIRD])
        assert runner.ran == ["second", "third"]
        assert said[1] == f"second: resuming ({SECOND.folder(tmp_path).name})"

    def test_a_changed_setting_makes_a_folder_beside_the_old_one(self, tmp_path):
        run(tmp_path, [FIRST, SECOND])
        changed = replace(SECOND, settings={"x": 5})
        assert run(tmp_path, [FIRST, changed])[0].ran == ["second"]
        assert len({FIRST.folder(tmp_path), SECOND.folder(tmp_path), changed.folder(tmp_path)}) == 3
        assert run(tmp_path, [FIRST, SECOND])[0].ran == []

    def test_recipes_share_the_folders_of_the_stages_they_share(self, tmp_path):
        one = [FIRST, SECOND]
        renamed = replace(FIRST, name="classifier")
        other = [renamed, replace(SECOND, settings={"x": 7}, inputs={"of": renamed})]
        run(tmp_path, one)
        runner, _ = run(tmp_path, other)
        assert runner.ran == ["second"]
        assert runner.inputs["second"] == {"of": FIRST.folder(tmp_path)}

    def test_the_same_work_twice_in_a_recipe_is_done_once(self, tmp_path):
        assert run(tmp_path, [FIRST, replace(FIRST, name="again")])[0].ran == ["first"]


class TestManifest:
    def test_says_what_was_done(self, tmp_path):
        run(tmp_path, [FIRST, SECOND])
        folder = SECOND.folder(tmp_path)
        found = read_json(folder / MANIFEST)
        assert {key: found[key] for key in ("stage", "kind", "version", "key", "settings", "inputs", "data")} == {
            "stage": "second", "kind": "cams", "version": 1, "key": SECOND.key, "settings": {"x": 1},
            "inputs": {"of": FIRST.key}, "data": "data",
        }  # fmt: skip
        assert (found["files"], found["bytes"], found["device"]) == (1, len("second"), "cpu")
        assert found["seconds"] >= 0
        assert found["finished"].endswith("+00:00")
        assert sorted(p.name for p in folder.iterdir()) == [LOCK, MANIFEST, "out.txt"]

    def test_is_written_last(self, tmp_path, monkeypatch):
        order = []
        monkeypatch.setattr(os, "replace", lambda part, path: order.append((part.name, path.name)))

        class Watching(Runner):
            def __call__(self, *asked):
                order.append("run")
                return super().__call__(*asked)

        run(tmp_path, [FIRST], Watching())
        assert order == ["run", (f"{MANIFEST}.part", MANIFEST)]
        assert FIRST.state(tmp_path) == "partial"  # for the file was never moved to its place

    def test_json_appears_whole_or_not_at_all(self, tmp_path):
        path = tmp_path / "x.json"
        write_json(path, {"a": 1})
        with pytest.raises(TypeError):
            write_json(path, {"a": object()})
        assert read_json(path) == {"a": 1}
        write_json(path, {"ü": [1, None]})
        assert json.loads(path.read_text("utf-8")) == {"ü": [1, None]}


class TestLock:
    def test_a_second_run_of_the_same_stage_is_refused(self, tmp_path):
        class Nested(Runner):
            def __call__(self, asked, folder, inputs):
                with pytest.raises(UserError, match=rf"^{folder}: another run is working on this stage"):
                    run(tmp_path, [asked])
                run(tmp_path, [THIRD])  # another stage may run at the same time
                return super().__call__(asked, folder, inputs)

        runner, _ = run(tmp_path, [FIRST], Nested())
        assert runner.ran == ["first"]
        assert [s.state(tmp_path) for s in (FIRST, THIRD)] == ["done", "done"]

    def test_is_released_after_a_failure(self, tmp_path):
        for _ in range(2):
            with pytest.raises(RuntimeError):
                run(tmp_path, [FIRST], Runner(fail=("first",)))
        assert run(tmp_path, [FIRST])[0].ran == ["first"]


class TestSeveralProcesses:
    def test_all_of_them_work_and_one_of_them_seals(self, tmp_path):
        run(tmp_path, [FIRST])
        barrier, runners, results = threading.Barrier(2, timeout=20), [Runner(), Runner()], [None, None]
        sealed = []

        class Slow(Runner):
            def __call__(self, asked, folder, inputs):
                facts = super().__call__(asked, folder, inputs)
                threading.Event().wait(0.05)
                sealed.append((folder / MANIFEST).exists())
                return facts

        runners[1] = Slow()

        def process(rank):
            results[rank] = run(tmp_path, [FIRST, SECOND, THIRD], runners[rank], main=rank == 0, wait=barrier.wait)

        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [runner.ran for runner in runners] == [["second", "third"]] * 2
        assert sealed == [False, False]  # the slower one had finished before the manifest appeared
        assert THIRD.state(tmp_path) == "done"
        assert results[0][1] == results[1][1]

    def test_one_that_does_not_lead_leaves_no_manifest(self, tmp_path):
        run(tmp_path, [FIRST], main=False)
        assert FIRST.state(tmp_path) == "partial"
