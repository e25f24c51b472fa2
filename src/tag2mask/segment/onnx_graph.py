"""A segmenter as an ONNX graph for other programs: the photo goes in as it is, normalisation and resizing are inside.

    input   "image"   uint8    [1 3 height width]     RGB in 0..255, any height and width
    output  "scores"  float32  [1 1+K height width]   probabilities, background first
    output  "mask"    uint8    [1 height width]       the best of them: 0 background, 1..K the classes

The metadata of the model hold JSON: classes (K names), palette (1+K colours), scales, flip; and tag2mask, the version.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag2mask.backbones.vit import ViT
from tag2mask.data.augment import normalise
from tag2mask.data.index_png import voc_palette
from tag2mask.errors import UserError
from tag2mask.segment.deeplab import DeepLab
from tag2mask.segment.onnx_model import needed

LIMIT = 2**31  # bytes of one ONNX file


class Graph(nn.Module):
    """What is exported: photo [1 3 H W] uint8 -> (scores [1 1+K H W], mask [1 H W] uint8).

    The same as `segment.predict` and argmax, written so that height and width may stay open.
    """

    def __init__(self, net: DeepLab, scales: Sequence[float], flip: bool) -> None:
        super().__init__()
        self.net, self.scales, self.flip = net, tuple(scales), flip

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and mask."""
        height, width = image.shape[-2:]
        images, found = normalise(image), []
        for scale in self.scales:
            inner: list[Any] = [torch.sym_max(32, rounded(side, scale)) for side in (height, width)]
            scaled = F.interpolate(images, size=inner, mode="bilinear", align_corners=False)
            scores = self.net(scaled)
            if self.flip:
                scores = (scores + self.net(scaled.flip(-1)).flip(-1)) / 2
            align = self.net.align_corners
            found.append(F.interpolate(scores, size=(height, width), mode="bilinear", align_corners=align))
        probabilities = torch.stack(found).mean(dim=0).softmax(dim=1) if len(found) > 1 else found[0].softmax(dim=1)
        return probabilities, probabilities.argmax(dim=1).to(torch.uint8)


def rounded(side: int, scale: float) -> int:
    """round(side * scale), halves to the even number, with the operations that ONNX has for sizes.

    `side` may be symbolic, so nothing may be decided by its value. The scale is taken as a fraction.
    """
    if scale == 1:
        return side
    above, below = Fraction(scale).limit_denominator(1000).as_integer_ratio()
    up = (2 * side * above + below) // (2 * below)
    down = (2 * side * above + below - 1) // (2 * below)  # differs from `up` for a half alone
    return up - (up - down) * (up % 2)


def onnx_graph(net: DeepLab, classes: Sequence[str], *, scales: Sequence[float], flip: bool, version: str) -> bytes:
    """The content of an ONNX file (see the module). The network must be on the CPU, in evaluation mode.

    Raises UserError if the extra [onnx] is missing, or the network cannot be written for images of any size.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        needed(module)
    if isinstance(net.backbone, ViT):  # resizes its position embeddings by decisions on the size of the image
        raise UserError(
            "export onnx: a segmenter on a ViT cannot be exported; train one on a CNN (--backbone resnet50)"
        )
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                Graph(net, scales, flip).eval(), (torch.zeros(1, 3, 131, 167, dtype=torch.uint8),), dynamo=True,
                input_names=["image"], output_names=["scores", "mask"], dynamic_shapes=(sizes,), optimize=True,
                verbose=False,
            )  # fmt: skip
        model = program.model_proto
    except Exception as error:  # of three compilers in a row; each has its own
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        kind = type(net.backbone).__name__
        raise UserError(
            f"export onnx: a segmenter on a {kind} cannot be written for images of any size ({reason.strip()})"
        ) from None
    _name_sizes(model)
    facts = {
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "palette": json.dumps(voc_palette()[: len(classes) + 1].tolist()),
        "scales": json.dumps(list(scales)),
        "flip": json.dumps(flip),
        "tag2mask": version,
    }
    _describe(model, facts)
    if model.ByteSize() >= LIMIT:
        raise UserError("export onnx: the network is larger than the 2 GB that a file can hold; take a smaller one")
    content: bytes = model.SerializeToString()
    return content


def _name_sizes(model: Any) -> None:
    """Open sizes get names; those of everything in between are left out, a reader infers them."""
    del model.graph.value_info[:]
    for value in [*model.graph.input, *model.graph.output]:
        sizes = value.type.tensor_type.shape.dim
        sizes[-2].dim_param, sizes[-1].dim_param = "height", "width"


def _describe(model: Any, facts: Mapping[str, str]) -> None:
    model.producer_name, model.producer_version = "tag2mask", facts["tag2mask"]
    for node in model.graph.node:  # paths and lines of the program that wrote it are nobody's business
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.input, *model.graph.output]:
        del value.metadata_props[:]
    del model.metadata_props[:]
    for key, text in facts.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, text
