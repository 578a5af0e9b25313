"""Matrix products straight from BLAS: C = op(A) op(B) + beta C on C-ordered arrays.

NumPy's `matmul` cannot add to its output and SciPy's wrappers hold the interpreter lock while they compute, which would stop a
rank's transfers; so the BLAS that SciPy publishes for compiled code is called through ctypes, which releases the lock.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType

import numpy as np


def _table() -> ModuleType:
    """Load SciPy's table of BLAS functions alone: every rank would pay 0.1 s of processor for the rest of `scipy.linalg`."""
    name = "scipy.linalg.cython_blas"
    spec = PathFinder.find_spec(name, [str(Path(find_spec("scipy").origin).parent / "linalg")])
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    # Whoever imports `scipy.linalg` later shall bind it there himself.
    sys.modules.pop(name, None)
    return module


_TABLE = _table().__pyx_capi__


def _function(name: str) -> ctypes._CFuncPtr:
    """Return the C function behind one of SciPy's exported BLAS capsules."""
    capsule = _TABLE[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)(address)


_GEMM = {np.dtype("f4"): _function("sgemm"), np.dtype("f8"): _function("dgemm")}
_SCALARS = {
    dtype: {value: ctypes.cast(ctypes.pointer(kind(value)), ctypes.c_void_p) for value in (0, 1)}
    for dtype, kind in ((np.dtype("f4"), ctypes.c_float), (np.dtype("f8"), ctypes.c_double))
}
_PLAIN, _TRANSPOSED = (ctypes.c_char_p(letter) for letter in (b"N", b"T"))


class Gemm:
    """A product on fixed arrays, with all arguments made ready once.

    Parameters
    ----------
    a, b, c
        Two-dimensional arrays whose rows are contiguous; op(a) is [m, k], op(b) is [k, n], c is [m, n].
    ta, tb
        Whether a, b enter transposed.
    """

    def __init__(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, ta: bool = False, tb: bool = False) -> None:
        m, k = a.shape[::-1] if ta else a.shape
        k2, n = b.shape[::-1] if tb else b.shape
        if k != k2 or c.shape != (m, n) or not a.dtype == b.dtype == c.dtype:
            raise ValueError(f"shapes do not fit: {a.shape}{'T' * ta} {b.shape}{'T' * tb} -> {c.shape}")
        if any(array.size and array.shape[1] > 1 and array.strides[1] != array.itemsize for array in (a, b, c)):
            raise ValueError("rows must be contiguous")
        self._keep = (a, b, c)
        self._empty = 0 in (m, n, k)
        numbers = [ctypes.c_int(v) for v in (n, m, k, *(max(1, x.strides[0] // x.itemsize) for x in (b, a, c)))]
        n_, m_, k_, ldb, lda, ldc = map(ctypes.pointer, numbers)
        one, zero = (_SCALARS[c.dtype][v] for v in (1, 0))
        # BLAS is column-major: what it sees is the transposed product, B' A' = C'.
        head = (
            _TRANSPOSED if tb else _PLAIN,
            _TRANSPOSED if ta else _PLAIN,
            n_,
            m_,
            k_,
            one,
            b.ctypes.data,
            ldb,
            a.ctypes.data,
            lda,
        )
        self._arguments = [
            tuple(x if isinstance(x, int) else ctypes.cast(x, ctypes.c_void_p) for x in (*head, beta, c.ctypes.data, ldc))
            for beta in (zero, one)
        ]
        self._call = _GEMM[c.dtype]

    def __call__(self, accumulate: bool = False) -> None:
        """Compute c = op(a) op(b), or add it to c."""
        if self._empty:
            if not accumulate:
                self._keep[2].fill(0)
            return
        self._call(*self._arguments[accumulate])
