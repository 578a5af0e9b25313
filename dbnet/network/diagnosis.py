"""Why a gradient is not finite: an example, the parameters, or neither, as found by the replica that has computed it.

Causes have an order, the gravest first: a value of the minibatch that is NaN or infinite; parameters beyond HUGE; neither, where
the largest input is named. Parameters beyond LOST (or NaN) are lost to all learning, which is told apart from the cause. A cut
replica's partitions each see a part of the units and of the parameters, look in step, and come to the same answer.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import NamedTuple

import numpy as np

from dbnet.comm.link import Link

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
