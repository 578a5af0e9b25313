"""Batch methods against SciPy, scikit-learn and textbook formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import adult
import numpy as np
import pytest
from pydantic import ValidationError
from scipy import optimize, sparse
from split_space import SplitSpace

from dbnet.comm.turns import Turns, result
from dbnet.core.ranges import Range
from dbnet.core.registry import family
from dbnet.methods.descent.base import Descent, solve
from dbnet.methods.descent.conjugate import ConjugateGradient, GradientDescent
from dbnet.methods.descent.history import State, direction
from dbnet.methods.descent.lbfgs import LBFGS
from dbnet.methods.descent.linesearch import Point, Wolfe, strong_wolfe
from dbnet.methods.descent.multibatch import MultiBatch
from dbnet.methods.descent.owlqn import OWLQN
from dbnet.methods.descent.problem import Halted, LocalProblem
from dbnet.shards.space import LocalSpace

Loss = Callable[[np.ndarray], tuple[float, np.ndarray]]


# --- losses -------------------------------------------------------------------------------------------------------------------


def rosenbrock(x: np.ndarray) -> tuple[float, np.ndarray]:
    return optimize.rosen(x), optimize.rosen_der(x)


def quadratic(n: int = 50, condition: float = 1e3) -> Loss:
    rng = np.random.default_rng(3)
    q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    a, b = (q * np.geomspace(1, condition, n)) @ q.T, rng.standard_normal(n)
    return lambda x: (float(x @ a @ x / 2 - b @ x), a @ x - b)


class Logistic:
    """Mean logistic loss + decay / 2 |x|^2 over rows of examples, labels -1 and 1."""

    def __init__(self, rows: object, labels: np.ndarray, decay: float) -> None:
        self.rows, self.labels, self.decay = rows, labels, decay

    def __call__(self, x: np.ndarray, examples: Range | None = None) -> tuple[float, np.ndarray]:
        rows, labels = self.rows, self.labels
        if examples is not None:
            chosen = np.arange(examples.lo, examples.hi) % len(labels)
            rows, labels = rows[chosen], labels[chosen]
        margin = labels * (rows @ x)
        loss = np.logaddexp(0, -margin).mean() + self.decay / 2 * (x @ x)
        pull = -labels / (1 + np.exp(margin)) / len(labels)
        return float(loss), rows.T @ pull + self.decay * x


def synthetic(n: int = 400, d: int = 20, decay: float = 1e-2) -> Logistic:
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((n, d)) * np.geomspace(1, 0.1, d)
    labels = np.where(rows @ rng.standard_normal(d) * 3 + rng.standard_normal(n) > 0, 1.0, -1.0)
    return Logistic(rows, labels, decay)


@lru_cache
def sparse_binary() -> Logistic:
    labels, rows, columns, values = [], [], [], []
    with TemporaryDirectory() as folder, open(adult.write(Path(folder) / "adult")) as file:
        for i, line in enumerate(file):
            label, *pairs = line.split()
            labels.append(float(label))
            for index, value in (pair.split(":") for pair in pairs):
                rows.append(i)
                columns.append(int(index) - 1)
                values.append(float(value))
    return Logistic(sparse.csr_matrix((values, (rows, columns)), shape=(len(labels), 123)), np.array(labels), 1e-4)


PROBLEMS: dict[str, tuple[Callable[[], Loss], np.ndarray]] = {
    "rosenbrock": (lambda: rosenbrock, np.array([-1.2, 1.0, -0.5, 0.8, 1.5, -1.0])),
    "quadratic": (quadratic, np.zeros(50)),
    "logistic": (synthetic, np.zeros(20)),
    "adult": (sparse_binary, np.zeros(123)),
}


# --- drivers ------------------------------------------------------------------------------------------------------------------


def objective(f: Loss) -> Callable[[np.ndarray, np.ndarray, Range | None], float]:
    def evaluate(params: np.ndarray, gradient: np.ndarray, examples: Range | None) -> float:
        loss, g = f(params.astype("f8")) if examples is None else f(params.astype("f8"), examples)
        gradient[:] = g
        return loss

    return evaluate


def local(x0: np.ndarray, dtype: str = "float64") -> LocalSpace:
    return LocalSpace({"params": x0.astype(dtype), "gradient": np.zeros(x0.size, dtype)})


def scipy_optimum(f: Loss, x0: np.ndarray) -> float:
    options = {"maxiter": 20000, "maxfun": 40000, "ftol": 1e-15, "gtol": 1e-10}
    return optimize.minimize(f, x0, jac=True, method="L-BFGS-B", options=options).fun


TIGHT = {"loss_change": 1e-15, "gradient_norm": 1e-7}
SMOOTH = {
    "lbfgs": LBFGS(iterations=500, **TIGHT),
    "conjugate_gradient": ConjugateGradient(iterations=3000, **TIGHT),
    "gradient_descent": GradientDescent(iterations=10000, **TIGHT),
}
SMALL = LBFGS(iterations=25, history=4, **TIGHT)
ALL: dict[str, Descent] = {
    "lbfgs": SMALL,
    "conjugate_gradient": ConjugateGradient(iterations=25, **TIGHT),
    "gradient_descent": GradientDescent(iterations=25, **TIGHT),
    "owlqn": OWLQN(iterations=25, history=4, strength=0.01, **TIGHT),
    "multibatch_lbfgs": MultiBatch(iterations=25, history=4, batch=50, overlap=20, rate=0.5),
}


# --- the direction ------------------------------------------------------------------------------------------------------------


def two_loop(s: np.ndarray, y: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Return -H g by the two-loop recursion (Nocedal & Wright, algorithm 7.4)."""
    q, alpha = g.copy(), np.zeros(len(s))
    for i in reversed(range(len(s))):
        alpha[i] = (s[i] @ q) / (s[i] @ y[i])
        q -= alpha[i] * y[i]
    if len(s):
        q *= (s[-1] @ y[-1]) / (y[-1] @ y[-1])
    for i in range(len(s)):
        q += s[i] * (alpha[i] - (y[i] @ q) / (s[i] @ y[i]))
    return -q


