"""What a check is: something that must hold of a member, and what to do where it does not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# The name of what must hold -> what looks; it returns what is to be said of it, or raises `Broken`.
Checks = dict[str, Callable[[], str]]
# Elements of an array that are compared with differences, the step of these, and how far they may be apart.
_PROBES, _STEP, _TOLERANCE = 24, 1e-6, 1e-6


class Broken(Exception):
    """Something does not hold; the message says what, and what to do."""


def same(found: np.ndarray, wanted: np.ndarray, tolerance: float, what: str) -> float:
    """Return the largest difference, relative to the largest value (at least 1); raise Broken beyond the tolerance."""
    scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
    off = np.abs(found.astype(np.float64) - wanted) / scale
    worst = float(off.max(initial=0.0))
    # NaN is no number below the tolerance, either.
    if not worst <= tolerance:
        at = np.unravel_index(int(np.argmax(np.where(np.isnan(off), np.inf, off))), off.shape)
        place = f" at [{', '.join(map(str, at))}]" if off.ndim else ""
        raise Broken(f"{what}{place}: {found[at]:.6g} instead of {wanted[at]:.6g}")
    return worst


def agrees(value: Callable[[], float], array: np.ndarray, gradient: np.ndarray, what: str) -> float:
    """Return how far a gradient with respect to a float64 array is from central differences; raise Broken where it is another."""
    places, wanted = differences(value, array, np.random.default_rng(6))
    found = gradient.reshape(-1)[places]
    scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
    off = np.abs(found - wanted) / scale
    for place, mine, other in zip(
        places[~(off <= _TOLERANCE)], found[~(off <= _TOLERANCE)], wanted[~(off <= _TOLERANCE)], strict=True
    ):
        at = ", ".join(map(str, np.unravel_index(place, array.shape)))
        raise Broken(f"{what} at [{at}] is {mine:.6g}, differences give {other:.6g}")
    return float(off.max(initial=0.0))


def unwritten(array: np.ndarray, what: str, advice: str) -> None:
    """Raise Broken where an array that was all NaN still holds some."""
    left = int(np.isnan(array).sum())
    if left:
        raise Broken(f"{left} of the {array.size} values of {what} are not written; {advice}")


def differences(value: Callable[[], float], array: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return places in a float64 array, and by central differences the derivative of `value` with respect to each of them."""
    flat = array.reshape(-1)
    assert np.shares_memory(flat, array)
    places = rng.permutation(flat.size)[:_PROBES]
    out = np.zeros(len(places))
    for i, place in enumerate(places):
        before = flat[place]
        ends = []
        for sign in (1, -1):
            flat[place] = before + sign * _STEP
            ends.append(value())
        flat[place] = before
        out[i] = (ends[0] - ends[1]) / (2 * _STEP)
    return places, out
