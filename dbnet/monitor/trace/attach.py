"""Put clocks around what a worker, a server and a coordinator are made of; of a run that is not traced nothing is changed.

Methods of these objects, and of no others, are replaced by ones that add a span to a lane: half a microsecond each, two where other
work has emptied the caches. Layers and loss, which networks of a process share, have stand-ins in a network while one of its
gradients is traced by layer: of a small network not each one is (`LAYERS_EACH`). Waits and rests are seen from outside, by what a
role yields.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dbnet.comm.turns import Turns
from dbnet.monitor.trace.lane import Lane
from dbnet.network.network import Network
from dbnet.shards.push import Intake, Push, Receiver
from dbnet.shards.server import Server
from dbnet.shards.shard import Front, Shard
from dbnet.shards.store import Inbox, WindowStore

# ns from one gradient whose layers are spans to the next; all are of a network that takes longer.
LAYERS_EACH = 5_000_000

if TYPE_CHECKING:
    from dbnet.coordinator.coordinator import Coordinator
    from dbnet.methods.worker import Worker


def timed(lane: Lane, name: int, inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does what `inner` does, as a span."""
    now, add = lane.now, lane.add

    def call(*arguments: Any) -> Any:
        begin = now()
        out = inner(*arguments)
        add(name, begin, now())
        return out

    return call


