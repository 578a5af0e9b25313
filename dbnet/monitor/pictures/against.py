"""What curves are drawn against: where a run stood at a moment, in seconds, steps, epochs, gradients or iterations."""

from __future__ import annotations

import numpy as np

from dbnet.core.errors import UserError
from dbnet.monitor.results import Run

# Name -> the axis; counts have whole ticks.
AXES = {
    "seconds": "time [s]",
    "steps": "steps of all replicas",
    "epochs": "epochs",
    "gradients": "gradients applied",
    "iterations": "iterations of the batch method",
}
COUNTS = {"steps", "gradients", "iterations"}


def axis(run: Run, seconds: np.ndarray, against: str) -> np.ndarray:
    """Return where a run stood at these moments.

    Parameters
    ----------
    seconds
        Moments [n], in seconds of training.
    against
        One of `AXES`. Steps are those of all replicas together; gradients those of minibatches that all shards had applied.

    Raises
    ------
    UserError
        The run has no such axis: iterations are those of a batch method.
    """
    seconds = np.asarray(seconds, float)
    if against == "seconds":
        return seconds
    if against in ("steps", "epochs"):
        rows = run.evaluation
        times, values = rows.seconds.to_numpy(), rows[against].to_numpy(float)
    elif against == "iterations":
        if not len(run.iterations):
            raise UserError(f"'{run.path}' has no iterations: they are a batch method's; draw it --against steps.")
        times, values = run.iterations.seconds.to_numpy(), run.iterations.iteration.to_numpy(float)
    else:
        times, values = applied(run)
    if not len(times):
        raise UserError(f"'{run.path}' has no {against} recorded to be drawn against; draw it --against seconds.")
    if times[0] > 0:
        times, values = np.append(0.0, times), np.append(0.0, values)
    return np.interp(seconds, times, values)


def applied(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return moments [n] and how many gradients of minibatches all shards had applied by then [n]."""
    events = run.events[["replica", "push", "steps", "seconds"]].sort_values("seconds", kind="stable")
    # A push comes to every shard in a slice of its own: it is applied with the last of them.
    whole = events.drop_duplicates(["replica", "push"], keep="last")
    return whole.seconds.to_numpy(), whole.steps.to_numpy(float).cumsum()
