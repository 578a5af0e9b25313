"""How a network does class by class: how many examples of each it takes for what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Of more classes the worst are shown; of what one is taken for, the most frequent.
_SHOWN, _TAKEN = 40, 3


def confusion(labels: np.ndarray, taken: np.ndarray, classes: int) -> np.ndarray:
    """Return how many examples of each class were taken for which [classes, classes].

    Parameters
    ----------
    labels, taken
        The class that each example is of, and the one it is taken for [examples].
    """
    return np.bincount(labels * classes + taken, minlength=classes * classes).reshape(classes, classes)


def table(counts: np.ndarray, names: Sequence[str]) -> list[str]:
    """Return a line for each class with examples: how many, how many of them right, what the others are taken for most often."""
    words = [f"{k} {name}" if name != str(k) else name for k, name in enumerate(names or map(str, range(len(counts))))]
    words = [word if word.isprintable() else repr(word) for word in words]
    examples, right = counts.sum(axis=1), counts.diagonal()
    known = np.flatnonzero(examples)
    worst = known[np.argsort(right[known] / examples[known], kind="stable")][:_SHOWN]
    width = max([5, *(len(words[k]) for k in worst)])
    lines = [f"{'class':<{width}}  examples     right  accuracy  otherwise taken for"]
    for k in np.sort(worst).tolist():
        others = counts[k].copy()
        others[k] = 0
        most = [i for i in np.argsort(-others, kind="stable")[:_TAKEN].tolist() if others[i]]
        mistaken = ", ".join(f"{words[i]} ({others[i]})" for i in most)
        lines.append(f"{words[k]:<{width}}  {examples[k]:>8}  {right[k]:>8}  {right[k] / examples[k]:8.4f}  {mistaken}".rstrip())
    if len(known) > len(worst):
        lines.append(f"These are the {len(worst)} with the lowest accuracy; {len(known) - len(worst)} more classes have examples.")
    return lines
