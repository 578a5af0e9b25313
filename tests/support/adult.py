"""Data like LIBSVM's a9a, generated: 123 binary features of which one in each of 14 groups may be set, two classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

GROUPS = (5, 8, 5, 16, 5, 7, 14, 6, 5, 2, 3, 3, 5, 39)


def write(path: Path, examples: int = 4000) -> Path:
    """Write a file in LIBSVM's format."""
    rng = np.random.default_rng(11)
    first, columns = np.cumsum((0, *GROUPS[:-1])), []
    for lo, size in zip(first, GROUPS, strict=True):
        # Few values of a group are common, as in a census.
        shares = rng.dirichlet(np.full(size, 0.5))
        columns.append(lo + rng.choice(size, examples, p=shares))
    chosen = np.stack(columns, axis=1)
    pull = rng.standard_normal(sum(GROUPS))[chosen].sum(axis=1)
    labels = np.where(pull - np.quantile(pull, 0.7) + rng.logistic(size=examples) > 0, 1, -1)
    # Some answers are missing: else the features of two groups have one sum, and the optimum is badly determined.
    given = rng.random(chosen.shape) < 0.8
    lines = (
        f"{label:+d} " + " ".join(f"{k + 1}:1" for k in row[known]) for label, row, known in zip(labels, chosen, given, strict=True)
    )
    path.write_text("\n".join(lines) + "\n")
    return path
