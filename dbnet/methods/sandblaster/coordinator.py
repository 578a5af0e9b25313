"""The coordinator of a batch method: it is the method's problem, makes its passes over the data, and owns no vector.

For each loss and gradient it hands out portions of the batch until all have a result (algorithm 7.2 of Dean et al. 2012,
`work_queue`); the shards add up what the replicas push (`accrual`). The history's state is that of a pass under way, so a
checkpoint is taken while one is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from dbnet.comm.topology import Topology
from dbnet.comm.turns import IDLE, Turns, Wait
from dbnet.comm.window import Field
from dbnet.coordinator.coordinator import Coordinator
from dbnet.coordinator.duty import Facts
from dbnet.coordinator.orders import Status
from dbnet.core.config import Config
from dbnet.core.ranges import Range
from dbnet.data.portions import Blocks
from dbnet.methods.descent.base import NOT_FINITE, Descent, resumed
from dbnet.methods.descent.history import State
from dbnet.methods.descent.problem import Halted
from dbnet.methods.sandblaster.tasks import task_fields
from dbnet.methods.sandblaster.work_queue import WorkQueue
from dbnet.shards.accrual import ShardSpace
from dbnet.shards.space import Command, Copy, Decay, Scale


def batch_method(config: Config) -> Descent:
    """Return the batch method, which makes no more iterations than the run is to have."""
    options, limit = config.method.descent, config.stop.iterations
    return options if limit is None else options.model_copy(update={"iterations": limit})


def closing(config: Config, blocks: Blocks, span: Range) -> list[Command]:
    """Return what makes the gradient of the loss of a pass's bundles; the shards return the decay's part of the loss."""
    minibatch = min(config.method.minibatch, blocks.size, blocks.examples)
    decay = [Decay(config.model.decay, "params", "gradient", "weights")] if config.model.decay else []
    return [Scale("gradient", minibatch / span.size), *decay]


class SandblasterCoordinator(Coordinator):
    """Runs a batch method, as the problem that it minimizes: makes its passes, records its iterates, says when to end."""

    by_pass: ClassVar[bool] = True
    rows: ClassVar[bool] = False

    def __init__(self, facts: Facts, *parts: Any) -> None:
        config = facts.config
        self.options = batch_method(config)
        self.descent = resumed(facts.state, self.options)
        super().__init__(facts, *parts)
        method = config.method
        self.blocks = Blocks(method.portion, facts.examples)
        copies, window = self.replicas.topology.copies, self.replicas.window
        self.queue = WorkQueue(window, copies, method.push_every, method.backups, method.patience, self.time.due)
        self.queue.absent = set(self.duties.membership.spares)
        self._before, self._owed, self._ending, self._iterate = self._counts(), False, False, -1
        self.duties.evaluation.counts(self.descent.examples)

    def messages(self) -> dict[str, Callable[[int, Any], None]]:
        self.space = ShardSpace(self.shards, self._hear, self.facts.config.model.dtype)
        return {"answer": self.space.take}

    @classmethod
    def fields(cls, topology: Topology) -> list[Field]:
        return task_fields(topology.copies)

    @staticmethod
    def made(status: Status, facts: Facts, replica: int) -> int:
        """Return the portions that a replica has computed and not dropped."""
        return int(status["computed"][replica] - status["dropped"][replica])

    def state(self) -> dict[str, Any]:
        return {"descent": self.options.options(), "state": self.descent.saved()}

    def inherit(self, lost: int, heirs: list[int]) -> None:
        """A lost replica's portions go to the others; a spare one joins them."""
        self.queue.absent.add(lost)
        self.queue.absent.difference_update(heirs)
        self.replicas.go(heirs)

    @property
    def judged(self) -> bool:
        return not self._owed and self._iterate == self.descent.iteration

    def evaluation_lost(self) -> None:
        """Params may be a trial point now: it is made up for at the next iterate, or when all is over."""
        if self._ending:
            self.duties.evaluation.ask()
        self._owed = not self._ending

    def run(self) -> Turns:
        self.replicas.go(self.duties.membership.active)
        yield from self.evaluate()
        yield from self.minimize()
        yield from self.dismiss()
        yield from self.finish()

    def _hear(self) -> int:
        self.tick()
        return self.news

    def minimize(self) -> Turns:
        """Run the batch method until it ends, or the run is to stop."""
        try:
            reason = yield from self.options.minimize(self, self.descent)
        except Halted:
            return
        self.duties.progress.say(f"The batch method ended by {reason}.")
        self.duties.guard.stopped = reason == NOT_FINITE

    def loss(self, examples: Range | None = None, iterate: str = "params") -> Turns[float]:
        """Algorithm 7.2, the coordinator: hand out the batch until it is covered; its mean loss."""
        span = examples or Range(0, self.blocks.examples)
        queue, config = self.queue, self.facts.config
        patience, scalars, end = config.method.patience, None, closing(config, self.blocks, span)

        def lost() -> bool:
            queue.hear(self.beats)
            queue.turn()
            return self.ending.halted or queue.lost(patience)

        self._heed_guard()
        while scalars is None:
            yield from self.space.ask(begin=queue.number + 1, iterate=iterate)
            queue.open(queue.number + 1, span, self.blocks.portions(span))
            if self.checkpoint_due:
                self.checkpoint()
            yield from self._hand_out()
            scalars = yield from self.space.ask(end, counts=queue.bundles, give_up=lost)
            if self.ending.halted:
                # What the run leaves behind is the iterate, and no trial point.
                yield from self.space.run([Copy(iterate, "params")])
                raise Halted
            if scalars is None:
                # A replica fell silent with an accepted bundle: once more, with more patience.
                queue.tally.restarts += 1
                patience *= 2
        yield from self._written()
        self.descent.examples += span.size
        self.duties.evaluation.counts(self.descent.examples)
        self._heed_guard()
        return self.duties.guard.loss(queue.number, queue.loss / span.size + sum(scalars))

    def _heed_guard(self) -> None:
        """Go no further when too many passes were refused."""
        if self.duties.guard.stops:
            raise Halted

    def _hand_out(self) -> Turns:
        queue = self.queue
        while not queue.complete and not self.ending.halted:
            self.tick()
            queue.hear(self.beats)
            if queue.turn(() if self.replicas.evaluating is None else (self.replicas.evaluating,)):
                yield None
            elif all(queue.silent(r) for r in range(queue.replicas)):
                yield Wait("the coordinator waits for any replica to compute")
            else:
                yield IDLE

    def _written(self) -> Turns:
        """Wait until a checkpoint is written: the parameters must not change before."""
        heard = -1
        while self.writing:
            self.tick()
            yield None if self.news != heard else Wait("the coordinator waits for the shards to send a checkpoint")
            heard = self.news

    def dismiss(self) -> Turns:
        """Have all replicas end; one may still be evaluating."""
        self._ending = True
        self.replicas.stop(self.duties.guard.stops)
        while not self.all_done:
            heard = self.listen()
            self.queue.turn()
            yield None if heard else Wait("the coordinator waits for the replicas to end")

    def accepted(self, state: State) -> Turns[str]:
        """Record an iterate, have it evaluated if that is due; return why it is the last, or nothing."""
        now = self._counts()
        since = [int(b - a) for a, b in zip(self._before, now, strict=True)]
        self._before = now
        norm = float(np.sqrt(state.square))
        self.duties.progress.iteration(self.time.seconds, state.iteration, state.loss, norm, state.step, *since)
        if self._owed or self.duties.evaluation.due:
            yield from self.evaluate()
        stop = self.facts.config.stop
        if self.ending.reached:
            return "the run's time or accuracy"
        if stop.epochs is not None and state.examples >= stop.epochs * self.blocks.examples:
            return "the run's epochs"
        return ""

    def _counts(self) -> tuple[int, ...]:
        dropped = int(self.status["dropped"].sum())
        return self.descent.passes, self.space.rounds, self.queue.tally.backups, dropped

    def evaluate(self) -> Turns:
        """Have the parameters evaluated; go on when a replica has its copy of them."""
        queue, replicas, evaluation, self._owed = self.queue, self.replicas, self.duties.evaluation, True
        # Since the shards worked on the last step nobody has listened.
        queue.hear(self.beats)
        while self._owed and (living := [r for r in self.duties.membership.active if not queue.silent(r)]):
            self._owed, self._iterate, turn = False, self.descent.iteration, evaluation.turn + 1
            chosen = min(living, key=lambda r: (r - turn) % queue.replicas)
            evaluation.ask(chosen)
            while True:
                heard = self.listen()
                queue.hear(self.beats)
                if replicas.snapshot_taken or queue.silent(chosen):
                    break
                yield None if heard else Wait(f"the coordinator waits for replica {chosen} to fetch what it evaluates")
            if not replicas.snapshot_taken:
                # It would fetch whatever is tried by then.
                replicas.withdraw()
                self._owed = True
