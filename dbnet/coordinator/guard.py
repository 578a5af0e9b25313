"""Gradients that are not finite: why a replica has one, what the coordinator counts, and what it says when the run stops.

A replica whose loss is not finite or absurdly large, or that hears that the run stops for this, looks for the cause, in this
order, and reports the gravest it has met in its status:

    INPUT        an example that holds a value that is not finite
    PARAMETERS   parameters that are not finite, or larger than any that still learn
    NEITHER      neither of them; the example with the largest value is named

Shards say which pushes they refused (`shards.push`). A push counts once however many shards refused it. Of a batch method a pass
counts once: a line search may try steps at which nothing is finite, and takes shorter ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, isfinite
from typing import Any

import numpy as np

from dbnet.coordinator.duty import Duty, RunTime
from dbnet.coordinator.orders import Status
from dbnet.core.config import Config
from dbnet.monitor.display import Display
from dbnet.monitor.runfile import RunFile
from dbnet.network.diagnosis import INPUT, PARAMETERS, Trouble
from dbnet.network.parameters.layout import FlatLayout
from dbnet.shards.push import Refusal


class Guard(Duty):
    """Counts what was refused, says when to stop and why.

    Parameters
    ----------
    config, layout
        The run, and the names of its parameters.
    record, display
        The run file and what is printed.
    time
        The time of the run.
    by_pass
        Whether passes are counted instead of pushes; a pass is known by the clock at the fetch.

    Attributes
    ----------
    keys
        What was refused: pushes by replica and number, or passes.
    unsound
        Whether the last checkpoint could not be written for its values.
    stopped
        Whether the run ends with a diagnosis.
    """

    def __init__(
        self, config: Config, layout: FlatLayout, record: RunFile, display: Display, time: RunTime, by_pass: bool = False
    ) -> None:
        self._config, self._layout, self._record, self._display, self._time = config, layout, record, display, time
        self._by_pass, self._active = by_pass, config.guard.finite
        # Lost parameters may be left again: those that a line search tries, or a replica's own between fetches.
        self._patient = by_pass or config.method.worker.steps_locally(config)
        self.keys: set[Any] = set()
        self.stopped = self.unsound = False
        self._first: tuple[int, Refusal] | None = None
        self._named: set[int] = set()
        self._status = Status.nothing(1)

    def messages(self) -> dict[str, Callable[[int, Any], None]]:
        return {"refused": self.take}

    # --- what is heard --------------------------------------------------------------------------------------------------------

    def take(self, shard: int, refusals: Sequence[Refusal]) -> None:
        """Take what a shard has refused: record it, and name a replica's first one."""
        self._record.refused(self._time.seconds, shard, refusals)
        for refusal in refusals:
            push = refusal.push
            self._first = self._first or (shard, refusal)
            self.keys.add(push.fetched if self._by_pass else (push.replica, push.number))
            if push.replica not in self._named:
                self._named.add(push.replica)
                self._display.say(
                    f"Shard {shard} refused push {push.number} of replica {push.replica} (step {push.step}): its gradient is "
                    f"{refusal.value} at {self.place(refusal.index)}. Further ones are counted in the run file."
                )

    def act(self, status: Status) -> bool:
        self._status = status
        return False

    # --- what follows ---------------------------------------------------------------------------------------------------------

    @property
    def stops(self) -> bool:
        """Whether the run is to end: by the bound, or because no later push can mend the parameters."""
        spoiled = self.unsound or bool(self._status["spoiled"].any())
        return self.stopped or (self._active and not self._patient and spoiled) or len(self.keys) >= self._config.guard.refused

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
            unit = "pass" if self._by_pass else "push"
            plural = f"{unit}es" if count > 1 else unit
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
        return f"{self._config.method.remedy(self._config)}, or use model.decay"
