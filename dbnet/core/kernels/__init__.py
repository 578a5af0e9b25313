"""Kernels on flat vectors (vector), a product inside others (products, tiles), and what stands behind `jit`.

Declared in `jit` -> compiler (Numba) -> a file of machine code for each module, in `folder` -> objects. A process that finds the
files of its kernels imports no compiler.
"""
