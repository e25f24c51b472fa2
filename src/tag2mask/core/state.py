"""Which state a trained model needs to be used, and which only to be trained further."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class TrainingOnly(nn.Module):
    """A part that training needs and inference does not (a memory, a teacher).

    Its parameters and buffers are in every checkpoint, and in no exported weights.
    """


def inference_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without that of its `TrainingOnly` parts."""
    parts = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, TrainingOnly))
    return {name: value for name, value in model.state_dict().items() if not name.startswith(parts)}


def load_inference_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Read what `inference_state` gave; `TrainingOnly` parts stay as they are.

    Raises RuntimeError when names or shapes differ.
    """
    wanted = inference_state(model).keys()
    if wanted != state.keys():
        raise RuntimeError(f"missing: {sorted(wanted - state.keys())}, unexpected: {sorted(state.keys() - wanted)}")
    model.load_state_dict(dict(state), strict=False)
