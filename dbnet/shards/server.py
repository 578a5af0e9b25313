"""TODO."""

from __future__ import annotations

from collections.abc import Callable

from dbnet.shards.store import Inbox

_REPORT = 0.1
_ALONE = 1e-3


# --- the shard's side ---------------------------------------------------------------------------------------------------------


def drain(inbox: Inbox | None, clock: Callable[[], float]) -> bool:
    """Apply what has arrived, for at most the millisecond that MPI may be left alone; return whether there was anything."""
    if inbox is None or not inbox.drain():
        return False
    until = clock() + _ALONE
    while clock() < until and inbox.drain():
        pass
    return True
