"""Files that a training leaves: checkpoints that appear whole or not at all, and the log."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tag2mask.engine.devices import Devices


def save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, step: int, seconds: float, devices: Devices
) -> None:
    """Write a checkpoint after `step` finished steps; a kill during the write leaves the previous one whole."""
    if devices.main:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict() if optimizer else {},
            "step": step,
            "seconds": seconds,
        }
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    devices.wait()


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device
) -> tuple[int, float]:
    """Restore a checkpoint if there is one. Returns (finished steps, seconds they took)."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), float(state["seconds"])


class Log:
    """One JSON object a line. A resumed run drops the lines that it is going to write again."""

    def __init__(self, path: Path, start: int, enabled: bool) -> None:
        self.path, self.enabled = path, enabled
        if enabled and path.exists():
            kept = [row for row in read_log(path) if row["step"] < start]
            path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row, rounded to six significant digits."""
        if self.enabled:
            short = {k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in row.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(short) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
