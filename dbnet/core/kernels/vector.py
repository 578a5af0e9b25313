"""Kernels on flat vectors: the arithmetic behind the commands that a coordinator sends to the shards.

Vectors are float32 or float64; every sum is taken in float64. Products of many vectors (`gram`) and sums of many (`combine`) go
through memory once: they work on blocks that fit the cache and take several vectors per pass over a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dbnet.core.jit import kernel

BLOCK = 32768  # elements: a few blocks stay in the cache, and the stretches are long enough for the memory to stream
ROWS, COLUMNS, TERMS = 3, 4, 4  # vectors that one call of `_gram` and `_add` takes


@kernel("T[:];T[:]")
def copy(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(x.size):
        out[i] = x[i]


@kernel("T[:];f8")
def fill(x: np.ndarray, value: float) -> None:
    v = x.dtype.type(value)
    for i in range(x.size):
        x[i] = v


@kernel("T[:];f8")
def scale(x: np.ndarray, a: float) -> None:
    c = x.dtype.type(a)
    for i in range(x.size):
        x[i] *= c


@kernel("f8;T[:];T[:]")
def axpy(a: float, x: np.ndarray, y: np.ndarray) -> None:
    """Add a x to y."""
    c = x.dtype.type(a)
    for i in range(x.size):
        y[i] += c * x[i]


@kernel("T[:];T[:];T[:]")
def multiply(x: np.ndarray, y: np.ndarray, out: np.ndarray) -> None:
    for i in range(x.size):
        out[i] = x[i] * y[i]


@kernel("f8;T[:];f8;T[:];T[:]")
def linear(a: float, x: np.ndarray, b: float, y: np.ndarray, out: np.ndarray) -> None:
    """Write a x + b y; `out` may be x or y."""
    c, d = x.dtype.type(a), x.dtype.type(b)
    for i in range(x.size):
        out[i] = c * x[i] + d * y[i]


@kernel("T[:];f8")
def clip(x: np.ndarray, bound: float) -> None:
    """Bring the finite values into -bound .. bound; NaN and Inf stay, so that a shard sees them."""
    top, inf = x.dtype.type(bound), x.dtype.type(np.inf)
    for i in range(x.size):
        v = x[i]
        x[i] = top if top < v < inf else -top if -inf < v < -top else v


@kernel("T[:];T[:]", fast=True)
def dot(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i]) * np.float64(y[i])
    return total


@kernel("T[:];f8", fast=True)
def first_bad(x: np.ndarray, largest: float) -> int:
    """Return the place of the first value beyond +-`largest`, Inf or NaN; -1 where there is none."""
    top, zero, one = x.dtype.type(largest), x.dtype.type(0), x.dtype.type(1)
    for lo in range(0, x.size, 4096):
        block, count = x[lo : lo + 4096], zero
        for i in range(block.size):
            # The selection instead of a branch lets the loop vectorise; a comparison with NaN is false.
            count += zero if abs(block[i]) <= top else one
        if count != zero:
            for i in range(block.size):
                if not abs(block[i]) <= top:
                    return lo + i
    return -1


@kernel("T[:]")
def check_sum(x: np.ndarray) -> int:
    """Return 32 bits that change with any bit of `x`, and when its values change places."""
    bits, total = x.view(np.uint32), np.uint32(0)
    for i in range(bits.size):
        # In 32 bits, where what is beyond falls away, the loop vectorises.
        total = np.uint32(total + bits[i] * np.uint32(2 * i + 1))
    return total


@kernel("f8;T[:];T[:];T[:]", fast=True)
def decay(a: float, x: np.ndarray, mask: np.ndarray, g: np.ndarray) -> float:
    """Add a x to g where the mask is 1; return the sum of x^2 there."""
    c, total = x.dtype.type(a), 0.0
    for i in range(x.size):
        kept = mask[i] * x[i]
        g[i] += c * kept
        total += np.float64(kept) * np.float64(kept)
    return total


@kernel("T[:];f8")
def checked(x: np.ndarray, largest: float) -> tuple[int, int]:
    """Return what `first_bad` and `check_sum` do, of float32 with one pass through memory."""
    if x.itemsize == 8:
        return first_bad(x, largest), check_sum(x)
    bits, top = x.view(np.uint32), np.float32(largest).view(np.uint32)
    highest, weight, total = np.uint32(0), np.uint32(1), np.uint32(0)
    for i in range(bits.size):
        b = bits[i]
        # Without their sign floats are ordered as their bits are, NaN above all others: one instruction less than they need.
        highest = np.uint32(max(highest, np.uint32(b & np.uint32(0x7FFFFFFF))))
        total = np.uint32(total + np.uint32(b * weight))
        weight = np.uint32(weight + np.uint32(2))
    return first_bad(x, largest) if highest > top else -1, total


# --- bfloat16: the upper half of a float32, here as uint16, since NumPy has no such type ---------------------------------------


@kernel("f4[:];u2[:]")
def narrow(x: np.ndarray, out: np.ndarray) -> None:
    """Round to bfloat16, to nearest, ties to even; what is beyond its largest value becomes Inf, a NaN a quiet one."""
    bits = x.view(np.uint32)
    for i in range(bits.size):
        b = bits[i]
        half = np.uint32(b >> np.uint32(16))
        near = np.uint32(b + np.uint32(0x7FFF) + (half & np.uint32(1))) >> np.uint32(16)
        # A rounded NaN could become Inf, or 0 with the other sign.
        nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = np.uint16(half | np.uint32(0x40)) if nan else np.uint16(near)


@kernel("u2[:];f4[:]")
def widen(x: np.ndarray, out: np.ndarray) -> None:
    """Write bfloat16 as float32, which holds all of them."""
    bits = out.view(np.uint32)
    for i in range(x.size):
        bits[i] = np.uint32(x[i]) << np.uint32(16)


@kernel("f4[:];f4[:]")
def coarse(x: np.ndarray, out: np.ndarray) -> None:
    """Write x as it comes out of `narrow` and `widen`; `out` may be x."""
    bits, to = x.view(np.uint32), out.view(np.uint32)
    for i in range(bits.size):
        b = bits[i]
        near = np.uint32(b + np.uint32(0x7FFF) + (np.uint32(b >> np.uint32(16)) & np.uint32(1)))
        nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        to[i] = (np.uint32(b | np.uint32(0x400000)) if nan else near) & np.uint32(0xFFFF0000)


# --- many vectors in one pass over memory -------------------------------------------------------------------------------------


@kernel("T[:];T[:];T[:];T[:];T[:];T[:];T[:];f8[:,:]", fast=True)
def _gram(x0, x1, x2, y0, y1, y2, y3, out):  # type: ignore[no-untyped-def]
    """Add the twelve products x_r . y_c to out[r, c]."""
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = s20 = s21 = s22 = s23 = 0.0
    for i in range(x0.size):
        a, b, c = np.float64(x0[i]), np.float64(x1[i]), np.float64(x2[i])
        y = np.float64(y0[i])
        s00 += a * y
        s10 += b * y
        s20 += c * y
        y = np.float64(y1[i])
        s01 += a * y
        s11 += b * y
        s21 += c * y
        y = np.float64(y2[i])
        s02 += a * y
        s12 += b * y
        s22 += c * y
        y = np.float64(y3[i])
        s03 += a * y
        s13 += b * y
        s23 += c * y
    for r, sums in enumerate(((s00, s01, s02, s03), (s10, s11, s12, s13), (s20, s21, s22, s23))):
        for c, s in enumerate(sums):
            out[r, c] += s


def gram(rows: Sequence[np.ndarray], columns: Sequence[np.ndarray]) -> np.ndarray:
    """Return all products rows[r] . columns[c] as a float64 matrix."""
    if len(rows) == 1:
        return np.array([[dot(rows[0], column) for column in columns]])
    # A tile that is not full repeats its last vector; the surplus is cut off below.
    row_tiles, column_tiles = _tiles(rows, ROWS), _tiles(columns, COLUMNS)
    out = np.zeros((len(row_tiles), len(column_tiles), ROWS, COLUMNS))
    for lo in range(0, rows[0].size, BLOCK):
        block = slice(lo, lo + BLOCK)
        for r, xs in enumerate(row_tiles):
            x = [v[block] for v in xs]
            for c, ys in enumerate(column_tiles):
                _gram(*x, *[v[block] for v in ys], out[r, c])
    whole = out.transpose(0, 2, 1, 3).reshape(len(row_tiles) * ROWS, len(column_tiles) * COLUMNS)
    return whole[: len(rows), : len(columns)].copy()


@kernel("f8[:];T[:];T[:];T[:];T[:];f8[:]")
def _add(c, x0, x1, x2, x3, out):  # type: ignore[no-untyped-def]
    """Add c0 x0 + c1 x1 + c2 x2 + c3 x3 to out."""
    c0, c1, c2, c3 = c[0], c[1], c[2], c[3]
    for i in range(x0.size):
        out[i] += c0 * np.float64(x0[i]) + c1 * np.float64(x1[i]) + c2 * np.float64(x2[i]) + c3 * np.float64(x3[i])


def combine(coefficients: Sequence[float], vectors: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Write the linear combination of the vectors, summed in float64 and rounded once; `out` may be one of them."""
    tiles = _tiles(vectors, TERMS)
    factors = np.zeros((len(tiles), TERMS))
    factors.flat[: len(vectors)] = coefficients
    total = np.empty(BLOCK)
    for lo in range(0, out.size, BLOCK):
        block = slice(lo, lo + BLOCK)
        piece = total[: out[block].size]
        piece.fill(0)
        for c, xs in zip(factors, tiles, strict=True):
            _add(c, *[v[block] for v in xs], piece)
        out[block] = piece


