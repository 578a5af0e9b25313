"""TODO."""

from __future__ import annotations

from typing import NamedTuple


class Machine(NamedTuple):
    """What the cost model assumes of a rank and its links: flop/s, bytes/s sent, seconds per message, bytes/s copied."""

    rate: float = 60e9
    bandwidth: float = 4e9
    latency: float = 3e-6
    memory: float = 8e9
