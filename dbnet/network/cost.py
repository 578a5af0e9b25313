"""What a rank and its links can do, in four numbers: the model by which the cheapest cut is chosen.

A step's predicted time is flops / rate, and for each message its latency + bytes / bandwidth (and bytes / memory for what is
copied in and out of buffers). Only the order of two cuts matters, so round numbers of a present core and network do.
"""

from __future__ import annotations

from typing import NamedTuple


class Machine(NamedTuple):
    """What the cost model assumes of a rank and its links: flop/s, bytes/s sent, seconds per message, bytes/s copied."""

    rate: float = 60e9
    bandwidth: float = 4e9
    latency: float = 3e-6
    memory: float = 8e9