def _tiles(vectors: Sequence[np.ndarray], width: int) -> list[list[np.ndarray]]:
    """Cut the vectors into groups of `width`, the last one filled up with its last vector."""
    groups = [list(vectors[i : i + width]) for i in range(0, len(vectors), width)]
    groups[-1] += [groups[-1][-1]] * (width - len(groups[-1]))
    return groups


# --- L1: each takes a mask, 0 where the penalty does not act; an empty mask means everywhere ----------------------------------


@kernel("T[:];T[:]", fast=True)
def norm1(x: np.ndarray, mask: np.ndarray) -> float:
    total = 0.0
    for i in range(x.size):
        weight = mask[i] if mask.size else x.dtype.type(1)
        total += np.float64(abs(x[i]) * weight)
    return total


@kernel("T[:];T[:];f8;T[:];T[:]")
def pseudo_gradient(x: np.ndarray, g: np.ndarray, strength: float, mask: np.ndarray, out: np.ndarray) -> None:
    """Write the element of the subdifferential of loss + strength |x| that is steepest downhill (Andrew & Gao 2007, eq. 4)."""
    zero, c = x.dtype.type(0), x.dtype.type(strength)
    for i in range(x.size):
        weight = c * mask[i] if mask.size else c
        right, left = g[i] + weight, g[i] - weight
        if x[i] > zero or (x[i] == zero and right < zero):
            out[i] = right
        elif x[i] < zero or left > zero:
            out[i] = left
        else:
            out[i] = zero


@kernel("T[:];T[:];T[:]")
def align(d: np.ndarray, pseudo: np.ndarray, mask: np.ndarray) -> None:
    """Clear the elements of a direction that do not point against the pseudo-gradient."""
    zero = d.dtype.type(0)
    for i in range(d.size):
        if d[i] * pseudo[i] >= zero and not (mask.size and mask[i] == zero):
            d[i] = zero


@kernel("T[:];f8;T[:];T[:];T[:];T[:]")
def project_orthant(base: np.ndarray, a: float, d: np.ndarray, pseudo: np.ndarray, mask: np.ndarray, out: np.ndarray) -> None:
    """Write base + a d, cleared where it left the orthant of base (where base is 0: of the negative pseudo-gradient)."""
    zero, c = d.dtype.type(0), d.dtype.type(a)
    for i in range(d.size):
        moved = base[i] + c * d[i]
        side = base[i] if base[i] != zero else -pseudo[i]
        inside = (moved > zero and side > zero) or (moved < zero and side < zero)
        out[i] = moved if inside or (mask.size and mask[i] == zero) else zero
