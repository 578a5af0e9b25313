"""What the coordinator tells replicas and what they report, both halves, over the coordinator's window.

Fields: `order[r]` is a level, not a message: replica r reads its row now and then and acts on what it sees; nobody ever addresses a
replica. Its columns: go (2: alone, until the warmstart's steps are made), stop (2: the run is suspect, its gradients are not
finite), number of the evaluation that is wanted, end, lost (given up: leave), how many rows of `share[r]` are valid, steps made
before in its place. `share[r]` lists the ranges of subsets that it is to train on; a row never changes.

`status[r]` is written by replica r alone: how far it is and what it has moved; `cursor[r]` how far it is in each of its shares.
`report[r]` is its last evaluation; its first number, written last, says which one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dbnet.comm.link import Link
from dbnet.comm.topology import Topology
from dbnet.comm.window import Field, Window
from dbnet.core.errors import UserError
from dbnet.data.batches import Cursor
from dbnet.data.subsets import Share
from dbnet.network.replica import Score

GO, STOP, EVALUATE, END, LOST, SHARES, MADE = range(7)
ORDER = 7
STATUS = (
    "heartbeat",
    "done",
    "steps",
    "examples",
    "loss",
    "right",
    "pushes",
    "fetches",
    "bytes_pushed",
    "bytes_fetched",
    "waited",
    "epoch",
    "position",
    "snapshot",
    "computed",
    "dropped",
    "taken",
    "cause",
    "cause_step",
    "cause_example",
    "cause_value",
    "spoiled",
)
_AT = {name: i for i, name in enumerate(STATUS)}
POLL = 0.02


class Status:
    """What all replicas have reported, at one moment: a column by its name is an array [replicas]."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    @classmethod
    def nothing(cls, replicas: int) -> Status:
        """Return the status of replicas that have not reported yet."""
        return cls(np.zeros((replicas, len(STATUS))))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._rows[:, _AT[name]]

    @property
    def beats(self) -> np.ndarray:
        """A number of each replica that changes while it lives."""
        return self["heartbeat"]

    @property
    def steps(self) -> int:
        """Steps of all replicas together."""
        return int(self["steps"].sum())

    def epochs(self, examples: int) -> float:
        """Return the passes over a training set of so many examples, by all replicas together."""
        return float(self["examples"].sum()) / examples


def coordinator_fields(topology: Topology) -> list[Field]:
    """Return the window fields of the coordinator."""
    n = topology.copies
    return [
        Field("order", "int64", (n, ORDER)),
        Field("share", "int64", (n, most_shares(topology), 5)),
        Field("cursor", "int64", (n, most_shares(topology), 2)),
        Field("status", "float64", (n, len(STATUS))),
        Field("report", "float64", (n, 1 + len(Score._fields))),
        Field("reported", "int64", (n,)),
    ]


def most_shares(topology: Topology) -> int:
    """Return how many shares there may be, since one replica may have to take all of them."""
    return 4 + 4 * topology.replicas


class OrderBook:
    """The coordinator's half: writes orders, reads what has been reported."""

    def __init__(self, window: Window, topology: Topology) -> None:
        self.window, self.topology = window, topology
        self._order, self._status = window.local["order"], window.local["status"]
        self._report, self._reported = window.local["report"], window.local["reported"]
        self._share, self._cursor = window.local["share"], window.local["cursor"]
        self._wanted = 0
        self._evaluator: int | None = None

    def go(self, replicas: Sequence[int], alone: bool = False) -> None:
        self._order[list(replicas), GO] = 1 + alone

    def stop(self, suspect: bool = False) -> None:
        """Have all replicas stop; if the run is `suspect`, they say what they find amiss."""
        self._order[:, STOP] = 1 + suspect

    def end(self) -> None:
        self._order[:, END] = 1

    @property
    def ended(self) -> bool:
        return bool(self._order[0, END])

    def done(self, replica: int) -> bool:
        """Return whether a replica has reported that it is done with everything that it was given."""
        status = self._status[replica]
        return bool(status[_AT["done"]]) and status[_AT["taken"]] >= self._order[replica, SHARES]

    def give(self, replica: int, shares: Sequence[Share], made: int = 0) -> None:
        """Give a replica more to train on, and the steps that were made before in its place.

        Raises
        ------
        UserError
            It has got too many already.
        """
        first = int(self._order[replica, SHARES])
        if first + len(shares) > len(self._share[replica]):
            raise UserError("More replicas were lost than the run can take; go on from the newest checkpoint with --resume auto.")
        for i, share in enumerate(shares, start=first):
            self._share[replica, i], self._cursor[replica, i] = share, share[3:]
        self._order[replica, MADE] += made
        # Before the number that makes the rows valid.
        self.window.sync()
        self._order[replica, SHARES] = first + len(shares)

    def resume(self, replica: int, **counters: int) -> None:
        """Set what a replica will report of the time before, should it die before it can."""
        for name, value in counters.items():
            self._status[replica, _AT[name]] = value

    def made(self, replica: int) -> int:
        """Return the steps that were made before in a replica's place."""
        return int(self._order[replica, MADE])

    def shares(self, replica: int) -> list[Share]:
        """Return what a replica trains on, and how far it is."""
        given = int(self._order[replica, SHARES])
        rows = zip(self._share[replica, :given].tolist(), self._cursor[replica, :given].tolist(), strict=True)
        return [Share(*row[:3], *cursor) for row, cursor in rows]

    def give_up(self, replica: int) -> bool:
        """Tell a replica, should it still live, that it is lost; return whether an evaluation is lost with it."""
        self._order[replica, LOST] = 1
        if self._evaluator != replica:
            return False
        self._evaluator = None
        return True

    @property
    def asked(self) -> int:
        """How many evaluations have been asked for."""
        return self._wanted

    @property
    def evaluating(self) -> int | None:
        """The replica that is evaluating, or None."""
        return self._evaluator

    def evaluate(self, replica: int) -> None:
        """Ask one replica for an evaluation; the others go on."""
        self._wanted += 1
        self._evaluator = replica
        # After the last report was read: the next one overwrites it.
        self.window.sync()
        self._order[replica, EVALUATE] = self._wanted

    def withdraw(self) -> None:
        """Wait no longer for the evaluation that was asked for; should it come, it does not count."""
        self._evaluator = None

    @property
    def snapshot_taken(self) -> bool:
        """Whether the replica that evaluates has its own copy of the parameters."""
        return self._evaluator is None or self._status[self._evaluator, _AT["snapshot"]] == self._wanted

    def collect(self) -> Score | None:
        """Return the evaluation that was asked for, once, when it has been reported."""
        if self._evaluator is None:
            return None
        self.window.sync()
        if self._reported[self._evaluator] != self._wanted:
            return None
        # A report may be read only after its number.
        self.window.sync()
        report = self._report[self._evaluator]
        self._evaluator = None
        return Score(*(float(v) for v in report[1:]))

    def status(self) -> Status:
        """Return what every replica has reported by now."""
        self.window.sync()
        return Status(self._status.copy())


