"""Filters over the patches of an image, as products that stay in registers.

Images are [row, column, map, batch]. Per output position, with W [maps, patch] its weights (a shared filter has one W for all),
X [patch, batch] the patch of inputs that it sees and dY [maps, batch] its delta,

    Y = W X,    dW = dY X',    dX += W' dY.

A row of a patch is contiguous in memory, so nothing is gathered: all three are sums over such rows of one small product, written
once in vector instructions (`product`): up to sixteen rows of the result stay in registers of 64 bytes, each step takes one vector
of b and one scalar of a per row. For dW the vectors run along the patch, on a copy of the input with the batch outside.

The order of summation at an output depends on its place in the image alone, not on how the image is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dbnet.core.jit import CHECKED, intrinsic, ir, kernel, overload, prange, types


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


class _Emitter:
    """Vector instructions on an LLVM builder; a vector is 64 bytes, of which the first `n` lanes are in use."""

    def __init__(self, builder: Any, scalar: Any, n: Any) -> None:
        self.builder, self.size = builder, 4 if isinstance(scalar, ir.FloatType) else 8
        self.lanes = 64 // self.size
        self.vector = ir.VectorType(scalar, self.lanes)
        self.zero = ir.Constant(self.vector, [scalar(0.0)] * self.lanes)
        numbers = ir.Constant(ir.VectorType(_I64, self.lanes), list(range(self.lanes)))
        self.used = builder.icmp_signed("<", numbers, self.splat(n))

    def splat(self, value: Any) -> Any:
        """Return a vector of equal lanes."""
        empty = ir.Constant(ir.VectorType(value.type, self.lanes), ir.Undefined)
        first = self.builder.insert_element(empty, value, _I32(0))
        return self.builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes))

    def at(self, start: Any, *steps: tuple[Any, Any]) -> Any:
        """Return start + index * stride + ..."""
        for index, stride in steps:
            start = self.builder.add(start, self.builder.mul(index, stride))
        return start

    def call(self, name: str, result: Any, arguments: list[Any]) -> Any:
        module = self.builder.module
        kind = ir.FunctionType(result, [value.type for value in arguments])
        return self.builder.call(module.globals.get(name) or ir.Function(module, kind, name), arguments)

    def load(self, pointer: Any, lanes: Any) -> Any:
        pointer = self.builder.bitcast(pointer, self.vector.as_pointer())
        name = f"llvm.masked.load.v{self.lanes}f{8 * self.size}.p0"
        return self.call(name, self.vector, [pointer, _I32(self.size), lanes, self.zero])

    def store(self, value: Any, pointer: Any) -> None:
        pointer = self.builder.bitcast(pointer, self.vector.as_pointer())
        name = f"llvm.masked.store.v{self.lanes}f{8 * self.size}.p0"
        self.call(name, ir.VoidType(), [value, pointer, _I32(self.size), self.used])

    def prefetch(self, pointer: Any) -> None:
        self.call("llvm.prefetch.p0", ir.VoidType(), [pointer, _I32(0), _I32(3), _I32(1)])

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c, one instruction where the machine has it."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    def loop(self, count: Any, state: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """Emit `for i in range(count): state = body(i, state)` with the state in registers."""
        builder, before = self.builder, self.builder.block
        head, inside, after = (builder.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        phis = [builder.phi(value.type) for value in (count, *state)]
        for phi, value in zip(phis, (count.type(0), *state), strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", phis[0], count), inside, after)
        builder.position_at_end(inside)
        for phi, value in zip(phis, (builder.add(phis[0], count.type(1)), *body(phis[0], phis[1:])), strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return phis[1:]


_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _tile(rows: int) -> Any:
    """Return the product for a fixed number of rows of c (a power of two) and at most one vector of columns, as an intrinsic."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        c, a, b = (context.make_array(kinds[i])(context, builder, args[i]).data for i in (0, 2, 4))
        (c0, cm), (a0, am, ap, ak), (b0, bp, bk), (_, n, p, k), (c_ahead, a_ahead) = (
            [builder.extract_value(args[i], j) for j in range(len(kinds[i]))] for i in (1, 3, 5, 6, 8)
        )
        emit = _Emitter(builder, context.get_data_type(kinds[0].dtype), n)
        at = emit.at
        # Where the lines to prefetch lie: those of the rows of c, or those of the scalars of a.
        in_c = builder.icmp_signed("!=", c_ahead, _I64(0))
        later = builder.select(in_c, builder.gep(c, [builder.add(c0, c_ahead)]), builder.gep(a, [builder.add(a0, a_ahead)]))
        lm, lp, lk = (builder.select(in_c, x, y) for x, y in ((cm, am), (_I64(0), ap), (_I64(0), ak)))

        def step(q: Any, h: Any, sums: list[Any]) -> list[Any]:
            row = builder.and_(h, _I64(rows - 1))
            emit.prefetch(builder.gep(later, [at(_I64(0), (q, lp), (h, lk), (row, lm))]))
            x = emit.load(builder.gep(b, [at(b0, (q, bp), (h, bk))]), emit.used)
            first = at(a0, (q, ap), (h, ak))
            scalars = [builder.load(builder.gep(a, [at(first, (_I64(i), am))])) for i in range(rows)]
            return [emit.multiply_add(emit.splat(value), x, total) for value, total in zip(scalars, sums, strict=True)]

        sums = emit.loop(p, [emit.zero] * rows, lambda q, outer: emit.loop(k, outer, lambda h, sums: step(q, h, sums)))
        old = builder.and_(emit.used, emit.splat(args[7]))
        for i, total in enumerate(sums):
            pointer = builder.gep(c, [at(c0, (_I64(i), cm))])
            emit.store(builder.fadd(total, emit.load(pointer, old)), pointer)
        return context.get_dummy_value()

    def typing(typingctx, c, c_at, a, a_at, b, b_at, size, add, ahead):  # type: ignore[no-untyped-def]
        n2, n3, n4 = (types.UniTuple(types.int64, n) for n in (2, 3, 4))
        return types.void(c, n2, a, n4, b, n3, n4, types.boolean, n2), codegen

    return intrinsic(typing)


