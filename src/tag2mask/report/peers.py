"""Comparable runs, found by the manifests in work folders: the same stage with other seeds, or without methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tag2mask.pipeline import MANIFEST, digest, read_json

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """A finished stage: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def kind(self) -> str:
        """What the stage does."""
        return str(self.manifest["kind"])


class Peers:
    """All finished stages in some work folders. A stage that several folders have is counted once."""

    def __init__(self, works: Sequence[Path]) -> None:
        self.made: dict[str, Made] = {}
        for work in works:
            for path in sorted(work.glob(f"*/{MANIFEST}")):
                try:
                    manifest = read_json(path)
                except ValueError:
                    continue  # damaged: as good as not there
                self.made.setdefault(manifest["key"], Made(path.parent, manifest))

    def like(self, key: str, *, methods: bool = True) -> list[Made]:
        """The stages that differ from that with this key in the seeds of their trainings alone, itself first.

        methods: False looks for those that also have no methods; then itself is left out unless it has none.
        """
        wanted = self.signature(key, methods=methods)
        if wanted is None:
            return []
        kind = self.made[key].kind
        found = [made for k, made in self.made.items() if made.kind == kind and self.signature(k) == wanted]
        return sorted(found, key=lambda made: (made.manifest["key"] != key, self.seeds(made), str(made.folder)))

    def signature(self, key: str, *, methods: bool = True) -> str | None:
        """A digest of all that led to a stage but seeds, and methods if not wanted; None if some of it is not there."""
        if key not in self.made:
            return None
        manifest = self.made[key].manifest
        settings = seedless(manifest["settings"])
        if not methods and "methods" in settings:
            settings["methods"] = {}
        inputs = {name: self.signature(k, methods=methods) for name, k in manifest["inputs"].items()}
        if None in inputs.values():
            return None
        return digest([manifest["kind"], manifest["version"], settings, inputs, manifest["data"]])

    def chain(self, key: str) -> Iterator[Made]:
        """A stage and all that led to it, the first ones first; those that are not there are left out."""
        if key in self.made:
            for above in self.made[key].manifest["inputs"].values():
                yield from self.chain(above)
            yield self.made[key]

    def seeds(self, made: Made) -> str:
        """The seeds of all trainings that led to a stage: "0", or "0, 1" where they differ."""
        trained = (step.manifest["settings"].get("train") for step in self.chain(made.manifest["key"]))
        seeds = [train["seed"] for train in trained if train is not None]
        return ", ".join(str(seed) for seed in dict.fromkeys(seeds))

    def methods(self, key: str) -> dict[str, str]:
        """name -> baseline of the trainings with methods that led to a stage; the name is the method's."""
        found = {}
        for step in self.chain(key):
            for name in step.manifest["settings"].get("methods") or ():
                found[name] = str(step.manifest["settings"]["net"]["name"])
        return found


def seedless(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the seed of their training."""
    train = settings.get("train")
    if train is None:
        return dict(settings)
    return {**settings, "train": {key: value for key, value in train.items() if key != "seed"}}