class Orders:
    """A replica's half: reads its orders at most every `period` seconds, writes its status as often.

    Of a cut replica partition 0 does so and shares what it read; the status is its own.

    Parameters
    ----------
    window, topology
        The coordinator's window, and who is where.
    replica, clock
        Who this is, and the seconds of the run.
    link
        The replica's other partitions; None where there are none.
    period
        0: at every call, as in one process, where no clock may decide.
    beat
        What else is due whenever the replica gives a sign of life.

    Attributes: `due`, when status and orders are exchanged next.
    """

    def __init__(
        self, window: Window, topology: Topology, replica: int, clock: Callable[[], float], link: Link | None = None,
        period: float = POLL, beat: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.window, self.replica, self.clock, self.link, self.period = window, replica, clock, link, period
        self._most = most_shares(topology)
        self.leads = link is None or link.rank == 0
        self.beat = beat
        self._order = np.zeros(ORDER, np.int64)
        self._cursors = np.zeros((0, 2), np.int64)
        self.status = np.zeros(len(STATUS))
        self._report = np.zeros(1 + len(Score._fields))
        self._reported = np.zeros(1, np.int64)
        self.due = -np.inf

    def note(self, **values: float) -> None:
        """Set numbers of the status; they travel with the next poll."""
        for name, value in values.items():
            self.status[_AT[name]] = value

    def note_cursors(self, cursors: Sequence[Cursor]) -> None:
        """Set how far the replica is in each of its shares."""
        if len(self._cursors) != len(cursors):
            self._cursors = np.zeros((len(cursors), 2), np.int64)
        for i, cursor in enumerate(cursors):
            self._cursors[i] = cursor

    def poll(self, now: bool = False, fill: Callable[[], None] = lambda: None) -> None:
        """Exchange status and orders, if it is time or `now`; `fill` notes what is new. All partitions call this in step."""
        self.beat()
        if self.leads:
            self._exchange(now, fill)
        if self.link is not None:
            self.link.share(self._order)

    def meet(self) -> None:
        """Wait until all partitions of the replica have come here."""
        if self.link is not None:
            self.link.meet()

    def _exchange(self, now: bool, fill: Callable[[], None]) -> None:
        time = self.clock()
        if time < self.due and not now:
            return
        fill()
        self.due = time + self.period
        self.status[0] += 1
        self.window.put(0, "status", self.status, self.replica * len(STATUS))
        if len(self._cursors):
            self.window.put(0, "cursor", self._cursors, self.replica * 2 * self._most)
        self.window.get(0, "order", self._order, self.replica * ORDER)
        self.window.flush(0)

    @property
    def alone(self) -> bool:
        """Whether the replica trains alone, and waits when it has made the warmstart's steps."""
        return bool(self._order[GO] > 1)

    @property
    def stop(self) -> bool:
        return bool(self._order[STOP])

    @property
    def suspect(self) -> bool:
        """Whether the run stops because of gradients that are not finite."""
        return bool(self._order[STOP] > 1)

    @property
    def given(self) -> int:
        """How many shares the replica has been given since the run began."""
        return int(self._order[SHARES])

    @property
    def made(self) -> int:
        """Steps that were made before in the replica's place."""
        return int(self._order[MADE])

    def share(self, number: int) -> Share:
        """Return a share that the replica has been given."""
        row = np.zeros(5, np.int64)
        self.window.get(0, "share", row, (self.replica * self._most + number) * 5)
        self.window.flush(0)
        return Share(*row.tolist())

    @property
    def evaluation_wanted(self) -> bool:
        return bool(self._order[EVALUATE] > self._reported[0])

    def has(self, flag: int) -> bool:
        """Return whether the coordinator has set GO, STOP or END."""
        return bool(self._order[flag])

    def copied(self) -> None:
        """Say that the parameters to evaluate have been fetched, so that they may change."""
        self.meet()
        self.note(snapshot=int(self._order[EVALUATE]))
        self.poll(now=True)

    def report(self, score: Score) -> None:
        """Hand in the evaluation that was asked for."""
        self._report[1:] = score
        # Not the order's number, which may be that of a later one by now.
        self._reported[0] = self.status[_AT["snapshot"]]
        if not self.leads:
            return
        self.window.put(0, "report", self._report, self.replica * self._report.size)
        self.window.flush(0)
        self.window.put(0, "reported", self._reported, self.replica)
        self.window.flush(0)
        self.window.wake(0)