_TILE16, _TILE8, _TILE4, _TILE2, _TILE1 = (_tile(rows) for rows in (16, 8, 4, 2, 1))


def inside(c, c_at, a, a_at, b, b_at, size):  # type: ignore[no-untyped-def]
    """Raise IndexError if a product reaches beyond its arrays."""
    m, n, p, k = size
    if min(m, n, p, k) > 0:
        c_end = c_at[0] + (m - 1) * c_at[1] + n
        a_end = a_at[0] + (m - 1) * a_at[1] + (p - 1) * a_at[2] + (k - 1) * a_at[3] + 1
        b_end = b_at[0] + (p - 1) * b_at[1] + (k - 1) * b_at[2] + n
        if min(c_at[0], a_at[0], b_at[0]) < 0 or c_end > c.size or a_end > a.size or b_end > b.size:
            raise IndexError("a product reaches beyond its arrays")


@overload(inside, inline="always")
def _inside(c, c_at, a, a_at, b, b_at, size):  # type: ignore[no-untyped-def]
    # Numba checks the bounds of its own indexing only, and not of what the tiles read and write.
    return inside if CHECKED else lambda c, c_at, a, a_at, b, b_at, size: None


@overload(product, inline="always")
def _product(c, c_at, a, a_at, b, b_at, size, add, ahead):  # type: ignore[no-untyped-def]
    lanes = 64 * 8 // c.dtype.bitwidth

    def tiled(c, c_at, a, a_at, b, b_at, size, add, ahead):  # type: ignore[no-untyped-def]
        m, n, p, k = size
        inside(c, c_at, a, a_at, b, b_at, size)
        for j in range(0, n, lanes):
            part = (m, min(n - j, lanes), p, k)
            bt = (b_at[0] + j, b_at[1], b_at[2])
            i = 0
            while i < m:
                ct = (c_at[0] + i * c_at[1] + j, c_at[1])
                at = (a_at[0] + i * a_at[1], a_at[1], a_at[2], a_at[3])
                if m - i >= 16:
                    _TILE16(c, ct, a, at, b, bt, part, add, ahead)
                    i += 16
                elif m - i >= 8:
                    _TILE8(c, ct, a, at, b, bt, part, add, ahead)
                    i += 8
                elif m - i >= 4:
                    _TILE4(c, ct, a, at, b, bt, part, add, ahead)
                    i += 4
                elif m - i >= 2:
                    _TILE2(c, ct, a, at, b, bt, part, add, ahead)
                    i += 2
                else:
                    _TILE1(c, ct, a, at, b, bt, part, add, ahead)
                    i += 1

    return tiled


