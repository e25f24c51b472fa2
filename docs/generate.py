"""Fills the pages with what the code knows. A line `<!-- make: WHAT [NAME] -->` is replaced by what `MAKERS` makes.

So a table of options, recipes or commands cannot differ from what is run. An unknown line stops the build.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer.main

from tag2mask import schema
from tag2mask.baselines import BASELINES
from tag2mask.cli import app
from tag2mask.data.faults import Kind
from tag2mask.methods import METHODS
from tag2mask.recipe import SOURCES, load_text, names, written
from tag2mask.refine import AFFINITY_NETS, BOUNDARY_NETS
from tag2mask.segment import SEGMENTERS
from tag2mask.stages import STAGES
from tag2mask.stages.amn import NETS as AMN_NETS

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"^<!-- make: (\S+)(?: (.+?))? -->$", re.MULTILINE)
BENCHMARKS = {"folder": "Your folder", "demo": "Built-in scenes", "scenes": "Built-in scenes"}
BENCHMARKS |= {"voc12": "VOC 2012", "coco14": "COCO 2014"}
NETS: Mapping[str, Callable[..., Any]] = {**AMN_NETS, **AFFINITY_NETS, **BOUNDARY_NETS, **SEGMENTERS}
COMPONENTS: Mapping[str, Callable[..., Any]] = {**BASELINES, **METHODS, **NETS}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with every `make` line replaced; mkdocs calls this."""
    return filled(markdown)


def filled(markdown: str) -> str:
    """A page with every `make` line replaced. Raises KeyError for a line that nothing is known of."""
    return LINE.sub(lambda found: MAKERS[found[1]](*([found[2]] if found[2] else [])), markdown)


def formula(name: str) -> str:
    """What stands at the top of a component's file: the paper, its formulas, and where the released code differs."""
    if name in STAGES:
        module = sys.modules[STAGES[name].function.__module__]
    else:
        module = sys.modules[COMPONENTS[name].__module__]
    return f"```text\n{inspect.cleandoc(module.__doc__ or '')}\n```"


def file_formula(path: str) -> str:
    """The same of a file that no component is in."""
    return f"```text\n{ast.get_docstring(ast.parse((ROOT / path).read_text(encoding='utf-8')))}\n```"


def options(name: str) -> str:
    """What the settings of a component mean, and their types and defaults; for pages in methods/."""
    component = COMPONENTS[name] if name in COMPONENTS else STAGES[name].function
    shared: dict[str, Any] = {}
    return f"{_prose(component)}\n\n{_settings(component, shared, page='../stages.md')}"


def stages(*_: str) -> str:
    """Every stage with its settings, then the settings that several of them share."""
    shared: dict[str, Any] = {}
    shown = {name: stage.function for name, stage in STAGES.items()}
    shown |= {f"net: {name}": net for name, net in NETS.items()}
    parts = [f"## {title}\n\n{_prose(one)}\n\n{_settings(one, shared)}" for title, one in shown.items()]
    for component in COMPONENTS.values():
        _settings(component, shared)
    done: set[str] = set()
    while left := {name: kind for name, kind in shared.items() if name not in done}:
        for name, kind in left.items():
            parts.append(f"## {name}\n\n{_prose(kind)}\n\n{_settings(kind, shared)}")
            done.add(name)
    return "\n\n".join(parts)


def components(kind: str) -> str:
    """The names of one kind (methods, baselines, data, stages) with their first lines."""
    there: dict[str, Mapping[str, Callable[..., Any]]] = {"methods": METHODS, "baselines": BASELINES, "data": SOURCES}
    there["stages"] = {name: stage.function for name, stage in STAGES.items()}
    rows = ((f"`{name}`", (inspect.getdoc(one) or "").split("\n")[0]) for name, one in there[kind].items())
    return _table(("name", "what"), rows)


def recipes(paper: str = "") -> str:
    """All recipes by what they run on; or those of a paper, with the numbers that its tables have for them."""
    if paper:
        rows = [row for name, tree in _recipes().items() for row in _paper_rows(name, tree, paper)]
        return _table(("recipe", "table", "row", "the paper's mIoU in %, by stage of the recipe"), rows)
    parts = []
    for title in dict.fromkeys(BENCHMARKS.values()):
        of_it = {name: tree for name, tree in _recipes().items() if BENCHMARKS[name.split("-")[0]] == title}
        rows = [(f"`{name}`", tree["title"].removeprefix(f"{title}, ")) for name, tree in of_it.items()]
        parts.append(f"### {title}\n\n{_table(('recipe', 'what'), rows)}")
    return "\n\n".join(parts)


def supervision(*_: str) -> str:
    """What recipes learn from beyond tags and the weights of their networks."""
    found: dict[str, list[str]] = {}
    for name, tree in _recipes().items():
        for source in tree.get("supervision", ()):
            found.setdefault(source, []).append(f"`{name}`")
    return _table(("beyond tags", "recipes"), ((source, ", ".join(names)) for source, names in found.items()))


def recipe(name: str) -> str:
    """The text of a recipe."""
    return f"```yaml\n{load_text(name).rstrip()}\n```"


def commands(*_: str) -> str:
    """Every command with its arguments and options."""
    return "\n\n".join(_command(words, command) for words, command in _all_commands())


