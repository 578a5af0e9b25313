"""Kernels against NumPy, interpreted and compiled; commands on whole vectors and on ranges."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from split_space import SplitSpace

from dbnet.comm.channel import Mailboxes, Shards
from dbnet.comm.topology import Topology
from dbnet.comm.turns import Wait, result
from dbnet.core.config import build
from dbnet.core.kernels import vector
from dbnet.core.ranges import Range
from dbnet.network.parameters.layout import Drawn, FlatLayout
from dbnet.shards import space
from dbnet.shards.accrual import Accrual, Question, ShardSpace
from dbnet.shards.push import Push, Receiving, Refusal
from dbnet.shards.rules.sgd import Sgd
from dbnet.shards.shard import Shard
from dbnet.shards.space import LocalSpace, Space, perform

DTYPES = ["float32", "float64"]
MASKS = ["everywhere", "some"]


def run(space: Space, commands: list[space.Command]) -> list[list[float]]:
    """Run a round to its end."""
    return result(space.run(commands))


def vectors(count: int, n: int, dtype: str, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).standard_normal((count, n)).astype(dtype))


def both(kernel: object) -> list[object]:
    return [kernel, kernel.py_func]


def close(a: object, b: object, dtype: str) -> None:
    """Compare up to rounding of the type."""
    tolerance = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(np.asarray(a, "f8"), np.asarray(b, "f8"), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [0, 1])
def test_elementwise_kernels_are_numpy(dtype: str, compiled: int) -> None:
    x, y = vectors(2, 37, dtype)

    def run(kernel: object, *arguments: object) -> None:
        both(kernel)[1 - compiled](*arguments)

    out = np.empty_like(x)
    run(vector.copy, x, out)
    assert np.array_equal(out, x)
    run(vector.fill, out, 0.3)
    assert np.array_equal(out, np.full_like(x, 0.3))
    run(vector.multiply, x, y, out)
    close(out, x * y, dtype)
    run(vector.linear, 2.0, x, -0.7, y, out)
    close(out, 2 * x.astype("f8") - 0.7 * y.astype("f8"), dtype)
    out[:] = y
    run(vector.axpy, 0.3, x, out)
    close(out, 0.3 * x.astype("f8") + y, dtype)
    run(vector.scale, out, -2.0)
    close(out, -2 * (0.3 * x.astype("f8") + y), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_float64(dtype: str) -> None:
    x, y = vectors(2, 1001, dtype)
    for dot in both(vector.dot):
        assert dot(x, y) == pytest.approx(x.astype("f8") @ y.astype("f8"), rel=1e-13)
    mask = (np.arange(1001) % 3 > 0).astype(dtype)
    for decay in both(vector.decay):
        g = y.copy()
        assert decay(0.5, x, mask, g) == pytest.approx((mask * x.astype("f8") ** 2).sum(), rel=1e-13)
        close(g, y + 0.5 * mask * x.astype("f8"), dtype)
    for norm1 in both(vector.norm1):
        assert norm1(x, x[:0]) == pytest.approx(np.abs(x.astype("f8")).sum(), rel=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_and_combine_tiles_interpreted(dtype: str) -> None:
    x = vectors(7, 23, dtype)
    for gram in both(vector._gram):
        out = np.ones((3, 4))
        gram(*x, out)
        np.testing.assert_allclose(out - 1, np.array(x[:3], "f8") @ np.array(x[3:], "f8").T, rtol=1e-12)
    for add in both(vector._add):
        out = np.ones(23)
        add(np.arange(4.0), *x[:4], out)
        np.testing.assert_allclose(out - 1, np.arange(4.0) @ np.array(x[:4], "f8"), rtol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, columns, n", [(1, 1, 10), (3, 23, 70_000), (2, 5, 65_536), (4, 4, 65_537), (3, 1, 0), (1, 6, 99_999)]
)
def test_gram_is_a_matrix_product(dtype: str, rows: int, columns: int, n: int) -> None:
    x = np.array(vectors(rows + columns, n, dtype))
    wide = x.astype("f8")
    out = vector.gram(list(x[:rows]), list(x[rows:]))
    assert out.shape == (rows, columns) and out.dtype == np.float64
    np.testing.assert_allclose(out, wide[:rows] @ wide[rows:].T, rtol=1e-10, atol=1e-10 * (n + 1) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, n", [(1, 10), (3, 65_537), (21, 1000), (4, 0)])
def test_combine_sums_in_float64_and_may_write_a_term(dtype: str, count: int, n: int) -> None:
    x = np.array(vectors(count, n, dtype))
    c = np.random.default_rng(1).standard_normal(count)
    expected = (c @ x.astype("f8")).astype(dtype)
    vector.combine(list(c), list(x), x[0])
    close(x[0], expected, dtype)


def penalty(x: np.ndarray, g: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return the pseudo-gradient by its definition: the element of the subdifferential with the smallest modulus."""
    lo = g + np.where(x > 0, c, -c)
    hi = g + np.where(x < 0, -c, c)
    return np.where(lo > 0, lo, np.where(hi < 0, hi, 0)) * (x == 0) + lo * (x != 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("compiled", [0, 1])
def test_l1_kernels_are_their_definitions(dtype: str, masked: str, compiled: int) -> None:
    x, g, d = vectors(3, 200, dtype)
    x[::3] = 0
    mask = (np.arange(200) % 5 > 0).astype(dtype) if masked == "some" else x[:0]
    acts = mask > 0 if mask.size else np.ones(200, bool)
    pseudo = np.empty_like(x)
    both(vector.pseudo_gradient)[1 - compiled](x, g, 0.5, mask, pseudo)
    close(pseudo, penalty(x, g, 0.5 * acts), dtype)
    aligned = d.copy()
    both(vector.align)[1 - compiled](aligned, pseudo, mask)
    assert np.array_equal(aligned, np.where((d * pseudo < 0) | ~acts, d, 0))
    out = np.empty_like(x)
    both(vector.project_orthant)[1 - compiled](x, 0.8, d, pseudo, mask, out)
    moved = x + np.dtype(dtype).type(0.8) * d
    side = np.where(x != 0, np.sign(x), -np.sign(pseudo))
    close(out, np.where((np.sign(moved) == side) | ~acts, moved, 0), dtype)
    assert both(vector.norm1)[1 - compiled](x, mask) == pytest.approx(np.abs(x[acts].astype("f8")).sum(), rel=1e-6)


COMMANDS = [
    space.Create(("extra", "params")),
    space.Fill("extra", 0.25),
    space.Copy("params", "base"),
    space.Scale("base", 1.5),
    space.Axpy(-0.3, "gradient", "base"),
    space.Multiply("base", "gradient", "extra"),
    space.Combine(((1.0, "extra"), (0.5, "base")), "extra"),
    space.Combine(((1.0, "extra"), (-0.5, "base"), (2.0, "direction")), "direction"),
    space.Gram(("params", "extra"), ("base", "gradient", "direction")),
    space.Dot("direction", "direction"),
    space.Norm1("direction"),
    space.Norm1("direction", "mask"),
    space.PseudoGradient(0.4, "mask", "pseudo"),
    space.Align("direction", "pseudo"),
    space.ProjectOrthant(0.7, "direction", "pseudo", "mask"),
    space.Gram(("params",), ("params", "pseudo")),
    space.Decay(0.3, "params", "gradient", "mask"),
]


def registers(n: int, dtype: str) -> space.Registers:
    names = ["params", "gradient", "direction", "base", "pseudo"]
    result = dict(zip(names, vectors(5, n, dtype), strict=True))
    result["mask"] = (np.arange(n) % 2).astype(dtype)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [3, 1003])