# --- filters ------------------------------------------------------------------------------------------------------------------
#
# x [rows, cols, in_maps, batch] and y [rows, cols, maps, batch] hold just the boxes at hand; xt is x with its batch outside, as
# [rows, batch, cols, in_maps]. W is [rows, cols, maps, patch], or [1, 1, maps, patch] where it is shared; `width` is the field's.
# The tables `rows` and `cols` say which inputs an output sees, see `patches.Patches.tables`.


@kernel("T[:,:,:,:];T[:,:,:,:];T[:,:,:,:];i8[:,:];i8[:,:];i8;i8;i8;i8;i8;i8;i8", parallel=True)
def filter_forward(
    y: np.ndarray, W: np.ndarray, x: np.ndarray, rows: np.ndarray, cols: np.ndarray, width: int,
    r0: int, r1: int, c0: int, c1: int, m0: int, m1: int,
) -> None:  # fmt: skip
    """Compute y = W x in a box of outputs."""
    _, n_cols, maps, batch = y.shape
    _, x_cols, in_maps, _ = x.shape
    patch = W.shape[3]
    ahead = maps * patch if W.shape[0] * W.shape[1] > 1 else 0
    for r in prange(r0, r1):
        top, down, tall = rows[r]
        for c in range(c0, c1):
            left, right, wide = cols[c]
            at = min(r, W.shape[0] - 1) * W.shape[1] + min(c, W.shape[1] - 1)
            product(
                y, (((r * n_cols + c) * maps + m0) * batch, batch),
                W, ((at * maps + m0) * patch + (down * width + right) * in_maps, patch, width * in_maps, 1),
                x, ((top * x_cols + left) * in_maps * batch, x_cols * in_maps * batch, batch),
                (m1 - m0, batch, tall, wide * in_maps), False, (0, ahead),
            )  # fmt: skip