def busy(lane: Lane, name: int, inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does what `inner` does, as a span where it returns that there was something to do."""
    now, add = lane.now, lane.add

    def call(*arguments: Any) -> Any:
        begin = now()
        out = inner(*arguments)
        if out:
            add(name, begin, now())
        return out

    return call


def run_of(lane: Lane, player: Worker | Server | Coordinator) -> None:
    """Show when a role waits or rests."""
    inner = player.run
    player.run = lambda: lane.watch(inner())


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


# --- a replica ----------------------------------------------------------------------------------------------------------------


def worker(player: Worker, lane: Lane, transfers: Lane | None, by_layer: bool = True) -> None:
    """Trace one partition of a replica.

    Parameters
    ----------
    transfers
        The lane of the thread that moves its data; None where there is none.
    by_layer
        Whether layers are spans; in simulated time they take none.
    """
    replica, link = player.replica, player.replica.link
    run_of(lane, player)
    turn = _network(replica.network, lane) if by_layer else None
    for method in ("accrue", "accrue_share"):
        # A dry replica takes no portions.
        if hasattr(replica, method):
            setattr(replica, method, _gradient(replica, getattr(replica, method), lane, turn))
    replica.evaluate = timed(lane, lane.name("evaluate", "evaluate"), replica.evaluate)
    if link is not None:
        for method, words in (("share", "orders"), ("meet", "meet")):
            setattr(link, method, timed(lane, lane.name(words, "exchange"), getattr(link, method)))
    _store(player, lane, transfers)


def _gradient(replica: Any, inner: Callable[..., Any], lane: Lane, turn: Callable[[bool], None] | None) -> Callable[..., Any]:
    """Return `inner` as a span, now and then with the layers in it."""
    now, add, name, last = lane.now, lane.add, lane.name("gradient", "compute"), -LAYERS_EACH

    def accrued(w: np.ndarray, g: np.ndarray, *more: Any) -> Any:
        nonlocal last
        step, begin = replica.steps, now()
        layers = turn is not None and begin - last >= LAYERS_EACH
        if layers:
            turn(True)
            last = begin
        out = inner(w, g, *more)
        # A portion may have had no more examples.
        if replica.steps > step:
            add(name, begin, now(), step)
        if layers:
            turn(False)
        return out

    return accrued


class TracedLayer:
    """Stands for a layer in one network."""

    def __init__(self, layer: Any, number: int, lane: Lane) -> None:
        self._layer, now, add, begin = layer, lane.now, lane.add, 0
        up, down = (lane.name(f"{way} {number}.{layer.kind}", "compute") for way in ("forward", "backward"))
        inputs, parameters = layer.backward_inputs, layer.backward_parameters
        self.forward = timed(lane, up, layer.forward)

        def backward_inputs(*arguments: Any) -> None:
            nonlocal begin
            begin = now()
            inputs(*arguments)

        def backward_parameters(*arguments: Any) -> None:
            parameters(*arguments)
            add(down, begin, now())

        self.backward_inputs, self.backward_parameters = backward_inputs, backward_parameters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class TracedLoss:
    """Stands for a loss in one network: a span from its statistics to their sum, and one for its gradient."""

    def __init__(self, loss: Any, lane: Lane) -> None:
        self._loss, now, add, begin = loss, lane.now, lane.add, 0
        name, reduced, combined = lane.name("loss", "compute"), loss.reduce, loss.combine
        self.delta = timed(lane, lane.name("loss gradient", "compute"), loss.delta)

        def reduce(*arguments: Any) -> None:
            nonlocal begin
            begin = now()
            reduced(*arguments)

        def combine(*arguments: Any) -> None:
            combined(*arguments)
            add(name, begin, now())

        self.reduce, self.combine = reduce, combine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)


def _network(network: Network, lane: Lane) -> Callable[[bool], None]:
    """Return what is called with whether the layers of the next gradient are spans."""
    plain, exchange = network.model, network.exchange
    model = copy.copy(plain)
    model.layers = tuple(TracedLayer(layer, number, lane) for number, layer in enumerate(model.layers))
    model.loss = TracedLoss(model.loss, lane)
    traced = None if exchange is None else TracedCrossings(exchange, [layer.kind for layer in model.layers], lane)

    def turn(on: bool) -> None:
        network.model, network.exchange = (model, traced) if on else (plain, exchange)

    return turn


class TracedCrossings:
    """Stands for a network's exchange: a span each time that values are sent or waited for."""

    def __init__(self, exchange: Any, kinds: Sequence[str], lane: Lane) -> None:
        self._exchange = exchange
        for method, words in (("start_up", "send"), ("finish_up", "receive"), ("start_down", "send"), ("finish_down", "receive")):
            way = method.partition("_")[2]
            ways = [
                timed(lane, lane.name(f"{words} {way} {i}.{kind}", "exchange"), getattr(exchange, method))
                for i, kind in enumerate(kinds)
            ]
            setattr(self, method, lambda layer, ways=ways: ways[layer](layer))
        for method in ("combine", "total"):
            setattr(self, method, timed(lane, lane.name(f"exchange {method}", "exchange"), getattr(exchange, method)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._exchange, name)


def _store(player: Worker, lane: Lane, transfers: Lane | None) -> None:
    store, main = player.store, threading.get_ident()

    def span(method: str, words: str, number: Callable[..., int]) -> None:
        inner, ways = getattr(store, method), [_moved(at, words) for at in (lane, transfers) if at is not None]

        def call(*arguments: Any) -> Turns:
            way = ways[0] if transfers is None or threading.get_ident() == main else ways[1]
            yield from way(inner(*arguments), number(*arguments))

        def alone(*arguments: Any) -> Turns:
            begin, push = now(), number(*arguments)
            yield from inner(*arguments)
            add(name, begin, now(), push)

        name, now, add = lane.name(words, words), lane.now, lane.add
        setattr(store, method, alone if transfers is None else call)

    if isinstance(store, WindowStore):
        span("read", "fetch", lambda *arguments: -1)
        span("write", "push", lambda g, number, *rest: number)
        return
    span("push", "push", lambda *arguments: store.number)
    # Where nothing is copied a fetch takes no time.
    if player.steps_locally(player.config):
        span("fetch", "fetch", lambda: -1)


def _moved(lane: Lane, words: str) -> Callable[[Turns, int], Turns]:
    """Return what shows a transfer, and its waits, in a thread's lane."""
    name = lane.name(words, words)

    def way(turns: Turns, number: int) -> Turns:
        begin = lane.now()
        yield from lane.watch(turns)
        lane.add(name, begin, lane.now(), number)

    return way


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
    now, add, apply, names, told = lane.now, lane.add, inbox.apply, _names(lane), (0, 0, 0)
    # Quicker than the arrays themselves, of which every number is an object first.
    head, tail, clock = memoryview(inbox.head), memoryview(inbox.tail), memoryview(receiver.clock)

    def letting(take: Callable[..., bool]) -> Callable[..., bool]:
        def taken(push: Push, g: np.ndarray, pieces: Any, first: bool, last: bool, sync: Callable[[], None]) -> bool:
            nonlocal told
            late = clock[push.partition]
            whole = take(push, g, pieces, first, last, sync)
            told = (last and not whole, push.number, late - push.fetched if whole else -1)
            return whole

        return taken

    for entry in inbox.intakes:
        entry.take = letting(entry.take)

    def applied(row: int, origin: int, slot: int) -> None:
        slices, begin = head[origin] - tail[origin], now()
        apply(row, origin, slot)
        refused, number, late = told
        add(names[refused], begin, now(), number, origin, late, slices)

    inbox.apply = applied


def direct(entry: Intake, receiver: Receiver, lane: Lane, origin: int) -> None:
    """Trace what a replica applies to a shard in this process: each push is one slice."""
    now, add, take, clock, (applied, refused) = lane.now, lane.add, entry.take, memoryview(receiver.clock), _names(lane)

    def taken(push: Push, *slice_: Any) -> bool:
        late, begin = clock[0] - push.fetched, now()
        whole = take(push, *slice_)
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
