"""Losses: kernels interpreted and compiled, cut over partitions, against their formulas."""

from __future__ import annotations

import numpy as np
import pytest

from dbnet.commands.see.checks.losses import computed, outputs, targets
from dbnet.core.ranges import split
from dbnet.core.registry import family
from dbnet.network.losses import base, logistic, softmax, squared


@pytest.mark.parametrize("kind", sorted(family("network.losses")))
def test_right_answers_are_the_largest_outputs(kind):
    """What else must hold of every loss, cut or not, is in `dbnet check` (tests/commands/test_check.py)."""
    y, label = outputs(), targets(family("network.losses")[kind]())["labels"]
    for parts in (1, 3):
        scores, *_ = computed(family("network.losses")[kind](), y, label, split(len(y), parts))
        assert {right for _, right in scores} == {np.sum(y[:, :5].argmax(0) == label[:5])}


def both(kernel, *arguments):
    """Run a kernel compiled and interpreted on copies; return both sets of arguments."""
    sets = [[a.copy() if isinstance(a, np.ndarray) else a for a in arguments] for _ in range(2)]
    results = [f(*a) for f, a in zip((kernel, kernel.py_func), sets, strict=True)]
    return sets, results


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_interpreted_equals_compiled(dtype):
    rng = np.random.default_rng(6)
    y, dy, label = rng.standard_normal((7, 5)).astype(dtype), np.zeros((7, 5), dtype), rng.integers(0, 7, 5)
    stats = np.zeros((5, 5), dtype)
    tolerance = {"rtol": 3e-6, "atol": 1e-6} if dtype == "float32" else {"rtol": 1e-13, "atol": 1e-15}
    cases = [
        (softmax.reduce, y, label, 0, stats, dy),
        (softmax.combine, np.abs(rng.standard_normal((3, 5, 5))).astype(dtype), stats),
        (softmax.finish, label, 0, np.abs(rng.standard_normal((5, 5))).astype(dtype), 4, y),
        (squared.reduce, y, 0, stats[:3].copy(), y),
        (squared.differ, y, label, 0, dy),
        (logistic.reduce, y, label, 0, stats[:3].copy(), dy),
        (base.combine_best, rng.standard_normal((3, 3, 5)).astype(dtype), stats[:3].copy()),
    ]
    for kernel, *arguments in cases:
        (one, two), _ = both(kernel, *arguments)
        for a, b in zip(one, two, strict=True):
            if isinstance(a, np.ndarray):
                np.testing.assert_allclose(a, b, **tolerance, err_msg=kernel.__name__)
    _, (a, b) = both(base.tally, np.abs(rng.standard_normal((3, 5))).astype(dtype), label, 4)
    assert a == pytest.approx(b)


def test_softmax_survives_large_outputs():
    loss, stats, dy = family("network.losses")["softmax"](), np.zeros((5, 2)), np.zeros((3, 2))
    y, label = np.array([[1e4, -1e4], [0.0, 0.0], [-1e4, 1e4]]), np.array([0, 0])
    loss.reduce(y, label, 0, stats, dy)
    loss.combine(stats[None].copy(), stats)
    loss.delta(y, label, 0, stats, 2, dy)
    assert np.isfinite(dy).all()
    assert loss.score(stats, label, 2) == (2e4, 1)


def exactly(kind, z, label):
    """Loss and delta of one example in exact terms: no difference of large numbers."""
    z, s = z.astype(np.float64), np.where(np.arange(len(z)) == label, 1.0, -1.0)
    if kind == "logistic":
        return np.logaddexp(0, -s * z).sum(), -s * np.exp(-np.logaddexp(0, s * z))
    others = np.delete(z - z[label], label)
    with np.errstate(over="ignore"):
        loss = np.log1p(np.exp(others).sum()) if others.max(initial=0) < 30 else np.logaddexp.reduce(np.append(others, 0.0))
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    return loss, np.where(s > 0, -np.delete(p, label).sum(), p)


