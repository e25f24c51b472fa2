"""The files that a training leaves: a log that can be continued and a checkpoint that is whole."""

import json

import pytest
import torch
from torch import nn

from tag2mask.engine import Devices, read_log
from tag2mask.engine.checkpoint import Log, load, save


class TestLog:
    def test_a_line_that_a_kill_cut_short_is_left_out(self, tmp_path):
        path = tmp_path / "train.jsonl"
        path.write_text('{"step": 0, "total": 1.5}\n{"step": 1, "total": 1.')
        assert read_log(path) == [{"step": 0, "total": 1.5}]
        log = Log(path, start=1, enabled=True)
        log.write({"step": 1, "total": 1.23456789})
        assert path.read_text() == '{"step": 0, "total": 1.5}\n{"step": 1, "total": 1.23457}\n'

    def test_rows_that_are_written_again_are_dropped(self, tmp_path):
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(5)))
        Log(path, start=3, enabled=True)
        assert [row["step"] for row in read_log(path)] == [0, 1, 2]

    def test_only_one_process_writes(self, tmp_path):
        Log(tmp_path / "train.jsonl", start=0, enabled=False).write({"step": 0})
        assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def devices():
    return Devices("cpu")


class TestCheckpoint:
    def test_nothing_yet(self, tmp_path, devices):
        assert load(tmp_path / "last.ckpt", nn.Linear(2, 1), None, devices.device) == (0, 0.0)

    def test_a_kill_during_the_write_leaves_the_previous_one(self, tmp_path, devices, monkeypatch):
        path, model = tmp_path / "last.ckpt", nn.Linear(2, 1)
        save(path, model, None, 3, 1.5, devices)

        def cut(state, file):
            file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            save(path, model, None, 6, 2.5, devices)
        assert load(path, nn.Linear(2, 1), None, devices.device) == (3, 1.5)
        monkeypatch.undo()
        save(path, model, None, 6, 2.5, devices)
        assert load(path, nn.Linear(2, 1), None, devices.device) == (6, 2.5)
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]

    def test_restores_model_and_optimiser(self, tmp_path, devices):
        def made():
            model = nn.Linear(2, 1)
            return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        model, optimizer = made()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        save(tmp_path / "last.ckpt", model, optimizer, 1, 0.5, devices)
        again, other = made()
        assert load(tmp_path / "last.ckpt", again, other, devices.device) == (1, 0.5)
        assert torch.equal(again.weight, model.weight)
        assert torch.equal(other.state_dict()["state"][0]["momentum_buffer"], torch.ones(1, 2))
