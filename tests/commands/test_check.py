"""`dbnet check`: dbnet's own members pass all checks, and each way to be wrong is found by the check that is made for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from finished import ROOT, Finished

from dbnet.commands.see.checks import layers, losses, rules, runs
from dbnet.core.registry import FAMILIES, family, make

OPTIONS = {
    "dense": {"units": 4, "activation": "sigmoid"}, "local": {"maps": 2, "field": 3, "stride": 2, "activation": "tanh"},
    "conv": {"maps": 3, "field": 3, "padding": 1, "activation": "relu"}, "pool": {"over": "max", "field": 2}, "norm": {"radius": 1},
    "dropout": {"rate": 0.5},
}  # fmt: skip
GAIN, AWARE, ABSOLUTE = (ROOT / "tests" / "support" / name for name in ("gain.py", "staleness_aware.py", "absolute.py"))
LOSS = '''
from typing import ClassVar
import numpy as np
from dbnet import Loss, kernel

@kernel("T[:,:];i8[:];i8;T[:,:]")
def hinges(y, label, lo, stats):
    for j in range(y.shape[1]):
        stats[0, j], stats[1, j], stats[2, j] = 0, -np.inf, 0
        for u in range(y.shape[0]):
            s = 1.0 if lo + u == label[j] else -1.0
            stats[0, j] += max(0.0, 1.0 - s * y[u, j]) ** 2
            if y[u, j] > stats[1, j]:
                stats[1, j], stats[2, j] = y[u, j], lo + u

class Hinge(Loss):
    """Sum of squared hinges, one against all."""

    kind: ClassVar[str] = "hinge"

    def reduce(self, y, target, lo, stats, dy):
        hinges(y, target, lo, stats)

    def delta(self, y, target, lo, stats, count, dy):
        s = np.where(np.arange(lo, lo + len(y))[:, None] == target, 1, -1).astype(y.dtype)
        dy[...] = -2 * s * np.maximum(0, 1 - s * y) / count
        dy[:, count:] = 0
'''


@pytest.fixture(autouse=True)
def own_kinds_are_forgotten() -> Iterator[None]:
    """Leave no member of a file that is wrong to other tests of this process."""
    # Whole, since what a test is the first to load is not its own.
    before = {name: dict(family(name)) for name in list(FAMILIES)}
    yield
    for name, members in before.items():
        FAMILIES[name].clear()
        FAMILIES[name].update(members)


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_layer_passes(kind: str) -> None:
    # Other tests may have made layers of their own.
    assert {name for name, layer in family("network.layers").items() if layer.__module__.startswith("dbnet.")} == set(OPTIONS)
    layer = make("network.layers", {"kind": kind, **OPTIONS[kind]}, "layer")
    for shape in layers.accepted(layer):
        assert all(check() for check in layers.checks(layer, shape).values())


@pytest.mark.parametrize("kind", sorted(family("network.losses")))
def test_every_loss_passes(kind: str) -> None:
    assert all(check() for check in losses.checks(make("network.losses", {"kind": kind}, "loss")).values())


@pytest.mark.parametrize("kind", sorted(family("shards.rules")))
def test_every_rule_passes(kind: str) -> None:
    assert all(check() for check in rules.checks(make("shards.rules", {"kind": kind}, "rule")).values())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("methods", "downpour"),
        ("methods.descent", "lbfgs"),
        ("shards.rules.schedules", "cosine"),
        ("network.parameters.initializers", "he_normal"),
    ],
)
def test_what_takes_part_in_a_run_passes(name: str, kind: str) -> None:
    assert all(check() for check in runs.checks(make(name, {"kind": kind}, "method"), "").values())


def test_own_files_pass(place: Path, dbnet: Callable[..., Finished]) -> None:
    Path("hinge.py").write_text(LOSS)
    for file, count in ((GAIN, 18), (AWARE, 8), (ABSOLUTE, 7), ("hinge.py", 7)):
        done = dbnet("check", file)
        assert (done.code, done.err) == (0, "") and done.out.endswith(f"All {count} checks passed.\n"), done.out
    rows = json.loads(dbnet("check", AWARE, "staleness_aware.rate=0.5", "--json").out)
    assert [row["check"] for row in rows][:3] == ["name", "signature", "in place"] and all(row["ok"] for row in rows)


WRONG = [
    # file, what is wrong with it, the check that finds it, what it says
    (GAIN, ("c.g[\"gain\"] += np.einsum", "c.g[\"gain\"][...] = np.einsum"), "accumulated", "add to it (c.g['gain'] += ...)"),
    (GAIN, ('if not accumulate:\n            c.g["gain"].fill(0)', "pass"), "in place", "without `accumulate` overwrite it"),
    (GAIN, ('"...j,...j->...", c.dy, c.x)', '"...j,...j->...", c.dy, c.x) / 2'), "gradient", "c.g['gain'] at ["),
    (GAIN, ("scale(c.dx.reshape(-1, batch), c.dy", "scale(c.dy.reshape(-1, batch), c.dy"), "in place", "values of c.dx"),
    (GAIN, ("scale(c.y.reshape(-1, batch), c.x.reshape(-1, batch), c.p[\"gain\"].reshape(-1))",
            "c.y = c.x * c.p['gain'][..., None]"), "in place", "forward() puts another array into c.y"),
    (GAIN, ("axes=len(x)", "axes=0"), "cut = uncut", ""),
    (GAIN, ("        return out\n", "        return tuple(r._replace(hi=r.lo + 1) for r in out)\n"), "needs",
     "; of c.x there is only what needs(...) asks for (c.x_box)."),
    (GAIN, ("return {\"gain\": Parameter(x,", "return {\"gain\": Parameter((x[0] + 1,),"), "shapes", "begin with the output's"),
    (AWARE, ("step(w, g, self.rate", "w = w - (g * self.rate"), "in place", "is ever trained; change it in place: w -= ..."),
    (AWARE, ("step(w, g, self.rate", "step(w, -g, self.rate"), "downhill", "subtract: w -= rate * g"),
    (AWARE, (", arrival: Arrival) -> None", ") -> None"), "signature", "apply cannot be called as apply(w, g, state, t, arrival)"),
    (AWARE, ("step(w, g, self.rate", "step(w, g - g.mean(), self.rate"), "slices = whole", "w after slices"),
    (AWARE, ("step(w, g, self.rate", "step(w, g / np.abs(g), self.rate"), "no gradient", "guard what is divided by"),
    (AWARE, ('"staleness_aware"', '"adam"'), "name", "kind 'adam' is one of dbnet's own"),
    (LOSS, ("-2 * s", "-1 * s"), "gradient", "dy (with labels as targets; it is d loss / dy divided by `count`) at ["),
    (LOSS, ("        dy[:, count:] = 0\n", ""), "padding", "these are padding: dy[:, count:] = 0"),
    (LOSS, ("np.arange(lo, lo + len(y))", "np.arange(len(y))"), "cut = uncut", "`lo` is the index of a partition's first unit"),
    (LOSS, ("dy[...] = -2", "dy = -2"), "in place", "write into it: dy[...] = ..."),
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("source", "change", "check", "said"), WRONG, ids=[f"{i}-{row[2]}" for i, row in enumerate(WRONG)])
def test_what_is_wrong_is_found(
    source: object, change: tuple[str, str], check: str, said: str, place: Path, dbnet: Callable
) -> None:
    text = source.read_text() if isinstance(source, Path) else str(source)
    assert change[0] in text
    Path("mine.py").write_text(text.replace(*change))
    done = dbnet("check", "mine.py", *(["--input", "7"] if source is GAIN and check != "needs" else []))
    assert done.code == 1 and "checks broken.\n" in done.out
    lines = [line for line in done.out.split("\n") if line.startswith(f"  BROKEN  {check} ")]
    assert lines and said in lines[0], done.out


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("x = 1\n", [], "'mine.py' defines no layer, loss, rule or method"),
        (GAIN.read_text(), ["gian.cut=[2]"], "'gian.cut=[2]': the file has no 'gian' (did you mean 'gain'?)"),
        (GAIN.read_text(), ["--input", "3,,2"], "--input 3,,2 is no shape"),
        (GAIN.read_text(), ["gain.unit=3"], "Unknown key 'gain.unit'"),
        (GAIN.read_text().replace('kind: ClassVar[str] = "gain"', 'kind: ClassVar[str] = "gain"\n    units: int'), [],
         "layer gain needs units; give for example gain.units=3."),
        ("x = \n", [], "fails with SyntaxError"),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_one_sentence(text: str, words: list[str], said: str, place: Path, dbnet: Callable) -> None:
    Path("mine.py").write_text(text)
    done = dbnet("check", "mine.py", *words)
    assert done.code == 2 and done.out == "" and said in done.err and done.err.count("\n") == 1
