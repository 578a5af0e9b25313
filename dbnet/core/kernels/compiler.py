"""Numba: makes kernels, and files of their machine code, with entries for Python; the compiler's half of `jit`.

Imported where something has to be compiled. Kernels that run over threads need Numba's, and are in no file.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload
from numba.np.arrayobj import populate_array

from dbnet.core import jit
from dbnet.core.kernels import folder, objects, tiles  # noqa: F401

# Read whenever a kernel is made, so it holds also where something else imported Numba first.
numba.config.CACHE_DIR = str(folder.cache())

_NAMES = {
    "f4": types.float32, "f8": types.float64, "i8": types.int64, "u8": types.uint64, "u2": types.uint16, "u1": types.uint8,
    "b1": types.boolean,
}  # fmt: skip
_ANY, _INT, _WORD = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)
# What Python has for the scalars that an entry takes.
_TAKEN = {
    types.float64: ("PyFloat_AsDouble", ir.DoubleType()), types.int64: ("PyLong_AsLongLong", _WORD),
    types.boolean: ("PyObject_IsTrue", _INT),
}  # fmt: skip
_FLAGS = 0x1 | 0x100 | 0x400  # of an array: rows follow each other, aligned, writable


# --- from a declaration to Numba's ----------------------------------------------------------------------------------------------


def arguments_of(words: str) -> tuple[Any, ...]:
    """Return Numba's types of a signature without T."""
    found = []
    for word in words.split(";") if words else ():
        name, bracket, rest = word.strip().partition("[")
        found.append(types.Array(_NAMES[name], rest.count(":"), "C") if bracket else _NAMES[name])
    return tuple(found)


def words_of(arguments: Sequence[Any]) -> str:
    """Return the signature of Numba's types."""
    names = {kind: name for name, kind in _NAMES.items()}
    words = []
    for kind in arguments:
        array = isinstance(kind, types.Array)
        name = names.get(kind.dtype if array else kind, str(kind))
        shape = f"[{','.join(':' * kind.ndim)}]" if array else ""
        words.append(name + shape if not array or kind == types.Array(kind.dtype, kind.ndim, "C") else str(kind))
    return ";".join(words)


def made(function: Callable, parallel: bool, fast: bool, guarded: bool = False) -> Any:
    """Return a kernel as Numba knows it, not compiled yet; one that is `guarded` checks its bounds, and is kept nowhere."""
    flags = {"reassoc", "nsz", "contract", "arcp"} if fast else {"contract"}
    options = {"nogil": True, "error_model": "numpy", "fastmath": flags, "parallel": parallel}
    # Where nothing is said the environment decides.
    return numba.njit(cache=not guarded, **options, **({"boundscheck": True} if guarded else {}))(function)


made_inline = numba.njit(inline="always", error_model="numpy")


def type_of(taken: jit.Taken) -> Any:
    """Return Numba's type of a function that is overloaded here."""
    # Whoever asks may have begun to compile before this module was imported.
    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()
    return cpu_target.typing_context._get_global_type(taken)


def _resolved(function: Any) -> Callable:
    """Return one of dbnet's functions with what Numba knows in place of the declarations that it names."""
    names = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    known = {name: value.compiled for name, value in names.items() if isinstance(value, jit.Kernel | jit.Inline)}
    if not known:
        return function
    new = FunctionType(function.__code__, {**function.__globals__, **known}, function.__name__, function.__defaults__)
    new.__qualname__, new.__module__, new.__doc__ = function.__qualname__, function.__module__, function.__doc__
    return new


def own(kernel: jit.Kernel) -> Any:
    """Return one of dbnet's kernels as Numba knows it, not compiled yet."""
    return made(_resolved(kernel.py_func), kernel.parallel, kernel.fast)


# --- files of machine code ------------------------------------------------------------------------------------------------------


def write(path: Path, kernels: Mapping[tuple[str, str], jit.Kernel]) -> tuple[int, objects.Loaded]:
    """Compile kernels, or take them from Numba's cache, and write their machine code; return how many were compiled, and load it.

    Parameters
    ----------
    kernels
        By name and signature without T.
    """
    compiled, entries, libraries, rest = 0, {}, [], []
    for (name, words), kernel in kernels.items():
        compiled += compile_one(words, kernel.compiled)
        result = kernel.compiled.overloads[arguments_of(words)]
        if kernel.parallel or not _enterable(words, result.signature.return_type):
            rest.append([name, words])
            continue
        entries[f"{kernel.__module__}.{name}({words})"] = [name, words]
        libraries.append((words, result))
    code = _linked(path.stem, list(zip(entries, libraries, strict=True))) if entries else b""
    if code is None:
        entries, code, rest = {}, b"", [*rest, *entries.values()]
    about = {"entries": entries, "rest": rest}
    try:
        objects.write(path, about, code)
    except OSError as error:
        folder.say_unwritten(str(error.strerror))
    return compiled, objects.enter(about, code)


