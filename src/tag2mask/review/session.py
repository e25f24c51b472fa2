"""What there is to review: images from the least to the most certain, their masks and maps, and what was decided."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from tag2mask import progress
from tag2mask.analyse.work import Work, open_work
from tag2mask.data.decisions import (
    DECISIONS,
    Decision,
    about_path,
    append_decision,
    decisions_path,
    mend,
    read_decisions,
    review_folder,
    reviewed_mask,
)
from tag2mask.data.images import read_mask
from tag2mask.data.maps import Maps, map_path, read_maps
from tag2mask.data.source import Mask
from tag2mask.errors import UserError
from tag2mask.export import voc_palette, write_mask
from tag2mask.ops.cams import best_class, to_mask
from tag2mask.pipeline import make_folder, only_one, read_json, write_json
from tag2mask.review.certainty import certainty, constant_of
from tag2mask.stages.background import chosen
from tag2mask.stages.labels import MASKS, mask_path

LONGEST = 1600  # pixels of a side on the page; masks are saved in full size


class Fault(ValueError):
    """A request that asks for what there is not; the text says what."""


class Review:
    """The masks of one stage. Images are numbered by rising certainty. Methods may be called from several threads.

    Thresholds: at a pixel the largest map wins, if it is above the background score of its class; with one score for
    all classes this is the rule of the stage `labels`.
    """

    def __init__(self, work: Work, stage: str) -> None:
        """Reads what was decided; the first time it looks at the maps of every image."""
        entry, manifest = work.record["stages"][stage], work.manifest(stage)
        self.path, self.record, self.stage, self.kind = work.path, work.record, stage, str(entry["kind"])
        self.classes = work.classes
        self.samples = work.source.split("train")
        self._masks, self._maps = work.folder(stage), work.folder(entry["inputs"]["of"])
        self.score = _constant(self._masks, manifest["settings"]["background"])
        self._writing = threading.Lock()
        about = self._about()
        self.class_scores: dict[str, float] = {
            name: score for name, score in about["classes"].items() if name in self.classes
        }
        self._certainty: dict[str, float] = about["certainty"]
        self.order = sorted(range(len(self.samples)), key=lambda i: (self._certainty[self.samples.names[i]], i))
        mend(decisions_path(self.path))
        self._decisions = read_decisions(decisions_path(self.path))
        self._heal()

    def state(self) -> dict[str, Any]:
        """Everything that the page needs to know besides pictures."""
        palette = voc_palette()
        return {
            "title": self.record["title"], "stage": self.stage, "work": self.path.resolve().name,
            "crf": self.kind == "crf", "score": self.score,
            "classes": [{"name": name, "colour": palette[k + 1].tolist()} for k, name in enumerate(self.classes)],
            "classScores": self.class_scores,
            "images": [self._row(index) for index in self.order],
        }  # fmt: skip

    def photo(self, number: int) -> bytes:
        """The image as JPEG, at most LONGEST pixels wide and high."""
        image = PIL.Image.fromarray(self.samples.image(self._index(number)))
        image = image.resize(view_size(image.height, image.width)[::-1], PIL.Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=93, subsampling=0)
        return encoded.getvalue()

    def mask(self, number: int) -> bytes:
        """The mask that the run made, as rows of class indices, in the size of the photo; 8 bytes of header (h, w)."""
        path = mask_path(self._masks, self.samples.names[self._index(number)])
        mask = read_mask(path, len(self.classes))
        height, width = view_size(*mask.shape)
        shown = PIL.Image.fromarray(mask).resize((width, height), PIL.Image.Resampling.NEAREST)
        return np.array([height, width], "<u4").tobytes() + np.asarray(shown).tobytes()

    def maps(self, number: int) -> bytes:
        """The soft maps as they are stored: header of 12 bytes (P, h, w), P class indices of 4 bytes, half floats."""
        stored = self._stored(self._index(number))
        head = np.array([*stored.maps.shape, *stored.classes], "<u4")
        return head.tobytes() + stored.maps.astype("<f2").tobytes()

    def decide(self, number: int, decision: str, scores: Mapping[str, float]) -> None:
        """Store a decision on the mask made with these background scores of all its tags, or on the run's if none."""
        index = self._index(number)
        name = self.samples.names[index]
        try:
            value = Decision(decision, scores)
        except ValueError as fault:
            raise Fault(str(fault)) from None
        if scores and set(scores) != set(self._tags(index)):
            raise Fault(f"{name}: scores are given for all its tags or for none")
        mask = self._made(index, scores) if scores else None
        with self._writing:
            append_decision(decisions_path(self.path), name, value)
            self._decisions[name] = value
            self._put(name, mask)

    def set_class(self, name: str, score: float | None) -> None:
        """Store the background score of a class for all images that are undecided; None takes it back."""
        if name not in self.classes:
            raise Fault(f"there is no class {name!r}")
        try:
            Decision(scores={} if score is None else {name: score})
        except ValueError as fault:
            raise Fault(str(fault)) from None
        with self._writing:
            if score is None:
                self.class_scores.pop(name, None)
            else:
                self.class_scores[name] = score
            self._write_about(self.class_scores, self._certainty)

    def counts(self) -> dict[str, int]:
        """How many images have each decision."""
        found = dict.fromkeys(DECISIONS, 0)
        for name in self.samples.names:
            found[self._decisions.get(name, Decision()).decision] += 1
        return found

    def _row(self, index: int) -> dict[str, Any]:
        name = self.samples.names[index]
        decided, tags = self._decisions.get(name, Decision()), self._tags(index)
        scores = dict(decided.scores) if set(decided.scores) == set(tags) else {}
        return {
            "name": name, "tags": tags, "certainty": round(self._certainty[name], 4), "decision": decided.decision,
            "scores": scores,
        }  # fmt: skip

    def _tags(self, index: int) -> list[str]:
        return [self.classes[k] for k in np.flatnonzero(self.samples.tags[index])]

    def _index(self, number: int) -> int:
        if not 0 <= number < len(self.order):
            raise Fault(f"there is no image {number}")
        return self.order[number]

    def _stored(self, index: int) -> Maps:
        return read_maps(map_path(self._maps, self.samples.names[index]))

    def _made(self, index: int, scores: Mapping[str, float]) -> Mask:
        """The mask in full size, from the maps and the background scores by class name."""
        stored = self._stored(index)
        maps = stored.full()
        ground = torch.tensor([scores[self.classes[k]] for k in stored.classes])[best_class(maps)[0]]
        mask: Mask = to_mask(maps, torch.from_numpy(stored.classes), ground).numpy()
        return mask

    def _put(self, name: str, mask: Mask | None) -> None:
        path = reviewed_mask(self.path, name)
        if mask is None:
            path.unlink(missing_ok=True)
        else:
            write_mask(path, mask)

    def _heal(self) -> None:
        """Masks follow their line: a kill between the two is made good, which can be at the last line alone."""
        position = {name: index for index, name in enumerate(self.samples.names)}
        last = next(reversed(self._decisions), None)
        for name, decided in self._decisions.items():
            if name not in position:
                continue
            there, scores = reviewed_mask(self.path, name).exists(), decided.scores
            if scores and set(scores) == set(self._tags(position[name])):
                if not there or name == last:
                    self._put(name, self._made(position[name], scores))
            elif there:
                self._put(name, None)

    def _about(self) -> dict[str, Any]:
        """review.json: whose masks these are, thresholds of classes, certainties. Raises UserError for other masks."""
        path = about_path(self.path)
        key = self._masks.name
        try:
            found: dict[str, Any] = read_json(path) if path.exists() else {}
        except ValueError:
            raise UserError(f"{path}: is damaged; remove it, the decisions are not in it") from None
        if found and found.get("masks") != key:
            raise UserError(
                f"{path.parent}: holds decisions on the masks of {found.get('masks')}, not of {key}; "
                "give their stage with --stage, or move that folder away"
            )
        known, names = dict(found.get("certainty", {})), self.samples.names
        todo = [name for name in names if name not in known]
        for name in progress.track(todo, "certainty", len(todo)):
            known[name] = round(certainty(read_maps(map_path(self._maps, name)), self.score), 6)
        if todo:
            self._write_about(found.get("classes", {}), known)
        return {"classes": found.get("classes", {}), "certainty": known}

    def _write_about(self, classes: Mapping[str, float], known: Mapping[str, float]) -> None:
        about = {"masks": self._masks.name, "classes": dict(classes), "certainty": dict(known)}
        write_json(about_path(self.path), about)


@contextmanager
def open_review(work: Path, name: str | None = None, stage: str | None = None) -> Iterator[Review]:
    """The review of a stage of masks: the one called `stage`, else the last finished one, of run `name` or the newest.

    Raises UserError if there is none, or if it is open in another process.
    """
    found = open_work(work, name)
    picked = found.pick(MASKS, stage)
    folder = review_folder(work)
    make_folder(folder, "review folder")
    with only_one(folder, f"{folder}: open in another `tag2mask review`; use that page, or stop it first"):
        yield Review(found, picked)


def view_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of an image on the page."""
    shrink = min(1.0, LONGEST / max(height, width))
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def _constant(folder: Path, background: Mapping[str, Any]) -> float:
    """The background score that a stage in this folder used, as a constant."""
    if background.get("alpha") is not None:
        return round(constant_of(float(background["alpha"])), 4)
    choice = chosen(folder)
    return float(background["score"] if choice is None else choice["threshold"])
