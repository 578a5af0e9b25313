"""`dbnet check`: what must hold of the layers, losses, rules and methods in a user's own file, one line each."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from dbnet.commands.see.checks import layers, losses, rules, runs
from dbnet.commands.see.checks.base import Broken, Checks
from dbnet.core import config as configuration
from dbnet.core import jit
from dbnet.core.errors import OWN, UserError, nearest, own_line
from dbnet.core.registry import SOURCES, Member, explain, load_file
from dbnet.network.layers.base import Layer, Shape
from dbnet.network.losses.base import Loss
from dbnet.shards.rules.base import Rule

# What a family's members are called here.
_WORDS = {
    "network.layers": "layer",
    "network.losses": "loss",
    "network.parameters.initializers": "initializer",
    "shards.rules": "rule",
    "shards.rules.schedules": "schedule",
    "methods": "method",
    "methods.descent": "batch method",
    "data.formats": "data format",
}


def check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check the layers, losses, rules and methods of your own file: gradients against differences, cut = uncut, shapes,\n"
        "what is written in place, a small run. What is broken is said with what to do (exit code 1).\n\n"
        "  dbnet check gain.py                           everything in it\n"
        "  dbnet check mine.py filter.units=5            with an option that has no default, or another value\n"
        "  dbnet check mine.py --input 32,32,3           layers on inputs of this shape; default: 9x8x2 and 7, what they take"
    )
    parser.add_argument("file", metavar="FILE.py", help="your own file, as model.modules names it")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KIND.option=value", help="options of the members")
    parser.add_argument("--input", metavar="N,N,N", help="shape of a layer's input: rows, columns, maps; or units")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, for scripts")


def run_check(options: argparse.Namespace) -> int:
    # A kernel that reaches beyond its arrays would end this command, or find what happens to lie there.
    with jit.guarded():
        load_file(options.file)
    classes = _own(options.file)
    shape = _shape(options.input)
    members = [_made(kind, options.overrides) for kind in classes]
    _refuse_strangers(options.overrides, classes)
    results = [row for member in members for row in _results(member, options.file, shape, not options.json)]
    broken = sum(not row["ok"] for row in results)
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        print(f"{broken} of {len(results)} checks broken." if broken else f"All {len(results)} checks passed.")
    return 1 if broken else 0


def _own(path: str) -> list[type[Member]]:
    """Return the members that a file defines, in its order.

    Raises
    ------
    UserError
        It defines none.
    """
    ending = SOURCES[path]["sha256"][:16]
    module = next(module for name, module in sys.modules.items() if name.startswith(OWN) and name.endswith(ending))
    classes = [
        one
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, Member) and one.__module__ == module.__name__
    ]
    for one in classes:
        if not one.kind:
            configuration.warn(
                f'The class {one.__name__} has no kind, so no configuration can choose it: kind: ClassVar[str] = "...".'
            )
    found = list(dict.fromkeys(one for one in classes if one.kind))
    if not found:
        raise UserError(
            f"'{path}' defines no layer, loss, rule or method: a class of dbnet.Layer, Loss, Rule or Method with a kind."
        )
    return found


def _made(kind: type[Member], overrides: Sequence[str]) -> Member:
    """Return a member with the options that are given."""
    tree: dict[str, Any] = {}
    for text in overrides:
        configuration.override(tree, text)
    entry = tree.get(kind.kind, {})
    try:
        return kind(**entry)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            raise UserError(f"{_WORDS.get(kind.family, kind.family)} {kind.kind} needs {first['loc'][0]}; give for example "
                            f"{kind.kind}.{first['loc'][0]}=3.") from None  # fmt: skip
        raise UserError(explain(error, kind, kind.kind)) from None


def _refuse_strangers(overrides: Sequence[str], classes: Sequence[type[Member]]) -> None:
    known = [one.kind for one in classes]
    for text in overrides:
        name = text.partition(".")[0]
        if name not in known:
            raise UserError(f"'{text}': the file has no '{name}'{nearest(name, known)}; it has {', '.join(known)}.")


def _shape(text: str | None) -> Shape | None:
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){0,2}", text):
        raise UserError(f"--input {text} is no shape; write rows,columns,maps, or the number of units.")
    return tuple(map(int, text.split(",")))


def _sets(member: Member, path: str, shape: Shape | None) -> Iterator[tuple[str, Checks]]:
    """Yield what must hold of a member, layers for each shape of inputs."""
    if isinstance(member, Layer):
        for one in [shape] if shape else layers.accepted(member):
            yield "x".join(map(str, one)), {**layers.checks(member, one), **runs.checks(member, path, one)}
    elif isinstance(member, Loss):
        yield "", {**losses.checks(member), **runs.checks(member, path)}
    elif isinstance(member, Rule):
        yield "", {**rules.checks(member), **runs.checks(member, path)}
    else:
        yield "", runs.checks(member, path)


def _results(member: Member, path: str, shape: Shape | None, prints: bool) -> Iterator[dict[str, Any]]:
    """Make the checks of a member; yield and print what came of each."""
    word = _WORDS.get(member.family, member.family)
    for of, checks in _sets(member, path, shape):
        if prints:
            print(f"{word} {member.kind}{f' on {of}' if of else ''}", flush=True)
        for name, check in {"name": lambda: _named(member), **checks}.items():
            try:
                ok, said = True, check()
            except Broken as error:
                ok, said = False, f"{error}."
            except Exception as error:
                own = own_line(error).removeprefix("dbnet: ").strip()
                ok, said = False, own or f"fails with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
                if "out of bounds" in str(error) and isinstance(member, Layer):
                    said += "; of c.x there is only what needs(...) asks for (c.x_box)."
            if prints:
                print(f"  {'ok' if ok else 'BROKEN':<7} {name:<15} {said}", flush=True)
            yield {"family": member.family, "kind": member.kind, "input": of, "check": name, "ok": ok, "said": said}


def _named(member: Member) -> str:
    """Nobody else has its kind."""
    known, left = [], list(Member.__subclasses__())
    while left:
        one = left.pop()
        left += one.__subclasses__()
        known.append(one)
    for one in known:
        if one.kind == member.kind and one.family == member.family and one.__module__.startswith("dbnet."):
            raise Broken(f"kind '{member.kind}' is one of dbnet's own, which nobody can choose any more; take another kind")
    return f'kind = "{member.kind}"'