@pytest.mark.parametrize("k", [0, 1, 2, 5, 10])
@pytest.mark.parametrize("seed", range(4))
def test_vector_free_direction_is_the_two_loop_recursion(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    s, g = rng.standard_normal((k, 60)), rng.standard_normal(60)
    y = s * np.geomspace(0.1, 10, 60)
    basis = np.vstack([s, y, g])
    expected = two_loop(s, y, g)
    np.testing.assert_allclose(direction(basis @ basis.T) @ basis, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_direction_on_registers_is_the_two_loop_recursion_of_the_path() -> None:
    f, x0 = quadratic(), np.zeros(50)
    space, state, path = local(x0), State(), []
    r = space.registers

    def follow(params: np.ndarray, gradient: np.ndarray, examples: Range | None) -> float:
        if state.loss is not None:
            if not path or not np.array_equal(path[-1][0], r["base"]):
                path.append((r["base"].copy(), r["previous"].copy()))
            s, y = (np.diff([p[i] for p in path[-5:]], axis=0).reshape(-1, 50) for i in (0, 1))
            np.testing.assert_allclose(r["direction"], two_loop(s, y, path[-1][1]), rtol=0, atol=1e-10)
        return objective(f)(params, gradient, examples)

    solve(space, follow, SMALL, state)
    # The ring of five pairs was filled and overwritten several times.
    assert state.iteration == 25 and len(path) == 25 and len(state.memory["slots"]) == 4


# --- the line search ----------------------------------------------------------------------------------------------------------

LINES = {
    "quadratic": lambda a: ((a - 3) ** 2, 2 * (a - 3)),
    "far": lambda a: ((a / 500 - 1) ** 2, 2 * (a / 500 - 1) / 500),
    "near": lambda a: ((1000 * a - 1) ** 2, 2000 * (1000 * a - 1)),
    "wavy": lambda a: (-a / (1 + a * a / 9) + 0.1 * np.sin(5 * a), -(1 - a * a / 9) / (1 + a * a / 9) ** 2 + 0.5 * np.cos(5 * a)),
    "walled": lambda a: (-np.log(0.7 - a) - 3 * a if a < 0.7 else np.nan, 1 / (0.7 - a) - 3),
    "exploding": lambda a: (np.exp(min(a, 700.0) * 20) - 60 * a, 20 * np.exp(min(a, 700.0) * 20) - 60),
}


def search(name: str, wolfe: Wolfe, step: float) -> tuple[Point | None, list[float]]:
    phi, steps = LINES[name], []

    def loss(step: float) -> Turns[float]:
        steps.append(step)
        yield None
        return float(phi(step)[0])

    def slope() -> Turns[float]:
        yield None
        return float(phi(steps[-1])[1])

    return result(strong_wolfe(wolfe, Point(0.0, *map(float, phi(0.0))), step, loss, slope)), steps


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("curvature", [0.9, 0.1, 1e-3])
@pytest.mark.parametrize("step", [1e-3, 1.0, 30.0])
def test_strong_wolfe_conditions_hold(name: str, curvature: float, step: float) -> None:
    phi, wolfe = LINES[name], Wolfe(curvature=curvature, trials=40)
    point, steps = search(name, wolfe, step)
    assert point.step == steps[-1] and (point.loss, point.slope) == phi(point.step)
    assert point.loss <= phi(0.0)[0] + wolfe.decrease * point.step * phi(0.0)[1]
    assert abs(point.slope) <= curvature * abs(phi(0.0)[1])
    assert len(steps) <= 25


def test_exhausted_search_returns_to_the_best_step() -> None:
    point, steps = search("far", Wolfe(trials=3, curvature=1e-6), 1.0)
    assert point.step == steps[-1] == max(steps) and len(steps) == 4
    point, steps = search("near", Wolfe(trials=1), 1.0)
    assert point is None and steps == [1.0]


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("problem", ["rosenbrock", "logistic"])
def test_accepted_steps_satisfy_strong_wolfe(kind: str, problem: str) -> None:
    make, x0 = PROBLEMS[problem]
    f, options = make(), ALL[kind]
    space, state, origins = local(x0), State(), []

    def watch(params: np.ndarray, gradient: np.ndarray, examples: Range | None) -> float:
        if state.loss is not None and len(origins) == state.iteration:
            origins.append((space.registers["base"].copy(), space.registers["direction"].copy()))
        return objective(f)(params, gradient, examples)

    solve(space, watch, options, state)
    assert len(origins) == state.iteration > 10
    ends = [base for base, _ in origins[1:]] + [space.registers["params"]]
    for (base, d), end in zip(origins, ends, strict=True):
        step = (end - base) @ d / (d @ d)
        (loss0, g0), (loss, g) = f(base), f(end)
        np.testing.assert_allclose(end, base + step * d, atol=1e-9)
        assert g0 @ d < 0
        assert loss <= loss0 + options.line.decrease * step * (g0 @ d) + 1e-12
        assert abs(g @ d) <= options.line.curvature * abs(g0 @ d) * (1 + 1e-6)


def test_noise_lets_the_search_end_where_losses_are_rounded() -> None:
    def rounded(x: np.ndarray) -> tuple[float, np.ndarray]:
        loss, g = quadratic()(x)
        return float(np.float32(loss + 1000)), g

    reached = []
    for noise in (0.0, 1e-7):
        space, state = local(np.zeros(50)), State()
        solve(space, objective(rounded), LBFGS(iterations=400, line=Wolfe(noise=noise), gradient_norm=1e-7, loss_change=0.0), state)
        reached.append(state.square**0.5)
    assert reached[1] <= 1e-7 and reached[0] > 1e-2


@pytest.mark.parametrize("dtype, norm", [("float64", 1e-12), ("float32", 2e-6)])
def test_the_search_ends_at_the_rounding_of_the_type(dtype: str, norm: float) -> None:
    """Of a loss that is as exact as its type; by default neither the gradient's norm stalls nor are there trials in vain."""
    f, state, passes = synthetic(), State(), []

    def rounded(x: np.ndarray) -> tuple[float, np.ndarray]:
        loss, g = f(x)
        passes.append(state.iteration)
        return float(np.dtype(dtype).type(loss)), g

    options = LBFGS(gradient_norm=norm, loss_change=0.0, iterations=200)
    assert solve(local(np.zeros(20), dtype), objective(rounded), options, state) == "gradient norm"
    assert max(np.bincount(passes)) <= 3, "passes of an iteration"


def test_owlqn_ends_at_the_rounding_of_the_type() -> None:
    f, state = synthetic(), State()

    def rounded(x: np.ndarray) -> tuple[float, np.ndarray]:
        loss, g = f(x)
        return float(np.float32(loss)), g

    options = OWLQN(strength=1e-3, iterations=200, loss_change=0.0, gradient_norm=0.0)
    solve(local(np.zeros(20), "float32"), objective(rounded), options, state)
    assert state.iteration == 200 and state.passes <= 400


# --- optima -------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_optimum_is_scipys(kind: str, problem: str) -> None:
    make, x0 = PROBLEMS[problem]
    if kind == "gradient_descent" and problem in ("rosenbrock", "adult"):
        pytest.skip("too slow by gradient descent")
    f, state, space = make(), State(), local(x0)
    reason = solve(space, objective(f), SMOOTH[kind], state)
    best = scipy_optimum(f, x0)
    assert state.loss <= best + 1e-6 * max(abs(best), 1e-3), reason
    assert state.loss == f(space.registers["params"])[0]


@pytest.mark.parametrize("problem", ["quadratic", "logistic", "adult"])
def test_float32_reaches_the_optimum(problem: str) -> None:
    make, x0 = PROBLEMS[problem]
    f, state = make(), State()
    solve(local(x0, "float32"), objective(f), LBFGS(iterations=300, gradient_norm=1e-6), state)
    best = scipy_optimum(f, x0)
    assert state.loss == pytest.approx(best, rel=1e-6)


def test_reasons() -> None:
    def run(f: Loss, x0: np.ndarray, **options: float) -> tuple[str, State]:
        state = State()
        return solve(local(x0), objective(f), LBFGS(**options), state), state

    assert run(quadratic(), np.zeros(50), iterations=3)[0] == "iterations"
    assert run(quadratic(), np.zeros(50), iterations=0)[1].passes == 1
    assert run(quadratic(), np.zeros(50), loss_change=0.1)[0] == "loss change"
    reason, state = run(rosenbrock, np.ones(3))
    assert reason == "gradient norm" and state.iteration == 0
    assert run(lambda x: (np.nan, x), np.ones(3))[0] == "the loss is not finite"
    # A gradient of the wrong sign.
    space, x0 = LocalSpace({"params": np.ones(3), "gradient": np.zeros(3)}), np.ones(3)
    assert solve(space, objective(lambda x: (x @ x, -2 * x)), LBFGS()) == "no decrease along the gradient"
    assert np.array_equal(space.registers["params"], x0)


@pytest.mark.parametrize("options", [MultiBatch(batch=50, rate=0.1), GradientDescent(gradient_norm=0.0, loss_change=0.0)])
def test_without_a_bound_iterations_go_on_until_the_caller_ends_them(options: Descent) -> None:
    class Enough(LocalProblem):
        def accepted(self, state: State) -> Turns[str]:
            yield None
            return "enough" if state.iteration == 105 else ""

    state = State()
    assert result(options.minimize(Enough(local(np.zeros(20)), objective(synthetic())), state)) == "enough"
    assert state.iteration == 105


@pytest.mark.parametrize("kind", ALL)
def test_every_iterate_is_told_of_when_params_is_it(kind: str) -> None:
    f, heard = synthetic(), []

    class Heard(LocalProblem):
        def accepted(self, state: State) -> Turns[str]:
            heard.append((state.iteration, state.loss, self.space.registers["params"].copy()))
            yield None
            return ""

    state, problem = State(), Heard(local(np.zeros(20)), objective(f))
    result(ALL[kind].minimize(problem, state))
    assert [iteration for iteration, *_ in heard] == list(range(1, state.iteration + 1)) and state.iteration > 10
    np.testing.assert_array_equal(heard[-1][2], problem.space.registers["params"])
    if kind != "multibatch_lbfgs":
        strength = getattr(ALL[kind], "strength", 0.0)
        for _, loss, x in heard:
            assert loss == pytest.approx(f(x)[0] + strength * np.abs(x).sum(), rel=1e-14)


def test_negative_curvature_is_survived() -> None:
    # Concave around the start: pairs with s . y <= 0 must stay out of the history, and the minimum is found all the same.
    def wells(x: np.ndarray) -> tuple[float, np.ndarray]:
        return float(np.sum(x**4 / 4 - x**2 / 2)), x**3 - x

    space = local(np.linspace(0.01, 0.05, 7))
    solve(space, objective(wells), SMOOTH["lbfgs"])
    np.testing.assert_allclose(np.abs(space.registers["params"]), 1, atol=1e-6)


# --- L1 -----------------------------------------------------------------------------------------------------------------------


def proximal(f: Loss, x0: np.ndarray, strength: np.ndarray, lipschitz: float) -> np.ndarray:
    """Return the L1 optimum by FISTA with restarts (Beck & Teboulle 2009; O'Donoghue & Candes 2015)."""
    x, z, t = x0.copy(), x0.copy(), 1.0
    for _ in range(20000):
        v = z - f(z)[1] / lipschitz
        new = np.sign(v) * np.maximum(np.abs(v) - strength / lipschitz, 0)
        if (z - new) @ (new - x) > 0:
            t = 1.0
        t2 = (1 + (1 + 4 * t * t) ** 0.5) / 2
        z, moved = new + (t - 1) / t2 * (new - x), np.abs(new - x).max()
        x, t = new, t2
        if moved < 1e-13:
            break
    return x


@pytest.mark.long
@pytest.mark.parametrize("problem, strength", [("logistic", 0.01), ("logistic", 0.05), ("adult", 1e-3)])
@pytest.mark.parametrize("masked", [False, True])
def test_owlqn_optimum(problem: str, strength: float, masked: bool) -> None:
    make, x0 = PROBLEMS[problem]
    f, space, state = make(), local(x0), State()
    acts = np.arange(x0.size) % 4 > 0 if masked else np.ones(x0.size, bool)
    space.registers["decays"] = acts.astype("f8")
    solve(space, objective(f), OWLQN(strength=strength, mask="decays" if masked else "", iterations=1000, **TIGHT), state)
    x = space.registers["params"]
    g, c = f(x)[1], strength * acts
    # The subgradient conditions.
    zero = x == 0
    assert np.all(np.abs(g[zero]) <= c[zero] + 1e-6) and np.all(np.abs(g + c * np.sign(x))[~zero] <= 1e-5)
    assert state.loss == pytest.approx(f(x)[0] + c @ np.abs(x), rel=1e-12)
    curvature = f.rows.multiply(f.rows).sum(1).max() if sparse.issparse(f.rows) else (f.rows**2).sum(1).max()
    oracle = proximal(f, x0, c, curvature / 4 + f.decay)
    assert state.loss <= f(oracle)[0] + c @ np.abs(oracle) + 1e-9
    assert set(np.flatnonzero(zero)) == set(np.flatnonzero(oracle == 0)) and (zero.any() or strength < 0.01)


# --- rounds, ranges, restart --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lbfgs", "conjugate_gradient", "gradient_descent", "owlqn"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_rounds(kind: str, problem: str) -> None:
    make, x0 = PROBLEMS[problem]
    space, state, seen = local(x0), State(), []
    evaluate = objective(make())

    def count(params: np.ndarray, gradient: np.ndarray, examples: Range | None) -> float:
        seen.append((state.iteration, space.rounds))
        return evaluate(params, gradient, examples)

    solve(space, count, ALL[kind], state)
    for k in range(state.iteration - 1):
        # From the first trial of an iteration to that of the next one.
        trials = [rounds for iteration, rounds in seen if iteration == k]
        first = trials[1] if k == 0 else trials[0]
        passes = len(trials) - (k == 0)
        rounds = min(r for i, r in seen if i == k + 1) - first
        assert rounds == 2 if passes == 1 else rounds <= 2 * passes
    # Creating registers, the first gradient and the end are not part of an iteration.
    if kind in ("lbfgs", "owlqn"):
        assert space.rounds - 3 <= (4 if problem == "rosenbrock" else 2.7) * state.iteration


def test_multibatch_takes_four_rounds_and_three_passes() -> None:
    space, state = local(np.zeros(20)), State()
    solve(space, objective(synthetic()), ALL["multibatch_lbfgs"], state)
    assert space.rounds == 1 + 4 * 25 and state.passes == 3 * 25


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_ranges_agree_with_the_whole(kind: str, parts: int) -> None:
    f, x0, state, state2 = synthetic(), np.zeros(20), State(), State()
    whole, cut = local(x0), SplitSpace({"params": x0.copy(), "gradient": np.zeros(20)}, parts)
    options = ALL[kind].model_copy(update={"iterations": 12})
    solve(whole, objective(f), options, state)

    class Cut(LocalProblem):
        def loss(self, examples: Range | None = None, iterate: str = "params") -> Turns[float]:
            gradient = np.zeros(20)
            yield None
            loss = self.objective(cut.whole("params"), gradient, examples)
            for part, lo in zip(cut.parts, np.cumsum([0, *(p["params"].size for p in cut.parts)])[:-1], strict=True):
                part["gradient"][:] = gradient[lo : lo + part["gradient"].size]
            return loss

    result(options.minimize(Cut(cut, objective(f)), state2))
    np.testing.assert_allclose(cut.whole("params"), whole.registers["params"], rtol=1e-10, atol=1e-10)
    assert state2.loss == pytest.approx(state.loss, rel=1e-10) and cut.rounds == whole.rounds


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("problem", ["logistic", "rosenbrock"])
@pytest.mark.parametrize("interrupt", [1, 2, 9, 17, 10_000])
def test_restart_continues_as_if_uninterrupted(kind: str, problem: str, interrupt: int) -> None:
    make, x0 = PROBLEMS[problem]
    if kind == "multibatch_lbfgs" and problem == "rosenbrock":
        pytest.skip("has no examples")
    f = make()
    options = ALL[kind].model_copy(update={"iterations": 18})
    straight, state = local(x0), State()
    solve(straight, objective(f), options, state)

    first, early, passes = local(x0), State(), []
    # The last case stops after an iteration, the others in the middle of one, while a pass is under way.
    short = options.model_copy(update={"iterations": 7}) if interrupt == 10_000 else options

    def halting(params: np.ndarray, gradient: np.ndarray, examples: Range | None) -> float:
        passes.append((early.saved(), {k: v.copy() for k, v in first.registers.items()}))
        if len(passes) == interrupt:
            raise Halted
        return objective(f)(params, gradient, examples)

    with nullcontext() if interrupt == 10_000 else pytest.raises(Halted):
        solve(first, halting, short, early)
    saved, registers = json.loads(json.dumps(early.saved())), {k: v.copy() for k, v in first.registers.items()}
    if interrupt < 10_000:
        # Nothing was touched on the way.
        assert early.saved() == passes[-1][0] and early.passes == interrupt - 1
        for name, values in registers.items():
            np.testing.assert_array_equal(values, passes[-1][1][name])
        registers["gradient"][:] = np.nan
    second, late = LocalSpace(registers), State(**saved)
    solve(second, objective(f), options, late)
    np.testing.assert_allclose(second.registers["params"], straight.registers["params"], rtol=1e-10, atol=1e-10)
    assert late.loss == pytest.approx(state.loss, rel=1e-10) and late.iteration == state.iteration


# --- multi-batch --------------------------------------------------------------------------------------------------------------


def test_batches_overlap_and_cover() -> None:
    options = MultiBatch(batch=10, overlap=3)
    for k in range(5):
        left, own, right = options.parts(k)
        assert left.size + own.size + right.size == 10 and left.hi == own.lo and own.hi == right.lo
        assert right == options.parts(k + 1)[0] and right.size == 3
    assert options.parts(0)[0].lo == 0


@pytest.mark.parametrize("problem, options, excess", [
    ("logistic", MultiBatch(batch=60, overlap=20, rate=1.0, decay=20, iterations=400), 0.01),
    ("logistic", MultiBatch(batch=60, overlap=30, rate=1.0, decay=20, iterations=400), 0.01),
    ("adult", MultiBatch(batch=400, overlap=100, rate=1.0, decay=20, iterations=300), 0.03),
])  # fmt: skip
def test_multibatch_converges_with_small_batches(problem: str, options: MultiBatch, excess: float) -> None:
    make, x0 = PROBLEMS[problem]
    f, space = make(), local(x0)
    assert solve(space, objective(f), options) == "iterations"
    best = scipy_optimum(f, x0)
    assert f(space.registers["params"])[0] <= best * (1 + excess)


def test_multibatch_on_all_data_is_lbfgs_with_a_fixed_step() -> None:
    # One batch that is all data, twice over: the pairs are those of the whole loss, and the method converges fully.
    f, space = synthetic(), local(np.zeros(20))
    solve(space, objective(f), MultiBatch(batch=800, overlap=400, iterations=60))
    assert f(space.registers["params"])[0] == pytest.approx(scipy_optimum(f, np.zeros(20)), rel=1e-10)


# --- options ------------------------------------------------------------------------------------------------------------------


def test_kinds_and_options() -> None:
    assert set(ALL) == set(family("methods.descent"))
    assert LBFGS().options()["kind"] == "lbfgs" and LBFGS().options()["line"]["curvature"] == 0.9
    assert ConjugateGradient().line.curvature == 0.1
    with pytest.raises(ValidationError):
        LBFGS(histroy=3)
    with pytest.raises(ValidationError, match="at most half"):
        MultiBatch(batch=10, overlap=6)
