"""`dbnet help`: every table, family and member with its options, formula and source, as the code itself states them.

A member's description is its class's docstring and that of its module; types, defaults and ranges are those that a configuration is
checked against. The same as one page is jobs/REFERENCE.md (`dbnet help --page`).
"""

from __future__ import annotations

import argparse
import re
import sys
import types
from inspect import cleandoc
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from dbnet.core.config import Config
from dbnet.core.errors import UserError, nearest
from dbnet.core.registry import Family, Member, family, meaning
from dbnet.core.toml import written

# What a member is called by in front of its kind -> its family, where a configuration chooses it, and what one is.
FAMILIES = {
    "layers": ("network.layers", "[[model.layers]] kind", "layers of a network"),
    "loss": ("network.losses", "model.loss", "losses"),
    "method": ("methods", "[method] kind", "methods of training"),
    "descent": ("methods.descent", "[method.descent] kind", "batch methods that Sandblaster runs"),
    "rule": ("shards.rules", "[rule] kind", "update rules of the shards"),
    "init": ("network.parameters.initializers", "[[model.layers]] init", "what the weights of a layer are drawn from"),
    "schedule": ("shards.rules.schedules", "[rule.schedule] kind", "schedules of the learning rate"),
    "data": ("data.formats", "dbnet data", "data formats"),
}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "length >=", "max_length": "length <="}
# Bounds that keep numbers exact are none that anybody meets.
_FAR = 1 << 53


class Option(NamedTuple):
    """One key as a reader wants it: type, default, range, meaning."""

    name: str
    type: str
    default: str
    bounds: str
    meaning: str


def tables() -> dict[str, type[BaseModel]]:
    """Return the configuration's tables that are no members, by name."""
    found = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def options(model: type[BaseModel]) -> list[Option]:
    """Return the keys of a table or a member, in the order of their definition."""
    out = []
    for name, field in model.model_fields.items():
        mark = Family.of(model, name)
        limits = [(_BOUNDS[key], getattr(rule, key)) for rule in field.metadata for key in _BOUNDS if hasattr(rule, key)]
        bounds = [f"{sign} {limit}" for sign, limit in limits if abs(limit) < _FAR]
        if mark is not None:
            word = next(word for word, (path, *_) in FAMILIES.items() if path == mark.name)
            kind = f"{'list' if name == 'layers' else 'one'} of {word}.*"
            default = written(mark.default or field.default) if mark.default or isinstance(field.default, str) else "required"
        else:
            kind = _type(field.annotation)
            value = None if field.is_required() else field.get_default(call_default_factory=True)
            default = "required" if field.is_required() else "none" if value is None else _value(value)
        out.append(Option(name, kind, default, ", ".join(bounds), meaning(model, name)))
    return out


def _value(value: Any) -> str:
    return written(value.model_dump() if isinstance(value, BaseModel) else list(value) if isinstance(value, tuple) else value)


def _type(kind: Any) -> str:
    """Return a type as a configuration's author knows it."""
    if get_origin(kind) is Literal:
        return " or ".join(written(word) for word in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_type(one) for one in get_args(kind) if one is not type(None))
    if get_origin(kind) in (tuple, list):
        inner = [one for one in get_args(kind) if one is not Ellipsis]
        return f"list of {_type(inner[0])}" if Ellipsis in get_args(kind) else f"[{', '.join(map(_type, inner))}]"
    known = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return known.get(kind, "table" if isinstance(kind, type) and issubclass(kind, BaseModel) else str(kind))


def description(model: type[BaseModel]) -> str:
    """Return what is said of a table or a member: its docstring without the options, and its module's with formula and source."""
    own = cleandoc(model.__dict__.get("__doc__") or "")
    own = re.split(r"^(?:Parameters|Attributes)\n-+\n", own, flags=re.MULTILINE)[0].strip()
    if not issubclass(model, Member):
        return own
    return f"{own}\n\n{cleandoc(sys.modules[model.__module__].__doc__ or '')}".strip()


