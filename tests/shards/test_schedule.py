"""No fetch of a recorded run is torn, and the clock that it counts from is exactly what it has read."""

from __future__ import annotations

import errno
import mmap
import os
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from harness import Late

from dbnet.comm.topology import Topology
from dbnet.comm.turns import result
from dbnet.comm.window import Field, LocalWindow, WindowLayout
from dbnet.core.errors import UserError
from dbnet.core.kernels.vector import check_sum, checked, first_bad
from dbnet.core.ranges import Range
from dbnet.core.registry import make
from dbnet.network.model import Footprint, Piece
from dbnet.shards.routes import Rings, routes
from dbnet.shards.schedule import fetching, log
from dbnet.shards.schedule import slices as slices_module
from dbnet.shards.schedule.fetching import RecordingStore
from dbnet.shards.schedule.log import END, FETCH, FULL, PUSH, TAKE, TAKES, PartLog, PartOfSchedule
from dbnet.shards.schedule.paths import tail_of
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


@pytest.mark.parametrize("way", ["recorded", "in pieces", "in groups", ""])
@pytest.mark.parametrize("seed", range(8))
def test_a_fetch_is_torn_unless_it_is_recorded(way, seed, tmp_path, monkeypatch):
    recording = bool(way)
    if way == "in pieces":
        monkeypatch.setattr(slices_module, "SHORTEST", 3)
    if way == "in groups":
        monkeypatch.setattr(fetching, "GROUP", 8 * SLICE)
    world, dtype = Topology(1, 1), np.dtype("f8")
    foot = [Piece(Range(0, SIZE), 0)]
    pieces = slice_pieces(routes(foot, [Range(0, SIZE)]), SLICE)
    cut = [(0, 3, 0), (3, 1, 0), (4, 3, 1), (7, 1, 1), (8, 2, 2)] if way == "in pieces" else [(0, 4, 0), (4, 4, 1), (8, 2, 2)]
    assert [(piece.lo, piece.size, piece.slice) for piece in pieces] == cut
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
    # The clock of a run that went on from a checkpoint.
    base = np.array([7])
    store = RecordingStore(with_log, foot, [pieces], base, True, *parts) if recording else WindowStore(*parts)
    torn = 0
    for _ in range(6):
        result(store.fetch())
        slices = [store.w[piece.lo : piece.lo + piece.size] for piece in pieces]
        torn += sum(np.unique(part).size > 1 for part in slices)
        if recording:
            # The parameters count the updates: what was read is of the oldest clock that they show.
            assert store.clocks[0] - 7 == min(part[0] for part in slices)
    assert torn == 0 if recording else torn > 0
    if recording:
        assert store.again > 0
        with_log.close()
        part = PartOfSchedule(with_log.path)
        read = [entry.array("<i8") // 2 for entry in part.entries if entry.kind == FETCH][-1]
        assert read.tolist() == [part[0] for part in slices] and part.whole


def store_of(folder, world, feet, change=lambda rank: None, counted=True, used=None, more=()):
    """Return partition 0's end over one shard, and the shard's numbers of changes."""
    size, dtype, used = feet[-1][-1].range.hi, np.dtype("f8"), used or feet[0]
    pieces = slice_pieces([routes(foot, [Range(0, size)])[0] for foot in feet], SLICE)
    rings = Rings([Range(0, size)], [list(range(len(feet)))], dtype, SLICE * 8, 4)
    layouts = [WindowLayout([*rings.fields(0, world), Field("version", "int64", (len(pieces),))]), *[WindowLayout(())] * len(feet)]
    memory = LocalWindow([WindowLayout(()), *layouts])
    parts = (Crumbling(memory, change), world, (0, 0), Footprint(used, feet[0], used[-1].range.hi), rings, *more)
    log = PartLog(folder / "replica-0.0", {}, 1 << 20, print)
    made = RecordingStore(log, used, [pieces], np.zeros(1, np.int64), counted, *parts)
    return made, memory.at(1).local["version"]


def test_changes_of_what_is_not_fetched_do_not_tear_a_fetch(tmp_path):
    changes = []

    def change(rank):
        if len(changes) < 100:
            changes.append(rank)
            versions[2:] += 1

    feet = [[Piece(Range(0, 8), 0)], [Piece(Range(8, 16), 0)]]
    store, versions = store_of(tmp_path, Topology(1, 1, 2), feet, change)
    result(store.fetch())
    assert changes and store.again == 0 and store.clocks[0] == 0
    store.close()


@pytest.mark.parametrize(("seconds", "times"), [(1.0, 4), (1e-9, 1)])
def test_a_long_fetch_gives_way_after_each_moment(seconds, times, tmp_path, monkeypatch):
    """Of three groups, and in any case before the gradient."""
    monkeypatch.setattr(fetching, "GROUP", SLICE * 8)
    clock = (seconds * tick for tick in range(1000))
    store, _ = store_of(tmp_path, Topology(1, 1), [[Piece(Range(0, 3 * SLICE), 0)]], more=(False, clock.__next__))
    assert list(store.fetch()) == [None] * times
    store.close()


def test_what_lies_between_two_pieces_is_not_read_with_them(tmp_path, monkeypatch):
    """It was read before, in a group of its own, and is changed when that is over."""
    monkeypatch.setattr(fetching, "GROUP", 2 * SLICE * 8)
    gets = []

    def change(rank):
        gets.append(rank)
        # Two numbers, eight values, the numbers again and those of the next two.
        if len(gets) == 15:
            params[4:12], versions[:2] = 1, 2

    feet = [[Piece(Range(4, 12), 0)], [Piece(Range(0, 4), 0), Piece(Range(12, 16), 4)]]
    store, versions = store_of(tmp_path, Topology(1, 1, 2), feet, change, used=[Piece(Range(0, 16), 0)])
    params = store._window.at(1).local["params"]
    result(store.fetch())
    assert len(gets) == 2 * 12 and store.again == 0 and not store.w.any() and params.any()
    store.close()


def test_a_fetch_waits_for_the_end_of_an_update_and_says_so(tmp_path):
    """The shard may have been put off its core in the middle of it: whoever only looked on would keep it from there."""
    store, versions = store_of(tmp_path, Topology(1, 1), [[Piece(Range(0, 8), 0)]])
    versions[1] = 3
    fetch = store.fetch()
    waits = [next(fetch) for _ in range(40)]
    assert waits[0] is None and waits[-1].reason == "a replica waits for shard 0 to end an update"
    versions[1] = 4
    result(fetch)
    assert store.again == 1 and store.clocks[0] == 0
    store.close()


@pytest.mark.parametrize("counted", [True, False])
def test_a_clock_is_read_where_it_does_not_count_changes(counted, tmp_path):
    """As of a batch of gradients that was refused: the clock goes on, and no parameter has changed."""
    store, versions = store_of(tmp_path, Topology(1, 1), [[Piece(Range(0, 8), 0)]], counted=counted)
    versions[:] = 4
    for clock, found in ((3, 3), (1, 2)):
        store._window.at(1).local["clock"][0] = clock
        result(store.fetch())
        assert store.clocks[0] == (2 if counted else found)
    store.close()


@pytest.mark.parametrize("partitions", [1, 2])
def test_a_fetch_is_written_down_before_anything_of_it_leaves(partitions, tmp_path):
    """Of a cut replica at once, for partitions exchange values; otherwise with what comes next, each in its order."""
    store, versions = store_of(tmp_path, Topology(1, 1, partitions), [[Piece(Range(0, 8), 0)]] * partitions)

    def kinds():
        return [entry.kind for entry in PartOfSchedule(tmp_path / "replica-0.0").entries]

    versions[:] = 2
    result(store.fetch())
    assert kinds() == ([] if partitions == 1 else [FETCH])
    versions[:] = 4
    result(store.fetch())
    assert kinds() == [FETCH, FETCH]
    result(store.fetch())
    store.push(1, 0)
    assert kinds() == [FETCH, FETCH, FETCH, PUSH]
    result(store.fetch())
    store.close()
    part = PartOfSchedule(tmp_path / "replica-0.0")
    assert kinds() == [FETCH, FETCH, FETCH, PUSH, FETCH, END] and part.whole
    assert [int(entry.array("<i8")[0]) for entry in part.entries if entry.kind == FETCH] == [2, 4, 4, 4]


def test_a_plan_adds_up_each_piece_once(tmp_path, monkeypatch):
    count, stops, read = 60, [], RecordingStore._read_of

    class Place:
        def __init__(self, place):
            self.start, self._stop = place.start, place.stop

        @property
        def stop(self):
            stops.append(self)
            return self._stop

    def counted(self, *parts):
        return [(rank, there, Place(place)) for rank, there, place in read(self, *parts)]

    monkeypatch.setattr(RecordingStore, "_read_of", counted)
    store, versions = store_of(tmp_path, Topology(1, 1), [[Piece(Range(0, SLICE * count), 0)]])
    assert len(versions) == count and count <= len(stops) < 5 * count
    store.close()


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


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("size", [1, 4096, 9999])
def test_one_pass_finds_what_two_find(dtype, size):
    x = np.random.default_rng(size).standard_normal(size).astype(dtype)
    largest = float(x.dtype.type(1e10))
    x[size // 3] = -largest
    for place, value in ((None, 0.0), (size - 1, np.nan), (size // 2, -np.inf), (0, np.nextafter(x.dtype.type(1e10), np.inf))):
        if place is not None:
            x[place] = value
        bad = first_bad(x, largest)
        assert checked(x, largest) == (bad, check_sum(x)) and bad == (-1 if place is None else place)


def said(path):
    """Return what a part says, slices taken one by one."""
    out = []
    for entry in PartOfSchedule(path).entries:
        out += entry.array(TAKE).tolist() if entry.kind == TAKES else [(entry.kind, bytes(entry.content))]
    return out


def test_a_part_can_be_read_whenever_its_writer_is_killed(tmp_path):
    rng, path, wanted = np.random.default_rng(3), tmp_path / "shard-0", []
    writer = PartLog(path, {}, 5000, pytest.fail)
    while path.stat().st_size < 1 << 11:
        if rng.random() < 0.9:
            wanted.append((int(rng.integers(9)), int(rng.integers(1 << 32))))
            writer.take(*wanted[-1])
        else:
            wanted.append((PUSH, rng.bytes(int(rng.choice([0, 24, 1500], p=[0.45, 0.45, 0.1])))))
            writer.add(*wanted[-1])
        assert said(path) == wanted
    # Killed while a block is written: what it was to hold is still in the tail.
    writer.take(1, 2)
    wanted.append((1, 2))
    whole, tail = path.read_bytes(), tail_of(path).read_bytes()
    path.write_bytes(whole + log.block(bytes(900))[:-3])
    assert said(path) == wanted
    # Killed after it was written, and before the tail says so: nothing is there twice.
    path.write_bytes(whole)
    writer._append(b"")
    tail_of(path).write_bytes(tail)
    assert said(path) == wanted[: len(wanted) - said_since(tail)]
    # A host died before its disk had all blocks: what the tail holds does not follow.
    path.write_bytes(whole[: 2 * len(whole) // 3])
    tail_of(path).write_bytes(tail)
    assert len(said(path)) > 20 and said(path) == wanted[: len(said(path))]


def said_since(tail):
    """Return how many things a tail holds."""
    entries = log._entries(tail[log._FIRST : log._BLOCKS.unpack_from(tail, log._BLOCKS.size)[0]])
    return sum(len(entry.array(TAKE)) if entry.kind == TAKES else 1 for entry in entries)


def taking(writer, count, seed=1):
    """Take slices and return what was written down of them."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(count):
        out.append((int(rng.integers(9)), int(rng.integers(1 << 32))))
        writer.take(*out[-1])
        if not writer.open:
            return out[:-1]
    return out


def test_a_part_that_is_full_says_so_and_keeps_what_it_has(tmp_path):
    path, told = tmp_path / "shard-0", []
    writer = PartLog(path, {}, 5000, told.append)
    wanted = taking(writer, 2000)
    assert not writer.open and len(told) == 1 and "record.limit" in told[0]
    writer.add(PUSH, b"late")
    writer.take(1, 2)
    writer.close()
    part = PartOfSchedule(path)
    assert part.full and not part.whole and 900 > len(wanted) > 600 and said(path) == [*wanted, (FULL, b"")]


@pytest.mark.parametrize("limit", [1500, 3000, 9000])
def test_a_part_and_its_tail_never_have_more_than_their_limit(limit, tmp_path):
    path, rng = tmp_path / "shard-0", np.random.default_rng(2)
    writer, most = PartLog(path, {}, limit, lambda _: None), 0
    for _ in range(100):
        taking(writer, 20)
        writer.add(FETCH, rng.bytes(int(rng.integers(200) * rng.integers(10))))
        most = max(most, sum(file.stat().st_size for file in tmp_path.iterdir()))
    assert not writer.open and limit // 2 < most <= limit
    assert PartOfSchedule(path).full


@pytest.mark.parametrize("when", ["first", "middle", "last"])
def test_what_a_full_disk_refuses_is_read_from_the_tail(when, tmp_path, monkeypatch):
    path, told, write, full = tmp_path / "shard-0", [], os.write, when == "first"
    writer = PartLog(path, {}, 20_000, told.append)

    def half(number, data):
        if number != writer._file or not full:
            return write(number, data)
        if len(data) < 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(number, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    wanted = taking(writer, 1000)
    full = True
    wanted += taking(writer, 200 if when == "last" else 1000, seed=2) if writer.open else []
    writer.close(b"state")
    part = PartOfSchedule(path)
    assert said(path) == wanted + [(END, b"state")] * (when == "last") and len(wanted) > 600
    assert part.whole == (when == "last") and not part.full and path.stat().st_size == writer._written
    assert ["No space left" in one for one in told] == [True] * (when != "last")


@pytest.mark.parametrize("limit", [3000, 20_000])
def test_a_part_that_cannot_be_closed_lets_the_run_go_on(limit, tmp_path, monkeypatch):
    path, told, close = tmp_path / "shard-0", [], os.close
    writer = PartLog(path, {}, limit, told.append)

    def lost(number):
        close(number)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    wanted, size = taking(writer, 200), path.stat().st_size
    monkeypatch.setattr(os, "close", lost)
    wanted += taking(writer, 300)
    writer.close()
    monkeypatch.undo()
    assert "may lack entries" in told[-1] and os.strerror(errno.EDQUOT) in told[-1]
    if limit > 3000:
        # The last block never reached the disk.
        path.write_bytes(path.read_bytes()[:size])
        assert said(path) == [*wanted, (END, b"")] and len(told) == 1
    else:
        assert said(path) == [*wanted, (FULL, b"")] and len(told) == 2


def test_a_tail_that_is_left_behind_does_no_harm(tmp_path, monkeypatch):
    path = tmp_path / "shard-0"
    writer = PartLog(path, {}, 20_000, pytest.fail)
    wanted = taking(writer, 1000)

    def refuse(*_, **__):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(Path, "unlink", refuse)
    writer.close()
    assert tail_of(path).exists() and said(path) == [*wanted, (END, b"")]
    tail_of(path).write_bytes(b"")
    assert said(path) == [*wanted, (END, b"")]


@pytest.mark.parametrize("known", [True, False])
def test_a_tail_has_all_its_blocks_before_it_is_written_to(known, tmp_path, monkeypatch):
    """A hole in a mapped file kills its rank once the disk is full."""
    if not known:
        monkeypatch.setattr("dbnet.core.files._ALLOCATE", None)
    PartLog(tmp_path / "shard-0", {}, 1 << 20, print)
    made = tail_of(tmp_path / "shard-0").stat()
    assert 512 * made.st_blocks >= made.st_size == 1 << 16


def test_a_disk_without_room_or_without_mapping_is_named(tmp_path, monkeypatch):
    path, write = tmp_path / "shard-0", os.write

    def mapped(*_):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    def full(number, data):
        if len(data) < 1000:
            return write(number, data)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", mapped)
        with pytest.raises(UserError, match=r"shard-0\.tail' cannot be mapped into memory \(No such device;.*set run.folder"):
            PartLog(path, {}, 1 << 20, print)
    path.unlink()
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=r"Cannot write '.*shard-0' \(No space left on device\).*have room"):
        PartLog(path, {}, 1 << 20, print)


def test_a_part_of_another_dbnet_is_named_as_such(tmp_path):
    path = tmp_path / "shard-0"
    writer = PartLog(path, {}, 1 << 20, pytest.fail)
    # More origins than there were in the formats before.
    writer.take(70_000, 1)
    writer.close()
    assert said(path) == [(70_000, 1), (END, b"")]
    blocks = path.read_bytes()[len(log._FORMAT) :]
    for first, words in {
        b"dbnet schedule 3\n": "an older dbnet, in format 3 ",
        b"dbnet schedule 12\n": "a newer dbnet, in format 12 ",
        b"dbnet schedule x\n": "no part of a recorded schedule",
        b"": "no part of a recorded schedule",
    }.items():
        path.write_bytes(first + blocks)
        with pytest.raises(UserError, match=words):
            PartOfSchedule(path)
