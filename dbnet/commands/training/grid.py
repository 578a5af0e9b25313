"""A grid of runs: every combination of the values that are given, each with a name that says what is its own.

``rule.rate=0.01,0.1`` gives two values, ``run.seed=1..3`` three, ``topology.replicas=2..8..2`` four; commas in quotes, brackets and
braces belong to a value. A run's name is that of the configuration and, for every key with several values, the key's last part and
the value: ``digits_rate-0.01_seed-1``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dbnet.core import config as configuration
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.core.toml import written
from dbnet.monitor.many.differences import short
from dbnet.run.setup import setup

# More runs than these nobody waits for.
_MOST = 10_000
# Signs that every shell and file system leaves alone, and how many of them a value, and a whole name, may have.
_PLAIN, _LONG, _LONGEST = re.compile(r"[\w.+-]{1,32}", re.ASCII), 24, 150


class GridAxis(NamedTuple):
    """A key of the configuration and the values that it takes in turn, as they are written in a change."""

    key: str
    values: list[str]


class GridPoint(NamedTuple):
    """One run of a grid.

    Attributes
    ----------
    base, name
        The configuration's name for it; what its outputs are called.
    values
        Its value of each key that has several, as the configuration holds it.
    words
        Its changes of the configuration, the name among them.
    config
        The run.
    """

    base: str
    name: str
    values: dict[str, Any]
    words: tuple[str, ...]
    config: Config


def split_values(text: str) -> list[str]:
    """Return the values between the commas of a text that stand in no quotes, brackets or braces."""
    out, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        else:
            depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not quote and depth == 0:
            out.append("")
        else:
            out[-1] += sign
    return [value.strip() for value in out]


def axis(word: str) -> GridAxis:
    """Return the values that a word of the command line gives a key.

    Raises
    ------
    UserError
        No key, an empty value among several, a range without end or backwards.
    """
    key, sign, text = word.partition("=")
    if not sign or not key.strip():
        raise UserError(f"'{word}' is neither a change nor an axis of the grid; write table.key=value or table.key=value,value.")
    out = []
    for value in split_values(text):
        found = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?", value)
        if found is None:
            out.append(value)
            continue
        first, last, step = int(found[1]), int(found[2]), int(found[3] or 1)
        if last < first or step < 1:
            raise UserError(f"'{word}': {value} counts from {first} to {last} by {step}; write {key}=1..3 or {key}=2..8..2.")
        if (last - first) // step >= _MOST:
            raise UserError(f"'{word}': {value} are more than {_MOST:,} values; a grid has at most {_MOST:,} runs.")
        out += [str(number) for number in range(first, last + 1, step)]
    if len(out) > 1 and "" in out:
        raise UserError(f"'{word}' has an empty value among others; write {key}=value,value without a comma at an end.")
    return GridAxis(key.strip(), out)


def grid(source: str | Path, words: Sequence[str], places: bool = True) -> list[GridPoint]:
    """Return all runs of a grid in order, the last axis turning fastest; each is known to fit its data.

    Parameters
    ----------
    places
        Whether all of a run must fit the memory of this machine.

    Raises
    ------
    UserError
        Something is wrong with an axis, or with a run of the grid; or two runs are the same.
    """
    axes = [axis(word) for word in words]
    keys = [axis.key for axis in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"'{key}' is given more than once; write all of its values after one '{key}='.")
    varied = [axis.key for axis in axes if len(axis.values) > 1]
    for key in ("run.name", "run.folder"):
        if key in varied:
            raise UserError(f"{key} cannot be varied: each run's name is made from what differs; give one {key}, or none.")
    count = 1
    for one in axes:
        count *= len(one.values)
    if count > _MOST:
        raise UserError(f"These are {count:,} runs; a grid has at most {_MOST:,}: leave some values out.")
    said: dict[str, None] = {}
    label, points = short(varied), []
    for chosen in itertools.product(*(axis.values for axis in axes)):
        changes = [f"{key}={value}" for key, value in zip(keys, chosen, strict=True)]
        points.append(_point(source, changes, {key: value for key, value in zip(keys, chosen, strict=True) if key in varied}, label,
                             said))  # fmt: skip
    _refuse_twins(points)
    _check(points, places)
    configuration.warn(*said)
    return points


def _point(source: str | Path, changes: list[str], own: dict[str, str], label: dict[str, str], said: dict[str, None]) -> GridPoint:
    try:
        config = configuration.load(source, changes, lambda sentence: said.setdefault(sentence))
    except UserError as error:
        raise UserError(f"{_here(own)}{error}") from None
    values = {key: _value(text) for key, text in own.items()}
    name = _name(config.run.name, [(label[key], value) for key, value in values.items()])
    # One picture of all is worth more than one of each.
    words = ["run.picture=false", *(word for word in changes if not word.startswith("run.name="))]
    named = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    return GridPoint(config.run.name, name, values, (*words, f"run.name={json.dumps(name)}"), named)


def _here(own: dict[str, str]) -> str:
    return f"In the grid at {', '.join(f'{key}={value}' for key, value in own.items())}: " if own else ""


def _value(text: str) -> Any:
    """Return a value as `override` takes it."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _name(base: str, own: Iterable[tuple[str, Any]]) -> str:
    """Return a run's name. What no file's name can hold is replaced, and a digest of the value is put behind it."""
    parts = [base]
    for key, value in own:
        text = spelled(value)
        if not _PLAIN.fullmatch(text):
            text = f"{re.sub(r'[^a-zA-Z0-9.+-]+', '.', text).strip('.')[:_LONG]}+{_digest(written(value))}"
        parts.append(f"{key}-{text}")
    name = "_".join(parts)
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}+{_digest(name)}"


def spelled(value: Any) -> str:
    """Return a value as short as it can be written: 0.1, 1e+09, softmax."""
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return value if isinstance(value, str) else written(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _refuse_twins(points: Sequence[GridPoint]) -> None:
    """Raise UserError where two points are the same run, or their outputs would have the same name."""
    runs: dict[str, GridPoint] = {}
    for point in points:
        table = point.config.run.model_copy(update={"name": ""})
        twin = runs.setdefault(point.config.model_copy(update={"run": table}).text(), point)
        if twin is not point:
            ways = [", ".join(f"{key}={spelled(value)}" for key, value in one.values.items()) for one in (twin, point)]
            raise UserError(f"The grid has the same run twice: {ways[0]} and {ways[1]}; leave one out.")
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two runs of the grid would have the name '{name}'; write their values in another way.")


def _check(points: Sequence[GridPoint], places: bool) -> None:
    """Raise UserError where a run does not fit its data, or, all of it in one process, this machine; labels are looked at once."""
    seen: set[str] = set()
    for point in points:
        path = point.config.data.path
        try:
            ready = setup(point.config, None, path not in seen)
            if places:
                ready.check(None)
        except UserError as error:
            raise UserError(f"{_here({key: spelled(value) for key, value in point.values.items()})}{error}") from None
        seen.add(path)
