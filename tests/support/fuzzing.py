"""Commands under guard and ways to damage what they read: configurations as trees and as bytes, HDF5 files likewise."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import h5py
import numpy as np
from finished import Finished
from hypothesis import strategies as st

from dbnet.__main__ import main
from dbnet.core.registry import family

# Of processor time, so that a loaded machine is no hang; what sleeps for ever is ended by pytest's own limit.
SECONDS = 10
MEMORY = 1 << 30


class TooLong(BaseException):
    """A command has computed for SECONDS."""


def run(*words: object, bounded: bool = True) -> Finished:
    """Run a command of the command line here, with bounds on its time and on the memory that it may ask for."""
    out, err = io.StringIO(), io.StringIO()
    bounds = _bounds() if bounded else contextlib.nullcontext()
    # The picture at the end of a training costs more than all else; the command 'plot' draws the same.
    picture = mock.patch("dbnet.monitor.pictures.figure.draw") if words[0] == "train" else contextlib.nullcontext()
    with (
        bounds,
        picture,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(record=True) as heard,
    ):
        warnings.simplefilter("always")
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Finished(code, out.getvalue(), err.getvalue() + "".join(f"{w.category.__name__}: {w.message}\n" for w in heard))


@contextlib.contextmanager
def _bounds() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = signal.signal(signal.SIGPROF, late)
    # Again and again, since what is raised while an object is disposed of is lost.
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 0.5)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def sound(done: Finished, *context: object) -> None:
    """Fail unless a command has succeeded or refused in one sentence, in silence but for doubts."""
    assert done.code in (0, 1, 2), (done, *context)
    lines = done.err.split("\n")[:-1] if done.err.endswith("\n") else [done.err] * bool(done.err)
    assert len(lines) >= (done.code != 0) and all(line.startswith("dbnet: ") for line in lines), (done, *context)


# --- configurations -------------------------------------------------------------------------------------------------------------

FAMILIES = ("network.layers", "network.losses", "shards.rules", "methods", "methods.descent")
WORDS = st.one_of(
    st.text(max_size=8).filter(lambda text: "/" not in text and ".." not in text),
    st.sampled_from(["", "none", "run.toml", "data.h5", "Zürich", "模型", "a" * 300, "nan", "float16", "0\x00", "\n"]),
    st.sampled_from(
        [
            kind
            for name in ("network.layers", "network.losses", "shards.rules", "methods", "methods.descent")
            for kind in sorted(family(name))
        ]
    ),
)
# Neither cheap nor absurd sizes would only take long.
NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 5, 8, 64, 1 << 31, (1 << 63) - 1, 1 << 63, 10**15, 10**30, -(1 << 31), -(10**18)]),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, -0.5, 1e-320, 1e-30, 1e30, 1e300, -1e300, float("nan"), float("inf"), float("-inf")]),
    st.booleans(),
)
PLAIN = st.one_of(NUMBERS, WORDS)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2), max_leaves=4)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of everything below the root of nested tables and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, inner in items for found in ((*path, key), *places(inner, (*path, key)))]


@st.composite
def spoiled_trees(draw: Callable[..., Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Draw a configuration's tables with one to three things that are wrong, or only strange."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(tree) or [("run",)]))
        table = tree
        for key in path[:-1]:
            table = table[key]
        how = draw(st.sampled_from(["value", "value", "value", "delete", "rename", "add", "nest", "double"]))
        old = table[path[-1]] if isinstance(table, list) or path[-1] in table else None
        if how == "delete":
            del table[path[-1]]
        elif how == "rename" and isinstance(table, dict):
            table[draw(WORDS)] = table.pop(path[-1], None)
        elif how == "add" and isinstance(old, dict):
            old[draw(WORDS)] = draw(VALUES)
        elif how == "nest":
            table[path[-1]] = draw(st.sampled_from([[old], {"kind": old}, {str(path[-1]): old}]))
        elif how == "double" and isinstance(old, list):
            old.extend(copy.deepcopy(old))
        else:
            table[path[-1]] = draw(VALUES)
    return tree


def toml(tree: dict[str, Any]) -> str:
    """Return nested tables as TOML, a line for each key of the root."""
    return "".join(f"{line}\n" for line in _pairs(tree))


def _pairs(tree: dict[str, Any]) -> list[str]:
    return [f"{json.dumps(key, ensure_ascii=False)} = {_inline(value)}" for key, value in tree.items() if value is not None]


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(_pairs(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_inline(inner) for inner in value if inner is not None) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


# --- files --------------------------------------------------------------------------------------------------------------------


@st.composite
def spoiled_bytes(draw: Callable[..., Any], whole: bytes) -> bytes:
    """Draw a file's bytes cut off, with some of them changed, or with some put in or taken out."""
    raw = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        how = draw(st.sampled_from(["change", "change", "cut", "insert", "remove", "zero"]))
        if how == "cut":
            del raw[at:]
        elif how == "insert":
            raw[at:at] = draw(st.binary(max_size=8))
        elif how == "remove":
            del raw[at : at + draw(st.integers(1, 64))]
        elif raw:
            n = min(len(raw) - at, draw(st.integers(1, 8)))
            raw[at : at + n] = bytes(n) if how == "zero" else draw(st.binary(min_size=n, max_size=n))
    return bytes(raw)


