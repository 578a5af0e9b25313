"""The window in simulated time: what is put changes its target's memory when it arrives, what is got is read there at that moment.

Transfers of one origin to one target between two flushes travel together: a request with what is put, an answer with what is got.
They leave at the first flush, to all targets at once, and it waits for all of them: nothing lies between the flushes of a fetch. It
waits no longer than until all is read that was to be got, and it is known when all transfers end: its rank goes on at that time
(`VirtualTime.ahead`). Most of what is under way needs no turn of its own: a look at a few words is made before their rank changes
them (`rest.Glances`), and answers to one that nobody else sends anything come in one after the other (`Interconnect.enter`).
Headers and slices lie in the memory of their target at once: nobody looks at them before the counter that is put after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from dbnet.comm.simulated.interconnect import PACKET, Hop, Interconnect
from dbnet.comm.simulated.memory import SimulatedMemory
from dbnet.comm.simulated.player import Player
from dbnet.comm.simulated.rest import Looks
from dbnet.comm.window import Get, Post, Window

_REQUEST = 32  # bytes that say what is wanted
# What an operation does at its target.
_GET, _GET_ONE, _PUT, _PUT_ONE = range(4)


class SimulatedWindow(Window):
    """One rank's end of the window.

    Attributes
    ----------
    lends
        Whether slices that are put into rings do not change any more, so that they need not be copied.
    """

    lends = False

    def __init__(self, memory: SimulatedMemory, wire: Interconnect, rank: int) -> None:
        self._memory, self._wire, self._time, self._rank = memory, wire, wire.time, rank
        self._flat, self._hollow = memory.flat, memory.hollow
        self.local = memory.local[rank]
        # For each target: the way to it; operations, bytes there and back, what is to be done there, and how much of it reads.
        self._ways: dict[int, Hop] = {}
        self._started: dict[int, list] = {}
        # Of what is under way: answers without a time, looks that are to be made; when the last answer is here; who waits for it;
        # answers that have left (`Interconnect.enter`).
        self._open = self._unread = 0
        self._latest = 0.0
        self._waiting: Player | None = None
        self._answers: list[tuple[float, int, int, float]] = []

    def get(self, rank: int, field: str, out: np.ndarray, start: int = 0) -> None:
        entry = self._started.get(rank)
        if entry is None:
            entry = self._started[rank] = [0, _REQUEST, _REQUEST, [], 0]
        entry[0] += 1
        entry[2] += out.nbytes
        if field not in self._hollow:
            entry[4] += 1
            entry[3].append((_GET_ONE if out.shape == (1,) else _GET, self._flat[rank][field], start, out))

    def put(self, rank: int, field: str, data: np.ndarray, start: int = 0) -> None:
        entry = self._started.get(rank)
        if entry is None:
            entry = self._started[rank] = [0, _REQUEST, _REQUEST, [], 0]
        entry[0] += 1
        entry[1] += data.nbytes
        if field in self._hollow:
            return
        place = self._flat[rank][field]
        if data.size == 1:
            entry[3].append((_PUT_ONE, place, start, data.item()))
        else:
            entry[3].append((_PUT, place, start, data.flatten()))

    def posting(self, rank: int, header: tuple[str, np.ndarray], ring: str, counter: tuple[str, np.ndarray, int]) -> Post:
        wire, time, me, fields, hollow = self._wire, self._time, self._rank, self._flat[rank], ring in self._hollow
        # Quicker than arrays, for a few words.
        headers, words, number = map(memoryview, (fields[header[0]], header[1], counter[1]))
        slices, count, at = fields[ring], fields[counter[0]], counter[2]
        (latency, bandwidth, most), crowded = wire.hop(me, rank), wire.crowded[me]
        between, asks, answers = most == PACKET, (_REQUEST + number.nbytes) / bandwidth, _REQUEST / bandwidth

        def post(start: int, data: np.ndarray, place: int) -> None:
            headers[start : start + len(words)] = words
            if not hollow:
                slices.put(place, data if self.lends else data.copy())
            there = words.nbytes + data.nbytes
            overhead = self._crowded([(rank, there)], 2) if crowded else wire.overhead
            player, there, begin = time.player, there + _REQUEST, time.now + overhead * 2
            player.looks = None
            wire.operations += 2
            if between:
                wire.sent += _REQUEST if there > most else there + _REQUEST
            if there > most:
                wire.queue(me, rank, there, begin, self._lands, player)
                time.switch()
                time.ahead(self._latest + latency + answers)
            else:
                time.ahead(begin + latency + there / bandwidth + latency + answers)
            number[0] += 1
            overhead = self._crowded([(rank, number.nbytes)], 1) if crowded else wire.overhead
            wire.operations += 1
            if between:
                wire.sent += 2 * _REQUEST + number.nbytes
            came = time.now + overhead + latency + asks
            time.at(came, me, self._counts, rank, count, at, number[0])
            time.ahead(came + latency + answers)

        return post

    def flush(self, rank: int) -> None:
        if self._started:
            started, self._started = self._started, {}
            self._move(self._transfers(started))

    def getting(self, gets: Sequence[Get]) -> Callable[[], None]:
        for get in gets:
            self.get(*get)
        started, self._started = self._started, {}
        return partial(self._move, self._transfers(started))

    def _transfers(self, started: dict[int, list]) -> list[tuple]:
        """Return for each target what is to be moved, done there and waited for, as `_move` takes it."""
        wire, out = self._wire, []
        for target, (count, there, back, todo, reads) in started.items():
            way = self._ways.get(target)
            if way is None:
                way = self._ways[target] = wire.hop(self._rank, target)
            latency, bandwidth, most = way
            sent = 0 if most != PACKET or there > most else there
            if back <= most == PACKET and there <= most:
                sent += back
            out.append((target, count, there, back, todo, reads, latency, there / bandwidth, back / bandwidth, most, sent))
        return out

    def _move(self, transfers: Sequence[tuple]) -> None:
        """Start these transfers, and wait until they are known to end."""
        wire, time, me = self._wire, self._time, self._rank
        player, overhead, glances = time.player, wire.overhead, time.glances if time.rests and not time.cores else None
        if wire.crowded[me]:
            overhead = self._crowded([(t[0], t[2] + t[3] - 2 * _REQUEST) for t in transfers], sum(t[1] for t in transfers))
        if player.looks is not None and not self._looks(player.looks, transfers):
            player.looks = None
        begin = latest = last = time.now
        looked = False
        for target, count, there, back, todo, reads, latency, asks, answers, most, sent in transfers:
            wire.operations += count
            begin += overhead * count
            if there > most:
                self._open += 1
                wire.queue(me, target, there, begin, self._arrives, target, todo, reads, back)
                continue
            wire.sent += sent
            at = begin + latency + asks
            if back > most:
                self._open += 1
                if todo:
                    time.at(at, me, self._reach, target, todo, back)
                else:
                    time.at(at, me, self._answer, target, back)
                continue
            end = at + latency + answers
            if end > latest:
                latest = end
            if glances is not None and reads == len(todo):
                # Nobody but its target can change what is looked at: it is read before that goes on, or with the last look.
                glances[target][self] = at, me, _read, todo
                looked = True
                if at > last:
                    last = at
            elif todo:
                self._unread += reads > 0
                time.at(at, me, self._reach, target, todo, -(reads > 0))
        self._latest = latest
        if looked:
            self._unread += 1
            time.at(last, me, self._glance, transfers)
        if self._open or self._unread:
            # The last thing to become known lets it go on.
            self._waiting = player
            time.switch()
        time.ahead(self._latest)

    def _crowded(self, moved: list[tuple[int, int]], operations: int) -> float:
        """What waits for cards, or for cores, does so in the order of its time; return what is left of an operation's overhead."""
        wire, time, me = self._wire, self._time, self._rank
        time.sync()
        if me not in time.cores:
            return wire.overhead
        wire.copy(me, moved, operations)
        return 0.0

    def _looks(self, looks: Looks, transfers: Sequence[tuple]) -> bool:
        """Note what is only looked at; return whether that is all, and waits for no card."""
        for i, (target, count, there, back, todo, _, latency, asks, answers, most, _) in enumerate(transfers):
            if max(there, back) > most or any(what > _GET_ONE for what, *_ in todo):
                return False
            if not looks.add(i == 0, (self._wire.overhead * count, latency, asks, answers), target, todo):
                return False
        return True

    def _arrives(self, at: float, target: int, todo: list, reads: int, back: int) -> None:
        """It is known when a request arrives that has waited for cards."""
        latency, bandwidth, most = self._ways[target]
        if back > most:
            # The answer waits for cards, in the order of arrivals.
            self._time.at(at, self._rank, self._reach, target, todo, back)
            return
        if todo:
            self._unread += reads > 0
            self._time.at(at, self._rank, self._reach, target, todo, -(reads > 0))
        self._wire.sent += back if most == PACKET else 0
        self._end(at + latency + back / bandwidth)

    def _lands(self, at: float, player: Player) -> None:
        """It is known when a slice arrives, of which nothing but an answer comes back."""
        self._latest = at
        player.go()

    def _glance(self, transfers: Sequence[tuple]) -> None:
        """The last look at what these targets hold: what has not been read yet has not changed."""
        glances = self._time.glances
        for target, *_ in transfers:
            found = glances[target].pop(self, None)
            if found is not None:
                _read(found[3])
        self._unread -= 1
        if not self._open and not self._unread:
            self._go_on()

    def _reach(self, target: int, todo: list, back: int) -> None:
        """At the target: what is put is there, what is got is read; `back` bytes are to be sent; -1: nothing else was unknown."""
        time, changed, watched = self._time, False, False
        for what, place, start, value in todo:
            if what <= _GET_ONE:
                _read(((what, place, start, value),))
            else:
                changed = True
                time.glances[target].before(time.now, self._rank)
                watched = watched or (target in time.watches and id(place) in time.watches[target].fields)
                if what == _PUT:
                    place[start : start + value.size] = value
                else:
                    place[start] = value
        if changed:
            time.notify(target, self._rank)
        if watched:
            time.watches[target].check(time.now, self._rank)
        if back > 0:
            self._answer(target, back)
        elif back:
            self._unread -= 1
            if not self._open and not self._unread:
                self._go_on()

    def _counts(self, target: int, place: np.ndarray, start: int, value: int) -> None:
        """At the target: a counter says that a slice lies in its ring."""
        place[start] = value
        self._memory.counted[target].add(start)
        self._time.notify(target, self._rank)

    def _answer(self, target: int, nbytes: int) -> None:
        """Have an answer sent that waits for cards."""
        wire = self._wire
        if self._rank in wire.visited or not self._time.rests:
            wire.queue(target, self._rank, nbytes, self._time.now, self._end)
            return
        # Nothing else comes in here: what is under way needs no turn of its own.
        self._answers.append(wire.leave(target, nbytes, self._time.now))
        self._open -= 1
        if not self._open and not self._unread:
            self._go_on()

    def _end(self, end: float) -> None:
        """It is known when an answer is here."""
        if end > self._latest:
            self._latest = end
        self._open -= 1
        if not self._open and not self._unread:
            self._go_on()

    def _go_on(self) -> None:
        """Nothing is unknown any more."""
        if self._answers:
            self._latest = max(self._latest, self._wire.enter(self._rank, self._answers))
            self._answers = []
        player, self._waiting = self._waiting, None
        player.go()

    def wake(self, rank: int) -> None:
        """What arrives wakes its target here."""

    def sync(self) -> None:
        """There is one memory, and everything has its moment."""

    def blocked(self) -> None:
        """No call ever waits for a real rank."""

    def free(self) -> None:
        self.local = {}


def _read(todo: Sequence[tuple]) -> None:
    """Read what is got."""
    for what, place, start, out in todo:
        if what == _GET_ONE:
            out[0] = place[start]
        else:
            out.reshape(-1)[:] = place[start : start + out.size]
