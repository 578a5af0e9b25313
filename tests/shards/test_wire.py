"""What travels as bfloat16 is rounded once on each way, by any store to the same bits; shards hold and add float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bfloat16 import rounded

from dbnet.comm.topology import Topology
from dbnet.comm.turns import Turns, take_turns
from dbnet.comm.window import Field, LocalWindow, WindowLayout
from dbnet.core.config import load
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range, split
from dbnet.core.registry import make
from dbnet.network.model import Footprint, Piece
from dbnet.run.setup import setup
from dbnet.shards.local_store import LocalStore, Store
from dbnet.shards.push import Intake
from dbnet.shards.routes import Rings, routes
from dbnet.shards.schedule.fetching import RecordingStore
from dbnet.shards.schedule.log import PartLog
from dbnet.shards.schedule.serving import CountingShard
from dbnet.shards.schedule.slices import slice_pieces
from dbnet.shards.shard import Shard
from dbnet.shards.store import Inbox, WindowStore

SIZE, RATE, SLOT = 23, 0.01, 10
RANGES, FOOT = list(split(SIZE, 2)), [Piece(Range(0, SIZE), 0)]


class Ends:
    """Two shards and the replica's end of one kind."""

    def __init__(self, kind: str, start: np.ndarray, folder: Path) -> None:
        world, rings = Topology(2, 1), Rings(RANGES, [[0], [0]], np.dtype("f4"), SLOT, 2, narrow=True)
        pieces = [slice_pieces([way], rings.elements) for way in routes(FOOT, RANGES)]
        fields = [[*rings.fields(s, world), Field("version", "int64", (len(pieces[s]),))] for s in range(2)]
        memory, self.flat = LocalWindow([WindowLayout(()), *map(WindowLayout, fields), WindowLayout(())]), start.copy()
        self.shards: list[Shard] = []
        for s, part in enumerate(RANGES):
            local, rule = memory.at(1 + s).local, make("shards.rules", {"kind": "sgd", "rate": RATE}, "rule")
            params = self.flat[part.slice] if kind == "local" else local["params"]
            params[:] = start[part.slice]
            parts = (part, rule, params, local["clock"], lambda: 0.0, None if kind == "local" else local["rounded"])
            self.shards.append(CountingShard(*parts, pieces[s], local["version"]) if kind == "recording" else Shard(*parts))
            self.shards[s].round(slice(None))
        ways, whole = routes(FOOT, RANGES), Footprint(FOOT, FOOT, SIZE)
        self.inboxes = [Inbox(memory.at(1 + s), [Intake(self.shards[s])], world, [0], [ways[s]]) for s in range(2)]
        parts = (memory, world, (0, 0), whole, rings, kind == "overlap")
        self.store: Store = WindowStore(*parts)
        if kind == "local":
            self.store = LocalStore(self.flat, self.shards, 0, share=True, narrow=True)
        if kind == "recording":
            log = PartLog(folder / "replica-0.0", {}, 1 << 20, print)
            self.store = RecordingStore(log, FOOT, pieces, np.zeros(2, int), True, *parts)

    def run(self, turns: Turns) -> None:
        def shard() -> Iterator[None]:
            while not done:
                [inbox.drain() for inbox in self.inboxes]
                yield None

        def replica() -> Turns:
            yield from turns
            done.append(True)

        done: list[bool] = []
        take_turns([replica(), shard()])

    @property
    def params(self) -> np.ndarray:
        return np.concatenate([shard.params for shard in self.shards])


KINDS = ["window", "overlap", "recording", "local"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_way_is_rounded_once_and_shards_hold_float32(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    wanted, snapshot = rng.standard_normal(SIZE, np.float32), np.zeros(SIZE, "f4")
    ends = Ends(kind, wanted, tmp_path)
    store = ends.store
    for step in range(5):
        ends.run(store.fetch())
        ends.run(store.arrive())
        assert store.w.tobytes() == rounded(wanted).tobytes() != wanted.tobytes()
        g = rng.standard_normal(SIZE, np.float32)
        store.g[:] = g
        store.accrued(first=True)
        ends.run(store.push(1, step))
        ends.run(store.confirm())
        # The rule's arithmetic, in float32, of the gradient as it came.
        wanted = wanted - np.float32(RATE) * rounded(g)
        np.testing.assert_allclose(ends.params, wanted, rtol=2e-7)
        assert (np.abs(ends.params - rounded(ends.params)) > 0).any()
        wanted = ends.params
        ends.run(store.snapshot(snapshot))
        assert snapshot.tobytes() == wanted.tobytes(), "an evaluation is not of what the shards hold"
    assert store.counts.bytes_fetched == 5 * 2 * SIZE
    store.close()


@pytest.mark.parametrize("kind", KINDS)
def test_what_rounding_makes_infinite_is_refused(kind: str, tmp_path: Path) -> None:
    ends = Ends(kind, np.zeros(SIZE, "f4"), tmp_path)
    ends.run(ends.store.fetch())
    ends.store.g[:] = 1.0
    ends.store.g[3] = -np.finfo("f4").max
    ends.store.accrued(first=True)
    ends.run(ends.store.push(1, 0))
    ends.run(ends.store.confirm())
    refused = [refusal for shard in ends.shards for refusal in shard.take_refused()]
    assert [(refusal.index, refusal.value) for refusal in refused] == [(3, -np.inf)]
    assert [int(shard.clock[0]) for shard in ends.shards] == [0, 1]
    ends.store.close()


def test_slices_hold_twice_as_much(run_file: Path) -> None:
    plain, narrow = (setup(load(run_file, [f"method.wire={wire}", "method.slot=256"])).rings for wire in ("float32", "bfloat16"))
    assert narrow.elements == 2 * plain.elements == 128 and plain.wire == np.dtype("f4")
    fields = [{field.name: field.nbytes for field in rings.fields(0, Topology(2, 2))} for rings in (plain, narrow)]
    assert fields[0]["ring"] == fields[1]["ring"] and fields[0]["params"] == fields[1]["params"] == 2 * fields[1]["rounded"]


def test_networks_of_float64_and_batch_methods_are_refused(run_file: Path) -> None:
    with pytest.raises(UserError, match=r"^method.wire = 'bfloat16' is for networks of float32; leave it out with .* 'float64'.$"):
        setup(load(run_file, ["method.wire=bfloat16", "model.dtype=float64"]))
    with pytest.raises(UserError, match=r"Unknown key 'method.wire'"):
        load(run_file, ["method={kind='sandblaster', wire='bfloat16'}"])
