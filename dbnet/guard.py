"""Gradients that are not finite: why a replica has one, what the coordinator counts, and what it says when the run stops.

A replica whose loss is not finite or absurdly large, or that hears that the run stops for this, looks for the cause, in this
order, and reports the gravest it has met in its status:

    INPUT        an example that holds a value that is not finite
    PARAMETERS   parameters that are not finite, or larger than any that still learn
    NEITHER      neither of them; the example with the largest value is named

Shards say which pushes they refused (`intake`). A push counts once however many shards refused it. Of a batch method a pass
counts once: a line search may try steps at which nothing is finite, and takes shorter ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, isfinite
from typing import Any, NamedTuple

import numpy as np

from dbnet.config import Config
from dbnet.display import Display
from dbnet.link import Link
from dbnet.monitor import RunFile
from dbnet.parameters import Layout
from dbnet.shard import Push, Refusal

INPUT, PARAMETERS, NEITHER = 1, 2, 3
# Of parameters: rarely meant, and beyond all learning; of a minibatch's mean loss: worth a look.
HUGE, LOST, WILD = 1e6, 1e15, 1e12


class Trouble(NamedTuple):
    """Why something is not finite: the cause, the replica's step, the example in the training set, the value that is named.

    `spoiled` says whether the parameters of the last such step were beyond all learning. The names are those in the status.
    """

    cause: float
    cause_step: float
    cause_example: float
    cause_value: float
    spoiled: float


def examine(
    x: np.ndarray, target: np.ndarray, w: np.ndarray, step: int, example: Callable[[int], int], link: Link | None
) -> Trouble:
    """Look for the cause of what is not finite; the partitions of a replica look together.

    Parameters
    ----------
    x, target
        Input [units, examples] and targets of the minibatch.
    w
        The parameters it was computed with.
    example
        Returns the place in the training set of a column.
    """
    # As infinity, since NaN has no order.
    size = np.where(np.isnan(x), np.inf, np.abs(x))
    if target.ndim == 2:
        size = np.concatenate([size, np.where(np.isnan(target), np.inf, np.abs(target))])
    tops = size.max(axis=0, initial=0)
    column = int(tops.argmax())
    largest = float(np.abs(w).max(initial=0))
    # So that NaN is, too.
    lost = not largest <= LOST
    if not isfinite(tops[column]):
        mine = (INPUT, step, example(column), np.inf, lost)
    elif lost or largest > HUGE:
        mine = (PARAMETERS, step, -1, largest if isfinite(largest) else np.inf, lost)
    else:
        mine = (NEITHER, step, example(column), tops[column], lost)
    rows = np.array([mine], np.float64)
    if link is not None:
        rows = np.zeros((link.size, len(mine)))
        link.gather(np.array(mine, np.float64), rows)
    best = min(rows.tolist(), key=lambda row: (row[0], -row[3]))
    return Trouble(*best[:4], float(rows[:, 4].any()))


def graver(old: Trouble | None, new: Trouble) -> Trouble:
    """Return the first trouble of the gravest cause, with what the newest says of the parameters."""
    return new if old is None or new.cause < old.cause else old._replace(spoiled=new.spoiled)


class Guard:
    """The coordinator's side.

    Parameters
    ----------
    config, layout
        The run, and the names of its parameters.
    record, display
        The run file and what is printed.

    Attributes
    ----------
    key
        What of a push counts once.
    patient
        Whether lost parameters may be left again: those that a line search tries, or a replica's own between fetches.
    keys
        What was refused, by `key`.
    unsound
        Whether the last checkpoint could not be written for its values.
    stopped
        Whether the run ends with a diagnosis.
    """

    def __init__(self, config: Config, layout: Layout, record: RunFile, display: Display) -> None:
        self._config, self._layout, self._record, self._display = config, layout, record, display
        self.key: Callable[[Push], Any] = lambda push: (push.replica, push.number)
        self.patient, self._active = config.method.n_fetch > 1, config.guard.finite
        self.keys: set[Any] = set()
        self.stopped = self.unsound = False
        self._unit = "push"
        self._first: tuple[int, Refusal] | None = None
        self._named: set[int] = set()
        self._status: dict[str, np.ndarray] = {}

    def by_pass(self) -> None:
        """Count passes instead of pushes; a pass is known by the clock at the fetch."""
        self.key, self.patient, self._unit = (lambda push: push.fetched), True, "pass"

    # --- what is heard --------------------------------------------------------------------------------------------------------

    def take(self, seconds: float, shard: int, refusals: Sequence[Refusal]) -> None:
        """Take what a shard has refused: record it, and name a replica's first one."""
        self._record.refused(seconds, shard, refusals)
        for refusal in refusals:
            push = refusal.push
            self._first = self._first or (shard, refusal)
            self.keys.add(self.key(push))
            if push.replica not in self._named:
                self._named.add(push.replica)
                self._display.say(
                    f"Shard {shard} refused push {push.number} of replica {push.replica} (step {push.step}): its gradient is "
                    f"{refusal.value} at {self.place(refusal.index)}. Further ones are counted in the run file."
                )

    def hear(self, status: dict[str, np.ndarray]) -> None:
        """Take the replicas' status."""
        self._status = status

    # --- what follows ---------------------------------------------------------------------------------------------------------

    @property
    def stops(self) -> bool:
        """Whether the run is to end: by the bound, or because no later push can mend the parameters."""
        spoiled = self.unsound or bool(self._status and self._status["spoiled"].any())
        return self.stopped or (self._active and not self.patient and spoiled) or len(self.keys) >= self._config.guard.refused

    def conclude(self) -> bool:
        """When everything has been applied: return whether the parameters are fit for a last checkpoint and evaluation."""
        self.stopped = self.stops or (self._active and self.unsound)
        return not self.stopped

    def loss(self, number: int, loss: float) -> float:
        """Return the loss of a pass, infinite where a bundle of it was refused: a line search then takes a shorter step."""
        return inf if number in self.keys or not isfinite(loss) else loss

    # --- what is said ---------------------------------------------------------------------------------------------------------

    def place(self, index: int) -> str:
        """Return the layer, the parameter and the place in it of a flat index."""
        entry = next(e for e in self._layout.entries if e.range.lo <= index < e.range.hi)
        layer, kind, name = entry.name.split(".", 2)
        inside = ", ".join(str(int(i)) for i in np.unravel_index(index - entry.offset, entry.shape))
        return f"{name}[{inside}] of layer {layer} ({kind})"

    def diagnosis(self) -> str:
        """Return two or three sentences: who, when, where and how many; why, and what to do; what is kept."""
        count, said = len(self.keys), "The run was stopped because its loss or its parameters are out of all bounds."
        if self._first is not None:
            shard, (push, index, value) = self._first
            plural = {"push": "pushes", "pass": "passes"}[self._unit] if count > 1 else self._unit
            said = (
                f"The run was stopped after {count} refused {plural}, the first by shard {shard} from replica {push.replica} at "
                f"step {push.step}, whose gradient is {value} at {self.place(index)}."
            )
        path = self._config.output(".checkpoint.h5")
        kept = f" The checkpoint before is kept: {path}." if path.exists() else " There is no checkpoint of this run."
        return f"{said} {self._why()}{kept}"

    def _why(self) -> str:
        rows = np.flatnonzero(self._status["cause"])
        if not rows.size:
            return f"The parameters have grown beyond all learning: {self._remedy()}."
        worst = min(rows.tolist(), key=lambda r: (self._status["cause"][r], self._status["cause_step"][r]))
        cause, step, example, value = (self._status[name][worst] for name in Trouble._fields[:4])
        if cause == INPUT:
            return (
                f"Example {example:.0f} of the training set holds a value that is NaN or infinite as {self._config.model.dtype} "
                f"(replica {worst}, step {step:.0f}): mend the data."
            )
        if cause == PARAMETERS:
            how = f"to {value:.2g}" if isfinite(value) else "beyond all numbers"
            return f"The parameters have grown {how} (replica {worst}, step {step:.0f}): {self._remedy()}."
        return (
            f"Neither the minibatch nor the parameters are out of bounds (replica {worst}, step {step:.0f}; the largest input is "
            f"{value:.3g}, in example {example:.0f}): scale the data down, or look for a layer that divides by nought."
        )

    def _remedy(self) -> str:
        config, decay = self._config, "or use model.decay"
        if config.method.kind == "sandblaster":
            rate = config.descent.get("rate")
            return f"{f'lower descent.rate ({rate:g})' if rate else 'begin elsewhere with run.start'}, {decay}"
        return f"lower rule.rate ({config.rule['rate']:g}), train with a warmstart, {decay}"
