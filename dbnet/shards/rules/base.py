"""What an update rule is: how a shard changes parameters w, in place, when a gradient g arrives.

A rule is a value given to the shard. It names the registers that it keeps beside the parameters (all elementwise, so that a
shard may apply a push slice by slice) and holds no array itself.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from dbnet.core.registry import Member, member

AnySchedule = member("shards.rules.schedules", "rule.schedule", "constant")


def square_root(dtype: np.dtype) -> float:
    """Return a bound of gradients whose squares are summed: 2^32 of them stay finite (3e14 for float32)."""
    return float(np.sqrt(np.finfo(dtype).max)) / 2**16


class Arrival(NamedTuple):
    """What an informed rule is told of the push whose gradient it applies.

    Attributes
    ----------
    staleness
        Updates that the shard finished between the fetch of the push's oldest gradient and the arrival of its first slice; all
        slices of a push are told the same. Of a synchronous step 0.
    replica
        Who computed the gradient; -1: all together, synchronously.
    steps
        Gradients that are summed in it; of a synchronous step whose mean it is.
    """

    staleness: int
    replica: int
    steps: int


class Rule(Member):
    """Base of all rules.

    Parameters
    ----------
    rate
        Learning rate (gamma for Adagrad).
    schedule
        How the rate changes over the run: its kind, and its options.

    Attributes
    ----------
    state
        Names of the registers that it keeps beside the parameters.
    informed
        Whether `apply` is told of the push: it is then called with an `Arrival` behind `t`.
    """

    family: ClassVar[str] = "shards.rules"
    state: ClassVar[tuple[str, ...]] = ()
    informed: ClassVar[bool] = False
    rate: float = Field(default=0.1, gt=0)
    schedule: AnySchedule = Field(default={}, validate_default=True)

    def initial(self, name: str) -> float:
        """Return the value that register `name` starts from."""
        return 0.0

    def local_rate(self) -> float:
        """Return the default rate of the replica's own steps between two fetches."""
        return self.rate

    def largest(self, dtype: np.dtype) -> float:
        """Return the largest gradient that the rule's registers bear."""
        return float(np.finfo(dtype).max)

    def apply(self, w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], t: int) -> None:
        """Change `w` in place; all arrays are [n]; `t` counts the updates of these parameters, this one included."""
        raise NotImplementedError
