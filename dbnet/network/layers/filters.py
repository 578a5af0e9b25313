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

import numpy as np

from dbnet.core import jit
from dbnet.core.jit import kernel
from dbnet.core.kernels.products import product

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
    for r in jit.prange(r0, r1):
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
    for band in jit.prange((dx.shape[0] + high - 1) // high):
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
    for r in jit.prange(rows):
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
    for r in jit.prange(n_rows):
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
    for row in jit.prange(patch // max(1, width * in_maps)):
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
