"""kind -> class: families by existing, one clear sentence where something is unknown."""

from __future__ import annotations

import importlib
import pkgutil
from typing import ClassVar

import pytest
from pydantic import Field

import dbnet
from dbnet.core.errors import UserError, nearest
from dbnet.core.registry import FAMILIES, Member, family, make

NAMES = (
    "network.layers", "network.parameters.initializers", "network.losses", "shards.rules", "shards.rules.schedules",
    "methods.descent", "methods", "commands.bench", "data.formats",
)  # fmt: skip


def shipped(name: str) -> dict[str, type[Member]]:
    """Return the members that come with dbnet: tests before this one may have defined others."""
    return {kind: member for kind, member in family(name).items() if member.__module__.startswith("dbnet.")}


@pytest.mark.parametrize("name", NAMES)
def test_every_member_is_found_under_its_kind(name: str) -> None:
    members = shipped(name)
    assert members
    for kind, member in members.items():
        assert member.kind == kind and member.family == name
        assert member.__doc__ and member.model_config["frozen"] and member.model_config["extra"] == "forbid"


def test_what_calls_itself_a_family_is_one() -> None:
    """Its first line says so, its `base` defines what a member is, and no other folder has a base like that."""
    named, based = set(), set()
    for module in pkgutil.walk_packages(dbnet.__path__, "dbnet."):
        name = module.name.removeprefix("dbnet.")
        if module.ispkg and "family" in (importlib.import_module(module.name).__doc__ or "").split("\n")[0]:
            named.add(name)
        if name.endswith(".base"):
            here = vars(importlib.import_module(module.name)).values()
            based |= {kind.family for kind in here if isinstance(kind, type) and issubclass(kind, Member) and kind.family}
    assert named == based == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_options_make_the_same_member_again(name: str) -> None:
    for kind, member in shipped(name).items():
        required = {key: _some(field.annotation) for key, field in member.model_fields.items() if field.is_required()}
        one = make(name, {"kind": kind, **required}, name)
        assert make(name, one.options(), name) == one


def _some(annotation: object) -> object:
    """Return a value that a required option of this type accepts."""
    return {int: 2, float: 0.5, str: "a"}.get(annotation, [2, 2])  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"kind": "adagrat"}, "rule.kind = 'adagrat' is not one of"),
        ({"kind": "mine"}, "sgd; one of your own needs its file in model.modules"),
        ({"kind": "adagrat"}, "(did you mean 'adagrad'?)"),
        ({}, "The key 'rule.kind' is missing; it is one of adagrad,"),
        ({"kind": ["adam"]}, "rule.kind = ['adam'] is not one of"),
        (
            {"kind": "adam", "beta3": 1},
            "Unknown key 'rule.beta3' (did you mean 'beta2'?); known here: rate, schedule, beta1, beta2, epsilon.",
        ),
        ({"kind": "adam", "rate": "fast"}, "rule.rate = 'fast' is not allowed: "),
        ({"kind": "adam", "rate": -1}, "rule.rate = -1 is not allowed: it must be greater than 0."),
    ],
)
def test_unknown_things_are_named(entry: dict, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "shards.rules", shipped("shards.rules"))
    with pytest.raises(UserError) as error:
        make("shards.rules", entry, "rule")
    assert said in str(error.value)


def test_a_class_of_ones_own_is_a_member() -> None:
    class Mine(Member):
        """A rule of one's own."""

        family: ClassVar[str] = "shards.rules"
        kind: ClassVar[str] = "mine"
        speed: float = Field(default=1, gt=0)

    try:
        assert make("shards.rules", {"kind": "mine", "speed": 2}, "rule") == Mine(speed=2)
    finally:
        del FAMILIES["shards.rules"]["mine"]


def test_nearest() -> None:
    assert nearest("replica", ["replicas", "shards"]) == " (did you mean 'replicas'?)"
    assert nearest("xyz", ["replicas", "shards"]) == ""
