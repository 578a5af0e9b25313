"""Portions: the pieces that a batch is handed out in, and the reader that has their examples ready.

The data file is cut into blocks of `portion` examples, in the order of the file. A batch is a range of an endless stream that
repeats the file; its portions are what this range has in common with the blocks. A replica keeps the blocks that it read: the
coordinator gives it the same ones again, one after another, and the next one is read while the present one is computed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from dbnet.core.ranges import Range
from dbnet.data.batches import Cursor, bound, fitting, gather
from dbnet.data.file import Examples

_BEAT = 0.005


class Portion(NamedTuple):
    """Examples lo ... hi - 1 of a block, counted within it."""

    block: int
    lo: int
    hi: int


class Blocks(NamedTuple):
    """The data file in blocks: examples per block and in all."""

    size: int
    examples: int

    def __call__(self, block: int) -> Range:
        """Return the examples of a block."""
        return Range(block * self.size, min((block + 1) * self.size, self.examples))

    def portions(self, span: Range) -> list[Portion]:
        """Cut the stream's positions `span` at the bounds of the blocks."""
        return [self.portion(span, i) for i in range(self._number(span.hi - 1) - self._number(span.lo) + 1)] if span.size else []

    def portion(self, span: Range, index: int) -> Portion:
        """Return one portion of `portions`, whatever their number."""
        turn, block = divmod(self._number(span.lo) + index, -(-self.examples // self.size))
        (start, end), at = self(block), turn * self.examples
        return Portion(block, max(start, span.lo - at) - start, min(end, span.hi - at) - start)

    def _number(self, position: int) -> int:
        """Return the number of the block at a position of the stream, in which the file's blocks come again and again."""
        turn, row = divmod(position, self.examples)
        return turn * -(-self.examples // self.size) + row // self.size


class _AtOnce(Executor):
    """What is submitted has been done."""

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **words: Any) -> Future:
        future: Future = Future()
        future.set_result(call(*arguments, **words))
        return future


class Reader:
    """Fills a network's input with the minibatches of a portion.

    Parameters
    ----------
    read, blocks
        Reads a range of examples; how they lie in blocks.
    batch, scale, dtype
        Columns of the input, what x is multiplied with, and the input's type.
    keep
        Blocks that stay in memory.

    Attributes
    ----------
    target
        Labels [batch] or vectors [units, batch] of the present minibatch.
    cursor
        How many portions were opened, for reports.
    taken, cursors
        Nothing: the coordinator hands out portions, not shares.
    filled
        Examples of the minibatch that was filled last.
    reads
        Blocks that were read from the file.
    """

    taken = 0
    cursors: ClassVar[list[Cursor]] = []

    def __init__(
        self, read: Callable[[Range], Examples], blocks: Blocks, batch: int, scale: float, dtype: np.dtype, keep: int
    ) -> None:
        self._read, self.blocks, self.batch, self._scale = read, blocks, batch, scale
        self._dtype, self._keep = np.dtype(dtype), max(2, keep)
        self._blocks: OrderedDict[int, Future[Examples]] = OrderedDict()
        self._ahead: Executor = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._held: MutableMapping[int, Examples] = WeakValueDictionary()
        self.target = np.zeros(batch, np.int64)
        self._part = Examples(np.zeros((0, 0)), np.zeros(0))
        self._bound: np.ndarray | None = None
        self._at = self._end = self._taken = self._start = self._first = self.filled = 0
        self.reads = 0

    def at_once(self, held: MutableMapping[int, Examples]) -> None:
        """Read in the caller's thread from now on, as where thousands of readers share a process; `held`: what others hold."""
        self._ahead.shutdown()
        self._ahead, self._held = _AtOnce(), held

    def __len__(self) -> int:
        return 1

    @property
    def cursor(self) -> Cursor:
        return Cursor(0, self._taken)

    def seek(self, cursor: Cursor) -> None:
        """Go on counting from a cursor."""
        self._taken = cursor.position

    def prefetch(self, block: int) -> None:
        """Begin to read a block that will be wanted."""
        if block in self._blocks:
            self._blocks.move_to_end(block)
            return
        self._blocks[block] = self._ahead.submit(self._load, block)
        while len(self._blocks) > self._keep:
            self._blocks.popitem(last=False)

    def _load(self, block: int) -> Examples:
        found = self._held.get(block)
        if found is None:
            self.reads += 1
            part = self._read(self.blocks(block))
            y = part.y.astype(self._dtype) if part.y.ndim == 2 else part.y
            self._held[block] = found = Examples(fitting(part, self._dtype, self._scale), y)
        return found

    def open(self, portion: Portion, beat: Callable[[], None] = lambda: None) -> None:
        """Go to the first minibatch of a portion; while it is read, which may take long, `beat` is called again and again."""
        self.prefetch(portion.block)
        loading = self._blocks[portion.block]
        while not wait([loading], _BEAT).done:
            beat()
        self._part = loading.result()
        if not 0 <= portion.lo <= portion.hi <= len(self._part):
            raise ValueError(f"{portion} does not lie in its block of {len(self._part)} examples.")
        self._bound = None
        self._at, self._end, self._start = portion.lo, portion.hi, self.blocks(portion.block).lo
        self._taken += 1
        if self._part.y.ndim == 2 and self.target.ndim == 1:
            self.target = np.zeros((self._part.y.shape[1], self.batch), self._dtype)

    def next(self, x: np.ndarray) -> int:
        """Fill `x` [units, batch] and `self.target` with the next minibatch; return its number of examples, 0 at the end."""
        count = min(self.batch, self._end - self._at)
        here = slice(self._at, self._at + count)
        if count:
            if x is not self._bound:
                self._bound = bound(x, self._part.x, self.batch)
            self._first, self.filled = self._start + self._at, count
            gather(self._part.x, np.arange(here.start, here.stop), count, self._scale, x)
            x[:, count:] = x[:, :1]
            self.target[..., :count] = self._part.y[here].T
        self._at += count
        return count

    def example(self, column: int) -> int:
        """Return which example of the file stands in a column of the minibatch that was filled last."""
        return self._first + column

    def close(self) -> None:
        self._ahead.shutdown(wait=True, cancel_futures=True)
