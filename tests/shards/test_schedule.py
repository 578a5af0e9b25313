"""No fetch of a recorded run is torn, and the clock that it counts from is exactly what it has read."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pytest
from harness import Late

from dbnet.comm.topology import Topology
from dbnet.comm.turns import take_turns
from dbnet.comm.window import Field, LocalWindow, WindowLayout
from dbnet.core.ranges import Range
from dbnet.core.registry import make
from dbnet.core.vector import check_sum
from dbnet.network.model import Footprint, Piece
from dbnet.shards.routes import Rings, routes
from dbnet.shards.schedule.fetching import RecordingStore
from dbnet.shards.schedule.log import FETCH, PartLog, PartOfSchedule
from dbnet.shards.schedule.serving import CountingShard
from dbnet.shards.schedule.slices import slice_pieces
from dbnet.shards.store import WindowStore

SIZE, SLICE = 10, 4


class Crumbling(Late):
    """A window whose transfers take place number by number, with something else in between."""

    def get(self, rank, field, out, start=0):
        flat = out.reshape(-1)
        for i in range(flat.size):
            super().get(rank, field, flat[i : i + 1], start + i)


def halved(shard, count):
    """Make `count` updates slice by slice, each adding 1 to its parameters; yield in the middle of each and at its end."""
    for number, piece in zip(range(count), cycle(shard.pieces), strict=False):
        w, middle = shard.params[piece.lo : piece.lo + piece.size], piece.size // 2
        shard.versions[number % len(shard.pieces)] += 1
        w[:middle] += 1
        yield
        w[middle:] += 1
        shard.versions[number % len(shard.pieces)] += 1
        yield


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_a_fetch_is_torn_unless_it_is_recorded(recording, seed, tmp_path):
    world, dtype = Topology(1, 1), np.dtype("f8")
    foot = [Piece(Range(0, SIZE), 0)]
    pieces = slice_pieces(routes(foot, [Range(0, SIZE)]), SLICE)
    assert [(piece.lo, piece.size, piece.slice) for piece in pieces] == [(0, 4, 0), (4, 4, 1), (8, 2, 2)]
    rings = Rings([Range(0, SIZE)], [[0]], dtype, SLICE * 8, 4)
    fields = [*rings.fields(0, world), Field("version", "int64", (len(pieces),))]
    memory = LocalWindow([WindowLayout(()), WindowLayout(fields), WindowLayout(())])
    local = memory.at(1).local
    rule = make("shards.rules", {"kind": "sgd", "rate": 1.0}, "rule")
    shard = CountingShard(Range(0, SIZE), rule, local["params"], local["clock"], lambda: 0.0, None, pieces, local["version"])
    updates, rng = halved(shard, 60), np.random.default_rng(seed)
    window = Crumbling(memory, lambda rank: rng.random() < 0.3 and next(updates, None))
    parts = (window, world, (0, 0), Footprint(foot, foot, SIZE), rings)
    with_log = PartLog(tmp_path / "replica-0.0", {}, 1 << 20, print)
    store = RecordingStore(with_log, foot, [pieces], np.zeros(1, np.int64), *parts) if recording else WindowStore(*parts)
    torn = 0
    for _ in range(6):
        take_turns([store.fetch()])
        slices = [store.w[piece.lo : piece.lo + piece.size] for piece in pieces]
        torn += sum(np.unique(part).size > 1 for part in slices)
        if recording:
            # The parameters count the updates: what was read is of the oldest clock that they show.
            assert store.clocks[0] == min(part[0] for part in slices)
    assert torn == 0 if recording else torn > 0
    if recording:
        assert store.again > 0
        with_log.close()
        part = PartOfSchedule(with_log.path)
        read = np.cumsum([entry.array("<i4") for entry in part.entries if entry.kind == FETCH], axis=0)[-1]
        assert read.tolist() == [part[0] for part in slices] and part.whole


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_check_sum_sees_a_bit_and_an_exchange():
    x = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    for dtype in (np.float32, np.float64):
        one, two, three = (x.astype(dtype) for _ in range(3))
        two.view(np.uint8)[77] ^= 1
        three[[5, 6]] = three[[6, 5]]
        assert len({check_sum(one), check_sum(two), check_sum(three)}) == 3
        assert 0 <= check_sum(one) < 1 << 32
    assert check_sum(x) == check_sum.py_func(x)