def replacements(old: np.ndarray) -> list[Any]:
    """Return what may stand in the place of an array in a file."""
    rows = np.atleast_1d(old)
    out: list[Any] = [np.zeros(0, old.dtype), old[..., None], rows[:-1], np.concatenate([rows, rows]), 0]
    out += [np.array("text", dtype=h5py.string_dtype()), np.array([b"ab"] * 3), h5py.Empty("f4"), np.zeros((2, 0, 3))]
    out += [1.5, "{}", "group"]
    if old.dtype.kind in "iuf":
        out += [old.astype(kind) for kind in ("i1", "u1", "i8", "f2", "f4", "f8", ">f4", "c8", "?")]
        out += [np.full_like(old, -1 if old.dtype.kind != "u" else 255), np.full(old.shape, np.nan), np.full(old.shape, np.inf)]
        out += [np.full(old.shape, 1 << 62), np.full(old.shape, -(1 << 62)), np.full(old.shape, 1e30)]
    if old.dtype.names:
        out += [old[list(old.dtype.names[1:])], np.zeros(old.shape)]
        for name in old.dtype.names:
            for value in (-1, np.inf if old.dtype[name].kind == "f" else np.iinfo(old.dtype[name]).max):
                spoiled = old.copy()
                spoiled[name] = value
                out.append(spoiled)
    return out


TEXTS = ["{", "[]", "{}", "null", "3", '"x"', '{"shape": 3}']
ATTRIBUTES = st.one_of(PLAIN, st.sampled_from(TEXTS), st.just(np.zeros(3)), st.just(h5py.Empty("i8")))


@st.composite
def spoiled_structure(draw: Callable[..., Any], path: Path) -> list[tuple[str, str, Any]]:
    """Draw up to three changes of an HDF5 file: (delete | set | attribute, name, value)."""
    arrays: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
        attributes = {name: file.attrs[name] for name in file.attrs}
    texts = {name: tree for name, values in arrays.items() if (tree := _stored_tree(values))}
    out = []
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(["set", "set", "set", "delete", "attribute", "json", "text"]))
        if how == "text" and texts:
            name = draw(st.sampled_from(sorted(texts)))
            value = json.dumps(draw(spoiled_trees(texts[name]))).encode()
            out.append(("set", name, np.frombuffer(value, np.uint8)))
        elif how in ("attribute", "json") and attributes:
            name = draw(st.sampled_from(sorted(attributes)))
            tree = _tree(attributes[name]) if how == "json" else None
            value = json.dumps(draw(spoiled_trees(tree))) if tree else draw(st.one_of(st.none(), ATTRIBUTES))
            out.append(("attribute", name, value))
        else:
            name = draw(st.sampled_from(sorted(arrays)))
            old = np.asarray(arrays[name])
            out.append((how, name, draw(st.sampled_from(replacements(old))) if how == "set" and old.dtype != object else None))
    return out


def _stored_tree(values: object) -> Any:
    """Return the non-empty table or list that an array of bytes holds as JSON; None for all else."""
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8 or values.ndim != 1:
        return None
    return _tree(values.tobytes().decode(errors="replace"))


def _tree(value: object) -> Any:
    """Return the non-empty table or list that a JSON text holds; None for all else."""
    try:
        tree = json.loads(value) if isinstance(value, str) else None
    except json.JSONDecodeError:
        return None
    return tree if isinstance(tree, dict | list) and tree else None


def spoil(path: Path, changes: list[tuple[str, str, Any]], out: Path) -> None:
    """Write a copy of an HDF5 file with these changes."""
    shutil.copy(path, out)
    with h5py.File(out, "a") as file:
        for how, name, value in changes:
            if how == "attribute":
                file.attrs.pop(name, None)
                if value is not None:
                    with contextlib.suppress(TypeError, ValueError, OverflowError):
                        file.attrs[name] = value
                continue
            if name in file:
                del file[name]
            if how == "set" and value is not None:
                if isinstance(value, str) and value == "group":
                    file.create_group(name)
                else:
                    file[name] = value
