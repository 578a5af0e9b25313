"""Nested tables: read from a TOML file or taken from Python, and how TOML writes a value."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import Any

from dbnet.core.errors import UserError


def tables(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return nested tables as a configuration has them, free to be changed; UserError where there is no such file, or no TOML."""
    if isinstance(source, Mapping):
        return plain(source)
    try:
        return tomllib.loads(Path(source).read_text())
    except FileNotFoundError:
        raise UserError(f"No configuration file '{source}'; the ones that come with dbnet are in jobs/.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        said = "it is no text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or error
        raise UserError(f"'{source}' is not a readable TOML file: {said}.") from None


def plain(value: Any) -> Any:
    """Return a value of Python as a file would have it: tables, lists, texts, and Python's own numbers for NumPy's."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def written(value: Any) -> str:
    """Return a value as TOML writes it on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {written(inner)}" for key, inner in value.items() if inner is not None) + "}"
    return json.dumps(value)
