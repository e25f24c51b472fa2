"""How long, how fast: the settings of a training, its optimiser and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from tag2mask.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings that change the numbers, hence part of a stage's key.

    epochs or steps: how long; give exactly one. batch: global, the same on 1 or 8 devices. lr: of the backbone; lr_new
    multiplies it for everything else (heads), lr_bias for biases and norms, which get no weight decay either.
    optimizer: sgd (with momentum, Nesterov's if nesterov), adam or adamw. power: lr falls as (1 -
    step/decay_steps)^power; 0 keeps it constant, "cosine" is (1 + cos(pi step/decay_steps))/2. decay_steps: null means
    all steps; after fewer, lr stays at its last value. drops: shares of the steps at each of which lr falls to a tenth
    as well. warmup: share of the steps over which lr first rises linearly. clip: largest gradient norm, 0 = no
    clipping. seed: of initial weights, order and augmentation.
    """

    epochs: float | None = None
    steps: int | None = None
    batch: int = 16
    lr: float = 0.01
    lr_new: float = 10.0
    lr_bias: float = 1.0
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    power: float | Literal["cosine"] = 0.9
    decay_steps: int | None = None
    drops: tuple[float, ...] = ()
    warmup: float = 0.0
    clip: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise UserError("give either epochs or steps")
        if self.batch < 1 or not 0 < (self.steps or self.epochs or 0) < math.inf:
            raise UserError("batch, steps and epochs must be positive")
        for name in ("lr", "lr_new", "lr_bias", "weight_decay", "momentum", "power", "clip", "seed"):
            value = getattr(self, name)
            if value != "cosine" and not 0 <= value < math.inf:
                raise UserError(f"{name}: {value} must be a number from 0")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise UserError(f"decay_steps: {self.decay_steps} must be positive; null means all steps")
        if not all(0 < share < 1 for share in self.drops):
            raise UserError(f"drops: {list(self.drops)} are shares of the steps, each must be between 0 and 1")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise UserError("nesterov: needs optimizer sgd and a momentum")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"warmup: {self.warmup} is a share of the steps, it must be in 0..1")

    def total_steps(self, images: int) -> int:
        """Number of optimiser steps on a training set of `images` images."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * images / self.batch))

    def lr_at(self, step: int, steps: int) -> float:
        """Factor on every group's learning rate at `step` (from 0)."""
        rising = int(self.warmup * steps)
        if step < rising:
            return (step + 1) / (rising + 1)
        falling = self.decay_steps or steps
        dropped = sum(step >= share * steps for share in self.drops)
        done = min(step, falling - 1) / falling
        left = (1 + math.cos(math.pi * done)) / 2 if self.power == "cosine" else (1 - done) ** self.power
        return float(left * 0.1**dropped)


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer | None:
    """Groups {backbone, new} x {weights, biases and norms}; None when nothing is to be trained.

    The backbone is every module that carries `trunk = True`. What a module names in `no_weight_decay()`, as timm's
    transformers do with tokens and position embeddings, is a group of its own without decay.
    """
    trunk = {id(p) for m in model.modules() if getattr(m, "trunk", False) is True for p in m.parameters()}
    kept = {id(m.get_parameter(name)) for m in model.modules() for name in _undecayed(m)}
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            groups.setdefault((id(p) not in trunk, p.ndim < 2, id(p) in kept), []).append(p)
    described = [
        {
            "params": parameters,
            "factor": (training.lr_new if new else 1.0) * (training.lr_bias if bias else 1.0),
            "weight_decay": 0.0 if bias or whole else training.weight_decay,
        }
        for (new, bias, whole), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    if not described:
        return None
    if training.optimizer == "adamw":
        return torch.optim.AdamW(described, lr=training.lr)
    if training.optimizer == "adam":
        return torch.optim.Adam(described, lr=training.lr)
    return torch.optim.SGD(described, lr=training.lr, momentum=training.momentum, nesterov=training.nesterov)


def _undecayed(module: nn.Module) -> list[str]:
    """The parameters of a module that it names in `no_weight_decay()` and has."""
    named = getattr(module, "no_weight_decay", None)
    names = set(named()) if callable(named) else set()
    return [name for name, _ in module.named_parameters() if name in names]
