"""Overrides with which a full-size recipe runs in seconds on miniature data: the same stages, tiny networks."""

from __future__ import annotations

from tag2mask.recipe import written_stages

BACKBONE = "{name: test_resnet, weights: null, output_stride: 8}"
TRANSFORMER = "{name: test_vit, weights: null, output_stride: 8}"
NETS = {  # what of a network is too large for it
    "seam": ["size=32"],
    "eps": ["size=32"],
    "oaa": ["width=16", "std=0.05"],
    "irnet": ["freeze=false", "radius=3"],
    "affinitynet": ["radius=3"],
    "deeplab": ["width=16", "dilation=2"],
    "deeplab_v2": ["dilations=[1,2]"],
    "deeplab_v3_like": ["width=16", "dilations=[1,2]"],
}
METHODS = {"ppc": ["size=32"], "hsc": ["size=32"], "rcm_mam": ["dim=16", "scales=[1.0]"]}


def shrunk(name: str, *, seed: int = 0) -> list[str]:
    """["classify.train=...", ...] for a built-in recipe."""
    found = []
    for stage, given in written_stages(name).items():
        own = []
        if "net" in given:
            sizes = NETS.get(given["net"]["name"], [])
            backbone = TRANSFORMER if given["net"]["name"] == "mctformer" else BACKBONE
            own += [f"net.{setting}" for setting in [f"backbone={backbone}", *sizes]]
        for method in given.get("methods") or ():
            own += [f"methods.{method}.{setting}" for setting in METHODS.get(method, [])]
        if given["do"] == "clip_es":
            own.append("clip.weights=null")
        if "train" in given:
            own.append(f"train={{steps: 3, batch: 4, lr: 0.001, seed: {seed}}}")
        if "augment" in given:
            own.append("augment={crop: 48, long: [48, 64]}")
        if "scales" in given:
            own.append("scales=[1.0]")
        found += [f"{stage}.{setting}" for setting in own]
    return found
