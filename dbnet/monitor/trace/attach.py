"""Put clocks around what a worker is made of; of a run that is not traced nothing is changed.

Methods of these objects, and of no others, are replaced by ones that add a span to a lane: half a microsecond each, two or three
where other work has emptied the caches. So of small networks not every step is traced (`Sampling`): which ones, every rank knows by
itself. Layers and loss, which networks of a process share, have stand-ins in a network while one of its gradients is traced. Waits
and rests are seen from outside, by what a role yields. `servers` does the same for shards and the coordinator.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dbnet.comm.turns import Turns
from dbnet.monitor.trace.lane import Lane
from dbnet.network.network import Network
from dbnet.shards.server import Server
from dbnet.shards.store import WindowStore

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
            shown = timed(lane, lane.name(words, "exchange"), getattr(link, method))
            setattr(link, method, _now_and_then(replica, lane.sampling.steps, shown, getattr(link, method)))
    _store(player, lane, transfers)


def _now_and_then(replica: Any, every: int, shown: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: (plain if replica.steps % every else shown)(*arguments)


def _gradient(replica: Any, inner: Callable[..., Any], lane: Lane, turn: Callable[[bool], None] | None) -> Callable[..., Any]:
    """Return `inner` as a span, with the layers in it; of a step that is left out, as it is."""
    now, add, name, every = lane.now, lane.add, lane.name("gradient", "compute"), lane.sampling.steps

    def accrued(w: np.ndarray, g: np.ndarray, *more: Any) -> Any:
        step = replica.steps
        if step % every:
            return inner(w, g, *more)
        if turn is not None:
            turn(True)
        begin = now()
        out = inner(w, g, *more)
        # A portion may have had no more examples.
        if replica.steps > step:
            add(name, begin, now(), step)
        if turn is not None:
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
    store, sampling = player.store, lane.sampling

    def span(method: str, words: str, number: Callable[..., int], every: int) -> None:
        inner, ways = getattr(store, method), [_moved(at, words, at is transfers) for at in (lane, transfers) if at is not None]
        nth, way = itertools.count().__next__, ways[0]

        def call(*arguments: Any) -> Turns:
            push = number(*arguments)
            if (nth() if push < 0 else push) % every:
                return inner(*arguments)
            return way(inner(*arguments), push)

        def beside(*arguments: Any) -> Turns:
            # Made by the replica and run by what moves its data: who it is shows when it runs.
            push, moves = number(*arguments), store.beside
            shown = (nth() if push < 0 else push) % every == 0
            turns = inner(*arguments)
            yield from ways[moves](turns, push) if shown else transfers.watch(turns) if moves else turns

        setattr(store, method, call if transfers is None else beside)

    if isinstance(store, WindowStore):
        span("read", "fetch", lambda *arguments: -1, sampling.fetches)
        span("write", "push", lambda g, number, *rest: number, sampling.pushes)
        return
    span("push", "push", lambda *arguments: store.number, sampling.pushes)
    # Where nothing is copied a fetch takes no time.
    if player.steps_locally(player.config):
        span("fetch", "fetch", lambda: -1, sampling.fetches)


def _moved(lane: Lane, words: str, beside: bool) -> Callable[[Turns, int], Turns]:
    """Return what shows a transfer in a lane; its waits with it, where it is made `beside` the replica."""
    name, now, add = lane.name(words, words), lane.now, lane.add

    def way(turns: Turns, number: int) -> Turns:
        begin = now()
        yield from lane.watch(turns) if beside else turns
        add(name, begin, now(), number)

    return way
