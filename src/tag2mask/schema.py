"""A component's signature is its schema: settings from a recipe are checked against it, nothing is declared twice."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from tag2mask.errors import UserError

Settings = dict[str, Any]
Table = Mapping[str, Callable[..., Any]]

# Filled in by whoever builds the component, never by a recipe.
PROVIDED = frozenset({"self", "ctx", "num_classes"})
LISTED = 40  # names that fit into a message


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Marks a parameter {name: ..., **settings}: one component of a table."""

    table: Table


@dataclasses.dataclass(frozen=True)
class ManyOf:
    """Marks a parameter {name: settings, ...}: any components of a table."""

    table: Table


@dataclasses.dataclass(frozen=True)
class Input:
    """Marks a parameter that names an earlier stage of one of these kinds; the function receives its folder."""

    kinds: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """Marks a text parameter that may be the path of a file; its content then belongs to the key of the stage."""


Marker = OneOf | ManyOf | Input | WeightsFile


@dataclasses.dataclass(frozen=True)
class Field:
    """One parameter of a component: its type with its bounds, its marker (OneOf, ...) if any, and its default."""

    name: str
    type: Any
    marker: Marker | None
    default: Any

    @property
    def required(self) -> bool:
        """Whether a recipe must give it."""
        return self.default is inspect.Parameter.empty

    @functools.cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """What checks a value against the type."""
        return TypeAdapter(self.type)


@functools.cache  # reading signatures is slow, and planning reads them again and again
def fields(component: Callable[..., Any]) -> Mapping[str, Field]:
    """The parameters of a function, class or dataclass that a recipe may set, by name."""
    target: Any = component.__init__ if inspect.isclass(component) else component
    hints = get_type_hints(target, include_extras=True)
    found = {}
    for parameter in inspect.signature(target).parameters.values():
        if parameter.name in PROVIDED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint, marker = hints.get(parameter.name, Any), None
        if get_origin(hint) is Annotated and isinstance(get_args(hint)[1], Marker):
            hint, marker = get_args(hint)[:2]
        found[parameter.name] = Field(parameter.name, hint, marker, parameter.default)
    return found


def check(component: Callable[..., Any], given: Any, where: str) -> Settings:
    """`given` with every default filled in, as plain JSON-able values.

    Raises UserError with one line per fault: its path in the recipe, what is wrong, what was probably meant.
    """
    faults: list[str] = []
    checked = _check(component, given, where, faults)
    if faults:
        raise UserError("\n".join(faults))
    return checked


def _check(component: Callable[..., Any], given: Any, where: str, faults: list[str]) -> Settings:
    if not isinstance(given, Mapping):
        faults.append(f"{where}: must be a mapping of settings, not {given!r}")
        return {}
    known, faults_before = fields(component), len(faults)
    faults += [f"{where}.{key}: unknown; {meant(str(key), known)}" for key in given if key not in known]
    checked: Settings = {}
    for name, field in known.items():
        path = f"{where}.{name}"
        if name in given:
            checked[name] = _value(field, given[name], path, faults)
        elif field.required:
            faults.append(f"{path}: missing; give it in the recipe or as -s {path}=VALUE")
        else:
            checked[name] = _value(field, _plain(field.default), path, faults)
    if len(faults) == faults_before and dataclasses.is_dataclass(component):
        try:
            make(component, checked)  # its __post_init__ checks what concerns several fields
        except UserError as fault:
            faults.append(f"{where}: {fault}")
    return checked


def _value(field: Field, value: Any, path: str, faults: list[str]) -> Any:
    match field.marker:
        case OneOf(table):
            value = {"name": value} if isinstance(value, str) else value
            if not isinstance(value, Mapping) or "name" not in value:
                faults.append(f"{path}: needs a name, one of {', '.join(sorted(table))}")
                return {}
            settings = {key: v for key, v in value.items() if key != "name"}
            return {"name": value["name"]} | _component(table, value["name"], settings, path, faults)
        case ManyOf(table):
            value = {} if value is None else value
            if isinstance(value, list) and all(isinstance(name, str) for name in value):
                value = {name: {} for name in value}
            if not isinstance(value, Mapping):
                faults.append(f"{path}: must be a mapping of names to settings, not {value!r}")
                return {}
            inner = {name: {} if settings is None else settings for name, settings in value.items()}
            return {name: _component(table, name, s, f"{path}.{name}", faults) for name, s in inner.items()}
        case Input():
            return value
    if dataclasses.is_dataclass(field.type):
        return _check(field.type, value, path, faults)  # type: ignore[arg-type]
    try:
        return field.adapter.validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Input ")
        faults.append(f"{path}: {reason} (got {value!r})")
        return None


def _component(table: Table, name: Any, settings: Any, path: str, faults: list[str]) -> Settings:
    if not isinstance(name, str) or name not in table:
        faults.append(f"{path}: no {name!r}; {meant(str(name), table)}")
        return {}
    return _check(table[name], settings, path, faults)


def meant(word: str, known: Mapping[str, Any], listed_by: str = "tag2mask ls") -> str:
    """ "did you mean temperature?" where something is close, else the list of what there is, or what lists it."""
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"there is {', '.join(sorted(known)) or 'nothing to set'}" if len(known) <= LISTED else f"see `{listed_by}`"


def make(component: Callable[..., Any], settings: Settings, **provided: Any) -> Any:
    """Call a component with checked settings; parameters that are dataclasses become those."""
    known = fields(component)
    ready = {
        name: make(known[name].type, value) if dataclasses.is_dataclass(known[name].type) else value
        for name, value in settings.items()
        if name != "name" or "name" in known
    }
    return component(**ready, **provided)


def files(component: Callable[..., Any], settings: Settings) -> list[Path]:
    """The files that checked settings point to (weights), so that their content can be part of a key."""
    found: list[Path] = []
    for name, field in fields(component).items():
        value: Any = settings.get(name)
        match field.marker:
            case OneOf(table):
                found += files(table[value["name"]], value)
            case ManyOf(table):
                found += [path for key, inner in value.items() for path in files(table[key], inner)]
            case WeightsFile():
                if isinstance(value, str) and Path(value).is_file():
                    found.append(Path(value))
            case _:
                if dataclasses.is_dataclass(field.type):
                    found += files(field.type, value)  # type: ignore[arg-type]
    return found


def _plain(value: Any) -> Any:
    """Defaults as a recipe would write them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value
