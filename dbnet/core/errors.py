"""Exceptions that are shown to a user as a sentence instead of a traceback, and the hint "did you mean" (`nearest`)."""

from __future__ import annotations

import difflib
import linecache
import sys
import traceback
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The message is one clear sentence that says how, on one line whatever names it quotes.

    Parameters
    ----------
    message
        The sentence.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class Stopped(UserError):
    """The run has ended in order on all ranks, but not as it was meant to; the message says why.

    Attributes
    ----------
    broken
        Whether ranks were lost on the way, so that nobody may wait for all of them.
    """

    def __init__(self, message: str, broken: bool = False) -> None:
        super().__init__(message)
        self.broken = broken


class Lost(UserError):
    """Somebody on whom the run depends is lost, or never answered: it has failed, and goes on from its checkpoint.

    After the sentence lines may follow that say who waits for whom.
    """

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)


# What other programs call what dbnet has by another name; of several the first one that is known counts.
_ELSEWHERE = {
    "lr": ("rate",), "learning_rate": ("rate",), "step_size": ("rate",), "gamma": ("rate",), "eta": ("rate",),
    "batch": ("minibatch",), "batch_size": ("minibatch",), "batchsize": ("minibatch",), "workers": ("replicas",),
    "servers": ("shards",), "ps": ("shards",), "weight_decay": ("decay",), "l2": ("decay",), "l1": ("strength",),
    "eps": ("epsilon", "floor"), "max_iter": ("iterations",), "memory": ("history",), "type": ("kind",), "optimizer": ("rule",),
    "size": ("units", "field"), "width": ("units",), "neurons": ("units",), "filters": ("maps",), "channels": ("maps",),
    "kernel": ("field",), "kernel_size": ("field",), "strides": ("stride",), "p": ("rate",), "beta": ("momentum", "beta1"),
    "linear": ("dense", "identity"), "fc": ("dense",), "conv2d": ("conv",), "maxpool": ("pool",), "lrn": ("norm",),
    "cross_entropy": ("softmax",), "crossentropy": ("softmax",), "mse": ("squared",), "bce": ("logistic",),
}  # fmt: skip


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest known word, or nothing."""
    known = list(known)
    close = [other for other in _ELSEWHERE.get(word.lower(), ()) if other in known]
    close += difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


# What the names of users' own modules begin with.
OWN = "dbnet_user_"


def own_line(error: BaseException) -> str:
    """Return a line that says in which line of a user's own module something failed, and what; nothing where it did elsewhere."""
    frames = list(traceback.walk_tb(error.__traceback__))
    found = [
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in frames
        if str(frame.f_globals.get("__name__", "")).startswith(OWN)
    ]
    # Numba's own way to name a line of a kernel that it cannot compile.
    place = getattr(error, "loc", None)
    own = {getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith(OWN)}
    if getattr(place, "filename", None) in own - {None}:
        found.append((place.filename, place.line, "a kernel"))
    if not found:
        return ""
    file, line, where = found[-1]
    said = str(error).strip().partition("\n")[0]
    code = linecache.getline(file, line).strip()
    return f"dbnet: '{file}', line {line}, in {where} fails with {type(error).__name__}: {said}: {code}\n"


def exit_code(error: BaseException) -> int:
    """Return the exit code for what ended a command: 2 something the user can mend, 130 an interruption, 1 a failure."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, UserError | Refused) and not isinstance(error, Lost):
        return 2
    return 130 if isinstance(error, KeyboardInterrupt) else 1


class Refused(Exception):
    """All ranks stop in step; the message has been printed."""
