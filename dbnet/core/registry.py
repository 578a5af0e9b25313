"""kind -> class, for every family of interchangeable members; and what is wrong with a table of options, in a sentence (`explain`).

A family is a folder inside the room that uses it (``network.layers``, ``shards.rules``, ...). Its modules define members: frozen
pydantic models whose fields are the options of a configuration and whose ``kind`` chooses it. Loading a family imports
its modules, so a new member is one new file. A member from a user's own file is registered in the same way, by being defined.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError, ValidationInfo

from dbnet.core.errors import OWN, UserError, nearest

M = TypeVar("M", bound=BaseModel)
FAMILIES: dict[str, dict[str, type[Member]]] = {}
# Users' own modules by path, as they were when they were loaded: path, sha256, text.
SOURCES: dict[str, dict[str, str]] = {}


class Member(BaseModel):
    """Base of all members: a frozen value, registered under ``kind`` when its class is defined."""

    # Deferred, since a run takes few of the members that are defined.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)
    family: ClassVar[str] = ""
    kind: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in cls.__dict__ and cls.kind:
            FAMILIES.setdefault(cls.family, {})[cls.kind] = cls

    def options(self) -> dict[str, Any]:
        """Return what a configuration would say: the kind and every option."""
        return {"kind": self.kind, **self.model_dump()}


class Stored(BaseModel):
    """What an output says of a member: its kind and its options, as they were, whether or not its class is at hand."""

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: str

    def options(self) -> dict[str, Any]:
        """Return what a configuration would say: the kind and every option."""
        return self.model_dump()


class Family(NamedTuple):
    """Marks a field whose value is a member of family `name`, or a list of such; by default of a certain kind."""

    name: str
    default: str | None = None

    @classmethod
    def of(cls, model: type[BaseModel] | None, key: str) -> Family | None:
        """Return the mark of a field; nothing if it has none."""
        field = None if model is None else model.model_fields.get(key)
        return None if field is None else next((mark for mark in field.metadata if isinstance(mark, cls)), None)

    def member(self, entry: Any) -> type[Member] | None:
        """Return the class that a configuration's entry asks for; nothing if none is at hand."""
        kind = entry.get("kind", self.default) if isinstance(entry, Mapping) else entry
        return chosen(self.name, kind) if isinstance(kind, str) else None


def member(name: str, where: str, default: str | None = None, short: bool = False) -> Any:
    """Return the type of a field whose value is a member: written as a table with its kind and options, or as its kind alone.

    Parameters
    ----------
    where
        The field's name in a configuration, for messages.
    default
        The kind if none is given.
    short
        Whether one that has no options is stored as its kind alone.
    """

    def read(value: Any, info: ValidationInfo) -> Any:
        return take(name, value, where, default, asked(info, "members"))

    def said(chosen: Any) -> Any:
        entry = shown(chosen)
        return entry["kind"] if short and list(entry) == ["kind"] else entry

    return Annotated[Any, BeforeValidator(read), PlainSerializer(said), Family(name, default)]


def shown(chosen: Any) -> Any:
    """Return what a configuration says of a member; of one that `model_copy` put in as tables or text these themselves."""
    return chosen.options() if isinstance(chosen, Member | Stored) else chosen


def asked(info: ValidationInfo, what: str) -> bool:
    """Return whether `what` is to be done while a configuration is read: it is, unless the context says otherwise."""
    return bool((info.context or {}).get(what, True))


def take(name: str, value: Any, where: str, default: str | None = None, made: bool = True) -> Any:
    """Return the member of family `name` that `value` asks for; not `made`: what an output says of it."""
    if isinstance(value, Member):
        return value
    if not made:
        return _stored(value, where)
    if isinstance(value, Stored):
        value = value.options()
    if isinstance(value, str):
        return make(name, {"kind": value}, where, where)
    if not isinstance(value, Mapping):
        raise UserError(f"{where} = {_shown(value)} is not allowed: it must be a table, like {{kind = 'x'}}.")
    return make(name, {**({} if default is None else {"kind": default}), **value}, where)


def _stored(value: Any, where: str, inner: bool = True) -> Stored:
    """Return what an output says of a member, and of one among its options."""
    entry = {"kind": value} if isinstance(value, str) else value
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str) or not all(str(key).isidentifier() for key in entry):
        raise UserError(f"The stored configuration is damaged: {where} = {_shown(value)} is no member of a family.")
    nested = {key: _stored(v, f"{where}.{key}", False) for key, v in entry.items() if inner and isinstance(v, dict) and "kind" in v}
    return Stored(**{**entry, **nested})


def family(name: str) -> dict[str, type[Member]]:
    """Return all members of the family ``dbnet.<name>``, for example network.layers, by kind; import them on first use."""
    package = importlib.import_module(f"dbnet.{name}")
    for module in pkgutil.walk_packages(package.__path__, f"dbnet.{name}."):
        importlib.import_module(module.name)
    return FAMILIES.setdefault(name, {})


def chosen(name: str, kind: str) -> type[Member] | None:
    """Return the member of a kind, None if there is none; of a family that is not loaded just its file, if that has this name."""
    place = f"dbnet.{name}"
    if kind.isidentifier() and find_spec(f"{place}.{kind}") is not None:
        importlib.import_module(f"{place}.{kind}")
    return FAMILIES.get(name, {}).get(kind) or family(name).get(kind)


