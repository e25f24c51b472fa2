"""A segmenter in an ONNX file, applied with onnxruntime on the CPU."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

from tag2mask.errors import UserError


def needed(name: str) -> ModuleType:
    """A module of the extra [onnx]. Raises UserError, with the command that installs it, where it is missing."""
    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"ONNX needs {name}, which is not installed: pip install 'tag2mask[onnx]'") from None


class OnnxModel:
    """A file that `tag2mask export onnx` wrote, or its bytes.

    classes: the names of the mask values 1..K.
    Raises UserError if it is no such file, or onnxruntime is missing.
    """

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        self.path, runtime = path, needed("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # the same number of threads as everything else
        options.log_severity_level = 4  # what goes wrong is raised, too
        try:
            given = path.read_bytes() if content is None else content
            self._session = runtime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror or error})") from None
        except Exception as error:  # onnxruntime has a family of errors of its own without a common base
            reason = _first_line(error)
            raise UserError(f"{path}: is no ONNX model, or a damaged one ({reason}); export it again") from None
        facts = self._session.get_modelmeta().custom_metadata_map
        names = ([x.name for x in self._session.get_inputs()], [x.name for x in self._session.get_outputs()])
        if "classes" not in facts or names != (["image"], ["scores", "mask"]):
            raise UserError(f"{path}: is no ONNX model of ours; `tag2mask export onnx` writes one")
        self.classes: tuple[str, ...] = tuple(json.loads(facts["classes"]))
        self.facts: dict[str, str] = dict(facts)

    def scores(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities [1 1+K H W] of one photo [1 3 H W] RGB."""
        return self.outputs(image)[0]

    def outputs(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """(scores [1 1+K H W], mask [1 H W]) of one photo [1 3 H W] RGB."""
        try:
            scores, mask = self._session.run(["scores", "mask"], {"image": image})
        except Exception as error:
            reason = _first_line(error)
            raise UserError(f"{self.path}: onnxruntime cannot compute it ({reason}); export it again") from None
        return scores, mask


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
