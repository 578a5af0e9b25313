"""Replicas in simulated time.

What one computes is computed for good, in no virtual time, and then takes the seconds that the machine's profile says. Replicas of
a whole network share what they compute with, since no turn of another lies within a gradient. A dry replica computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dbnet.comm.link import Link, LocalLink, Wires
from dbnet.comm.simulated.clock import VirtualTime
from dbnet.data.batches import Batches, Cursor
from dbnet.data.subsets import Share
from dbnet.network.model import Model, footprint
from dbnet.network.network import Network
from dbnet.network.partition import Cut
from dbnet.network.replica import Clipping, Replica, Score
from dbnet.run.simulated.noise import Noise


class Pace(NamedTuple):
    """How long one partition of a replica takes.

    Attributes
    ----------
    time, noise
        The clocks, and what varies them.
    entity, speed
        Whose numbers are drawn; what all times are multiplied with.
    step, batch, local
        Seconds of a step, of a minibatch of an evaluation, and of a step that a replica makes with its own gradient.
    """

    time: VirtualTime
    noise: Noise
    entity: int
    speed: float
    step: float
    batch: float
    local: float = 0.0

    def compute(self, step: int, local: bool = False) -> None:
        """Let the time of a step pass; `local`: the replica makes one by itself, too."""
        self.time.compute(self.seconds(step, local))

    def seconds(self, step: int, local: bool = False) -> float:
        """Return the time of a step."""
        seconds = self.step + self.local if local else self.step
        return seconds * self.speed * self.noise.step(self.entity, step)

    def evaluate(self) -> None:
        """Let the time of a minibatch of an evaluation pass."""
        self.time.compute(self.batch * self.speed)


class PacedLink(LocalLink):
    """A partition's end over which it computes between its messages, where it shares cores: who it waits for may need its core.

    Parameters
    ----------
    wires, rank, time
        The link's; the clocks.
    layers
        Seconds of one pass through this partition's part of each layer, or what is in proportion to them.
    """

    def __init__(self, wires: Wires, rank: int, time: VirtualTime, layers: Sequence[float]) -> None:
        super().__init__(wires, rank)
        self._time = time
        n, total = len(layers), 3 * sum(layers) - layers[0]
        # Passes up; then down, of inputs and of parameters of each layer. Who owns no unit has all of a step first.
        passes = [*layers, *(mine for mine in layers[:0:-1] for _ in range(2))]
        parts = np.cumsum(passes) / total if total else np.ones(len(passes))
        # By tag, which part of a step is computed when messages leave, and when they are waited for; and at the end of the way up.
        self._leave: dict[int, float] = {}
        self._wait: dict[int, float] = {}
        self._up = float(parts[n - 1])
        for i in range(1, n):
            down = n + 2 * (n - 1 - i)
            self._leave[2 * i] = self._wait[2 * i] = float(parts[i - 1])
            self._leave[2 * i + 1], self._wait[2 * i + 1] = float(parts[down]), float(parts[down + 1])
        self._seconds, self._done = 0.0, 1.0

    def begin(self, seconds: float) -> None:
        """A step of so many seconds begins."""
        self._seconds, self._done = seconds, 0.0

    def compute(self, part: float = 1.0) -> None:
        """Compute up to this part of a step."""
        if part > self._done:
            self._time.compute((part - self._done) * self._seconds)
            self._done = part

    def start(self, transfers: Sequence[tuple[bool, np.ndarray, int, int]]) -> None:
        if self._done < 1.0 and transfers:
            self.compute(self._leave[transfers[0][3]])
        super().start(transfers)

    def wait(self, transfers: Sequence[tuple[bool, np.ndarray, int, int]]) -> None:
        if self._done < 1.0 and transfers:
            self.compute(self._wait[transfers[0][3]])
        super().wait(transfers)

    def gather(self, mine: np.ndarray, everyone: np.ndarray) -> None:
        if self._done < 1.0:
            self.compute(self._up)
        super().gather(mine, everyone)


class Shared:
    """What replicas of a whole network compute with, one at a time.

    Parameters
    ----------
    model, batch, watched
        The network, the columns of a minibatch, and what is evaluated.
    columns
        Of a minibatch of an evaluation.
    """

    def __init__(self, model: Model, batch: int, watched: dict[str, Batches], columns: int) -> None:
        self.watched = watched
        self.networks = (Network(model, batch), Network(model, columns if watched else batch, training=False))
        size = self.networks[0].size
        # One replica evaluates at a time.
        self.snapshot, self.gradient = np.zeros(size, model.dtype), np.zeros(size, model.dtype)
        # Who began a step last, and whose minibatch lies in the network.
        self.latest: PacedReplica | None = None
        self.filled: PacedReplica | None = None


class PacedReplica(Replica):
    """A replica whose steps and evaluations take virtual seconds.

    Parameters
    ----------
    pace, shared
        How long they take; what is shared with others, None: nothing.
    parts, clipping
        What a replica is made of.
    """

    def __init__(self, pace: Pace, shared: Shared | None, *parts: object, clipping: Clipping) -> None:
        super().__init__(*parts, networks=None if shared is None else shared.networks, clipping=clipping)
        self._pace, self._shared = pace, shared
        if shared is not None:
            self.snapshot, self._own = shared.snapshot, shared.gradient

    def accrue(self, w: np.ndarray, g: np.ndarray, accrued: int, rate: float) -> float:
        if self._shared is not None:
            # At the end of the step: nobody computes between a gradient and the beginning of its push.
            self._shared.latest = self
            self._pace.compute(self.steps, rate > 0)
            self._shared.filled = self
            return super().accrue(w, g, accrued, rate)
        between = isinstance(self.link, PacedLink)
        if between:
            self.link.begin(self._pace.seconds(self.steps, rate > 0))
        loss = super().accrue(w, g, accrued, rate)
        if between:
            self.link.compute()
        else:
            self._pace.compute(self.steps - 1, rate > 0)
        return loss

    def accrue_share(self, w: np.ndarray, g: np.ndarray, fresh: bool) -> tuple[int, float, int]:
        count, loss, right = super().accrue_share(w, g, fresh)
        if count:
            if self._shared is not None:
                self._shared.latest = self._shared.filled = self
            self._pace.compute(self.steps - 1)
        return count, loss, right

    def examine(self, w: np.ndarray) -> None:
        """Look at the last minibatch, unless another replica began one after it."""
        shared = self._shared
        if shared is None or shared.latest is self:
            if shared is not None and shared.filled is not self:
                self.train.refill(self.network.x)
                shared.filled = self
            super().examine(w)

    def evaluate(self, w: np.ndarray, beat: Callable[[], None] = lambda: None) -> Score:
        score = super().evaluate(w)
        for batches in self.watched.values():
            for _ in range(-(-len(batches) // batches.batch)):
                self._pace.evaluate()
                beat()
        return score


# --- dry ----------------------------------------------------------------------------------------------------------------------


class Counted:
    """Examples that are counted and not read.

    Parameters
    ----------
    batch
        Examples of a minibatch.
    shares
        How many there are.
    """

    def __init__(self, batch: int, shares: Sequence[Share]) -> None:
        self.batch, self.taken, self._size = batch, 0, 0
        self._epoch = self._position = 0
        for share in shares:
            self.take(share)

    def take(self, share: Share, beat: Callable[[], None] = lambda: None) -> None:
        """Count these, too."""
        self._size += share.size
        self._epoch, self.taken = max(self._epoch, share.epoch), self.taken + 1

    def __len__(self) -> int:
        return self._size

    @property
    def cursor(self) -> Cursor:
        return Cursor(self._epoch, self._position)

    @property
    def cursors(self) -> list[Cursor]:
        return [self.cursor] * self.taken

    def next(self) -> int:
        """Return the number of examples of the next minibatch."""
        count = min(self.batch, self._size - self._position)
        self._position += count
        if self._position >= self._size:
            self._epoch, self._position = self._epoch + 1, 0
        return count


class Crossed(NamedTuple):
    """One exchange among the partitions of a replica: what is sent and received, or what is gathered by all."""

    sends: list[Any]
    receives: list[Any]
    mine: np.ndarray | None = None
    everyone: np.ndarray | None = None


class DryReplica:
    """A replica that computes nothing: its steps take time, and its partitions exchange values without contents.

    Parameters
    ----------
    pace, train
        How long its steps take; what it would train on.
    cut
        The cut and the link to the other partitions; None: the network is whole.
    model, evaluated
        The network; how many examples an evaluation looks at, and how many at a time.
    clips
        Whether its partitions tell each other the norms of their gradients.
    """

    trouble = None
    right = 0
    # There is no loss.
    loss = float("nan")

    def __init__(
        self, pace: Pace, train: Counted, cut: tuple[Cut, Link] | None, model: Model, evaluated: tuple[Sequence[int], int],
        clips: bool,
    ) -> None:  # fmt: skip
        self.train, self._pace, self._evaluated = train, pace, evaluated
        self.steps = self.examples = 0
        self.link = None if cut is None else cut[1]
        boxes, leads = (model.boxes(), True) if cut is None else (cut[0].boxes[self.link.rank], self.link.rank == 0)
        # Without contents, but of as many bytes as are fetched to evaluate.
        self.snapshot = np.broadcast_to(np.zeros((), model.dtype), (footprint(model, boxes, leads).size,))
        step, watched = ((), ()), ((), ())
        if cut is not None:
            step, watched = self._transfers(*cut, train.batch), self._transfers(*cut, evaluated[1])
        (self._up, self._down), (self._judge, _) = step, watched
        self._shared = np.zeros(0 if cut is None else cut[0].shared, model.dtype)
        self._squares = np.zeros((cut[1].size if cut is not None and clips else 0, 1))

    @staticmethod
    def _transfers(cut: Cut, link: Link, batch: int) -> tuple[list[Crossed], list[Crossed]]:
        """Return what is sent and received, exchange by exchange: up to the statistics of the loss, and down."""
        nothing, layers, out = np.zeros((), cut.model.dtype), range(1, len(cut.model.layers)), []
        for down in (False, True):
            exchanges = []
            for layer in reversed(layers) if down else layers:
                exchange = Crossed([], [])
                for message in cut.messages(layer):
                    values = np.broadcast_to(nothing, (message.size * batch,))
                    source, target = (message.source, message.target)[:: -1 if down else 1]
                    if source == link.rank:
                        exchange.sends.append(link.sender(values, target, 2 * layer + down))
                    if target == link.rank:
                        exchange.receives.append(link.receiver(values, source, 2 * layer + down))
                exchanges.append(exchange)
            out.append(exchanges)
        statistics = np.zeros((cut.model.loss.width, batch), cut.model.dtype)
        out[0].append(Crossed([], [], statistics, np.zeros((link.size, *statistics.shape), statistics.dtype)))
        return out[0], out[1]

    def _exchange(self, exchanges: Sequence[Crossed]) -> None:
        for sends, receives, mine, everyone in exchanges:
            if mine is not None:
                self.link.gather(mine, everyone)
            elif sends or receives:
                self.link.start(sends)
                self.link.wait(receives)

    def accrue(self, w: np.ndarray, g: np.ndarray, accrued: int, rate: float) -> float:
        """Let a step's time pass."""
        between = isinstance(self.link, PacedLink)
        if between:
            self.link.begin(self._pace.seconds(self.steps, rate > 0))
        self._exchange(self._up)
        self._exchange(self._down)
        if self._shared.size:
            self.link.total(self._shared, self._shared)
        if self._squares.size:
            self.link.gather(self._squares[0], self._squares)
        if between:
            self.link.compute()
        else:
            self._pace.compute(self.steps, rate > 0)
        self.steps += 1
        self.examples += self.train.next()
        return self.loss

    def examine(self, w: np.ndarray) -> None:
        """There is nothing to look at."""

    def evaluate(self, w: np.ndarray, beat: Callable[[], None] = lambda: None) -> Score:
        """Let an evaluation's time pass."""
        batches = sum(-(-size // self._evaluated[1]) for size in self._evaluated[0])
        for _ in range(batches):
            self._exchange(self._judge)
        for _ in range(batches):
            self._pace.evaluate()
            beat()
        return Score(*[float("nan")] * 4)


AnyReplica = Replica | DryReplica
