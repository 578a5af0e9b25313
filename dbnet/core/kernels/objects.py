"""Machine code of kernels from files: loaded by LLVM's linker alone, and called as built-in functions.

An entry looks at its arguments before it computes: an array must have the declared type, dimensions and order, and be writable,
otherwise the entry does nothing and returns NotImplemented. It calls Python through `TABLE`, addresses that it is handed by whoever
calls: machine code in a file knows none.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import math
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np

# What entries need of Python, in this order: objects, and functions.
OBJECTS = {"ndarray": np.ndarray, "None": None, "NotImplemented": NotImplemented, "RuntimeError": RuntimeError}
FUNCTIONS = (
    "Py_IncRef", "PyFloat_AsDouble", "PyLong_AsLongLong", "PyObject_IsTrue", "PyErr_Occurred", "PyErr_SetString",
    "PyEval_SaveThread", "PyEval_RestoreThread", "PyFloat_FromDouble", "PyLong_FromLongLong", "PyLong_FromUnsignedLongLong",
    "PyBool_FromLong", "PyTuple_New", "PyTuple_SetItem",
)  # fmt: skip
TABLE = (*OBJECTS, *FUNCTIONS)
# Where the table lies in the bytes object that every entry gets as its `self`.
HEAD = bytes.__basicsize__ - 1
_FASTCALL = 0x80
_NO_MATTER = ("NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS")


class _Method(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = [("name", ctypes.c_char_p), ("code", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p)]


# Python reads them for as long as a function lives.
_METHODS: list[_Method] = []


@cache
def _table() -> bytes:
    functions = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in FUNCTIONS]
    return struct.pack(f"{len(TABLE)}P", *map(id, OBJECTS.values()), *functions)


@cache
def _engine() -> Any:
    """Return what links machine code into this process."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


@cache
def machine() -> str:
    """Return what all machine code depends on: processor, versions, what Numba was asked for."""
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite", "numpy")]
    asked = sorted(pair for pair in os.environ.items() if pair[0].startswith("NUMBA_") and pair[0] not in _NO_MATTER)
    processor = f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    return f"{sys.version} {versions} {asked} {processor}"


# Of files that differ in their stamp alone: versions, processors and environments that take turns on a host.
_KEPT = 8


def write(path: Path, about: dict[str, Any], code: bytes) -> None:
    """Write a file of machine code and what `about` says of it, whole or not at all; OSError where that cannot be.

    Its name ends in a hyphen and a stamp; of those that are named alike but for that the oldest go.
    """
    number, name = tempfile.mkstemp(dir=path.parent, prefix=_NEW)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(_sealed(json.dumps(about).encode() + b"\n" + code))
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
    alike = path.parent.glob(f"{path.stem.rpartition('-')[0]}-*{path.suffix}")
    for old in sorted(alike, key=_age)[_KEPT:]:
        old.unlink(missing_ok=True)


_NEW = ".new-"


def _sealed(data: bytes) -> bytes:
    """Return data behind their length and SHA-256."""
    return f"{len(data)} {hashlib.sha256(data).hexdigest()}\n".encode() + data


def _age(path: Path) -> float:
    """Return how old a file is, in seconds since some moment; one that another process has removed is the oldest."""
    try:
        return -path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def sweep(folder: Path) -> None:
    """Remove what processes have left that were killed while they wrote; only where no other can be writing."""
    for path in folder.glob(_NEW + "*"):
        path.unlink(missing_ok=True)


Loaded = tuple[dict[str, Any], dict[str, Callable]]


def load(path: Path) -> Loaded | None:
    """Return what a file says of itself and its entries by symbol; None where it is not there, or not as it was written."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    _, _, inner = data.partition(b"\n")
    # The linker would take whatever it is given.
    if data != _sealed(inner):
        return None
    head, _, code = inner.partition(b"\n")
    return enter(json.loads(head), code)


def enter(about: dict[str, Any], code: bytes) -> Loaded:
    """Link machine code; return what `about` says of it and its entries by symbol."""
    if code:
        _engine().add_object_file(llvm.ObjectFileRef.from_data(code))
        _engine().finalize_object()
    return about, {symbol: _function(symbol) for symbol in about["entries"]}


def _function(symbol: str) -> Callable:
    """Return a built-in function whose code is in the engine."""
    method = _Method(symbol.encode(), _engine().get_function_address(symbol), _FASTCALL, None)
    _METHODS.append(method)
    make = ctypes.pythonapi.PyCFunction_NewEx
    make.argtypes, make.restype = [ctypes.POINTER(_Method), ctypes.py_object, ctypes.c_void_p], ctypes.py_object
    return make(ctypes.byref(method), _table(), None)
