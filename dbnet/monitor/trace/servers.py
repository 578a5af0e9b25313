"""Put clocks around what a server and a coordinator are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dbnet.monitor.trace.attach import busy, run_of
from dbnet.monitor.trace.lane import Lane
from dbnet.shards.push import Intake, Push, Receiver
from dbnet.shards.server import Server
from dbnet.shards.shard import Front, Shard
from dbnet.shards.store import Inbox

if TYPE_CHECKING:
    from dbnet.coordinator.coordinator import Coordinator


def during(lane: Lane, name: int, what: tuple[Any, str, str], on: Callable[[], bool]) -> None:
    """Show from when to when something is under way.

    Parameters
    ----------
    what
        An object, its method that begins it, and the one that is called now and then; that one alone while it is under way.
    on
        Whether it is.
    """
    owner, start, look = what
    begin_it = getattr(owner, start)

    def begun(*arguments: Any, **words: Any) -> Any:
        begin, seen = lane.now(), getattr(type(owner), look)
        out = begin_it(*arguments, **words)

        def looked(*more: Any) -> Any:
            found = seen(owner, *more)
            if not on():
                lane.add(name, begin, lane.now())
                delattr(owner, look)
            return found

        if on():
            setattr(owner, look, looked)
        return out

    setattr(owner, start, begun)


# --- a shard ------------------------------------------------------------------------------------------------------------------


def server(player: Server, lane: Lane) -> None:
    """Trace one shard."""
    run_of(lane, player)
    receiver, saver = player.receiver, player.saver
    if getattr(type(receiver), "advance", None) not in (Shard.advance, Front.advance):
        receiver.advance = busy(lane, lane.name("command", "apply"), receiver.advance)
    _saver(saver, lane)
    if isinstance(player.inbox, Inbox):
        _inbox(player.inbox, receiver, lane)


def _saver(saver: Any, lane: Lane) -> None:
    begin, slice_ = saver.begin, busy(lane, lane.name("checkpoint", "checkpoint"), saver.advance)

    def begun(*arguments: Any) -> None:
        begin(*arguments)
        saver.advance = advanced

    def advanced() -> bool:
        out = slice_()
        if not saver.busy:
            del saver.advance
        return out

    saver.begin = begun


def _inbox(inbox: Inbox, receiver: Receiver, lane: Lane) -> None:
    now, add, apply, names, every, told = lane.now, lane.add, inbox.apply, _names(lane), lane.sampling.pushes, None
    # Quicker than the arrays themselves, of which every number is an object first.
    head, tail, clock = memoryview(inbox.head), memoryview(inbox.tail), memoryview(receiver.clock)

    def letting(take: Callable[..., bool]) -> Callable[..., bool]:
        def taken(push: Push, g: np.ndarray, pieces: Any, first: bool, last: bool, sync: Callable[[], None]) -> bool:
            nonlocal told
            late = clock[push.partition]
            whole = take(push, g, pieces, first, last, sync)
            refused = last and not whole
            told = None if push.number % every and not refused else (refused, push.number, late - push.fetched if whole else -1)
            return whole

        return taken

    for entry in inbox.intakes:
        entry.take = letting(entry.take)

    def applied(row: int, origin: int, slot: int, header: tuple[int, ...]) -> None:
        nonlocal told
        slices, begin, told = head[origin] - tail[origin], now(), None
        apply(row, origin, slot, header)
        if told is not None:
            refused, number, late = told
            add(names[refused], begin, now(), number, origin, late, slices)

    inbox.apply = applied


def direct(entry: Intake, receiver: Receiver, lane: Lane, origin: int) -> None:
    """Trace what a replica applies to a shard in this process: each push is one slice."""
    now, add, take, clock, (applied, refused) = lane.now, lane.add, entry.take, memoryview(receiver.clock), _names(lane)
    every = lane.sampling.pushes

    def taken(push: Push, *slice_: Any) -> bool:
        late, begin = clock[0] - push.fetched, now()
        whole = take(push, *slice_)
        if push.number % every and whole:
            return whole
        add(applied if whole else refused, begin, now(), push.number, origin, late if whole else -1)
        return whole

    entry.take = taken


def _names(lane: Lane) -> tuple[int, int]:
    return lane.name("apply", "apply"), lane.name("refuse", "apply")


# --- the coordinator ----------------------------------------------------------------------------------------------------------


def coordinator(player: Coordinator, lane: Lane, evaluations: Lane, checkpoints: Lane) -> None:
    """Trace the coordinator: rounds in which it heard something, and when an evaluation or a checkpoint was under way."""
    run_of(lane, player)
    name, tick = lane.name("round", "coordinate"), player.tick

    def ticked() -> None:
        news, begin = player.news, lane.now()
        tick()
        if player.news != news:
            lane.add(name, begin, lane.now())

    player.tick = ticked
    asks, writes = player.duties.evaluation, player.duties.checkpoints
    during(evaluations, evaluations.name("evaluation", "evaluate"), (asks, "ask", "act"), lambda: asks.running)
    during(checkpoints, checkpoints.name("checkpoint", "checkpoint"), (writes, "begin", "act"), lambda: writes.writing)
