"""Where pre-trained weights come from, and how files with weights are read into a network.

All weights in the table were learnt on ImageNet, whose images may be used for non-commercial research only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tag2mask.backbones import mxnet
from tag2mask.errors import UserError

Tensors = Mapping[str, Tensor]
HUB_HELP = 'give an existing file, "hub", or null (from scratch)'


@dataclass(frozen=True)
class Published:
    """Weights that somebody published.

    file: its name. fits: name of the backbone. checksum: "method:digits", of which publishers often give the first
    eight only. hub: whether `weights: hub` gets the same without a file.
    """

    file: str
    fits: str
    url: str
    checksum: str
    licence: str
    hub: bool = False


TORCHVISION, BSD = "https://download.pytorch.org/models", "BSD-3-Clause (torchvision)"
PUBLISHED = (
    Published(
        "ilsvrc-cls_rna-a1_cls1000_ep-0001.params",
        fits="resnet38",
        url="https://drive.google.com/file/d/15F13LEL5aO45JU-j45PYjzv5KW5bn_Pn/view (a copy of Model A1 of "
        "https://github.com/itijyou/ademxapp)",
        checksum="md5:ff21f45d6bf03284100dcbec571edfad",
        licence="Apache-2.0 (the authors' repository)",
    ),
    Published(
        "resnet101s-03a0f310.pth",
        fits="resnet101s",
        url="https://s3.us-west-1.wasabisys.com/encoding/models/resnet101s-03a0f310.zip (unpack it)",
        checksum="sha1:03a0f310d6447880f1b22a83bd7d1aa7fc702c6e",
        licence="MIT (PyTorch-Encoding)",
    ),
    Published(
        "resnet101-63fe2227.pth", "resnet101.tv_in1k", f"{TORCHVISION}/resnet101-63fe2227.pth",
        "sha256:63fe2227", BSD, hub=True,
    ),
    Published(
        "resnet50-0676ba61.pth", "resnet50.tv_in1k", f"{TORCHVISION}/resnet50-0676ba61.pth",
        "sha256:0676ba61", BSD, hub=True,
    ),
    Published(
        "vgg16-397923af.pth", "vgg16.tv_in1k", f"{TORCHVISION}/vgg16-397923af.pth",
        "sha256:397923af", BSD, hub=True,
    ),
)  # fmt: skip


def load_weights(
    model: nn.Module, path: Path, *, fits: str, rename: Callable[[Tensors], Tensors] | None = None
) -> None:
    """Weights of the same architecture into `model`, in place; what else is in the file (a classifier) is left out.

    fits: name of the backbone, to say where its weights are. rename: from the names of an MXNet file to the model's.
    Raises UserError if the file is missing, unreadable, damaged, or of another architecture.
    """
    tensors = read_weights(path, fits=fits)
    if path.suffix == ".params" and rename is not None:
        tensors = rename(tensors)
    fill(model, tensors, str(path))


def load_from_hub(model: nn.Module, name: str, *, keep: Callable[[Tensors, nn.Module], Tensors] | None = None) -> None:
    """timm's weights of the model `name` into `model`, in place; `keep` picks out of them what is to be loaded.

    Raises UserError if timm has none, or they cannot be downloaded.
    """
    import timm
    from timm.models import load_pretrained

    source = getattr(model, "pretrained_cfg", None) or timm.get_pretrained_cfg(name).to_dict()
    if not source.get("hf_hub_id") and not source.get("url"):
        raise UserError(f"backbone.weights: timm has no weights for {name}; use null (from scratch) or a file")
    try:
        if keep is None:
            load_pretrained(model, num_classes=0)
        else:
            load_pretrained(model, source, num_classes=0, filter_fn=keep)
    except Exception as error:  # the hub client raises a dozen kinds: offline, proxy, quota, moved
        address = f"https://huggingface.co/{source['hf_hub_id']}" if source.get("hf_hub_id") else source["url"]
        raise UserError(
            f"backbone.weights: cannot download the weights of {name} ({type(error).__name__}); get model.safetensors "
            f"from {address} on a machine with network and give its path as weights, or set weights to null"
        ) from None


def fill(model: nn.Module, tensors: Tensors, source: str) -> None:
    """Copy tensors of the names of `model` into it. Raises UserError if one is missing or of another shape."""
    wanted = model.state_dict()
    usable = {name: x for name, x in tensors.items() if name in wanted and x.shape == wanted[name].shape}
    missing = [name for name in wanted if name not in usable and not name.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"backbone.weights: {source} does not fit {type(model).__name__}: {len(missing)} of {len(wanted)} tensors "
            f"are missing or of another shape, the first is {missing[0]}; is it of another model?"
        )
    model.load_state_dict(usable, strict=False)


def read_weights(path: Path, *, fits: str = "") -> Tensors:
    """The tensors of a .safetensors, .pth or MXNet .params file by name; no pickled object is run.

    Raises UserError if the file is missing (with where to get it, if it is a published one of the backbone `fits`),
    damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"backbone.weights: no file {path}; {how_to_get(path, fits)}")
    _verify(path)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif path.suffix == ".params":
            state = {name: torch.from_numpy(x.copy()) for name, x in mxnet.read(path).items()}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
        return {name: x for name, x in state.items() if isinstance(x, Tensor)}
    except mxnet.MalformedError as error:
        raise UserError(f"backbone.weights: {path} is no MXNet file of arrays, or a damaged one: {error}") from None
    except Exception as error:  # a broken or crafted file provokes a dozen kinds
        raise UserError(
            f"backbone.weights: {path} is broken or holds more than tensors, it is not loaded "
            f"({type(error).__name__}); save the model's state_dict as .safetensors"
        ) from None


def how_to_get(path: Path, fits: str) -> str:
    """What to do where the file `path` with weights for the backbone `fits` is missing."""
    named = [p for p in PUBLISHED if p.file == path.name]
    suited = [p for p in PUBLISHED if p.fits == fits and not p.hub]
    if named:
        hub = f", or set weights: hub with name: {named[0].fits}" if named[0].hub else ""
        return f"get it from {named[0].url} ({named[0].licence}) and put it there{hub}"
    if suited:
        return f"{HUB_HELP}; {suited[0].file} is at {suited[0].url} ({suited[0].licence})"
    return HUB_HELP


def convert(source: Path, out: Path, rename: Callable[[Tensors], Tensors]) -> int:
    """Write the weights of `source` as safetensors, whole or not at all, and return how many tensors there are.

    rename: from the names of an MXNet file to those of the network, as in `load_weights`. Raises UserError as
    `read_weights` does, and if `out` is to be something else.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: the result is a .safetensors file; name it so")
    if not source.is_file():
        found = [p for p in PUBLISHED if p.file == source.name]
        raise UserError(f"{source}: no such file" + (f"; get it from {found[0].url}" if found else ""))
    tensors = read_weights(source)
    if source.suffix == ".params":
        tensors = rename(tensors)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    save_file({name: x.contiguous() for name, x in tensors.items()}, part)
    part.replace(out)
    return len(tensors)


def _verify(path: Path) -> None:
    """Raises UserError if a file that bears a published name has another checksum."""
    for published in PUBLISHED:
        if published.file == path.name:
            method, _, digits = published.checksum.partition(":")
            with path.open("rb") as file:
                found = hashlib.file_digest(file, method).hexdigest()
            if not found.startswith(digits):
                raise UserError(
                    f"backbone.weights: {path} is damaged or another file, its {method} is {found}, not {digits}; "
                    f"get it again from {published.url}, or give yours another name"
                )