def test_ranges_agree_with_the_whole(dtype: str, parts: int, n: int) -> None:
    whole, cut = LocalSpace(registers(n, dtype)), SplitSpace(registers(n, dtype), parts)
    a, b = run(whole, COMMANDS), run(cut, COMMANDS)
    assert [len(x) for x in a] == [6, 1, 1, 1, 2, 1]
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)
    for name, values in whole.registers.items():
        close(cut.whole(name), values, dtype)
    assert whole.rounds == cut.rounds == 1


def test_commands_are_values() -> None:
    assert space.Dot("a", "b") == space.Dot("a", "b")
    assert len({space.Gram(("a",), ("b",)), space.Gram(("a",), ("b",))}) == 1
    for command in COMMANDS:
        assert pickle.loads(pickle.dumps(command)) == command
        assert len(perform(registers(9, "float64") | {"extra": np.zeros(9)}, command)) == command.scalars


def test_unknown_register_is_named() -> None:
    with pytest.raises(KeyError, match="Dot uses register 'nowhere'; there are only gradient, params"):
        run(LocalSpace({"params": np.zeros(2), "gradient": np.zeros(2)}), [space.Dot("params", "nowhere")])


def test_create_keeps_what_exists() -> None:
    r = {"params": np.ones(3, "f4"), "s_0": np.full(3, 2.0, "f4")}
    assert run(LocalSpace(r), [space.Create(("s_0", "y_0"))]) == []
    assert r["s_0"].tolist() == [2, 2, 2] and r["y_0"].tolist() == [0, 0, 0] and r["y_0"].dtype == np.float32


