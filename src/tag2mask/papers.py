"""What a recipe says of itself beside its stages: which rows of a paper's tables it gives, and what it learns from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

Name = Literal["PPC", "RCM+MAM", "HSC", "RCA", "CPAL"]
PAPERS: tuple[Name, ...] = get_args(Name)
SCORED = ("evaluate_maps", "evaluate_masks")  # the kinds of stages whose mIoU a paper prints
Text = Annotated[str, Field(min_length=1)]
Percent = Annotated[float, Strict(), Field(ge=1, le=100)]  # 0.615 is a slip, not a score
CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=CLOSED)
class Row:
    """One row of a table: `expected` has the paper's mIoU in % for evaluation stages of the recipe."""

    table: Text
    row: Text
    expected: Annotated[dict[str, Percent], Field(min_length=1)]


@dataclass(frozen=True, config=CLOSED)
class Paper:
    """The paper of a recipe and the rows of its tables that this one pipeline gives."""

    name: Name
    rows: Annotated[list[Row], Field(min_length=1)]


def read_paper(given: Any, stages: Mapping[str, Mapping[str, Any]], faults: list[str]) -> Paper | None:
    """`paper` of a recipe, checked against its stages; None where it is not given or has faults.

    Adds one line per fault to `faults`, each with its path in the recipe.
    """
    paper: Paper | None = _read(TypeAdapter(Paper), given, "paper", faults)
    for number, row in enumerate(paper.rows if paper else ()):
        for stage in row.expected:
            if stages.get(stage, {}).get("do") not in SCORED:
                there = ", ".join(name for name, settings in stages.items() if settings.get("do") in SCORED)
                faults.append(
                    f"paper.rows.{number}.expected.{stage}: no stage that scores maps or masks; "
                    f"there is {there or 'none, add one'}"
                )
    return paper


def read_supervision(given: Any, faults: list[str]) -> tuple[str, ...]:
    """`supervision` of a recipe: what it learns from beyond image tags, in words. Adds to `faults` as `read_paper`."""
    return tuple(_read(TypeAdapter(list[Text]), given, "supervision", faults) or ())


def _read(wanted: TypeAdapter[Any], given: Any, where: str, faults: list[str]) -> Any:
    if given is None:
        return None
    try:
        return wanted.validate_python(given)
    except ValidationError as error:
        for fault in error.errors():
            path = ".".join(map(str, (where, *fault["loc"])))
            faults.append(f"{path}: {_in_words(fault['type'], fault['msg'], fault['input'])}")
        return None


def _in_words(kind: str, message: str, given: Any) -> str:
    match kind:
        case "unexpected_keyword_argument":
            return "unknown; a paper has name and rows, a row has table, row and expected"
        case "missing":
            return "missing"
        case "dataclass_type":
            return f"must be a mapping, not {given!r}"
        case "string_type":
            return f"must be text (got {given!r}); put it in quotes"
        case "too_short" | "string_too_short":
            return "is empty"
        case "list_type":
            return f"must be a list, not {given!r}"
        case _:
            return f"{message.removeprefix('Input ')} (got {given!r})"
