"""A recipe: the pipeline written out as YAML, flat, checked against the signatures of what it names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import yaml

from tag2mask import schema
from tag2mask.data.coco14 import Coco14
from tag2mask.data.folder import Folder
from tag2mask.data.scenes import Scenes
from tag2mask.data.source import CheckedSource
from tag2mask.data.voc12 import Voc12
from tag2mask.errors import UserError
from tag2mask.papers import Paper, read_paper, read_supervision
from tag2mask.pipeline import Stage
from tag2mask.schema import Settings
from tag2mask.stages import STAGES

SOURCES = {"scenes": Scenes, "folder": Folder, "voc12": Voc12, "coco14": Coco14}
TOP = ("title", "paper", "supervision", "data", "stages")
WORDS = "a number, yes, no, on or off"  # what YAML does not read as a word


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: every default filled in, every name known, every input an earlier stage.

    stages: name -> {"do": kind, **settings}, in order. paper: the rows of a paper's tables that it gives.
    supervision: what it learns from beyond image tags and the weights of its networks. Neither changes a stage.
    """

    name: str
    title: str
    data: Settings
    stages: dict[str, Settings]
    paper: Paper | None = None
    supervision: tuple[str, ...] = ()

    def source(self) -> CheckedSource:
        """The data set; cheap, nothing is decoded. Raises UserError for what can be seen at a glance."""
        source: CheckedSource = schema.make(SOURCES[self.data["name"]], self.data)
        return source

    def plan(self, fingerprint: str) -> list[Stage]:
        """The stages ready to run on the data with this fingerprint."""
        planned: dict[str, Stage] = {}
        for name, settings in self.stages.items():
            kind = STAGES[settings["do"]]
            inputs = input_names(settings["do"])
            used = {key: value for key, value in settings.items() if key != "do" and key not in inputs}
            planned[name] = Stage(
                name=name,
                kind=settings["do"],
                version=kind.version,
                settings=used,
                inputs={parameter: planned[settings[parameter]] for parameter in inputs},
                data=fingerprint,
                files={str(path): _digest(path) for path in schema.files(kind.function, used)},
            )
        return list(planned.values())

    def as_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML that can be run again."""
        head: dict[str, Any] = {"title": self.title}
        if self.paper:
            head["paper"] = asdict(self.paper)
        if self.supervision:
            head["supervision"] = list(self.supervision)
        return yaml.safe_dump(head | {"data": self.data, "stages": _lists(self.stages)}, sort_keys=False)


def input_names(kind: str) -> list[str]:
    """The parameters of a stage that name an earlier stage."""
    return [f.name for f in schema.fields(STAGES[kind].function).values() if isinstance(f.marker, schema.Input)]


def built_in() -> dict[str, str]:
    """Recipes that come with the package: name -> title."""
    return {name: str(_parse(_text(name)[1], name)["title"]) for name in names()}


def names() -> list[str]:
    """The names of the recipes that come with the package, in order; none of them is read."""
    found = (entry.name for entry in (package_files("tag2mask") / "recipes").iterdir())
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def load_text(name: str) -> str:
    """The YAML of a built-in recipe as it was written. Raises UserError for an unknown name."""
    return _text(name)[1]


def written(which: str | Path) -> dict[str, Any]:
    """A recipe as written, unchecked but for being a mapping."""
    return _parse(_text(which)[1], str(which))


def written_stages(which: str | Path) -> dict[str, Settings]:
    """The stages of a recipe as written, unchecked; those that are no mapping are left out (`load` reports them)."""
    stages = _mapping(written(which).get("stages"), f"{_text(which)[0]}: stages")
    return {stage: given for stage, given in stages.items() if isinstance(given, dict)}


def load(which: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A built-in recipe by name or a YAML file by path, with `key=value` overrides applied, checked.

    Raises UserError with one line per fault, each with its path in the recipe.
    """
    name, text = _text(which)
    tree = override(_parse(text, str(which)), overrides)
    for key in tree:
        if key not in TOP:
            there = "a recipe has title, data and stages, it may have paper and supervision"
            raise UserError(f"{name}: {key}: unknown; {there}")
    faults: list[str] = []
    data = tree.get("data") or {}
    source = data.get("name") if isinstance(data, dict) else None
    if not isinstance(source, str) or source not in SOURCES:
        faults.append(f"data.name: {source!r} is unknown; there is {', '.join(SOURCES)}")
    else:
        settings = {key: value for key, value in data.items() if key != "name"}
        data = {"name": source} | _try(faults, SOURCES[source], settings, "data")
    stages: dict[str, Settings] = {}
    for stage, given in _mapping(tree.get("stages"), f"{name}: stages").items():
        if not isinstance(stage, str) or not stage or "." in stage or stage in TOP:
            faults.append(f"stages: {stage!r} cannot be the name of a stage; take a word (in quotes if it is {WORDS})")
            continue
        stages[stage] = _stage(stage, given, stages, faults)
    if not stages:
        faults.append("stages: missing; a recipe needs at least one stage")
    paper = read_paper(tree.get("paper"), stages, faults)
    supervision = read_supervision(tree.get("supervision"), faults)
    if faults:
        raise UserError("\n".join(faults))
    return Recipe(name, str(tree.get("title", name)), data, stages, paper, supervision)


