"""L-BFGS without vectors (Chen, Wang & Zhou 2014), OWL-QN for L1, and multi-batch L-BFGS.

The two-loop recursion only ever forms linear combinations of the basis s_1 ... s_k, y_1 ... y_k, g, and products of these. So the
coordinator keeps the Gram matrix of the basis and runs the recursion on coefficients; the shards form the combination once. Per
iteration only the products with the new s, y and g are new: one command.

The history is a ring of m + 1 pairs of registers. The spare pair takes s and y of a trial point, so a pair that is turned down
(its curvature s . y is not safely positive, or the trial point is not accepted) has overwritten nothing.
"""

from __future__ import annotations

from collections.abc import Generator
from math import isfinite, sqrt
from typing import ClassVar

import numpy as np
from pydantic import Field

from dbnet.descent import Descent, FullBatch, Memory, Pass, Requests, Smooth, State, evaluate
from dbnet.ranges import Range
from dbnet.space import Align, Combine, Command, Copy, Create, Dot, Gram, Norm1, ProjectOrthant, PseudoGradient, Space, Terms


def direction(gram: np.ndarray) -> np.ndarray:
    """Return the coefficients of -H g in the basis s_1 ... s_k, y_1 ... y_k, g, oldest first, from the basis' Gram matrix."""
    k = len(gram) // 2
    c, alpha = np.zeros(2 * k + 1), np.zeros(k)
    c[-1] = -1.0
    for i in reversed(range(k)):
        alpha[i] = (c @ gram[i]) / gram[i, k + i]
        c[k + i] -= alpha[i]
    if k:
        c *= gram[k - 1, 2 * k - 1] / gram[2 * k - 1, 2 * k - 1]
    for i in range(k):
        c[i] += alpha[i] - (c @ gram[k + i]) / gram[i, k + i]
    return c


class History(Memory):
    """The last pairs s = params - base, y = gradient - previous, and the Gram matrix.

    Parameters
    ----------
    length
        m, the number of pairs.
    curvature
        A pair enters if s . y exceeds this share of |s| |y|.
    gradient
        The register that the direction starts from.
    """

    def __init__(self, state: State, length: int, curvature: float, gradient: str = "gradient") -> None:
        super().__init__(state)
        self.length, self.curvature, self.gradient = length, curvature, gradient
        ring = tuple(f"{letter}_{i}" for i in range(length + 1) for letter in "sy")
        self.registers = (*Memory.registers, *ring)

    @property
    def slots(self) -> list[int]:
        """The ring's places that hold a pair, oldest first."""
        return self.state.memory["slots"]

    @property
    def fresh(self) -> bool:
        return not self.slots

    @property
    def pair(self) -> tuple[str, str]:
        """The spare pair of registers."""
        spare = (self.slots[-1] + 1) % (self.length + 1) if self.slots else 0
        return f"s_{spare}", f"y_{spare}"

    def basis(self) -> list[str]:
        return [f"{letter}_{i}" for letter in "sy" for i in self.slots]

    def forget(self) -> None:
        self.state.memory = {"slots": [], "gram": [[self.state.square]]}
        self.state.step = 0.0

    def survey(self) -> list[Command]:
        new = (*self.pair, self.gradient)
        s = Combine(((1.0, "params"), (-1.0, "base")), new[0])
        y = Combine(((1.0, "gradient"), (-1.0, "previous")), new[1])
        return [s, y, Gram(new, (*self.basis(), *new))]

    def learn(self, products: list[float]) -> None:
        k = len(self.slots)
        new = np.reshape(products, (3, 2 * k + 3))
        # The whole Gram matrix in the order old s, old y, new s, new y, g; what is dropped is dropped by index.
        whole = np.zeros((2 * k + 3, 2 * k + 3))
        whole[: 2 * k, : 2 * k] = np.array(self.state.memory["gram"])[: 2 * k, : 2 * k]
        whole[2 * k :], whole[:, 2 * k :] = new, new.T
        s, y, g = 2 * k, 2 * k + 1, 2 * k + 2
        slots, old = self.slots, list(range(k))
        if whole[s, y] > self.curvature * sqrt(whole[s, s]) * sqrt(whole[y, y]):
            slots = [*slots, int(self.pair[0][2:])][-self.length :]
            old = old[-(self.length - 1) :] if self.length > 1 else []
            order = [*old, s, *(k + i for i in old), y, g]
        else:
            order = [*old, *(k + i for i in old), g]
        self.state.memory = {"slots": slots, "gram": whole[np.ix_(order, order)].tolist()}
        self.state.square = float(whole[g, g])

    def propose(self) -> tuple[Terms, float]:
        if self.fresh:
            return ((-1.0, self.gradient),), 1 / sqrt(self.state.square) if self.state.square else 1.0
        coefficients = direction(np.array(self.state.memory["gram"])).tolist()
        return tuple(zip(coefficients, [*self.basis(), self.gradient], strict=True)), 1.0


class LBFGS(Smooth):
    """L-BFGS.

    Parameters
    ----------
    history
        m, the number of pairs remembered.
    curvature
        A pair enters the history if s . y exceeds this share of |s| |y|.
    """

    kind: ClassVar[str] = "lbfgs"
    history: int = Field(default=10, gt=0)
    curvature: float = Field(default=1e-10, ge=0)

    def memory(self, state: State) -> Memory:
        return History(state, self.history, self.curvature)


