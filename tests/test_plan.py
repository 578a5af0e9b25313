"""What `dbnet plan` says of memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbnet import config
from dbnet.build import setup, window_layouts


@pytest.mark.parametrize(("replicas", "shards"), [(100, 1), (4, 3)])
def test_rings_are_no_larger_than_what_is_pushed(replicas: int, shards: int, run_file: Path) -> None:
    ready = setup(config.load(run_file, [f"topology.replicas={replicas}", f"topology.shards={shards}"]))
    size = ready.model.layout.size
    rings = sum(layout.nbytes for layout in window_layouts(ready)[1 : 1 + shards])
    assert rings <= 1.1 * 4 * (size + replicas * 8 * (size + shards)) + 4096 * replicas * shards
    ready = setup(config.load(run_file, ["method.slot=64"]))
    assert ready.rings.slot == 64
