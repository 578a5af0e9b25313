"""A small product of matrices inside kernels: what it computes; `tiles` is how.

Taken by kernels alone: interpreted it is NumPy's arithmetic.
"""

from __future__ import annotations

import numpy as np

from dbnet.core.jit import Taken


@Taken
def product(c, c_at, a, a_at, b, b_at, size, add, ahead):  # type: ignore[no-untyped-def]
    """Compute c[m, n] = (c[m, n] +) sum over p, k of a[m, p, k] b[p, k, n]; n is contiguous in b and in c.

    `c_at` is (offset, stride of m) into the flat array c, `a_at` (offset, strides of m, p, k), `b_at` (offset, strides of p, k),
    `size` the extents (m, n, p, k). `ahead` is the distance in c, or else in a, to what a later product uses: weights and their
    gradient are touched once, so unless they are fetched from memory while this product computes, that one waits for them.
    """
    c, a, b = c.reshape(-1), a.reshape(-1), b.reshape(-1)
    m, n, p, k = size
    for i in range(m):
        total = np.zeros(n, c.dtype)
        for q in range(p):
            for h in range(k):
                at = b_at[0] + q * b_at[1] + h * b_at[2]
                total += a[a_at[0] + i * a_at[1] + q * a_at[2] + h * a_at[3]] * b[at : at + n]
        at = c_at[0] + i * c_at[1]
        c[at : at + n] = c[at : at + n] + total if add else total


def inside(c, c_at, a, a_at, b, b_at, size):  # type: ignore[no-untyped-def]
    """Raise IndexError if a product reaches beyond its arrays."""
    m, n, p, k = size
    if min(m, n, p, k) > 0:
        c_end = c_at[0] + (m - 1) * c_at[1] + n
        a_end = a_at[0] + (m - 1) * a_at[1] + (p - 1) * a_at[2] + (k - 1) * a_at[3] + 1
        b_end = b_at[0] + (p - 1) * b_at[1] + (k - 1) * b_at[2] + n
        if min(c_at[0], a_at[0], b_at[0]) < 0 or c_end > c.size or a_end > a.size or b_end > b.size:
            raise IndexError("a product reaches beyond its arrays")