def override(tree: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """["classify.train.lr=0.02"] -> the tree with that leaf replaced; "stages." may be left out; values are YAML.

    Raises UserError for a setting without "=" or whose first word is no stage.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"-s {setting}: must be key=value, such as classify.train.lr=0.02")
        if keys[0] not in TOP:
            known = _mapping(tree.get("stages"), "stages")
            if keys[0] not in known:
                raise UserError(f"-s {setting}: no stage {keys[0]!r}; {schema.meant(keys[0], {**known, 'data': None})}")
            keys = ["stages", *keys]
        node = tree
        for key in keys[:-1]:
            if node.get(key) is None:
                node[key] = {}
            if not isinstance(node[key], dict):
                raise UserError(f"-s {setting}: {key} is a value, it has no settings inside")
            node = node[key]
        try:
            node[keys[-1]] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"-s {setting}: the value is not valid YAML; quote it") from None
    return tree


def _stage(name: str, given: Any, earlier: dict[str, Settings], faults: list[str]) -> Settings:
    kind = given.get("do") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind not in STAGES:
        faults.append(f"{name}.do: {kind!r} is no kind of stage; {schema.meant(str(kind), STAGES)}")
        return {}
    settings = {key: value for key, value in given.items() if key != "do"}
    checked = {"do": kind} | _try(faults, STAGES[kind].function, settings, name)
    for parameter, field in schema.fields(STAGES[kind].function).items():
        source = checked.get(parameter)
        if not isinstance(field.marker, schema.Input) or source is None:
            continue
        if not isinstance(source, str) or source not in earlier:
            there = schema.meant(str(source), earlier) if earlier else "it is the first one"
            faults.append(f"{name}.{parameter}: no earlier stage {source!r}; {there}")
        elif earlier[source].get("do") not in (*field.marker.kinds, None):
            wanted = " or ".join(field.marker.kinds)
            faults.append(f"{name}.{parameter}: {source} is a {earlier[source]['do']} stage, this needs {wanted}")
    return checked


def _try(faults: list[str], component: Any, settings: Any, where: str) -> Settings:
    try:
        return schema.check(component, settings, where)
    except UserError as fault:
        faults.extend(str(fault).splitlines())
        return {}


def _text(which: str | Path) -> tuple[str, str]:
    path = Path(which)
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.stem, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    known = names()
    if str(which) not in known:
        close = schema.meant(str(which), dict.fromkeys(known))
        raise UserError(f"no recipe {str(which)!r}; {close}, or give a path ending in .yaml")
    return str(which), (package_files("tag2mask") / "recipes" / f"{which}.yaml").read_text(encoding="utf-8")


class _Once(yaml.constructor.SafeConstructor):
    """Refuses a key that is given twice: the first of two stages of one name would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


class _Loader(_Once, yaml.SafeLoader):
    """In Python, with messages that say where."""


class _FastLoader(_Once, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """In C where PyYAML has it, ten times as fast."""


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        try:
            tree = yaml.load(text, _FastLoader)
        except yaml.YAMLError:
            tree = yaml.load(text, _Loader)  # says more
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{where}: a recipe is a mapping with title, data and stages")
    return tree


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict | None):
        raise UserError(f"{where}: must be a mapping of names to stages, not {value!r}")
    return value or {}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lists(value: Any) -> Any:
    """Tuples as lists, so that YAML stays plain."""
    if isinstance(value, dict):
        return {key: _lists(inner) for key, inner in value.items()}
    return [_lists(inner) for inner in value] if isinstance(value, (list, tuple)) else value
