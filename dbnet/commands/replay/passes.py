"""A batch method's run as it was recorded: its coordinator's program and its shards again, with one replica.

The method itself runs, on sums that the shards compute anew; of the record come only the bundles of each pass in the order in which
they were accepted, at every shard the order in which their slices were added, and what a clock or a signal decided. Passes that
were begun again left nothing, and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dbnet.comm.turns import Turns, take_turns
from dbnet.commands.replay.bundles import PassTaker
from dbnet.commands.replay.crew import Crew
from dbnet.commands.replay.moment import save
from dbnet.commands.replay.outcome import Compared, Difference, Ended
from dbnet.commands.replay.replica import Pages
from dbnet.commands.replay.shard import Parcel, compare, held
from dbnet.core.ranges import Range
from dbnet.data.portions import Blocks, Portion
from dbnet.methods.descent.base import resumed
from dbnet.methods.descent.history import State
from dbnet.methods.descent.problem import Halted
from dbnet.methods.sandblaster.coordinator import batch_method, closing
from dbnet.methods.sandblaster.recording import marks
from dbnet.run import roles
from dbnet.run.setup import Setup
from dbnet.shards.accrual import Accrual, ShardSpace
from dbnet.shards.push import Push
from dbnet.shards.schedule.log import CHECKPOINT, END, EVALUATE, EVALUATED, HALT, ITERATION, PASS, STOP, LogEntry, PartOfSchedule
from dbnet.shards.shard import Shard
from dbnet.shards.space import Copy


class Answering:
    """All shards as a coordinator asks them: they answer at once."""

    def __init__(self, receivers: Sequence[Accrual], dtype: np.dtype) -> None:
        self._receivers = receivers
        self.space = ShardSpace(self, self._answer, dtype)

    def __len__(self) -> int:
        return len(self._receivers)

    def tell(self, kind: str, question: Any) -> None:
        for receiver in self._receivers:
            receiver.heed(question)

    def _answer(self) -> None:
        for shard, receiver in enumerate(self._receivers):
            while receiver.advance(_Answers(self.space.take, shard)):
                pass


class _Answers(NamedTuple):
    """Where a shard sends its answer."""

    take: Callable[[int, Any], None]
    shard: int

    def send(self, rank: int, kind: str, content: Any) -> None:
        self.take(self.shard, content)


class ReplayedPasses:
    """The world of a batch method's replay: what its roles ask for, and the problem that the method minimizes.

    Parameters
    ----------
    ready, parts
        The run; what each rank has recorded.
    whole
        Whether a bundle came to its shard as one slice.
    compared
        Counts what is compared.
    until
        The iteration to stop after; None: the record's end.

    Attributes
    ----------
    ended
        Whether the record reaches to the end of the run.
    state, made
        Where the method is; of each replica pushes, minibatches and examples that were accepted.
    """

    def __init__(
        self, ready: Setup, parts: dict[int, PartOfSchedule], whole: bool, compared: Compared, until: int | None = None
    ) -> None:
        self._ready, self.parts, self._compared, self._until, self.topology = ready, parts, compared, until, ready.topology
        self.gradient, self.ended, world, facts = None, False, ready.topology, ready.beginning()
        self.clock: Callable[[], float] = lambda: 0.0
        self.flat = np.zeros(ready.model.layout.size, ready.model.dtype)
        self._clocks = np.zeros((world.shards, world.partitions), np.int64)
        self.options = batch_method(ready.config)
        self.state, self.blocks = resumed(facts.state, self.options), Blocks(ready.config.method.portion, facts.examples)
        self.made = np.zeros((world.copies, 3), np.int64)
        self._scores, entries = _scores(parts[0].entries)
        self._pages, self._evaluated = Pages(entries, "the coordinator"), 0
        longest = None if whole else ready.rings.elements
        self.receivers = [roles.receiver(ready, self, shard) for shard in range(world.shards)]
        takers = [(parts[world.shard_rank(shard)], ready, shard, taker) for shard, taker in enumerate(self.receivers)]
        self._takers = [PassTaker(*mine, compared, longest) for mine in takers]
        self.space = Answering(self.receivers, ready.model.dtype).space

    def memory(self, shard: int) -> tuple[np.ndarray, np.ndarray, None]:
        return self.flat[self._ready.ranges[shard].slice], self._clocks[shard], None

    def counting(self, shard: int, *parts: Any) -> Shard:
        return Shard(*parts)

    def play(self) -> None:
        """Play the run; raise Difference where something is not as recorded."""
        self._crew = Crew(self._ready, self.flat)
        try:
            take_turns([self._run(), *self._crew.hands()])
        finally:
            self._crew.leave()

    def _run(self) -> Turns:
        with suppress(Ended):
            yield from self._program()
        self._crew.leave()

    def _program(self) -> Turns:
        """What the coordinator did, in order."""
        yield from self._look_on(EVALUATE)
        with suppress(Halted):
            yield from self.options.minimize(self, self.state)
        if self._until is not None:
            return
        yield from self._look_on(EVALUATE, CHECKPOINT)
        self._pages.next(END)
        for taker in self._takers:
            if taker.end is None:
                raise Ended
            compare(self._compared, taker.index, "the end", taker.end, held(taker.receiver))
        self.ended = True

    def save(self, until: str, seconds: float) -> Path:
        """Write a checkpoint of where the method has stopped; return its path."""
        ready, point = self._ready, self._ready.checkpoint
        before = [0 if point is None else point.replica(r, self.topology.replicas) for r in range(self.topology.replicas)]
        reached = []
        for replica, row in enumerate(before):
            more = self.made[replica] + (row if point is None else [row[name] for name in ("pushes", "steps", "examples")])
            cursors = [share[3:] for share in ready.beginning().subsets[replica]]
            reached.append((int(more[0]) - 1, int(more[1]), int(more[2]), cursors))
        method = {"descent": self.options.options(), "state": self.state.saved()}
        return save(ready, until, self.receivers, reached, seconds, method)

    # --- the problem ----------------------------------------------------------------------------------------------------------

    def loss(self, examples: Range | None = None, iterate: str = "params") -> Turns[float]:
        span = examples or Range(0, self.blocks.examples)
        while (entry := self._pages.peek()).kind in (CHECKPOINT, HALT):
            number = entry.value[1] if entry.kind == CHECKPOINT else entry.value
            if number:
                yield from self.space.ask(begin=number, iterate=iterate)
            self._pages.next(entry.kind)
            if entry.kind == CHECKPOINT:
                # One at a time: where a pass was begun again the next one is of another number.
                self._checkpoint(*entry.value)
                continue
            if number:
                yield from self.space.run([Copy(iterate, "params")])
            raise Halted
        number, bundles = self._pages.next(PASS).value
        for taker in self._takers:
            taker.open(number)
        yield from self.space.ask(begin=number, iterate=iterate)
        loss = yield from self._bundles(number, bundles, self.blocks.portions(span))
        counts = np.bincount([replica for replica, *_ in bundles], minlength=self.topology.copies)
        scalars = yield from self.space.ask(closing(self._ready.config, self.blocks, span), counts=counts.tolist())
        self.state.examples += span.size
        refused = [refusal for receiver in self.receivers for refusal in receiver.take_refused()]
        loss = loss / span.size + sum(scalars)
        return np.inf if refused or not np.isfinite(loss) else loss

    def _bundles(self, number: int, bundles: Sequence[Any], portions: Sequence[Portion]) -> Turns[float]:
        """Compute the bundles of a pass and have the shards take them; return the sum of their losses."""
        covered = sorted(portion for _, _, mine in bundles for portion in mine)
        if covered != list(range(len(portions))):
            wrong = next(p for p in (*covered, *range(len(portions))) if covered.count(p) != 1 or p >= len(portions))
            raise Difference(
                f"pass {number}, portion {wrong}: it is in {covered.count(wrong)} accepted bundles of {len(portions)} portions"
            )
        self._crew.fetch()
        total, partitions = 0.0, self.topology.partitions
        for replica, recorded, mine in bundles:
            about = f"portion{'s' * (len(mine) > 1)} {', '.join(map(str, mine))}"
            loss, gradients = yield from self._crew.bundle([portions[p] for p in mine])
            if self._compared.exact and not _same(loss, recorded):
                raise Difference(f"pass {number}, replica {replica}, {about}: the loss is {loss!r}, recorded was {recorded!r}")
            total += loss
            for partition, g in enumerate(gradients):
                push = Push(replica, partition, int(self.made[replica, 0]), number, len(mine), 0)
                for taker in self._takers:
                    taker.give(Parcel(push, g, about=about), replica * partitions + partition)
            sizes = [portions[p].hi - portions[p].lo for p in mine]
            batch = self._ready.config.method.worker.batch(self._ready.config, self.blocks.examples)
            self.made[replica] += (1, sum(-(-size // batch) for size in sizes), sum(sizes))
        for taker in self._takers:
            taker.shut()
        return total

    def accepted(self, state: State) -> Turns[str]:
        recorded, found = self._pages.next(ITERATION).array("<f8"), marks(state)
        if self._compared.exact and recorded.tobytes() != found.tobytes():
            names = zip(("iteration", "loss", "norm of the gradient", "step"), found.tolist(), recorded.tolist(), strict=True)
            name, now, before = next(each for each in names if not _same(*each[1:]))
            raise Difference(f"iteration {state.iteration}: its {name} is {now!r}, recorded was {before!r}")
        self._compared.updates += 1
        yield from self._look_on(EVALUATE)
        if self._until == state.iteration:
            return "the moment that is wanted"
        return self._pages.next(STOP).value if self._pages.peek().kind == STOP else ""

    def _look_on(self, *kinds: int) -> Turns:
        """Make the evaluations that were asked for here, and compare what checkpoints hold that were begun here."""
        while (entry := self._pages.peek()).kind in kinds:
            self._pages.next(entry.kind)
            if entry.kind == EVALUATE:
                yield from self._evaluate(f"replica {entry.value}")
            else:
                self._checkpoint(*entry.value)

    def _evaluate(self, who: str) -> Turns:
        recorded, self._evaluated = self._scores[self._evaluated], self._evaluated + 1
        if recorded is None:
            return
        self._crew.fetch()
        found = np.array((yield from self._crew.evaluate()), "<f8")
        if self._compared.exact and recorded.tobytes() != found.tobytes():
            raise Difference(f"{who}: an evaluation gives {found.tolist()}, recorded was {recorded.tolist()}")
        self._compared.scores.append((who, recorded.tolist(), found.tolist()))

    def _checkpoint(self, name: str, number: int) -> None:
        for taker in self._takers:
            recorded, found = taker.saved.get(name), held(taker.receiver)
            if recorded is None:
                continue
            if all(clock > number and clock in taker.passes for clock in recorded["clock"]):
                # The pass was begun again while it was written.
                found["clock"] = recorded["clock"]
            compare(self._compared, taker.index, f"checkpoint {name}", recorded, found)
            self._compared.part(name)


def _scores(entries: Sequence[LogEntry]) -> tuple[list[np.ndarray | None], list[LogEntry]]:
    """Return what came of each evaluation that was asked for, if anything did, and the entries without that."""
    scores, others = [], []
    for entry in entries:
        if entry.kind == EVALUATED:
            scores[-1] = entry.array("<f8")
            continue
        others.append(entry)
        if entry.kind == EVALUATE:
            scores.append(None)
    return scores, others


def _same(a: float, b: float) -> bool:
    """Return whether two numbers have the same bits."""
    return np.float64(a).tobytes() == np.float64(b).tobytes()
