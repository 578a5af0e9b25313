"""`products` in vector instructions: up to sixteen rows of a result stay in registers of 64 bytes.

Each step takes one vector of b and one scalar of a per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from dbnet.core.kernels.folder import CHECKED
from dbnet.core.kernels.products import inside, product


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
