"""What must hold of an update rule: it writes in place, slice by slice as on the whole, and goes downhill."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import numpy as np

from dbnet.commands.see.checks.base import Broken, Checks, same
from dbnet.core.ranges import split
from dbnet.shards.rules.base import Arrival, Rule

_SIZE, _UPDATES = 23, 6
_ARRIVAL = Arrival(staleness=0, replica=0, steps=1)


def checks(rule: Rule) -> Checks:
    """Return what must hold of a rule."""
    made = {"signature": signature, "in place": in_place, "downhill": downhill, "slices = whole": slices, "no gradient": nothing,
            "float32": single}  # fmt: skip
    return {name: partial(look, rule) for name, look in made.items()}


class Shelf:
    """Parameters and the registers that a rule keeps beside them, as a shard holds them."""

    def __init__(self, rule: Rule, dtype: str = "float64") -> None:
        self._rule = rule
        self.w = np.random.default_rng(2).standard_normal(_SIZE).astype(dtype)
        self.state = {name: np.full(_SIZE, rule.initial(name), dtype) for name in rule.state}

    def apply(self, g: np.ndarray, t: int, here: slice = slice(None), arrival: Arrival = _ARRIVAL) -> None:
        """Apply the rule to a part of the parameters with a gradient of it."""
        state = {name: register[here] for name, register in self.state.items()}
        before = dict(state)
        self._rule.apply(self.w[here], g, state, t, *((arrival,) if self._rule.informed else ()))
        for name in {*before, *state}:
            if state.get(name) is not before.get(name):
                raise Broken(
                    f"apply() puts another array into state['{name}']; write into the one that is there: state['{name}'][...] = ..."
                )


def gradients(dtype: str = "float64") -> np.ndarray:
    """Return gradients [updates, size]."""
    return np.random.default_rng(3).standard_normal((_UPDATES, _SIZE)).astype(dtype)


def signature(rule: Rule) -> str:
    """It takes what it is called with."""
    wanted = ["w", "g", "state", "t", *(["arrival"] if rule.informed else [])]
    call: Callable[..., None] = rule.apply
    try:
        inspect.signature(call).bind(*wanted)
    except TypeError as error:
        told = "informed = True, so it is told of the push" if rule.informed else "informed = False; True tells it of the push"
        raise Broken(f"apply cannot be called as apply({', '.join(wanted)}): {error} ({told})") from None
    for name, number in (("local_rate", rule.local_rate()), ("largest", rule.largest(np.dtype("float32")))):
        if not 0 < number < np.inf:
            raise Broken(f"{name}() returns {number}; it must be a finite number above 0")
    return f"apply({', '.join(wanted)})"


def in_place(rule: Rule) -> str:
    """Parameters are changed where they lie; the gradient is left alone."""
    shelf, g = Shelf(rule), gradients()[0]
    before, kept = shelf.w.copy(), g.copy()
    shelf.apply(g, 1)
    if np.array_equal(shelf.w, before):
        raise Broken(
            "apply() leaves w as it was, so nothing is ever trained; change it in place: w -= ... or w[:] = ..., not w = w - step"
        )
    if not np.array_equal(g, kept):
        raise Broken("apply() changes g, which others still read; work on a copy, or within a kernel")
    same_ = int((shelf.w == before).sum())
    if same_:
        raise Broken(f"apply() leaves {same_} of {_SIZE} parameters as they were, though none of their gradients is 0")
    return "w is changed in place"


def downhill(rule: Rule) -> str:
    """A step goes against the gradient."""
    shelf, g = Shelf(rule), gradients()[0]
    before = shelf.w.copy()
    shelf.apply(g, 1)
    way = float((shelf.w - before) @ g)
    if not way < 0:
        raise Broken(f"the first step goes {'along the gradient, uphill' if way else 'nowhere'}; subtract: w -= rate * g")
    return "steps go against the gradient"


def slices(rule: Rule) -> str:
    """A push that is applied slice by slice does what it does as a whole."""
    whole, parts = Shelf(rule), Shelf(rule)
    for t, g in enumerate(gradients(), 1):
        whole.apply(g, t)
        for part in reversed(split(_SIZE, 4)):
            parts.apply(g[part.slice], t, part.slice)
    advice = "w after slices; let an element depend on its own gradient, its own registers and t alone"
    same(parts.w, whole.w, 1e-13, advice)
    return f"{_UPDATES} updates in 4 slices each"


def nothing(rule: Rule) -> str:
    """Gradients that are 0 do no harm, from the first update on."""
    shelf = Shelf(rule)
    with np.errstate(all="ignore"):
        for t in (1, 2):
            shelf.apply(np.zeros(_SIZE), t)
    if not np.isfinite(shelf.w).all():
        raise Broken("w is not finite after a gradient of 0; guard what is divided by (0 / 0)")
    return "w stays finite where gradients are 0"


def single(rule: Rule) -> str:
    """In float32 the same comes out, to its rounding."""
    exact, rough = Shelf(rule), Shelf(rule, "float32")
    for t, g in enumerate(gradients(), 1):
        exact.apply(g, t)
        rough.apply(g.astype("float32"), t)
    return f"{same(rough.w, exact.w, 1e-3, 'w in float32'):.0e} from float64"