def test_answers_of_shards_are_summed_in_their_order_and_late_ones_forgotten() -> None:
    boxes = Mailboxes(4)
    asking = ShardSpace(Shards(boxes.at(0), Topology(3, 1)), lambda: None, "f8")
    given_up = asking.ask(give_up=lambda: len(asking._answers) == 1)
    next(given_up)
    asking.take(0, (1, [5.0]))
    with pytest.raises(StopIteration) as end:
        next(given_up)
    assert end.value.value is None
    again = asking.ask([space.Dot("params", "params")])
    wait = next(again)
    assert isinstance(wait, Wait) and wait.reason == "the coordinator waits for shard 0, 1, 2 to answer"
    # In the order of the shards this is 0, in that in which they answer 1.
    asking.take(2, (2, [-1e16]))
    asking.take(1, (1, [7.0]))
    wait = next(again)
    assert isinstance(wait, Wait) and wait.reason == "the coordinator waits for shard 0, 1 to answer"
    asking.take(1, (2, [1e16]))
    asking.take(0, (2, [1.0]))
    assert next(again) is None
    with pytest.raises(StopIteration) as end:
        next(again)
    assert end.value.value == [0.0]
    assert [boxes.at(3).receive().content.number for _ in range(2)] == [1, 2]


def accrual_over(shard: Shard, origins: list[tuple[int, int]], decay: float = 0.0, **saved: np.ndarray) -> Accrual:
    model = {"layers": [{"kind": "dense", "units": 1}], "decay": decay}
    config = build({"data": {"path": "none"}, "model": model, "method": {"kind": "sandblaster"}, "stop": {"iterations": 1}})
    return Accrual(shard, Receiving(config, FlatLayout([("0.dense.W", (2,), Drawn("uniform", 1.0), True)]), origins, lambda: saved))


def test_a_shard_counts_what_is_of_its_pass_and_answers_what_it_was_asked() -> None:
    boxes, params = Mailboxes(2), np.zeros(2)
    accrual = accrual_over(Shard(Range(0, 2), Sgd(), params, np.zeros(1, np.int64), lambda: 0.0), [(0, 0), (1, 0)])

    def asked(*question: object) -> list[float] | None:
        accrual.heed(Question(*question))
        return answered()

    def answered() -> list[float] | None:
        while accrual.advance(boxes.at(1)):
            pass
        message = boxes.at(0).receive()
        return None if message is None else message.content[1]

    def bundle(replica: int, fetched: int, bad: bool = False) -> None:
        push = Push(replica, 0, 0, fetched, 1, 0)
        if bad:
            accrual.refuse(Refusal(push, 0, np.nan))
        else:
            accrual.apply(0, np.ones(2), accrual.begin(0, fetched))
            accrual.finish(push)

    product = space.Dot("gradient", "gradient")
    # It begins once, however many commands follow.
    assert asked(1, (space.Fill("gradient", 3.0), product, product), 1) == [18.0, 18.0] and accrual.clock[0] == 1
    assert asked(2, (product,), 2) == [0.0], "begun anew, and no answer of before"
    bundle(0, 2)
    assert asked(3, (product,), None, (1, 1)) is None
    for late in (1, 3):
        bundle(1, late)
        bundle(1, late, bad=True)
    assert answered() is None and accrual.dropped == 4, "what came is of other passes"
    assert [refusal.push.fetched for refusal in accrual.take_refused()] == [] and len(accrual.take_events()) == 1
    bundle(1, 2)
    assert answered() == [8.0]
    assert asked(4, (), 3) == [] and asked(5, (), None, (1, 0)) is None, "the count begins anew, too"
    bundle(0, 3, bad=True)
    assert answered() == [] and len(accrual.take_refused()) == 1
    assert accrual.registers() == {"params": accrual.params}


def test_a_checkpoint_takes_the_iterate_for_the_parameters() -> None:
    """While params is a trial point; masks and the gradient come anew with each run."""
    base, boxes = np.full(2, 7.0), Mailboxes(2)
    shard = Shard(Range(0, 2), Sgd(), np.zeros(2), np.zeros(1, np.int64), lambda: 0.0)
    accrual = accrual_over(shard, [], decay=0.1, base=base)
    assert "weights" in accrual.held
    for number, iterate, expected in ((1, "base", base), (2, "params", shard.params)):
        accrual.heed(Question(number, (), number, (), iterate))
        assert accrual.advance(boxes.at(1))
        held = accrual.registers()
        assert sorted(held) == ["params", "vector.base"] and held["params"] is expected and held["vector.base"] is base