def entry(word: str) -> str:
    """Return what there is to say of ``family.kind``, a table, a family, or a kind alone.

    Raises
    ------
    UserError
        There is no such thing.
    """
    name, _, kind = word.partition(".")
    if kind and name in FAMILIES:
        members = family(FAMILIES[name][0])
        if kind not in members:
            raise UserError(f"There is no '{word}'{nearest(kind, list(members))}; {name} has {', '.join(sorted(members))}.")
        where = FAMILIES[name][1]
        chosen = f'{where} = "{kind}"' if name != "data" else f"{where} {kind}"
        return "\n".join([f"{word}        {chosen}", "", description(members[kind]), "", *_lines(members[kind])]).rstrip()
    if not kind and name in FAMILIES and name != "data":
        return _family(name)
    if not kind and name in tables():
        about = description(tables()[name])
        return "\n".join([f"[{name}]", "", *([about, ""] if about else []), *_lines(tables()[name])])
    # A kind is known by itself, too: the member of every family that has one.
    found = [f"{name}.{word}" for name, (path, *_) in FAMILIES.items() if word in family(path)]
    if found:
        return "\n\n".join(map(entry, found))
    known, kinds = [*tables(), *FAMILIES], [kind for path, *_ in FAMILIES.values() for kind in family(path)]
    raise UserError(
        f"There is no table or family '{name}'{nearest(name, [*known, *kinds])}; there are {', '.join(dict.fromkeys(known))}."
    )


def _lines(model: type[BaseModel]) -> list[str]:
    """Return the options as lines of text."""
    out = []
    for option in options(model):
        kind = f"{option.type}, {option.bounds}" if option.bounds else option.type
        out += [f"  {option.name} = {option.default}", f"      {kind}", f"      {option.meaning}".rstrip()]
    return [line for line in out if line.strip()] or ["  It has no options."]


def _first(model: type[BaseModel]) -> str:
    return description(model).split("\n")[0].rstrip(".")


def _family(name: str) -> str:
    where, what = FAMILIES[name][1:]
    members = sorted(family(FAMILIES[name][0]).items())
    lines = [f"  {f'{name}.{kind}':<28} {_first(model)}" for kind, model in members]
    return "\n".join([f"{name}: {what}, chosen by {where}", "", *lines])


def overview() -> str:
    """Return all tables and families, a line for each member."""
    out = ["Tables of a configuration:", ""]
    out += [f"  {name:<28} {', '.join(model.model_fields)}" for name, model in tables().items()]
    for name in FAMILIES:
        out += ["", _family(name)]
    return "\n".join([*out, "", "'dbnet help layers.conv' or 'dbnet help topology' says more of one."])


def page() -> str:
    """Return all of it as Markdown: jobs/REFERENCE.md."""
    out = [
        "# Reference",
        "",
        "Every table of a configuration, every layer, loss, method, rule and data format, with its options. Made from the code by",
        "`dbnet help --page > jobs/REFERENCE.md`; `dbnet help layers.conv` prints a part.",
        "",
        "## Tables",
    ]
    for name, model in tables().items():
        out += ["", f"### [{name}]", "", description(model), "", *_rows(model)]
    for name, (path, where, what) in FAMILIES.items():
        out += ["", f"## {name}: {what}", "", f"Chosen by `{where}`."]
        for kind, model in sorted(family(path).items()):
            out += ["", f"### {name}.{kind}", "", _quoted(description(model)), "", *_rows(model)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)) + "\n"


def _quoted(text: str) -> str:
    """Return a description with its signs kept: a formula is no emphasis."""
    spans = text.split("`")
    # Between backticks signs are themselves.
    return "`".join(re.sub(r"([*_<|])", r"\\\1", span) if i % 2 == 0 else span for i, span in enumerate(spans))


def _rows(model: type[BaseModel]) -> list[str]:
    """Return the options as a table."""
    found = options(model)
    if not found:
        return ["It has no options."]
    out = ["| option | type | default | range | meaning |", "|---|---|---|---|---|"]
    for name, kind, default, bounds, said in found:
        cells = (f"`{name}`", kind, default if default in ("required", "none") else f"`{default}`", bounds, _quoted(said))
        out.append("| " + " | ".join(cell.replace("|", "\\|") if "\\|" not in cell else cell for cell in cells) + " |")
    return out


def help_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Explain a configuration's tables, and layers, losses, methods, rules and data formats.\n\n"
        "  dbnet help                      what there is\n  dbnet help layers.conv          one of them\n"
        "  dbnet help topology rule        a table; a family\n  dbnet help adam                 whatever has that name"
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="a table (topology), a family (rule) or a member (rule.adagrad)")
    parser.add_argument("--page", action="store_true", help="print all of it as one page of Markdown")


def run_help(options: argparse.Namespace) -> None:
    if options.page:
        print(page(), end="")
        return
    print("\n\n".join(entry(word) for word in options.words) or overview())
