"""A signature as a schema: defaults, types, names and what is said about mistakes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field as Bound

from tag2mask.errors import UserError
from tag2mask.schema import Input, ManyOf, OneOf, Settings, WeightsFile, check, fields, files, make, meant


@dataclass(frozen=True, kw_only=True)
class Weights:
    name: str
    file: Annotated[str | None, WeightsFile()] = None


@dataclass(frozen=True, kw_only=True)
class Range:
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if self.low > self.high:
            raise UserError(f"low {self.low} is above high {self.high}")


class Net:
    def __init__(self, num_classes: int, *, backbone: Weights, dropout: float = 0.0) -> None:
        self.num_classes, self.backbone, self.dropout = num_classes, backbone, dropout


class Plain:
    def __init__(self, *, sizes: tuple[int, int] = (3, 4), mode: Literal["a", "b"] = "a") -> None:
        self.sizes, self.mode = sizes, mode


NETS = {"net": Net, "plain": Plain}


def stage(
    ctx: object,
    *,
    of: Annotated[Path, Input(("first", "second"))],
    net: Annotated[Settings, OneOf(NETS)],
    extras: Annotated[Settings | None, ManyOf({"plain": Plain})] = None,
    where: Range = Range(),
    scales: tuple[float, ...] = (0.5, 1.0),
    steps: int | None = None,
    count: Annotated[int, Bound(ge=1)] = 1,
    flip: bool = True,
) -> None:
    """Nothing is done: only the signature matters."""


GOOD = {"of": "maps", "net": {"name": "net", "backbone": {"name": "r"}}}


def faults(given, component=stage, where="s"):
    with pytest.raises(UserError) as caught:
        check(component, given, where)
    return str(caught.value).splitlines()


class TestDefaults:
    def test_are_filled_in_at_every_depth(self):
        checked = check(stage, GOOD, "s")
        assert checked == {
            "of": "maps",
            "net": {"name": "net", "backbone": {"name": "r", "file": None}, "dropout": 0.0},
            "extras": {},
            "where": {"low": 0.0, "high": 1.0},
            "scales": (0.5, 1.0),
            "steps": None,
            "count": 1,
            "flip": True,
        }
        json.dumps(checked)

    def test_checking_twice_changes_nothing(self):
        checked = check(stage, GOOD, "s")
        assert check(stage, json.loads(json.dumps(checked)), "s") == checked

    def test_fields(self):
        found = fields(stage)
        assert [name for name, field in found.items() if field.required] == ["of", "net"]
        assert "ctx" not in found
        assert "num_classes" not in fields(Net)
        assert isinstance(found["net"].marker, OneOf)
        assert isinstance(found["extras"].marker, ManyOf)
        assert found["of"].marker == Input(("first", "second"))
        assert found["count"].marker is None


class TestValues:
    @pytest.mark.parametrize(
        ("given", "read"),
        [
            ({"scales": [1, 2.5]}, (1.0, 2.5)),
            ({"scales": ["1e-3"]}, (0.001,)),  # how YAML 1.1 reads 1e-3
            ({"steps": "100"}, 100),
            ({"steps": 5.0}, 5),
            ({"steps": None}, None),
            ({"flip": False}, False),
            ({"count": 7}, 7),
            ({"where": {"low": -1}}, {"low": -1.0, "high": 1.0}),
            ({"extras": ["plain"]}, {"plain": {"sizes": (3, 4), "mode": "a"}}),
            ({"extras": {"plain": None}}, {"plain": {"sizes": (3, 4), "mode": "a"}}),
            ({"extras": {"plain": {"sizes": [1, 2]}}}, {"plain": {"sizes": (1, 2), "mode": "a"}}),
            ({"net": "plain"}, {"name": "plain", "sizes": (3, 4), "mode": "a"}),
        ],
    )
    def test_are_read_as_their_type(self, given, read):
        (name,) = given
        found = check(stage, GOOD | given, "s")[name]
        assert found == read
        assert type(found) is type(read)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"scales": 0.5}, "s.scales: should be a valid tuple (got 0.5)"),
            ({"steps": 1.5}, "s.steps: should be a valid integer, got a number with a fractional part (got 1.5)"),
            ({"flip": "perhaps"}, "s.flip: should be a valid boolean, unable to interpret input (got 'perhaps')"),
            ({"count": 0}, "s.count: should be greater than or equal to 1 (got 0)"),
            ({"where": 3}, "s.where: must be a mapping of settings, not 3"),
            ({"where": None}, "s.where: must be a mapping of settings, not None"),
            ({"where": {"low": 2}}, "s.where: low 2.0 is above high 1.0"),
            ({"where": {"hihg": 2}}, "s.where.hihg: unknown; did you mean high?"),
            ({"extras": {"plian": {}}}, "s.extras.plian: no 'plian'; did you mean plain?"),
            ({"extras": [{"plain": {}}]}, "s.extras: must be a mapping of names to settings, not [{'plain': {}}]"),
            ({"extras": 3}, "s.extras: must be a mapping of names to settings, not 3"),
            ({"extras": {"plain": 0}}, "s.extras.plain: must be a mapping of settings, not 0"),
            ({"extras": {"plain": {"mode": "c"}}}, "s.extras.plain.mode: should be 'a' or 'b' (got 'c')"),
            ({"extras": {"plain": {"sizes": [1]}}}, "s.extras.plain.sizes: Field required (got [1])"),
            ({"net": {"backbone": {"name": "r"}}}, "s.net: needs a name, one of net, plain"),
            ({"net": 3}, "s.net: needs a name, one of net, plain"),
            ({"net": {"name": "nat"}}, "s.net: no 'nat'; did you mean net?"),
            ({"net": {"name": ["net"]}}, "s.net: no ['net']; did you mean net?"),
            ({"net": "net"}, "s.net.backbone: missing; give it in the recipe or as -s s.net.backbone=VALUE"),
            (
                {"net": {"name": "net", "backbone": {}}},
                "s.net.backbone.name: missing; give it in the recipe or as -s s.net.backbone.name=VALUE",
            ),
            (
                {"net": {"name": "net", "backbone": {"name": 5}}},
                "s.net.backbone.name: should be a valid string (got 5)",
            ),
            (
                {"net": {"name": "net", "backbone": {"name": "r"}, "dropuot": 1}},
                "s.net.dropuot: unknown; did you mean dropout?",
            ),
            ({1: 2}, "s.1: unknown; there is count, extras, flip, net, of, scales, steps, where"),
        ],
    )
    def test_that_do_not_fit_are_one_line_with_their_path(self, given, message):
        assert faults(GOOD | given) == [message]

    def test_all_faults_are_told_at_once(self):
        found = faults({"net": "plain", "stesp": 3, "flip": "x", "where": {"low": 2}, "count": -1})
        assert [line.split(":")[0] for line in found] == ["s.stesp", "s.of", "s.where", "s.count", "s.flip"]

    @pytest.mark.parametrize("given", [None, 3, "text", ["of"]])
    def test_settings_must_be_a_mapping(self, given):
        assert faults(given) == [f"s: must be a mapping of settings, not {given!r}"]

    def test_what_a_recipe_must_not_give_is_unknown(self):
        assert faults(GOOD | {"ctx": 1})[0].startswith("s.ctx: unknown")


class TestMeant:
    def test_the_closest_or_all(self):
        known = {"temperature": 0, "momentum": 0}
        assert meant("temprature", known) == "did you mean temperature?"
        assert meant("x", known) == "there is momentum, temperature"
        assert meant("x", {f"name-{n}": 0 for n in range(41)}) == "see `tag2mask ls`"
        assert meant("x", {}) == "there is nothing to set"


class TestMake:
    def test_components_get_dataclasses_and_what_is_provided(self):
        net = make(Net, check(stage, GOOD, "s")["net"], num_classes=4)
        assert (net.num_classes, net.dropout, net.backbone) == (4, 0.0, Weights(name="r"))

    def test_a_function(self):
        def function(ctx, *, where: Range, steps: int = 3) -> tuple:
            return ctx, where, steps

        assert make(function, {"where": {"low": 0.0, "high": 2.0}, "steps": 1}, ctx="c") == ("c", Range(high=2.0), 1)


class TestFiles:
    def test_only_paths_of_files_that_exist(self, tmp_path):
        file = tmp_path / "w.pth"
        file.write_bytes(b"x")

        def of(path):
            given = GOOD | {"net": {"name": "net", "backbone": {"name": str(file), "file": path}}}
            return files(stage, check(stage, given, "s"))

        assert of(str(file)) == [file]
        assert of("hub") == of(None) == of(str(tmp_path)) == []

    def test_in_methods_too(self, tmp_path):
        class Teacher:
            def __init__(self, *, weights: Annotated[str, WeightsFile()]) -> None: ...

        def other(*, methods: Annotated[Settings | None, ManyOf({"teacher": Teacher})] = None) -> None: ...

        file = tmp_path / "w.pth"
        file.write_bytes(b"x")
        assert files(other, check(other, {"methods": {"teacher": {"weights": str(file)}}}, "s")) == [file]
        assert files(other, check(other, {}, "s")) == []
