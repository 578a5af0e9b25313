"""Class by class: counted by hand, the worst of many alone, names that do nothing to a terminal."""

from __future__ import annotations

import numpy as np

from dbnet.data.confusion import confusion, table


def test_classes_are_counted_and_named() -> None:
    labels, taken = np.array([0, 0, 0, 0, 2, 2, 2]), np.array([0, 1, 2, 2, 2, 2, 0])
    counts = confusion(labels, taken, 4)
    assert counts.tolist() == [[1, 1, 2, 0], [0] * 4, [1, 0, 2, 0], [0] * 4]
    head, *lines = table(counts, ["cat", "dog", "a\x1b[31mnt", "bee"])
    assert head.split() == ["class", "examples", "right", "accuracy", "otherwise", "taken", "for"]
    assert lines[0].split() == ["0", "cat", "4", "1", "0.2500", "'2", "a\\x1b[31mnt'", "(2),", "1", "dog", "(1)"]
    assert lines[1].split()[-6:] == ["3", "2", "0.6667", "0", "cat", "(1)"] and len(lines) == 2


def test_of_many_classes_the_worst_are_shown() -> None:
    counts = np.eye(100, dtype=np.int64) * 5
    counts[70, 3] = 5
    lines = table(counts, [])
    assert len(lines) == 42 and any(line.split() == ["70", "10", "5", "0.5000", "3", "(5)"] for line in lines)
    assert lines[-1] == "These are the 40 with the lowest accuracy; 60 more classes have examples."
