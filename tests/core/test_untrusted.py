"""Files that somebody else has made: nothing outside them is read, nothing hangs, no size is believed; verify names what is bad."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from finished import ROOT, Finished
from h5py._objects import phil
from points import SIZE, VALUES, write

from dbnet.checkpoint import format
from dbnet.checkpoint.format import create, part_of, store
from dbnet.checkpoint.reader import Checkpoint
from dbnet.checkpoint.verify import damage
from dbnet.core.errors import UserError
from dbnet.core.untrusted.mappings import checksum
from dbnet.core.untrusted.opening import opened
from dbnet.data.file import DataFile, read_inputs
from dbnet.data.subsets import SHARE
from dbnet.monitor.results import Run

Command = Callable[..., Finished]
# A command that hangs in HDF5 cannot be interrupted: it gets a process of its own.
LIMIT = 60


def put_link(file: h5py.File, name: str, target: str) -> None:
    file[name] = h5py.ExternalLink(target, "/x")


def put_external(file: h5py.File, name: str, target: str) -> None:
    file.create_dataset(name, (8, 3), np.uint8, external=[(target, 0, 24)])


def put_virtual(file: h5py.File, name: str, target: str) -> None:
    layout = h5py.VirtualLayout((8, 3), np.float32)
    layout[:] = h5py.VirtualSource(target, "x", (8, 3))
    file.create_virtual_dataset(name, layout)


def put_endless(file: h5py.File, name: str, target: str) -> None:
    """Of this one the shape alone opens the other file."""
    layout, endless = h5py.VirtualLayout((8, 3), np.float32, maxshape=(None, 3)), slice(0, h5py.h5s.UNLIMITED)
    layout[endless, :] = h5py.VirtualSource(target, "x", (8, 3), maxshape=(None, 3))[endless, :]
    file.create_virtual_dataset(name, layout)


def put_itself(file: h5py.File, name: str, _: str) -> None:
    put_virtual(file, name, ".")


LEADING = {"link": put_link, "external": put_external, "virtual": put_virtual, "endless": put_endless, "itself": put_itself}


@pytest.mark.parametrize("how", LEADING)
def test_data_that_lead_out_of_their_file(how: str, make_data: Callable[..., Path]) -> None:
    """The other file is a pipe: whoever opens it hangs, and so would this test."""
    path = make_data()
    os.mkfifo("pipe")
    with h5py.File(path, "a") as file:
        del file["train/x"]
        LEADING[how](file, "train/x", "pipe")
    for read in (lambda: DataFile(path), lambda: read_inputs(path, "train", (3,))):
        with pytest.raises(UserError, match=r"/train/x (is a link to|takes its values from|is stored in) (other|another) file"):
            read()


def test_links_within_a_file_are_good(make_data: Callable[..., Path]) -> None:
    path = make_data(test__x=None, test__y=None)
    with h5py.File(path, "a") as file:
        file["test"] = h5py.SoftLink("/train")
        file["train/again"] = file["train"]
    data = DataFile(path)
    assert data.sizes == {"train": 8, "test": 8} and np.array_equal(data.read("test").x, data.read("train").x)


def test_pipes_folders_and_devices(place: Path, dbnet: Command) -> None:
    os.mkfifo("pipe")
    for name, kind in (("pipe", "a pipe"), (".", "a folder"), ("/dev/null", "a device")):
        for look in (DataFile, Checkpoint, Run, lambda name: read_inputs(name, "test", (3,))):
            with pytest.raises(UserError, match=f"cannot be read: it is {kind}"):
                look(name)
        for words in (["inspect", name], ["inspect", "--verify", name], ["plot", name], ["evaluate", name]):
            done = dbnet(*words)
            assert done.code == 2 and f"'{name}' cannot be read: it is {kind}; give a regular file." in done.err


def test_sizes_that_no_file_has(make_data: Callable[..., Path]) -> None:
    path = make_data(train__y=None)
    with h5py.File(path, "a") as file:
        file.create_dataset("train/y", (1 << 50,), np.int64, chunks=(1024,))
    with pytest.raises(UserError, match="/train/y claims 9,007,199,254,740,992 bytes, of which the file holds 0"):
        DataFile(path)


def test_what_is_squeezed_hard_is_good(place: Path) -> None:
    with h5py.File("zeros.h5", "w") as file:
        file.create_dataset("x", data=np.zeros(1 << 24, np.uint8), compression="gzip", compression_opts=9, chunks=(1 << 20,))
    with opened("zeros.h5") as file:
        assert file["x"].size == 1 << 24


def test_groups_in_groups_and_in_themselves(place: Path) -> None:
    with h5py.File("deep.h5", "w") as file:
        inner = file
        for _ in range(40):
            inner = inner.create_group("a")
    with h5py.File("round.h5", "w") as file:
        file["a/b/c"] = np.zeros(1)
        file["a/b/d"] = file["a"]
    with pytest.raises(UserError, match="groups in groups"), opened("deep.h5"):
        pass
    with opened("round.h5") as file:
        assert file["a/b/d/b/c"].size == 1


# --- run files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_flipped_byte_in_a_run_file_that_was_not_closed(place: Path) -> None:
    """HDF5 takes it for one that is being written, and tries to read it again and again, twice as long later each time."""
    code = "\n".join(
        [
            "import os, h5py, numpy as np",
            "file = h5py.File('killed.h5', 'w', libver='latest')",
            "data = file.create_dataset('progress', (0,), 'f8', maxshape=(None,), chunks=(64,))",
            "file.swmr_mode = True",
            "data.resize((3000,))",
            "data.flush()",
            "os._exit(0)",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT)
    raw = Path("killed.h5").read_bytes()
    look = (
        "import sys\nfrom dbnet.core.untrusted.opening import opened\nfound = 0\nfor at in range(12, 400, 17):\n"
        "    raw = bytearray(open('killed.h5', 'rb').read()); raw[at] ^= 4; open('flipped.h5', 'wb').write(raw)\n"
        "    try:\n        with opened('flipped.h5', growing=True) as file: file['progress'][:]\n"
        "    except Exception: found += 1\nprint(found)\n"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=LIMIT, env=with_path())
    assert int(done.stdout) > 4, done.stderr
    with opened("killed.h5", growing=True) as file:
        assert file["progress"].shape == (3000,) and len(raw) > 400


def with_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# --- checkpoints --------------------------------------------------------------------------------------------------------------


def replace(path: Path, name: str, values: Any) -> None:
    """Write a dataset anew, with checksums."""
    with h5py.File(path, "a") as file:
        del file[name]
        store(file, name, values)


def both(master: Path, said: str) -> None:
    """Verify names it, and nobody uses it."""
    flaws = damage(master)
    assert any(said in flaw for flaw in flaws), flaws
    assert len(flaws) == 1


def test_parts_that_have_changed_places(tmp_path: Path) -> None:
    master = write(tmp_path, shards=2).resolve()
    one, two, other = part_of(master, 0), part_of(master, 1), tmp_path / "other.h5"
    one.rename(other)
    two.rename(one)
    other.rename(two)
    flaws = damage(master)
    assert len(flaws) == 2 and "000001.shard-0.h5' is part 1 of this checkpoint, not 0" in flaws[0]
    with pytest.raises(UserError, match="is part 1 of this checkpoint, not 0"):
        Checkpoint(master)


def test_a_part_that_was_written_anew(tmp_path: Path) -> None:
    master = write(tmp_path).resolve()
    with h5py.File(part_of(master, 1)) as file:
        values, clock, extent = file["params"][:], file["clock"][:], file["range"][:]
    replace(part_of(master, 1), "params", values + np.float32(1e-6))
    both(master, "000001.shard-1.h5': /params holds other values than were written")
    replace(part_of(master, 1), "params", values)
    assert damage(master) == []
    replace(part_of(master, 1), "clock", clock + 1)
    both(master, "000001.shard-1.h5' has another /range or /clock")
    replace(part_of(master, 1), "clock", clock)
    replace(part_of(master, 1), "range", extent + 1)
    both(master, "000001.shard-1.h5' has another /range or /clock")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    master = write(tmp_path).resolve()
    with h5py.File(part_of(master, 2)) as file:
        values, lo = file["params"][:], int(file["range"][0])
    values[3] = value
    replace(part_of(master, 2), "params", values)
    flaws = damage(master)
    assert f"000001.shard-2.h5': /params, elements 0 .. {len(values)}: element 3 is {value}" in flaws[0]
    with pytest.raises(UserError, match="holds values that are not finite"):
        Checkpoint(master).read("params", Checkpoint(master).ranges[2], np.zeros(SIZE - lo, np.float32))


def test_a_bad_element_is_counted_from_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "CHUNK", 16)
    master = write(tmp_path).resolve()
    with h5py.File(part_of(master, 1), "a") as file:
        file["params"][6] = np.nan
    assert damage(master)[0] == f"'{part_of(master, 1)}': /params, elements 4 .. 8: element 6 is nan"


def test_masters_that_map_other_files(tmp_path: Path) -> None:
    master = write(tmp_path).resolve()
    for target in ("/etc/passwd", "../other.shard-0.h5", "pipe"):
        with h5py.File(master, "a") as file:
            del file["params"]
            put_virtual(file, "params", target)
        with pytest.raises(UserError, match="/params takes its values from other files"):
            Checkpoint(master)
        both(master, "/params takes its values from other files")
    with h5py.File(master, "a") as file:
        del file["params"]
        layout = h5py.VirtualLayout((SIZE,), np.float32)
        layout[:] = h5py.VirtualSource("000009.shard-0.h5", "params", (SIZE,))
        file.create_virtual_dataset("params", layout)
    both(master, "/params does not map the parts")
    with h5py.File(master, "a") as file:
        del file["params"]
        layout, (one, two, three) = h5py.VirtualLayout((SIZE,), np.float32), Checkpoint(write(tmp_path, 2), parts=False).ranges
        for shard, part in ((1, one), (0, two), (2, three)):
            layout[part.slice] = h5py.VirtualSource(f"000001.shard-{shard}.h5", "params", (part.size,))
        file.create_virtual_dataset("params", layout)
    both(master, "/params does not map the parts")


@pytest.mark.long
def test_any_flipped_byte_of_the_mappings(tmp_path: Path) -> None:
    """HDF5 decodes them before it looks at their checksum, and crashes: in a process of its own."""
    master = write(tmp_path).resolve()
    raw = master.read_bytes()
    heap = raw.index(b"GCOL")
    size = int.from_bytes(raw[heap + 24 : heap + 32], "little")
    look = (
        "import sys\nfrom dbnet.core.errors import UserError\nfrom dbnet.core.files import UNREADABLE\n"
        "from dbnet.core.untrusted.opening import opened\n"
        "path, lo, hi = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n"
        "raw = open(path, 'rb').read()\n"
        "for at in range(lo, hi):\n"
        "    for bit in (1, 16):\n"
        "        flipped = bytearray(raw); flipped[at] ^= bit; open(path, 'wb').write(flipped)\n"
        "        try:\n            with opened(path, virtual=True) as file: file['params'].id.get_create_plist()\n"
        "        except (UserError, *UNREADABLE) as error: print(at, bit, error)\n"
    )
    words = [sys.executable, "-c", look, str(master), str(heap), str(heap + 2 * size + 60)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT, env=with_path())
    assert done.returncode == 0, (done.returncode, done.stderr)
    said = {tuple(map(int, line.split()[:2])): line for line in done.stdout.splitlines()}
    for at in range(heap + 32, heap + 32 + size):
        assert all("the mappings of /params are damaged" in said[at, bit] for bit in (1, 16))


def test_the_checksum_is_that_of_hdf5() -> None:
    """The values are those that the author of the algorithm gives."""
    assert checksum(b"") == 0xDEADBEEF and checksum(b"Four score and seven years ago") == 0x17770551


def big(file: h5py.File, name: str, shape: tuple[int, ...]) -> None:
    dtype = file[name].dtype
    del file[name]
    create(file, name, shape, dtype)


ODD: dict[str, Callable[[h5py.File], None]] = {
    "no replicas": lambda file: store_over(file, "replicas", file["replicas"][:0]),
    "one replica too few": lambda file: store_over(file, "replicas", file["replicas"][:1]),
    "huge replicas": lambda file: big(file, "replicas", (1 << 40,)),
    "huge clock": lambda file: big(file, "clock", (1 << 40, 2)),
    "wide clock": lambda file: big(file, "clock", (3, 1 << 40)),
    "other clock": lambda file: store_over(file, "clock", file["clock"][:, :0]),
    "chain of numbers": lambda file: store_over(file, "chain", [1, 2]),
    "chain of text": lambda file: store_over(file, "chain", "run"),
    "chain of empty tables": lambda file: store_over(file, "chain", [{}]),
    "chain is a table": lambda file: store_over(file, "chain", {"a": 1}),
    "chain is an empty table": lambda file: store_over(file, "chain", {}),
    "parts of text": lambda file: store_over(file, "parts", "x"),
    "ranges with a gap": lambda file: store_over(file, "ranges", file["ranges"][:] + np.array([[0, 0], [1, 0], [0, 0]])),
}


def store_over(file: h5py.File, name: str, values: Any) -> None:
    del file[name]
    store(file, name, values)


@pytest.mark.parametrize("case", ODD)
def test_odd_masters(case: str, tmp_path: Path, dbnet: Command) -> None:
    link = write(tmp_path)
    with h5py.File(link, "a") as file:
        ODD[case](file)
    assert len(damage(link)) == 1
    with pytest.raises(UserError):
        Checkpoint(link)
    for words, code in ((["inspect"], 2), (["inspect", "--verify"], 1), (["evaluate"], 2)):
        done = dbnet(*words, link)
        assert done.code == code and (done.err + done.out).count("\n") == 1 and "Traceback" not in done.err, done


def test_shares_that_cannot_be(tmp_path: Path) -> None:
    rows = {(0, 0, 5, 1, 4): 1.8, (1, 3, 3, 2, 0): 0.0, (0, 0, 5, 1, 6): None, (2, 0, 5, 0, 0): None, (0, 5, 4, 0, 0): None}
    for number, (row, progress) in enumerate(rows.items(), 1):
        link = write(tmp_path, number)
        with h5py.File(link, "a") as file:
            store(file, "table.shares", np.array([row], SHARE))
        if progress is None:
            with pytest.raises(UserError, match=r"/table\.shares is damaged"):
                Checkpoint(link)
        else:
            assert Checkpoint(link).progress == progress


def test_a_dataset_whose_chunks_were_never_written(tmp_path: Path) -> None:
    master = write(tmp_path).resolve()
    with h5py.File(part_of(master, 0), "a") as file:
        big(file, "params", file["params"].shape)
    both(master, "/params: some of its chunks were never written")


def test_pipes_in_the_place_of_masters_and_parts(run_file: Path, dbnet: Command) -> None:
    assert dbnet("train", run_file, "--quiet", "stop.steps=2").code == 0
    folder = Path("out/run.checkpoints")
    os.mkfifo(folder / "000002.h5")
    resumed = dbnet("train", run_file, "--resume", "stop.steps=3", "--quiet")
    assert resumed.code == 0 and "000002.h5' is damaged" not in resumed.out and "it is a pipe" in resumed.err
    shutil.rmtree("out/run-2.checkpoints")
    (folder / "000001.shard-1.h5").unlink()
    os.mkfifo(folder / "000001.shard-1.h5")
    assert "it is a pipe" in dbnet("train", run_file, "--resume").err
    assert "it is a pipe" in dbnet("evaluate", folder / "000001.h5").err
    assert "it is a pipe" in dbnet("inspect", "--verify", folder / "000001.h5").out


def test_the_master_says_what_its_parts_hold(tmp_path: Path) -> None:
    import hashlib

    master = write(tmp_path).resolve()
    with h5py.File(master) as file:
        parts = json.loads(file["parts"][:].tobytes())
    point = Checkpoint(master)
    for shard, part in enumerate(parts):
        mine = VALUES[point.ranges[shard].slice]
        assert part["part"] == shard and part["digests"]["params"] == hashlib.sha256(mine.tobytes()).hexdigest()


def test_what_h5py_has_no_name_for_is_called_under_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads in HDF5 at a time crash it, as now and then a replica that opened its data while it read ahead."""
    master, right, held = write(tmp_path).resolve(), ctypes.CDLL, []

    class Call:
        def __init__(self, path: str) -> None:
            self._call = right(path).H5Pset_metadata_read_attempts

        def __call__(self, access: int, attempts: int) -> int:
            held.append(phil._is_owned())
            self._call.argtypes, self._call.restype = self.argtypes, self.restype
            return self._call(access, attempts)

    def library(path: str) -> SimpleNamespace:
        return SimpleNamespace(H5Pset_metadata_read_attempts=Call(path))

    monkeypatch.setattr("dbnet.core.untrusted.opening.ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": library}))
    with opened(master, virtual=True):
        pass
    assert held == [True]
