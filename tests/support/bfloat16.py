"""What bfloat16 is, by its definition and by search, for comparison with the kernels that go by bits."""

from __future__ import annotations

import numpy as np


def value_of(pattern: np.ndarray) -> np.ndarray:
    """Return what patterns of bfloat16 mean, from sign, exponent (8 bits) and fraction (7 bits), in float64."""
    sign, exponent, fraction = pattern >> 15, (pattern >> 7 & 255).astype(int), (pattern & 127).astype(float)
    size = np.where(exponent == 0, np.ldexp(fraction / 128, -126), np.ldexp(1 + fraction / 128, exponent - 127))
    size = np.where(exponent == 255, np.where(fraction == 0, np.inf, np.nan), size)
    return np.where(sign == 1, -size, size)


def nearest(x: np.ndarray) -> np.ndarray:
    """Return the pattern nearest to each float32 that is no NaN, of two the even one, by search among all magnitudes."""
    finite = value_of(np.arange(0x7F80))
    # Infinity stands where the next number would be.
    size, numbers = np.minimum(np.abs(x.astype("f8")), 2.0**128), np.append(finite, 2.0**128)
    above = np.searchsorted(numbers, size).clip(1)
    up, down = numbers[above] - size, size - numbers[above - 1]
    found = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    return np.where(np.signbit(x), found | 0x8000, found).astype(np.uint16)


def rounded(x: np.ndarray) -> np.ndarray:
    """Return float32 numbers, none of them NaN, rounded to bfloat16."""
    return value_of(nearest(x)).astype("f4")
