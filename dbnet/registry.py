"""kind -> class, for every family of interchangeable members.

A family is a package (``dbnet.layers``, ``dbnet.rules``, ...). Each of its modules defines members: frozen pydantic models whose
fields are the options of a run file and whose ``kind`` is the name it is chosen by. Loading a family imports all its modules, so
a new member is one new file. A member from a user's own file is registered in the same way, by being defined.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
import zlib
from inspect import cleandoc
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dbnet.errors import UserError, nearest

FAMILIES: dict[str, dict[str, type[Member]]] = {}


class Member(BaseModel):
    """Base of all members: a frozen value, registered under ``kind`` when its class is defined."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    family: ClassVar[str] = ""
    kind: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in cls.__dict__ and cls.kind:
            FAMILIES.setdefault(cls.family, {})[cls.kind] = cls

    def options(self) -> dict[str, Any]:
        """Return what a run file would say: the kind and every option."""
        return {"kind": self.kind, **self.model_dump()}


def family(name: str) -> dict[str, type[Member]]:
    """Return all members of ``dbnet.<name>`` by kind, importing them on first use."""
    package = importlib.import_module(f"dbnet.{name}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"dbnet.{name}.{module.name}")
    return FAMILIES.setdefault(name, {})


def load_file(path: str) -> None:
    """Define the members of a user's own Python file, once.

    Raises
    ------
    UserError
        No such file, or it fails.
    """
    source = Path(path).resolve()
    name = f"dbnet_user_{source.stem}_{zlib.crc32(str(source).encode()):08x}"
    if name in sys.modules:
        return
    if not source.is_file():
        raise UserError(f"model.modules: there is no file '{path}'; paths are relative to the folder the command is given in.")
    spec = importlib.util.spec_from_file_location(name, source)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"model.modules: '{path}' fails with {type(error).__name__}: {error}.") from error


def make(name: str, entry: dict[str, Any], where: str, key: str = "") -> Any:
    """Build the member of family `name` that the run file's table `entry` asks for; `key` names its kind if `where`.kind does not.

    Raises
    ------
    UserError
        Unknown kind or option, or a wrong value; the sentence names the key and the nearest known one.
    """
    known = family(name)
    entry = dict(entry)
    kind, key = entry.pop("kind", None), key or f"{where}.kind"
    if kind is None:
        raise UserError(f"The key '{key}' is missing; it is one of {', '.join(sorted(known))}.")
    if not isinstance(kind, str) or kind not in known:
        raise UserError(f"{key} = {kind!r} is not one of {', '.join(sorted(known))}{nearest(str(kind), known)}.")
    try:
        return known[kind](**entry)
    except ValidationError as error:
        raise UserError(explain(error, known[kind], where)) from None


def meaning(model: type[BaseModel], name: str) -> str:
    """Return what a field means: its description, or what the docstring of its class says of it under Parameters."""
    field = model.model_fields.get(name)
    if field is None:
        first = cleandoc(model.__doc__ or "").partition("\n")[0].rstrip(".")
        known = FAMILIES.get(getattr(model, "family", ""), {})
        return f"{first} (kinds: {', '.join(sorted(known))})" if name == "kind" else ""
    said = [field.description or ""]
    for owner in model.__mro__:
        text = cleandoc(owner.__dict__.get("__doc__") or "") + "\n"
        found = re.search(rf"^(?:\w+, )*{name}(?:, \w+)*\n((?: {{4}}.*\n)+)", text, re.MULTILINE)
        if found:
            said.append(found[1])
    return " ".join(next(filter(None, said), "").split()).rstrip(".")


def reached(modules: set[str]) -> set[str]:
    """Return these loaded modules and all of dbnet's that they take something from, directly or not."""
    found: set[str] = set()
    left = list(modules)
    while left:
        name = left.pop()
        if name in found or name not in sys.modules:
            continue
        found.add(name)
        # What stands in a table is taken, too.
        own = list(vars(sys.modules[name]).values())
        for value in [*own, *(inner for table in own if isinstance(table, dict) for inner in table.values())]:
            origin = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(origin, str) and origin.startswith("dbnet."):
                left.append(origin)
    return found


def explain(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """Turn pydantic's first complaint into one sentence with the key, what is allowed, and the nearest known key."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(([where] if where else []) + path)
    if first["type"] == "extra_forbidden":
        fields = _fields_at(model, path[:-1])
        return f"Unknown key '{key}'{nearest(path[-1], fields)}; known here: {', '.join(fields)}."
    if first["type"] == "missing":
        return f"The key '{key}' is missing; add it to the run file."
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}" if key else f"{first['ctx']['error']}"
    return f"{key} = {_shown(first['input'])} is not allowed: {_rule(first)}."


# What must hold, by pydantic's name of the complaint; {} takes the complaint's numbers.
_RULES = {
    "greater_than_equal": "it must be at least {ge:g}",
    "greater_than": "it must be greater than {gt:g}",
    "less_than_equal": "it must be at most {le:g}",
    "less_than": "it must be less than {lt:g}",
    "multiple_of": "it must be a multiple of {multiple_of:g}",
    "int_": "it must be a whole number",
    "float_": "it must be a number",
    "finite_number": "it must be a finite number",
    "bool_": "it must be true or false",
    "string_too_short": "it must not be empty",
    "string_": "it must be a text in quotes",
    "literal_error": "it must be {expected}",
    "too_short": "it needs {min_length} or more",
    "too_long": "it takes {max_length} or fewer",
    "tuple_type": "it must be a list, like [1, 2]",
    "list_type": "it must be a list, like [1, 2]",
    "dict_type": "it must be a table, like {{kind = 'x'}}",
    "model_": "it must be a table, like {{key = 1}}",
}


def _rule(complaint: Any) -> str:
    """Return what one of pydantic's complaints asks for."""
    for start, words in _RULES.items():
        if complaint["type"].startswith(start):
            return words.format_map(complaint.get("ctx", {}))
    return f"{complaint['msg'][0].lower()}{complaint['msg'][1:]}"


def _shown(value: Any) -> str:
    """Return a value as a run file writes it, shortened."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:70]} ..."


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Return the field names of the sub-model that `path` leads to."""
    for part in path:
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return list(model.model_fields)