class OWLQN(FullBatch):
    """Orthant-wise L-BFGS for loss + strength * |params|_1 (Andrew & Gao 2007).

    The direction starts from the pseudo-gradient and keeps its signs; trial points are projected on the orthant that the
    iteration starts in; the step is halved until the decrease suffices.

    Parameters
    ----------
    strength
        Factor of the L1 norm.
    mask
        A register that is 1 where the penalty acts and 0 where it does not (biases); empty: it acts everywhere.
    history, curvature
        As in LBFGS.
    decrease
        Share of the linearly predicted decrease that a step must reach.
    trials
        Trial points per iteration.
    """

    kind: ClassVar[str] = "owlqn"
    strength: float = Field(gt=0)
    mask: str = ""
    history: int = Field(default=10, gt=0)
    curvature: float = Field(default=1e-10, ge=0)
    decrease: float = Field(default=1e-4, gt=0, lt=1)
    trials: int = Field(default=30, gt=0)

    def steps(self, space: Space, state: State) -> Requests:
        memory = History(state, self.history, self.curvature, gradient="pseudo")
        space.run([Create((*memory.registers, "pseudo", "moved"))])
        pseudo = PseudoGradient(self.strength, self.mask, "pseudo")
        if state.loss is None:
            loss = yield from evaluate(state)
            (state.square,), (norm,) = space.run([pseudo, Dot("pseudo", "pseudo"), Norm1("params", self.mask)])
            state.loss = loss + self.strength * norm
            memory.forget()
        else:
            space.run([*memory.restore, pseudo])
        while not (reason := self.reason(state)):
            step, loss = yield from self._search(space, state, memory)
            if step:
                (products,) = space.run([pseudo, *memory.survey()])
                memory.learn(products)
                state.accept(loss, step, 0.0)
            elif memory.fresh:
                reason = "no decrease along the gradient"
                break
            else:
                memory.forget()
        space.run(memory.commit)
        return reason

    def _search(self, space: Space, state: State, memory: History) -> Generator[Pass, float, tuple[float, float]]:
        """Halve the step until the loss decreases enough; return step and loss, or 0 with params and gradient as before."""
        terms, step = memory.propose()
        start = [*memory.commit, Combine(terms, "direction"), Align("direction", "pseudo", self.mask)]
        for _ in range(self.trials):
            # Where the projection changed the step, the prediction follows the step that was made.
            moved = [
                ProjectOrthant(step, "direction", "pseudo", self.mask),
                Combine(((1.0, "params"), (-1.0, "base")), "moved"),
                Dot("pseudo", "moved"),
                Norm1("params", self.mask),
            ]
            (predicted,), (norm,) = space.run([*start, *moved])
            start = []
            if not predicted < 0:
                break
            loss = (yield from evaluate(state)) + self.strength * norm
            if loss <= state.loss + self.decrease * predicted:
                return step, loss
            step /= 2
        space.run(memory.restore)
        return 0.0, state.loss


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
        Examples shared with the next batch.
    rate, decay
        The step, and after how many iterations it has halved; 0 means it stays.
    history, curvature
        As in LBFGS; noisy pairs need a larger curvature.
    """

    kind: ClassVar[str] = "multibatch_lbfgs"
    batch: int = Field(gt=0)
    overlap: int = Field(gt=0)
    rate: float = Field(default=1.0, gt=0)
    decay: float = Field(default=0.0, ge=0)
    history: int = Field(default=10, gt=0)
    curvature: float = Field(default=1e-4, ge=0)

    def model_post_init(self, context: object) -> None:
        if 2 * self.overlap > self.batch:
            raise ValueError(f"overlap = {self.overlap} must be at most half of batch = {self.batch}")

    def parts(self, iteration: int) -> tuple[Range, Range, Range]:
        """Return the batch of an iteration as positions in the stream: shared with the last, own, shared with the next."""
        period = self.batch - self.overlap
        lo = iteration * period
        return Range(lo, lo + self.overlap), Range(lo + self.overlap, lo + period), Range(lo + period, lo + self.batch)

    def steps(self, space: Space, state: State) -> Requests:
        memory = History(state, self.history, self.curvature, gradient="total")
        space.run([Create((*memory.registers, "total"))])
        if not state.memory:
            memory.forget()
        while state.iteration < self.iterations:
            loss = yield from self._gradient(space, state, memory)
            if not isfinite(loss):
                return "the loss is not finite"
            terms, first = memory.propose()
            step = min(1.0, first) * self.rate / (1 + state.iteration / self.decay if self.decay else 1)
            move = Combine(((1.0, "base"), (step, "direction")), "params")
            space.run([Combine(terms, "direction"), Copy("params", "base"), move])
            state.iteration, state.loss, state.step = state.iteration + 1, loss, step
        return "iterations"

    def _gradient(self, space: Space, state: State, memory: History) -> Generator[Pass, float, float]:
        """Sum the batch's gradient in total, the right part's own in previous; learn the pair. Return the batch's loss."""
        weights = [part.size / self.batch for part in self.parts(state.iteration)]
        *pair, product = memory.survey()
        loss = 0.0
        for i, (part, weight) in enumerate(zip(self.parts(state.iteration), weights, strict=True)):
            if not part.size:
                continue
            loss += weight * (yield from evaluate(state, part))
            add = Combine(((weight, "gradient"), (float(i > 0), "total")), "total")
            if i == 0:
                space.run([*pair, add])
            elif i == 1:
                space.run([add])
        (products,) = space.run([add, Copy("gradient", "previous"), product])
        if state.iteration:
            memory.learn(products)
        else:
            state.square = products[-1]
            memory.forget()
        return loss
