"""A replica on one rank: its network, its minibatches, and evaluation. It knows neither shards nor other replicas."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import inf, sqrt
from typing import NamedTuple

import numpy as np

from dbnet.comm.link import Link
from dbnet.core.jit import kernel
from dbnet.core.kernels.vector import axpy, clip, dot, fill, scale
from dbnet.data.batches import Batches, Cursor
from dbnet.data.portions import Reader
from dbnet.data.subsets import Shares
from dbnet.network.diagnosis import WILD, Trouble, examine, graver
from dbnet.network.exchange import Exchange
from dbnet.network.model import Model, footprint
from dbnet.network.network import Network
from dbnet.network.partition import Cut


@kernel("T[:];T[:];T[:];f8")
def accrue_and_step(total: np.ndarray, g: np.ndarray, w: np.ndarray, rate: float) -> None:
    """total = total + g;  w = w - rate g, in one pass."""
    r = w.dtype.type(rate)
    for i in range(w.size):
        total[i] += g[i]
        w[i] -= r * g[i]


class Clipping(NamedTuple):
    """Bounds of a minibatch's gradient: of each value, and then of its 2-norm; None: none."""

    value: float | None = None
    norm: float | None = None


class Replica:
    """One partition of a replica.

    Parameters
    ----------
    model
        The network's description.
    train
        Minibatches of the replica's shares, or of the portions that it is given.
    watched
        Evaluation batches by name, "judged" (`evaluate.part`) and "train" (a portion of the training set); either may be missing.
    seed
        This replica's own, for layers that draw random numbers.
    cut
        The cut and the link to the other partitions; None: the network is whole.
    networks
        To train and to evaluate with, of a whole network; default: its own. Replicas that take turns may share them.
    clipping
        Bounds of each minibatch's gradient.

    Attributes
    ----------
    trouble
        Why a loss was not finite, if one was.
    """

    def __init__(
        self, model: Model, train: Shares | Reader, watched: dict[str, Batches], seed: int, cut: tuple[Cut, Link] | None = None,
        networks: tuple[Network, Network] | None = None, clipping: Clipping | None = None,
    ) -> None:  # fmt: skip
        self.model, self.train, self.watched, self.seed = model, train, watched, seed
        boxes = None if cut is None else cut[0].boxes[cut[1].rank]
        batch = next(iter(watched.values())).batch if watched else train.batch
        self.link = None if cut is None else cut[1]
        self.network, self.judge = networks or (Network(model, train.batch, boxes), Network(model, batch, boxes, training=False))
        if cut is not None:
            for number, network in enumerate((self.network, self.judge)):
                Exchange(cut[1], cut[0], network, tags=number * 2 * len(model.layers))
        self._clipping = clipping or Clipping()
        # Of parameters that all partitions hold, one counts the gradient.
        pieces = footprint(model, self.network.boxes, leads=cut is None or cut[1].rank == 0).pushed
        self._counted = [slice(piece.at, piece.at + piece.range.size) for piece in pieces]
        self._squares = np.zeros((1 if cut is None else cut[1].size, 1))
        self.steps = self.examples = self.right = 0
        self.loss = 0.0
        self.trouble: Trouble | None = None

    @cached_property
    def snapshot(self) -> np.ndarray:
        """Parameters to evaluate, so that training goes on from its own."""
        return np.zeros(self.size, self.model.dtype)

    @cached_property
    def _own(self) -> np.ndarray:
        """One step's gradient, where it cannot go straight into the sum."""
        return np.zeros(self.size, self.model.dtype)

    @property
    def size(self) -> int:
        return self.network.size

    def accrue(self, w: np.ndarray, g: np.ndarray, accrued: int, rate: float) -> float:
        """Take the next minibatch, add its gradient to `g`, and make a local step w = w - rate gradient if rate > 0.

        Parameters
        ----------
        w, g
            Parameters and the sum of the `accrued` gradients so far, [size]; with none, `g` is overwritten.

        Returns
        -------
        The mean loss of the minibatch.
        """
        count = self.train.next(self.network.x)
        apart = accrued > 0 and (rate > 0 or self._clipping != Clipping())
        target, into = self.train.target, self._own if apart else g
        loss, right = self.network.loss_and_gradient(w, into, target, count, accrued > 0 and not apart, self.steps, self.seed)
        sound = self._sound(loss, w, count)
        self._clip(into)
        if apart and sound and rate > 0:
            accrue_and_step(g, self._own, w, rate)
        elif apart:
            axpy(1.0, self._own, g)
        elif rate > 0 and sound:
            axpy(-rate, g, w)
        self._count(count, loss, right)
        return loss / count

    def accrue_share(self, w: np.ndarray, g: np.ndarray, fresh: bool) -> tuple[int, float, int]:
        """Take the portion's next minibatch and add its gradient, weighted by its share of a full minibatch, to `g`.

        Parameters
        ----------
        w, g
            Parameters and the weighted sum so far, [size]; if `fresh`, it is overwritten.

        Returns
        -------
        Number of examples (0: the portion has no more), summed loss, right answers.
        """
        count = self.train.next(self.network.x)
        if not count:
            return 0, 0.0, 0
        full = count == self.train.batch
        into, target = g if full else self._own, self.train.target
        loss, right = self.network.loss_and_gradient(w, into, target, count, full and not fresh, self.steps, self.seed)
        if not full:
            if fresh:
                fill(g, 0.0)
            axpy(count / self.train.batch, into, g)
        self._sound(loss, w, count)
        self._count(count, loss, right)
        return count, loss, right

    def _clip(self, g: np.ndarray) -> None:
        """Bring one minibatch's gradient within its bounds; its norm is that of all partitions together."""
        value, most = self._clipping
        if value is not None:
            clip(g, value)
        if most is None:
            return
        mine = sum(dot(g[here], g[here]) for here in self._counted)
        if self.link is None:
            self._squares[0] = mine
        else:
            self.link.gather(np.array([mine]), self._squares)
        # In the order of the partitions, so that all of them find the same.
        norm = sqrt(sum(self._squares[:, 0].tolist()))
        if most < norm < inf:
            scale(g, most / norm)

    def _count(self, count: int, loss: float, right: int) -> None:
        self.steps += 1
        self.examples += count
        self.loss += loss
        self.right += right

    def _sound(self, loss: float, w: np.ndarray, count: int) -> bool:
        """Return whether the loss is one to learn from; if not, look for the cause."""
        if abs(loss) <= WILD * count:
            return True
        self.trouble = graver(self.trouble, self._look(w, count))
        return False

    def _look(self, w: np.ndarray, count: int) -> Trouble:
        x, target = self.network.x[:, :count], self.train.target[..., :count]
        return examine(x, target, w, self.steps, self.train.example, self.link)

    def examine(self, w: np.ndarray) -> None:
        """Look at the last minibatch and at `w`, if no loss has given a reason to do so before."""
        if self.trouble is None and self.steps:
            self.trouble = self._look(w, self.train.filled)

    def evaluate(self, w: np.ndarray, beat: Callable[[], None] = lambda: None) -> Score:
        """Return mean loss and accuracy on the examples that are evaluated and on the watched portion of the training set.

        `beat` is called after each minibatch, to show that the replica is alive.
        """
        out: list[float] = []
        for name in ("judged", "train"):
            batches = self.watched.get(name)
            out += self._evaluate(w, batches, beat) if batches is not None and len(batches) else [np.nan, np.nan]
        return Score(*out)

    def _evaluate(self, w: np.ndarray, batches: Batches, beat: Callable[[], None]) -> list[float]:
        batches.seek(Cursor(0, 0))
        loss, right = 0.0, 0
        for _ in range(-(-len(batches) // batches.batch)):
            count = batches.next(self.judge.x)
            more, good = self.judge.score(w, batches.target, count)
            loss, right = loss + more, right + good
            beat()
        accuracy = right / len(batches) if batches.target.ndim == 1 else np.nan
        return [loss / len(batches), accuracy]


class Score(NamedTuple):
    """Mean loss and accuracy on what is evaluated (`evaluate.part`) and on the watched portion of the training set; else NaN."""

    loss: float
    accuracy: float
    train_loss: float
    train_accuracy: float
