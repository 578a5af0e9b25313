"""The coordinator of a batch method: it answers the method's questions by passes over the data, and owns no vector.

For each loss and gradient it hands out portions of the batch until all have a result (algorithm 7.2 of Dean et al. 2012, `tasks`);
the shards add up what the replicas push (`accrual`). The history's state is that of a pass under way, so a checkpoint is taken
while one is.
"""

from __future__ import annotations

import numpy as np

from dbnet.comm.turns import IDLE, Turns, Wait
from dbnet.coordinator.coordinator import Coordinator
from dbnet.core.ranges import Range
from dbnet.data.portions import Blocks
from dbnet.methods.descent.base import NOT_FINITE, Pass, Requests, resumed
from dbnet.methods.sandblaster.work_queue import WorkQueue
from dbnet.shards.accrual import ShardSpace
from dbnet.shards.space import Command, Copy, Decay, Scale


class Driver:
    """Runs a batch method: answers its passes, records its iterations, says when to end."""

    def __init__(self, pace: Coordinator) -> None:
        self.pace, table = pace, pace.config.sandblaster
        options, limit = pace.config.batch_method(), pace.config.stop.iterations
        self.options = options if limit is None else options.model_copy(update={"iterations": limit})
        self.state = resumed(pace.resumed, self.options)
        self.space = ShardSpace(pace.shards, pace.channel, self._hear, pace.config.model.dtype)
        self.blocks = Blocks(table.portion, pace.examples)
        self.ledger = WorkQueue(
            pace.desk.window, pace.desk.topology.copies, table.push_every, table.backups, table.patience, pace.due
        )
        self.ledger.absent = set(pace.roll.spares)
        pace.roll.inherit, pace.roll.steps = self.inherit, pace.counted
        self._end = [Decay(pace.config.model.decay, "params", "gradient", "weights")] if pace.config.model.decay else []
        self._before, self._owed = self._counts(), False
        pace.roll.evaluation_lost = self._owe
        pace.handlers["answer"], pace.rows = self.space.take, False
        pace.guard.by_pass()
        pace.state = lambda: {"descent": self.options.options(), "state": self.state.saved()}

    def _hear(self) -> int:
        self.pace.tick()
        return self.pace.news

    def drive(self, run: Requests) -> Turns:
        """Answer the batch method until it ends."""
        answer: float | None = None
        while not self.pace.guard.stops:
            try:
                request = run.send(answer)
            except StopIteration as end:
                self.pace.display.say(f"The batch method ended by {end.value}.")
                self.pace.guard.stopped = end.value == NOT_FINITE
                return
            answer = None
            if isinstance(request, Pass):
                if (answer := (yield from self.sum_up(request))) is None:
                    # What the run leaves behind is the iterate, and no trial point.
                    yield from self.space.run([Copy(request.iterate, "params")])
                    return
            elif isinstance(request, Wait) or request is None:
                yield request
            else:
                yield from self.iteration()

    def sum_up(self, request: Pass) -> Turns:
        """Algorithm 7.2, the coordinator: hand out the batch until it is covered; its mean loss, or None if the run is to stop."""
        span = request.examples or Range(0, self.blocks.examples)
        pace, ledger = self.pace, self.ledger
        patience, scalars = pace.config.sandblaster.patience, None
        minibatch = min(pace.config.method.minibatch, self.blocks.size, self.blocks.examples)
        end: list[Command] = [Scale("gradient", minibatch / span.size), *self._end]

        def lost() -> bool:
            ledger.hear(pace.beats)
            ledger.turn()
            return pace.halted or ledger.lost(patience)

        while scalars is None:
            yield from self.space.ask(begin=ledger.number + 1, iterate=request.iterate)
            ledger.open(ledger.number + 1, span, self.blocks.portions(span))
            if pace.checkpoint_due():
                pace.checkpoint()
            yield from self._hand_out()
            scalars = yield from self.space.ask(end, counts=ledger.bundles, give_up=lost)
            if pace.halted:
                return None  # What is saved while a pass is under way is the state of the last iterate.
            if scalars is None:
                # A replica fell silent with an accepted bundle: once more, with more patience.
                ledger.tally.restarts += 1
                patience *= 2
        yield from self._written()
        self.state.examples += span.size
        return pace.guard.loss(ledger.number, ledger.loss / span.size + sum(scalars))

    def _hand_out(self) -> Turns:
        pace, ledger = self.pace, self.ledger
        while not ledger.complete and not pace.halted:
            pace.tick()
            ledger.hear(pace.beats)
            if ledger.turn(() if pace.desk.evaluating is None else (pace.desk.evaluating,)):
                yield None
            elif all(ledger.silent(r) for r in range(ledger.replicas)):
                yield Wait("the coordinator waits for any replica to compute")
            else:
                yield IDLE

    def _written(self) -> Turns:
        """Wait until a checkpoint is written: the parameters must not change before."""
        heard = -1
        while self.pace.writing:
            self.pace.tick()
            yield None if self.pace.news != heard else Wait("the coordinator waits for the shards to send a checkpoint")
            heard = self.pace.news

    def dismiss(self) -> Turns:
        """Have all replicas end; one may still be evaluating."""
        self.pace.roll.evaluation_lost = self.pace.evaluate
        self.pace.desk.stop(self.pace.guard.stops)
        while not self.pace.all_done:
            heard = self.pace.tick()
            self.ledger.turn()
            yield None if heard else Wait("the coordinator waits for the replicas to end")

    def inherit(self, lost: int, heirs: list[int]) -> None:
        """A lost replica's portions go to the others; a spare one joins them."""
        self.ledger.absent.add(lost)
        self.ledger.absent.difference_update(heirs)
        self.pace.desk.go(heirs)

    def iteration(self) -> Turns:
        """Record an iterate, have it evaluated if that is due, and see whether it is the last."""
        pace, state, now = self.pace, self.state, self._counts()
        since = [int(b - a) for a, b in zip(self._before, now, strict=True)]
        self._before = now
        values = (pace.seconds, state.iteration, state.loss, float(np.sqrt(state.square)), state.step, *since)
        pace.record.iteration(*values)
        pace.display.iteration(values, pace.last_score)
        if self._owed or pace.evaluation_due():
            yield from self.evaluation()
        stop = pace.config.stop
        if pace.reached:
            state.ending = "the run's time or accuracy"
        elif stop.epochs is not None and state.examples >= stop.epochs * self.blocks.examples:
            state.ending = "the run's epochs"

    def _counts(self) -> tuple[int, ...]:
        return self.state.passes, self.space.rounds, self.ledger.tally.backups, self.pace.dropped

    def _owe(self) -> None:
        """An evaluation was lost with its replica: params may be a trial point now, so it is made up for at the next iterate."""
        self._owed = True

    def evaluation(self) -> Turns:
        """Have the parameters evaluated; go on when a replica has its copy of them."""
        pace, ledger, self._owed = self.pace, self.ledger, True
        # Since the shards worked on the last step nobody has listened.
        ledger.hear(pace.beats)
        while self._owed and (living := [r for r in pace.roll.active if not ledger.silent(r)]):
            self._owed, turn = False, pace.turn + 1
            chosen = min(living, key=lambda r: (r - turn) % ledger.replicas)
            pace.evaluate(chosen)
            while True:
                heard = pace.tick()
                ledger.hear(pace.beats)
                if pace.desk.snapshot_taken or ledger.silent(chosen):
                    break
                yield None if heard else Wait(f"the coordinator waits for replica {chosen} to fetch what it evaluates")
            if not pace.desk.snapshot_taken:
                # It would fetch whatever is tried by then.
                pace.desk.withdraw()
                self._owed = True
