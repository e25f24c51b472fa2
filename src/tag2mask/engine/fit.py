"""The one training loop: it trains any module whose forward(batch, progress) returns a dict of losses.

Classifiers, affinity networks and segmenters all go through here. It knows no image, class or CAM.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tag2mask import progress
from tag2mask.core import Losses, Progress
from tag2mask.engine.checkpoint import Log, load, save
from tag2mask.engine.devices import Devices
from tag2mask.engine.stream import StepSampler, stream
from tag2mask.engine.training import Training, make_optimizer
from tag2mask.errors import Interrupted, UserError
from tag2mask.ops.gather import mean_over_processes
from tag2mask.ops.seed import seed_of


class Trainable(Protocol):
    """What `fit` needs of a module besides its losses."""

    def on_epoch_start(self, epoch: int) -> None:
        """Slow updates, before the first step of an epoch."""

    def after_step(self) -> None:
        """Fast updates, after every step of the optimiser."""


def fit(
    model: nn.Module,
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], Any],
    training: Training,
    out: Path,
    devices: Devices,
    *,
    label: str = "train",
    workers: int = 0,
    save_every: int = 200,
    log_every: int = 10,
) -> None:
    """Train `model` in place; `out` receives last.ckpt (resumed from if it exists) and train.jsonl.

    `dataset[(epoch, index)]` is one sample, `collate` makes a batch with `.to(device)`. Everything random in step
    s depends on (seed, s) alone, so a run that was killed ends bit-identical to one that was not (on a CPU).
    Raises UserError if the loss is no longer finite, Interrupted after Ctrl-C (130) or SIGTERM (75).
    """
    images = len(cast(Any, dataset))
    steps = training.total_steps(images)
    if training.batch % devices.world:
        raise UserError(f"train.batch: {training.batch} does not divide over {devices.world} processes")
    if devices.world > 1 and devices.device.type == "cuda":  # batch norm over the global batch; a no-op where frozen
        from timm.layers import convert_sync_batchnorm  # torch's own drops the activation inside timm's norms

        model = convert_sync_batchnorm(model)
    wrapped = devices.prepare(model)
    hooks = cast(Trainable, model)
    optimizer = make_optimizer(model, training)
    parameters = [p for p in model.parameters() if p.requires_grad]
    start, seconds = load(out / "last.ckpt", model, optimizer, devices.device)

    sampler = StepSampler(
        images, training.batch, start=start, total=steps, seed=training.seed, rank=devices.rank, world=devices.world
    )
    batches = stream(dataset, sampler, collate, workers=workers, pin=devices.device.type == "cuda")
    log = Log(out / "train.jsonl", start, enabled=devices.main)
    clock = time.monotonic() - seconds
    model.train()
    with _stop_signals() as stop, progress.bar(label, steps, start, devices.main) as advance:
        for step, batch in enumerate(batches, start):
            torch.manual_seed(seed_of(training.seed, step, devices.rank))
            epoch = step * training.batch // images
            if step == 0 or epoch != (step - 1) * training.batch // images:
                hooks.on_epoch_start(epoch)

            now = Progress(step * training.batch / images, step / steps, seed_of(training.seed, step))
            losses: Losses = wrapped(batch.to(devices.device), now)
            total = torch.stack(list(losses.values())).sum() if losses else torch.zeros((), device=devices.device)
            factor = training.lr_at(step, steps)
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] = training.lr * group["factor"] * factor
                optimizer.zero_grad()
                devices.backward(total)
                if training.clip:
                    nn.utils.clip_grad_norm_(parameters, training.clip)
                optimizer.step()
            hooks.after_step()

            done = step + 1
            note = ""
            if step % log_every == 0 or done == steps:
                values = _mean_losses(total, losses)
                if not all(map(_finite, values.values())):
                    raise UserError(f"{label}: the loss is {values} at step {step}; lower train.lr or set train.clip")
                row = {"step": step, "epoch": step * training.batch / images, "lr": training.lr * factor}
                log.write(row | {"seconds": time.monotonic() - clock} | values)
                note = f"loss {values['total']:.4f}"
            signalled = stop() if devices.world == 1 or step % log_every == 0 else 0
            if devices.world > 1 and step % log_every == 0:
                signalled = signal.SIGTERM if devices.any(bool(signalled)) else 0
            if done % save_every == 0 or done == steps or signalled:
                save(out / "last.ckpt", model, optimizer, done, time.monotonic() - clock, devices)
            advance(note=note)
            if signalled:
                raise Interrupted(130 if signalled == signal.SIGINT else 75)


def _mean_losses(total: Tensor, losses: Losses) -> dict[str, float]:
    """All losses as numbers, the mean over processes, in one transfer."""
    stacked = mean_over_processes(torch.stack([total.detach(), *(loss.detach() for loss in losses.values())]))
    return dict(zip(["total", *losses], stacked.tolist(), strict=True))


def _finite(value: float) -> bool:
    return value - value == 0


@contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """Within the block Ctrl-C and SIGTERM only leave a note; calling the value tells which came (0 = none)."""
    came = 0

    def remember(number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = number

    handled = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, remember) for number in handled}
    try:
        yield lambda: came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
