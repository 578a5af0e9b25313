"""The one exception that is shown to a user as a sentence instead of a traceback."""

from __future__ import annotations

import difflib
import linecache
import os
import re
import secrets
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. The message is one clear sentence that says how, on one line whatever names it quotes."""

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


# Whatever a missing part, a cut-off or a damaged file makes a reader raise.
UNREADABLE = (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError)


def words(error: BaseException) -> str:
    """Return what a reader's error says, on one line."""
    said = str(error.args[-1] if isinstance(error, KeyError) and error.args else error)
    if "file signature not found" in said:
        return "it is no HDF5 file"
    if found := re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", said):
        return f"it is cut off: it has {int(found[1]):,} of its {int(found[2]):,} bytes"
    return " ".join(said.split()) or type(error).__name__


# How files start that are taken for HDF5 now and then.
_STARTS = {b"PK": "a zip archive, like NumPy's .npz", b"\x93NUMPY": "a NumPy array", b"\x1f\x8b": "compressed with gzip"}


def foreign(path: str | Path) -> str:
    """Return what a file is that is plainly no HDF5 file; otherwise nothing."""
    if Path(path).is_dir():
        return "a folder"
    if not Path(path).is_file():
        return "no ordinary file" if Path(path).exists() else ""
    with open(path, "rb") as file:
        start = file.read(512)
    found = next((words for magic, words in _STARTS.items() if start.startswith(magic)), "")
    return found or ("a text file" if start and all(byte >= 32 or byte in b"\t\n\r\f" for byte in start) else "")


@contextmanager
def reading(path: str | Path, advice: str) -> Iterator[None]:
    """Turn what a reader raises into one sentence that ends in `advice`."""
    try:
        yield
    except UNREADABLE as error:
        with suppress(OSError):
            if isinstance(error, OSError) and (found := foreign(path)):
                advice = "'dbnet data --help' shows how arrays become a data file"
                raise UserError(f"'{path}' cannot be read: it is {found}, and dbnet's files are HDF5; {advice}.") from None
        raise UserError(f"'{path}' cannot be read ({words(error)}); {advice}.") from None


def refuse_taken(path: str | Path, force: bool = False) -> None:
    """Raise UserError where a file has this name already and may not be replaced."""
    if not force and os.path.lexists(path) and not Path(path).is_dir():
        raise UserError(f"Cannot write '{path}': that file exists; choose another name, or give --force to replace it.")


@contextmanager
def writing(path: Path, force: bool = True) -> Iterator[Path]:
    """Give the body a temporary name to write to; it becomes `path` when the body ends, and vanishes when it raises.

    Without `force` a file that has the name, or gets it in the meantime, stays as it is: UserError.
    """
    # Of its own, since two may write the same file at the same time.
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        refuse_taken(path, force)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if not force:
            _reserve(path)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"Cannot write '{path}': {getattr(error, 'strerror', None) or error}; choose another place.") from None
    finally:
        with suppress(OSError):
            part.unlink()


def _reserve(path: Path) -> None:
    """Take a name that nobody has."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        refuse_taken(path)