def load_file(path: str) -> None:
    """Define the members of a user's own Python file; what was loaded is kept in `SOURCES`, to be stored with a run.

    Raises
    ------
    UserError
        No such file, or it fails.
    """
    source = Path(path)
    if "\0" in path or not source.is_file():
        raise UserError(f"model.modules: there is no file '{path}'; paths are relative to the folder the command is given in.")
    if source.suffix != ".py":
        raise UserError(f"model.modules: '{path}' is not a Python file; its name must end in .py.")
    try:
        text = source.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise UserError(f"model.modules: '{path}' cannot be read: {why}.") from None
    entry = {"path": path, "sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text}
    run_module(entry, source.resolve())
    SOURCES[path] = entry


def is_running(entry: dict[str, str]) -> bool:
    """Return whether a module is loaded already, from wherever."""
    return _name(entry) in sys.modules


def run_module(entry: dict[str, str], file: Path) -> None:
    """Run the text of a user's own module, once, as if it stood in `file`, and have its members found.

    Raises
    ------
    UserError
        It fails.
    """
    name = _name(entry)
    if name in sys.modules:
        # Another one may have defined the same kinds since.
        for member in vars(sys.modules[name]).values():
            if isinstance(member, type) and issubclass(member, Member) and member.__module__ == name and member.kind:
                FAMILIES.setdefault(member.family, {})[member.kind] = member
        return
    if "numba" in entry["text"]:
        # What it compiles by itself is cached where kernels are.
        importlib.import_module("dbnet.core.kernels.compiler")
    sys.modules[name] = module = ModuleType(name)
    module.__file__ = str(file)
    try:
        exec(compile(entry["text"].encode(), str(file), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_globals is vars(module)]
        del sys.modules[name]
        at = f" in line {lines[-1]}" if lines else ""
        raise UserError(f"model.modules: '{entry['path']}' fails{at} with {type(error).__name__}: {error}.") from error


def own_modules(entries: Any, paths: Sequence[str]) -> list[dict[str, str]]:
    """Return what an output says of the own modules of its run; ValueError where that is not what it was."""
    for entry in entries:
        if not all(isinstance(entry[key], str) for key in ("path", "text")):
            raise ValueError("/modules is damaged")
        if entry["sha256"] != hashlib.sha256(entry["text"].encode()).hexdigest():
            raise ValueError("/modules is damaged: the text of a module has another SHA-256")
    if [entry["path"] for entry in entries] != list(paths):
        raise ValueError("/modules is damaged: model.modules has others")
    return entries


def named(entries: Sequence[dict[str, str]]) -> str:
    """Return own modules in words."""
    return ", ".join(f"{entry['path']} (SHA-256 {entry['sha256'][:12]}...)" for entry in entries)


def _name(entry: dict[str, str]) -> str:
    """Return the name of a user's own module: another text is another module."""
    return f"{OWN}{re.sub(r'[^a-zA-Z0-9_]', '_', Path(entry['path']).stem)}_{entry['sha256'][:16]}"


def make(name: str, entry: dict[str, Any], where: str, key: str = "") -> Any:
    """Build the member of family `name` that a configuration's table asks for; `key` names its kind if `where`.kind does not.

    Raises
    ------
    UserError
        Unknown kind or option, or a wrong value; the sentence names the key and the nearest known one.
    """
    entry = dict(entry)
    kind, key = entry.pop("kind", None), key or f"{where}.kind"
    cls = None if not isinstance(kind, str) else chosen(name, kind)
    if kind is None:
        raise UserError(f"The key '{key}' is missing; it is one of {', '.join(sorted(family(name)))}.")
    if cls is None:
        known = family(name)
        own = "" if name.startswith(("data.", "network.parameters")) else "; one of your own needs its file in model.modules"
        raise UserError(f"{key} = {kind!r} is not one of {', '.join(sorted(known))}{nearest(str(kind), known) or own}.")
    try:
        return cls(**entry)
    except UserError as error:
        # A member among its options does not know whose it is.
        inner = "|".join(key for key in cls.model_fields if Family.of(cls, key)) or "$"
        said = str(error) if f"{where}." in str(error) else re.sub(rf"\b({inner})\b(?=[. ])", rf"{where}.\1", str(error), count=1)
        raise UserError(said) from None
    except ValidationError as error:
        first, known = error.errors()[0], family(name)
        others = [k for k in sorted(known) if first["type"] == "extra_forbidden" and first["loc"][0] in known[k].model_fields]
        elsewhere = f" {first['loc'][0]} is an option of {key} = {' or '.join(map(repr, others))}." if others else ""
        raise UserError(explain(error, cls, where) + elsewhere) from None


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


def valid(model: type[M], tree: dict[str, Any], **context: bool) -> M:
    """Return the value that nested tables give; UserError where they are not what the model allows."""
    try:
        return model.model_validate(tree, context=context)
    except ValidationError as error:
        raise UserError(explain(error, model)) from None


def explain(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """Turn pydantic's first complaint into one sentence with the key, what is allowed, and the nearest known key."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(([where] if where else []) + path)
    if first["type"] == "extra_forbidden":
        fields = _fields_at(model, path[:-1])
        return f"Unknown key '{key}'{nearest(path[-1], fields)}; known here: {', '.join(fields)}."
    if first["type"] == "missing":
        return f"The key '{key}' is missing; add it to the configuration."
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
    "tuple_type": "it must be a list, like [1, 2] or ['a.py']",
    "list_type": "it must be a list, like [1, 2] or ['a.py']",
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
    """Return a value as a configuration writes it, shortened."""
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