def faults(*_: str) -> str:
    """What `tag2mask check` can find, and the remedies."""
    rows = [(kind.title[0].upper() + kind.title[1:], kind.remedy or "it says which values are meant") for kind in Kind]
    return _table(("it says", "what to do"), rows)


def text_of(path: str) -> str:
    """A file of the repository as a page, without its first heading."""
    return (ROOT / path).read_text(encoding="utf-8").partition("\n")[2].strip()


def code(path: str) -> str:
    """A Python file of the repository."""
    return f"```python\n{(ROOT / path).read_text(encoding='utf-8').strip()}\n```"


def demo_figures(*_: str) -> str:
    """The table that README has of the demo."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| what | measured on | result |")
    return "\n".join(lines[start : lines.index("", start)])


MAKERS: Mapping[str, Callable[..., str]] = {
    "formula": formula, "file-formula": file_formula, "options": options, "stages": stages, "list": components,
    "recipes": recipes, "supervision": supervision, "recipe": recipe, "commands": commands, "faults": faults,
    "text": text_of, "code": code, "demo-figures": demo_figures,
}  # fmt: skip


@cache
def _recipes() -> Mapping[str, Mapping[str, Any]]:
    """The built-in recipes as they are written."""
    return {name: written(name) for name in names()}


def _paper_rows(name: str, tree: Mapping[str, Any], paper: str) -> Iterable[Sequence[str]]:
    own = tree.get("paper") or {}
    for row in own.get("rows", ()) if own.get("name") == paper else ():
        numbers = ", ".join(f"{stage} {value}" for stage, value in row["expected"].items())
        yield f"`{name}`", row["table"], row["row"].replace("[", "\\["), numbers


def _prose(component: Any) -> str:
    """A docstring as paragraphs, with what is said of each setting on a line of its own. It is no Markdown."""
    names = "|".join(schema.fields(component))
    about = re.compile(rf"(^|(?<=[.;\])\d]\s))((?:{names})(?:, (?:{names}))*):\s", re.MULTILINE)
    shown = []
    for text in (inspect.getdoc(component) or "").split("\n\n"):
        plain = re.sub(r"``?([^`]+)``?", r"<code>\1</code>", html.escape(text, quote=False))
        shown.append(about.sub(r"<br><strong>\2</strong>: ", plain) if names else plain)
    return "\n\n".join(f"<p>{text.removeprefix('<br>')}</p>" for text in shown)


def _settings(component: Callable[..., Any], shared: dict[str, Any], page: str = "") -> str:
    rows = []
    for field in schema.fields(component).values():
        default = "required" if field.required else f"`{_plain(field.default)}`"
        rows.append((f"`{field.name}`", _kind(field, shared, page), default))
    return _table(("setting", "takes", "default"), rows) if rows else ""


def _kind(field: schema.Field, shared: dict[str, Any], page: str) -> str:
    match field.marker:
        case schema.OneOf(table):
            return f"a name with its settings: {', '.join(f'`{name}`' for name in table)}"
        case schema.ManyOf(table):
            return f"names with their settings: {', '.join(f'`{name}`' for name in table)}"
        case schema.Input(kinds):
            return f"an earlier stage: {', '.join(f'`{kind}`' for kind in kinds)}"
    return _type(field.type, shared, page)


def _type(kind: Any, shared: dict[str, Any], page: str) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(inner[0], shared, page)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_type(part, shared, page) for part in inner)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        shared[kind.__name__] = kind
        return f"[{kind.__name__}]({page}#{kind.__name__.lower()})"
    if kind is type(None):
        return "`null`"
    if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return f"a list of {_type(inner[0], shared, page)}"
    if origin is dict:
        return "a mapping"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))


def _plain(value: Any) -> str:
    """A default as it is written in YAML."""
    if dataclasses.is_dataclass(value):
        return "{}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _all_commands() -> Iterable[tuple[list[str], Any]]:
    top = typer.main.get_command(app)
    for name, command in sorted(top.commands.items()):  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        for below, one in sorted(inner.items()) if inner else [("", command)]:
            yield [name, *([below] if below else [])], one


def _command(words: Sequence[str], command: Any) -> str:
    title = f"## tag2mask {' '.join(words)}\n\n{html.escape(inspect.cleandoc(command.help or ''), quote=False)}"
    rows, hints = [], get_type_hints(command.callback, include_extras=True)
    for given in command.params:
        argument = given.param_type_name == "argument"
        name = given.name.upper() if argument else ", ".join(given.opts)
        about = html.escape(given.help or "", quote=False).replace("|", "\\|")
        if choices := _choices(hints.get(given.name)):
            about += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
        default = given.default
        shown = (
            "required"
            if given.required
            else ""
            if default is None or default is False or callable(default)
            else default
        )
        rows.append((f"`{name}`", about, f"`{shown}`" if shown not in ("", "required") else shown))
    return f"{title}\n\n{_table(('argument or option', 'what', 'default'), rows)}"


def _choices(kind: Any) -> Sequence[str]:
    """The values of a Literal, wherever it is inside of a type."""
    inner = get_args(kind)
    return inner if get_origin(kind) is Literal else next((found for part in inner if (found := _choices(part))), ())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