@pytest.mark.parametrize("kind", ["softmax", "logistic"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_float32_losses_are_exact_to_its_rounding_whatever_the_size_of_the_outputs(kind, parts):
    """A loss far below the outputs' own rounding, as of 1000 against 990 or of 50 against -12, and random ones."""
    cases = [([1000.0, 990.0], 0), ([990.0, 1000.0], 0), ([50.0, -12.0], 0), ([-12.0, 50.0], 1), ([0.0, 0.0, 0.0], 2), ([7.0], 0)]
    rng = np.random.default_rng(3)
    for _ in range(200):
        z = rng.standard_normal(rng.integers(2, 7)) * 10 ** rng.uniform(-2, 1) + rng.choice([0, 100, 1000])
        cases.append((z.tolist(), int(rng.integers(len(z)))))
    loss = family("network.losses")[kind]()
    for values, label in cases:
        z, labels = np.array(values, np.float32)[:, None], np.array([label])
        cuts = split(len(z), parts)
        stats, deltas = np.zeros((parts, loss.width, 1), np.float32), [np.zeros((c.size, 1), np.float32) for c in cuts]
        for c, s, d in zip(cuts, stats, deltas, strict=True):
            loss.reduce(z[c.slice].copy(), labels, c.lo, s, d)
        for c, s, d in zip(cuts, stats.copy(), deltas, strict=True):
            loss.combine(stats, s)
            loss.delta(z[c.slice].copy(), labels, c.lo, s, 1, d)
            value = loss.score(s, labels, 1)[0]
        wanted, delta = exactly(kind, z[:, 0], label)
        assert value == pytest.approx(wanted, rel=2e-6, abs=1e-37), (values, label)
        np.testing.assert_allclose(np.concatenate(deltas)[:, 0], delta, rtol=1e-5, atol=1e-37, err_msg=str((values, label)))


@pytest.mark.parametrize("kind", ["softmax", "logistic"])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_partition_loses_an_output_that_is_not_finite(kind, where, value):
    loss, z = family("network.losses")[kind](), np.zeros((3, 1), np.float32)
    z[where] = value
    stats, label = np.zeros((3, loss.width, 1), np.float32), np.array([0])
    for k in range(3):
        loss.reduce(z[k : k + 1].copy(), label, k, stats[k], np.zeros((1, 1), np.float32))
    loss.combine(stats.copy(), stats[0])
    assert not np.isfinite(loss.score(stats[0], label, 1)[0]) or (kind == "logistic" and where == 0 and value == np.inf)


@pytest.mark.parametrize("kind", ["softmax", "squared", "logistic"])
def test_losses_agree_with_pytorch(kind):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra 'torch')")
    rng = np.random.default_rng(12)
    y, label = (4 * rng.standard_normal((30, 16))).astype(np.float32), rng.integers(0, 30, 16)
    loss = family("network.losses")[kind]()
    stats, dy = np.zeros((loss.width, 16), np.float32), np.zeros_like(y)
    loss.reduce(y.copy(), label, 0, stats, dy)
    loss.combine(stats[None].copy(), stats)
    loss.delta(y.copy(), label, 0, stats, 16, dy)
    z, wanted = torch.tensor(y.T, requires_grad=True), torch.tensor(label)
    onehot = torch.nn.functional.one_hot(wanted, 30).float()
    total = {
        "softmax": lambda: torch.nn.functional.cross_entropy(z, wanted, reduction="sum"),
        "squared": lambda: 0.5 * ((z - onehot) ** 2).sum(),
        "logistic": lambda: torch.nn.functional.binary_cross_entropy_with_logits(z, onehot, reduction="sum"),
    }[kind]()
    (total / 16).backward()
    assert loss.score(stats, label, 16)[0] == pytest.approx(total.item(), rel=1e-5)
    np.testing.assert_allclose(dy.T, z.grad.numpy(), rtol=1e-5, atol=1e-7)
