"""Multi-batch L-BFGS (Berahas, Nocedal & Takac 2016): batches smaller than the data set."""

from __future__ import annotations

from math import isfinite
from typing import ClassVar

from pydantic import Field

from dbnet.comm.turns import Turns
from dbnet.core.ranges import Range
from dbnet.methods.descent.base import NOT_FINITE, Descent, evaluate, move
from dbnet.methods.descent.history import History, State
from dbnet.methods.descent.problem import Problem
from dbnet.shards.space import Combine, Copy, Create


class MultiBatch(Descent):
    """L-BFGS on minibatches that overlap (Berahas, Nocedal & Takac 2016).

    Consecutive batches share `overlap` examples. A curvature pair takes both its gradients from the shared examples, so that
    their difference shows curvature and not the change of batch. The step is rate / (1 + iteration / decay), without line search.
    A batch is three passes: the part shared with the last batch, its own part, the part shared with the next one. A batch's loss
    and gradient are no measure of convergence: the method ends after its iterations, or when the caller stops it.

    Parameters
    ----------
    batch
        Examples per batch.
    overlap
        Examples shared with the next batch; 0 stands for a quarter of the batch.
    rate
        The step of the first iteration.
    decay
        After how many iterations the step has halved; 0 means it stays.
    history
        m, the number of pairs remembered.
    curvature
        A pair enters the history if s . y exceeds this share of |s| |y|; noisy pairs need a larger one.
    """

    kind: ClassVar[str] = "multibatch_lbfgs"
    batch: int = Field(gt=1, le=1 << 53)
    overlap: int = Field(default=0, ge=0)
    rate: float = Field(default=1.0, gt=0)
    decay: float = Field(default=0.0, ge=0)
    history: int = Field(default=10, gt=0, le=1000)
    curvature: float = Field(default=1e-4, ge=0)

    def model_post_init(self, context: object) -> None:
        if 2 * self.overlap > self.batch:
            raise ValueError(f"overlap = {self.overlap} must be at most half of batch = {self.batch}")

    @property
    def shared(self) -> int:
        return self.overlap or -(-self.batch // 4)

    def parts(self, iteration: int) -> tuple[Range, Range, Range]:
        """Return the batch of an iteration as positions in the stream: shared with the last, own, shared with the next."""
        period = self.batch - self.shared
        lo = iteration * period
        return Range(lo, lo + self.shared), Range(lo + self.shared, lo + period), Range(lo + period, lo + self.batch)

    def registers(self) -> tuple[str, ...]:
        return (*super().registers(), "total")

    def memory(self, state: State) -> History:
        return History(state, self.history, self.curvature, gradient="total")

    def minimize(self, problem: Problem, state: State) -> Turns[str]:
        space, memory, ending = problem.space, self.memory(state), ""
        yield from space.run([Create(self.registers())])
        if not state.memory:
            memory.forget()
        while not (ending := ending or self.reason(state)):
            loss = yield from self._batch(problem, state, memory)
            if not isfinite(loss):
                return NOT_FINITE
            terms, first = memory.propose()
            step = min(1.0, first) * self.rate / (1 + state.iteration / self.decay if self.decay else 1)
            yield from space.run([Combine(terms, "direction"), Copy("params", "base"), move(step)])
            state.iteration, state.loss, state.step = state.iteration + 1, loss, step
            ending = yield from problem.accepted(state)
        return ending

    def _batch(self, problem: Problem, state: State, memory: History) -> Turns[float]:
        """Sum the batch's gradient in total, the right part's own in previous; learn the pair. Return the batch's loss."""
        space, weights = problem.space, [part.size / self.batch for part in self.parts(state.iteration)]
        *pair, product = memory.survey()
        loss = 0.0
        for i, (part, weight) in enumerate(zip(self.parts(state.iteration), weights, strict=True)):
            if not part.size:
                continue
            loss += weight * (yield from evaluate(problem, state, part))
            add = Combine(((weight, "gradient"), (float(i > 0), "total")), "total")
            if i == 0:
                yield from space.run([*pair, add])
            elif i == 1:
                yield from space.run([add])
        (products,) = yield from space.run([add, Copy("gradient", "previous"), product])
        if state.iteration:
            memory.learn(products)
        else:
            state.square = products[-1]
            memory.forget()
        return loss