@kernel("T[:,:,:,:];T[:,:,:,:];T[:,:,:,:];i8[:,:];i8[:,:];i8", parallel=True)
def filter_dx(dx: np.ndarray, W: np.ndarray, dy: np.ndarray, rows: np.ndarray, cols: np.ndarray, width: int) -> None:
    """Compute dx, the sum of W' dy over all outputs."""
    n_rows, n_cols, maps, batch = dy.shape
    _, x_cols, in_maps, _ = dx.shape
    patch = W.shape[3]
    ahead = maps * patch if W.shape[0] * W.shape[1] > 1 else 0
    # As many rows of inputs as a field is high gather from the outputs that see them: such bands are independent, and each
    # position's weights are read in two runs at most.
    high = patch // max(1, width * in_maps)
    for band in prange((dx.shape[0] + high - 1) // high):
        lo, hi = band * high, min((band + 1) * high, dx.shape[0])
        dx[lo:hi] = 0
        for r in range(n_rows):
            top, down, tall = rows[r]
            if top >= hi or top + tall <= lo:
                continue
            for c in range(n_cols):
                left, right, wide = cols[c]
                at = min(r, W.shape[0] - 1) * W.shape[1] + min(c, W.shape[1] - 1)
                for t in range(max(top, lo), min(top + tall, hi)):
                    product(
                        dx, ((t * x_cols + left) * in_maps * batch, batch),
                        W, (at * maps * patch + ((down + t - top) * width + right) * in_maps, 1, 0, patch),
                        dy, ((r * n_cols + c) * maps * batch, 0, batch),
                        (wide * in_maps, batch, 1, maps), True, (0, ahead),
                    )  # fmt: skip


def batch_outside(x: np.ndarray) -> np.ndarray:
    """Return room for x as [rows, batch, cols * in_maps], lines of 64 bytes in an odd number so that they spread over a cache."""
    rows, cols, in_maps, batch = x.shape
    lanes = 64 // x.itemsize
    return np.zeros((rows, batch, (cols * in_maps // lanes | 1) * lanes + (lanes * 2 if cols * in_maps % lanes else 0)), x.dtype)


@kernel("T[:,:,:];T[:,:,:,:]", parallel=True)
def turn(xt: np.ndarray, x: np.ndarray) -> None:
    """Copy x to xt, 16 units at a time."""
    rows, cols, in_maps, batch = x.shape
    for r in prange(rows):
        units = x[r].reshape(cols * in_maps, batch)
        for first in range(0, cols * in_maps, 16):
            for j in range(batch):
                for u in range(first, min(first + 16, cols * in_maps)):
                    xt[r, j, u] = units[u, j]


@kernel("T[:,:,:,:];T[:,:,:,:];T[:,:,:];i8;i8[:,:];i8[:,:];i8;b1", parallel=True)
def local_dW(
    dW: np.ndarray, dy: np.ndarray, xt: np.ndarray, in_maps: int, rows: np.ndarray, cols: np.ndarray, width: int, accumulate: bool
) -> None:
    """Compute dW = dy x' at every output position."""
    n_rows, n_cols, maps, batch = dy.shape
    line = xt.shape[2]
    patch = dW.shape[3]
    for r in prange(n_rows):
        top, down, tall = rows[r]
        for c in range(n_cols):
            left, right, wide = cols[c]
            if tall * wide * in_maps < patch and not accumulate:
                dW[r, c] = 0
            for i in range(tall):
                product(
                    dW, ((r * n_cols + c) * maps * patch + ((down + i) * width + right) * in_maps, patch),
                    dy, ((r * n_cols + c) * maps * batch, batch, 0, 1),
                    xt, ((top + i) * batch * line + left * in_maps, 0, line),
                    (maps, wide * in_maps, 1, batch), accumulate, (maps * patch, 0),
                )  # fmt: skip


@kernel("T[:,:];T[:,:,:,:];T[:,:,:];i8;i8[:,:];i8[:,:];i8", parallel=True)
def shared_dW(dW: np.ndarray, dy: np.ndarray, xt: np.ndarray, in_maps: int, rows: np.ndarray, cols: np.ndarray, width: int) -> None:
    """Add dy x', summed over all output positions, to dW [maps, patch]."""
    n_rows, n_cols, maps, batch = dy.shape
    line = xt.shape[2]
    patch = dW.shape[1]
    # Each row of the field sums over all outputs, so that these rows are independent.
    for row in prange(patch // max(1, width * in_maps)):
        for r in range(n_rows):
            i = row - rows[r, 1]
            if i < 0 or i >= rows[r, 2]:
                continue
            c = 0
            while c < n_cols:
                left, right, wide = cols[c]
                # Neighbours that see the whole width of the field are one long sum.
                n = 1
                while wide == width and c + n < n_cols and cols[c + n, 2] == width:
                    n += 1
                step = cols[c + 1, 0] - left if n > 1 else 0
                product(
                    dW, ((row * width + right) * in_maps, patch),
                    dy, ((r * n_cols + c) * maps * batch, batch, maps * batch, 1),
                    xt, ((rows[r, 0] + i) * batch * line + left * in_maps, step * in_maps, line),
                    (maps, wide * in_maps, n, batch), True, (0, 0),
                )  # fmt: skip
                c += n