def compile_one(words: str, kernel: Any) -> int:
    """Compile a kernel of Numba's for a signature, or take it from its cache; return whether it was compiled, 0 or 1."""
    before, arguments = sum(kernel.stats.cache_misses.values()), arguments_of(words)
    try:
        kernel.compile(arguments)
    except OSError as error:
        if arguments not in kernel.overloads:
            raise
        folder.say_unwritten(str(error.strerror))
    return sum(kernel.stats.cache_misses.values()) - before


def _enterable(words: str, result: Any) -> bool:
    """Return whether an entry can take these arguments and give this result."""
    results = tuple(result) if isinstance(result, types.BaseTuple) else (result,)
    given = all(kind is types.none or isinstance(kind, types.Boolean | types.Integer | types.Float) for kind in results)
    return given and all(isinstance(kind, types.Array) or kind in _TAKEN for kind in arguments_of(words))


@global_compiler_lock
def _linked(name: str, entries: Sequence[tuple[str, tuple[str, Any]]]) -> bytes | None:
    """Return an object file with an entry for each of these results of Numba's; None where one needs what only Numba has."""
    context = entries[0][1][1].target_context
    library = context.codegen().create_library(name)
    library.enable_object_caching()
    module = library.create_ir_module(name)
    _never(module)
    for symbol, (words, result) in entries:
        library.add_linking_library(result.library)
        _Entry(context, module, symbol, arguments_of(words), result.fndesc).emit()
    library.add_ir_module(module)
    library.finalize()
    wanted = [f.name for f in library._final_module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    if not all(hasattr(ctypes.CDLL(None), name) for name in wanted):
        return None
    return library._get_compiled_object()


def _never(module: ir.Module) -> None:
    """Define what frees memory of Numba's: kernels own none, so that it is named in them, but never called."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
    ir.IRBuilder(ir.Function(module, kind, "NRT_MemInfo_call_dtor").append_basic_block()).unreachable()


class _Entry:
    """Code that takes Python's objects, as `METH_FASTCALL` passes them, and calls a kernel without the interpreter lock."""

    def __init__(self, context: Any, module: ir.Module, symbol: str, kinds: Sequence[Any], description: Any) -> None:
        self.context, self.kinds, self.description, self.module = context, kinds, description, module
        function = ir.Function(module, ir.FunctionType(_ANY, [_ANY, _ANY.as_pointer(), _WORD]), symbol)
        self.builder = ir.IRBuilder(function.append_basic_block())
        self.table, self.objects, self.count = function.args

    def emit(self) -> None:
        """Write it."""
        builder, call = self.builder, self.context.call_conv
        self._refuse_unless(builder.icmp_signed("==", self.count, _WORD(len(self.kinds))))
        given = [builder.load(builder.gep(self.objects, [_WORD(i)])) for i in range(len(self.kinds))]
        for value, kind in zip(given, self.kinds, strict=True):
            if isinstance(kind, types.Array):
                self._look_at(value, kind)
        ways = [self._array if isinstance(kind, types.Array) else self._scalar for kind in self.kinds]
        values = [way(value, kind) for way, value, kind in zip(ways, given, self.kinds, strict=True)]
        if not all(isinstance(kind, types.Array) for kind in self.kinds):
            with builder.if_then(self._truth(self._python("PyErr_Occurred", _ANY)), likely=False):
                builder.ret(_ANY(None))
        state = self._python("PyEval_SaveThread", _ANY)
        result, arguments = self.description.restype, self.description.argtypes
        kernel = ir.Function(self.module, call.get_function_type(result, arguments), self.description.llvm_func_name)
        status, value = call.call_function(builder, kernel, result, arguments, values)
        self._python("PyEval_RestoreThread", ir.VoidType(), state)
        with builder.if_then(status.is_error, likely=False):
            # Kernels raise nothing of their own.
            text = self.context.insert_const_string(self.module, f"the kernel {self.description.qualname} failed")
            self._python("PyErr_SetString", ir.VoidType(), self._object("RuntimeError"), text)
            builder.ret(_ANY(None))
        builder.ret(self._boxed(value, result))

    def _object(self, name: str) -> Any:
        """Return what the table says of a name."""
        place = self.builder.gep(self.table, [_WORD(objects.HEAD + 8 * objects.TABLE.index(name))])
        return self.builder.load(self.builder.bitcast(place, _ANY.as_pointer()))

    def _python(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [value.type for value in arguments])
        return self.builder.call(self.builder.bitcast(self._object(name), kind.as_pointer()), arguments)

    def _truth(self, value: Any) -> Any:
        return self.builder.icmp_unsigned("!=", value, value.type(None))

    def _field(self, value: Any, at: int, kind: Any) -> Any:
        """Return what lies so many bytes into an object."""
        return self.builder.load(self.builder.bitcast(self.builder.gep(value, [_WORD(at)]), kind.as_pointer()))

    def _refuse_unless(self, condition: Any) -> None:
        with self.builder.if_then(self.builder.not_(condition), likely=False):
            self.builder.ret(self._new(self._object("NotImplemented")))

    def _new(self, value: Any) -> Any:
        """Return an object with a reference more."""
        self._python("Py_IncRef", ir.VoidType(), value)
        return value

    def _look_at(self, value: Any, kind: Any) -> None:
        """Refuse what is not such an array of NumPy's, whose objects' layout is a part of its interface."""
        both = self.builder.and_
        is_array = self.builder.icmp_unsigned("==", self._field(value, 8, _ANY), self._object("ndarray"))
        self._refuse_unless(is_array)
        described = self._field(value, 56, _ANY)
        number, order = self._field(described, 28, _INT), self._field(described, 26, ir.IntType(8))
        numbers = [np.dtype(code).num for code in np.typecodes["All"] if np.dtype(code) == np.dtype(str(kind.dtype))]
        typed = ir.IntType(1)(0)
        for one in sorted(set(numbers)):
            typed = self.builder.or_(typed, self.builder.icmp_signed("==", number, _INT(one)))
        native = self.builder.icmp_signed("!=", order, order.type(ord(">" if sys.byteorder == "little" else "<")))
        flags = self.builder.and_(self._field(value, 64, _INT), _INT(_FLAGS))
        shaped = self.builder.icmp_signed("==", self._field(value, 24, _INT), _INT(kind.ndim))
        self._refuse_unless(both(both(typed, native), both(shaped, self.builder.icmp_signed("==", flags, _INT(_FLAGS)))))

    def _array(self, value: Any, kind: Any) -> Any:
        """Return Numba's view of an array."""
        builder, array = self.builder, self.context.make_array(kind)(self.context, self.builder)
        data = builder.bitcast(self._field(value, 16, _ANY), array.data.type)
        tables = (builder.bitcast(self._field(value, at, _ANY), _WORD.as_pointer()) for at in (32, 40))
        shape, strides = ([builder.load(builder.gep(table, [_WORD(i)])) for i in range(kind.ndim)] for table in tables)
        size = self.context.get_constant(types.intp, kind.dtype.bitwidth // 8)
        populate_array(array, data=data, shape=shape, strides=strides, itemsize=size, meminfo=None)
        return array._getvalue()

    def _scalar(self, value: Any, kind: Any) -> Any:
        name, wide = _TAKEN[kind]
        taken = self._python(name, wide, value)
        return self._truth(taken) if kind is types.boolean else taken

    def _boxed(self, value: Any, kind: Any) -> Any:
        """Return a result as Python's object."""
        if kind is types.none:
            return self._new(self._object("None"))
        if isinstance(kind, types.BaseTuple):
            out = self._python("PyTuple_New", _ANY, _WORD(len(kind)))
            for i, inner in enumerate(kind):
                self._python("PyTuple_SetItem", _INT, out, _WORD(i), self._boxed(self.builder.extract_value(value, i), inner))
            return out
        if isinstance(kind, types.Float):
            name, wide = "PyFloat_FromDouble", ir.DoubleType()
            value = value if value.type == wide else self.builder.fpext(value, wide)
        elif isinstance(kind, types.Integer):
            name = "PyLong_FromLongLong" if kind.signed else "PyLong_FromUnsignedLongLong"
            value = (self.builder.sext if kind.signed else self.builder.zext)(value, _WORD)
        else:
            name, value = "PyBool_FromLong", self.builder.zext(value, _WORD)
        return self._python(name, _ANY, value)


# --- what kernels take from jit -------------------------------------------------------------------------------------------------


@intrinsic
def _barrier(typingctx: Any) -> Any:  # type: ignore[misc]
    """Emit a full memory barrier, for the processor and for the compiler."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@overload(jit.barrier, inline="always")
def _jit_barrier():  # type: ignore[no-untyped-def]
    return lambda: _barrier()


@intrinsic
def _bits_to_float(typingctx: Any, bits: Any) -> Any:  # type: ignore[misc]
    """Reinterpret an int32 as a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


def _polynomial(less):  # type: ignore[no-untyped-def]
    """Return the code of e to the x, or with `less` of that less 1, on float32."""
    f, i = np.float32, np.int32
    low, high, log2e = f(-87.0), f(88.0), f(1.44269504)
    # ln 2 in two parts, so that n * ln 2 is subtracted exactly (Cody and Waite); 1.5 * 2^23 rounds to the nearest integer.
    ln2_high, ln2_low, magic = f(0.693359375), f(-2.12194440e-4), f(12582912.0)
    c = tuple(f(1 / math.factorial(k)) for k in range(8))
    c2, c3, c4, c5, c6, c7 = c[2:]
    one, bias, width = f(1.0), i(127), i(23)

    def exp32(x):  # type: ignore[no-untyped-def]
        # In this order a NaN stays one.
        z = low if x < low else x
        z = high if z > high else z
        n = (z * log2e + magic) - magic
        r = (z - n * ln2_high) - n * ln2_low
        p = c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * c7))))
        power = _bits_to_float(i(i(n) + bias) << width)
        return (r + r * r * p) * power + (power - one) if less else (one + r + r * r * p) * power

    return exp32


@overload(jit.exp, inline="always")
def _exp(x):  # type: ignore[no-untyped-def]
    return _polynomial(False) if x == types.float32 else lambda x: math.exp(x)


@overload(jit.expm1, inline="always")
def _expm1(x):  # type: ignore[no-untyped-def]
    return _polynomial(True) if x == types.float32 else lambda x: math.expm1(x)
