"""Small kernels that no family's suite covers: interpreted equals compiled, and both equal NumPy."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numba
import numpy as np
import pytest
from bfloat16 import nearest, value_of

from dbnet.core import jit
from dbnet.core.errors import UserError
from dbnet.core.kernels import objects, vector
from dbnet.core.kernels.vector import coarse, narrow, widen
from dbnet.data import batches
from dbnet.network import network, replica
from dbnet.network.layers import dropout, filters
from dbnet.network.layers.activations import ACTIVATIONS
from dbnet.network.losses import softmax
from dbnet.network.losses.base import tally

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = {"float32": {"rtol": 2e-6, "atol": 1e-6}, "float64": {"rtol": 1e-13, "atol": 1e-14}}
FORMULAS = {
    "identity": (lambda z: z, lambda y: np.ones_like(y)),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda y: y * (1 - y)),
    "tanh": (np.tanh, lambda y: 1 - y**2),
    "relu": (lambda z: np.maximum(z, 0), lambda y: (y > 0).astype(y.dtype)),
}


def both(kernel, *arguments):
    """Run a kernel compiled and interpreted on copies of its arguments; return both sets."""
    sets = [[a.copy() if isinstance(a, np.ndarray) else a for a in arguments] for _ in range(2)]
    for function, own in zip((kernel, kernel.py_func), sets, strict=True):
        function(*own)
    return sets


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shared", [1, 3])
def test_activations(name, dtype, shared):
    """Also with a bias that several units share, and with extreme values."""
    rng, tolerance = np.random.default_rng(1), TOLERANCE[dtype]
    z, b = (3 * rng.standard_normal((9, 11))).astype(dtype), rng.standard_normal(9 // shared).astype(dtype)
    z[0, :4] = (-200, 200, -30, 30)
    value, slope = FORMULAS[name]
    bias = np.tile(b, shared)[:, None]
    one, two = both(ACTIVATIONS[name].forward, z, b)
    np.testing.assert_allclose(one[0], two[0], **tolerance)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(one[0], value(z.astype("f8") + bias), **tolerance)
    dy, db = rng.standard_normal((9, 11)).astype(dtype), rng.standard_normal(9 // shared).astype(dtype)
    for accumulate in (False, True):
        one, two = both(ACTIVATIONS[name].delta, value(z.clip(-9, 9)).astype(dtype), dy, db, accumulate)
        wanted = dy * slope(value(z.clip(-9, 9)).astype(dtype))
        sums = wanted.reshape(shared, -1, 11).sum(axis=(0, 2)) + accumulate * db
        for mine, other, truth in zip(one[1:3], two[1:3], (wanted, sums), strict=True):
            np.testing.assert_allclose(mine, other, **tolerance)
            np.testing.assert_allclose(mine, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, most", [("float32", 4e-7), ("float64", 1e-15)])
def test_tanh_is_exact_to_rounding_however_small(dtype, most):
    z = np.geomspace(1e-30, 400, 500).astype(dtype)
    z = np.stack([z, -z])
    for y, *_ in both(ACTIVATIONS["tanh"].forward, z, np.zeros(1, dtype)):
        assert np.abs(y / np.tanh(z.astype("f8")) - 1).max() < most


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["floats", "bytes"])
def test_gather(kind, dtype):
    rng = np.random.default_rng(2)
    data = rng.integers(0, 255, (12, 5)).astype(np.uint8 if kind == "bytes" else dtype)
    index, out = rng.permutation(12)[:7], np.full((5, 9), -1, dtype)
    one, two = both(batches.gather, data, index, 7, 0.5, out)
    np.testing.assert_array_equal(one[-1], two[-1])
    np.testing.assert_array_equal(one[-1][:, :7], 0.5 * data[index].T)
    assert (one[-1][:, 7:] == -1).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_vectors(dtype):
    rng = np.random.default_rng(3)
    total, g, w = rng.standard_normal((3, 33)).astype(dtype)
    one, two = both(replica.accrue_and_step, total, g, w, 0.25)
    for mine, other, truth in zip(one[:3], two[:3], (total + g, g, w - dtype_of(dtype, 0.25) * g), strict=True):
        np.testing.assert_allclose(mine, other, **TOLERANCE[dtype])
        np.testing.assert_allclose(mine, truth, **TOLERANCE[dtype])
    one, two = both(network.add_decay, g, w, 0.5)
    np.testing.assert_allclose(one[0], two[0], **TOLERANCE[dtype])
    np.testing.assert_allclose(one[0], g + dtype_of(dtype, 0.5) * w, **TOLERANCE[dtype])


def dtype_of(dtype, value):
    return np.dtype(dtype).type(value)


OUTSIDE = """
import sys
import numpy as np
from dbnet.core.jit import kernel, prange
from dbnet.data import batches
from dbnet.core.kernels.products import product

@kernel("f8[:];i8", parallel=True)
def beyond(out, n):
    for i in prange(n):
        out[i] = 1.0

@kernel("f8[:];f8[:];f8[:];i8")
def reach(c, a, b, n):
    product(c, (0, n), a, (0, 1, 1, 1), b, (0, 1, n), (1, n, 1, 2), False, (0, 0))

# The elements beyond are this process's own.
calls = [(batches.gather, np.zeros((3, 2)), np.arange(2), 2, 1.0, np.zeros((2, 4))[:1]), (beyond, np.zeros(8)[:3], 4)]
if sys.argv[1:] == ["products"]:
    for sizes in ((4, 4, 7), (3, 4, 8), (4, 1, 8)):
        calls.append((reach, *(np.zeros(8)[:n] for n in sizes), 4))
for kernel, *arguments in calls:
    try:
        kernel(*arguments)
        print("silence")
    except IndexError:
        print("IndexError")
"""


@pytest.mark.long
def test_bounds_are_checked_where_that_is_asked_for_whatever_was_compiled_before(tmp_path, soak):
    """What `tests/run --soak` trusts in: a cache filled with kernels that do not check bounds."""
    (tmp_path / "outside.py").write_text(OUTSIDE)
    folders = {"PYTHONPATH": str(ROOT), "DBNET_CACHE": str(tmp_path)}
    plain = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "NUMBA_BOUNDSCHECK")}
    words, said = ["products"] if soak else [], []
    for more in ({}, {"NUMBA_BOUNDSCHECK": "1"}):
        command = [sys.executable, tmp_path / "outside.py", *words]
        done = subprocess.run(command, env=plain | folders | more, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        said.append(set(done.stdout.split()))
    assert said == [{"silence"}, {"IndexError"}]


@pytest.mark.long
def test_nothing_is_compiled_after_the_clock_has_started(run_file: Path) -> None:
    """The first run on a machine measures training, and not the compiler; in a process where nothing is compiled yet."""
    code = (
        "import sys; from dbnet.core import jit; from dbnet.run import process, train\n"
        "count = lambda: {f'{k.py_func.__module__}.{k.py_func.__name__}': len(k.signatures) for _, k in jit.KERNELS}\n"
        "before, start = [], process.stopwatch\n"
        "process.stopwatch = lambda: before.append(count()) or start()\n"
        "train.execute(sys.argv[1], ['stop.epochs=1', *sys.argv[2:]], quiet=True)\n"
        # The last one started is the run's.
        "print(len(before) > 0, sum(before[-1].values()) > 0, sorted(n for n, k in count().items() if k != before[-1][n]))"
    )
    for changes in ([], ["method.kind=sandblaster", "stop.iterations=2"]):
        words = [sys.executable, "-c", code, str(run_file), *changes]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, cwd=run_file.parent)
        assert done.stdout.split("\n")[-2] == "True True []"


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the home a file, and a folder that others use too the one for temporary files; return where the cache would lie."""
    (tmp_path / "home").touch()
    (tmp_path / "shared").mkdir()
    monkeypatch.delenv("DBNET_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    return tmp_path / "shared" / f"dbnet-{os.geteuid()}"


def test_a_temporary_cache_is_nobody_elses(no_home: Path) -> None:
    one, two = jit.cache_folder(), jit.cache_folder()
    assert one == two and one.parent == no_home and one.is_dir()
    assert no_home.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("what", ["open to others", "a link", "a file", "another's"])
def test_a_temporary_cache_that_others_could_fill(what: str, no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba unpickles what it finds there, so it is left alone."""
    if what == "a file":
        no_home.touch()
    elif what == "a link":
        (no_home.parent / "elsewhere").mkdir(mode=0o700)
        no_home.symlink_to("elsewhere")
    else:
        no_home.mkdir(mode=0o700)
        if what == "open to others":
            no_home.chmod(0o770)
        else:
            me = os.geteuid()
            monkeypatch.setattr(os, "geteuid", lambda: me + 1)
            no_home.rename(no_home.with_name(f"dbnet-{me + 1}"))
    before = sorted(no_home.parent.rglob("*"))
    one, two = jit.cache_folder(), jit.cache_folder()
    assert one != two and sorted(path for path in no_home.parent.rglob("*") if path in before) == before
    for folder in (one, two):
        fresh = folder.parent
        assert folder.is_dir() and fresh.parent == no_home.parent and fresh not in before and fresh.stat().st_mode & 0o777 == 0o700


def test_kernels_are_loaded_by_many_at_the_same_time_and_compiled_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jit, "_PATIENCE", 0)
    jit.warm("float32", {"dbnet.core.jit"}.__contains__)
    # A lock of its own: others may be compiling now.
    monkeypatch.setattr(jit, "cache", lambda: tmp_path)
    with jit._lock(fcntl.LOCK_SH):
        assert jit.warm("float32", {"dbnet.core.jit"}.__contains__, False) == 0
        with pytest.raises(UserError, match="has been compiling"):
            jit.warm("float32", {"dbnet.core.jit"}.__contains__, True)


# --- machine code ----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(jit.CHECKED, reason="kernels that check their bounds are Numba's own")
def test_machine_code_takes_what_was_declared_and_nothing_else() -> None:
    """What is read as something else would be garbage, and what is written a crash."""
    jit.warm("float32", {vector.__name__, tally.__module__}.__contains__)
    entry, x, frozen = vector.axpy._entries["f8;f4[:];f4[:]"], np.ones(6, "f4"), np.ones(6, "f4")
    frozen.flags.writeable = False
    shifted = np.zeros(25, "u1")[1:].view("f4")
    for wrong in (x[::2], x.astype("f8"), x.astype("i4"), x.reshape(2, 3), x.astype(">f4"), frozen, shifted, [1.0], None, 1.0):
        assert entry(2.0, wrong, x) is NotImplemented and entry(2.0, x, wrong) is NotImplemented
    assert entry(2.0, x) is NotImplemented and entry(2.0, x, x, x) is NotImplemented
    with pytest.raises(TypeError, match="real number"):
        entry("2", x, x)
    assert (x == 1).all()
    for a in (2, 2.0, np.float32(2), np.float64(2), np.int64(2), True):
        y = np.zeros(6, "f4")
        assert vector.axpy(a, x, y) is None and (y == np.float32(a)).all()
    sums = vector.dot(x, x), vector.first_bad(x, 1e9), vector.check_sum(x), tally(np.ones((5, 6), "f4"), np.ones(6, "i8"), 6)
    assert [type(value) for value in sums] == [float, int, int, tuple]
    with np.errstate(over="ignore"):
        assert sums == (6.0, -1, vector.check_sum.py_func(x), (6.0, 6))


@pytest.mark.skipif(jit.CHECKED, reason="kernels that check their bounds are Numba's own")
def test_what_machine_code_does_not_take_is_computed_all_the_same() -> None:
    jit.warm("float32", {vector.__name__}.__contains__)
    x, y = np.arange(6, dtype="f4"), np.zeros(6, "f4")
    vector.copy(x[::2], y[::2])
    assert y.tolist() == [0, 0, 2, 0, 4, 0]
    # Numba's own functions may call kernels, too.
    numba.njit(lambda x, y: vector.copy(x, y))(x, y)
    assert y.tolist() == [0, 1, 2, 3, 4, 5]


def test_machine_code_is_made_anew_where_it_is_another_or_of_another_processor(tmp_path: Path, monkeypatch) -> None:
    objects.write(tmp_path / "a.kernels", {"stamp": "now", "entries": {}, "rest": []}, b"")
    assert objects.load(tmp_path / "a.kernels", "before") is None and objects.load(tmp_path / "b.kernels", "now") is None
    assert objects.load(tmp_path / "a.kernels", "now") is not None
    names = [(dropout, "dropout.py"), (softmax, "softmax.py jit.py"), (filters, "filters.py products.py")]
    for module, wanted in names:
        mine = {(kernel.__name__, words): kernel for words, kernel in jit.KERNELS if kernel.__module__ == module.__name__}
        files, digest = [], jit._digest
        monkeypatch.setattr(
            jit, "_digest", lambda found, files=files, digest=digest: files.extend(found := list(found)) or digest(found)
        )
        before = jit._stamp(module.__name__, mine)
        assert {file.name for file in files} == set(wanted.split())
        with monkeypatch.context() as other:
            other.setattr(objects, "machine", lambda: "another processor")
            assert jit._stamp(module.__name__, mine) != before
        with monkeypatch.context() as other:
            other.setattr(jit, "_digest", lambda found: "changed")
            assert jit._stamp(module.__name__, mine) != before


# --- bfloat16 -----------------------------------------------------------------------------------------------------------------


def test_bfloat16_holds_every_pattern() -> None:
    """Of all 65536 patterns each means what it should, and is the same again; a signalling NaN becomes a quiet one."""
    patterns, wide, back = np.arange(1 << 16, dtype=np.uint16), np.zeros(1 << 16, "f4"), np.zeros(1 << 16, np.uint16)
    widen(patterns, wide)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(wide.astype("f8"), value_of(patterns))
    assert (np.signbit(wide) == patterns >> 15).all()
    nan = np.isnan(value_of(patterns))
    narrow(wide, back)
    np.testing.assert_array_equal(back, np.where(nan, patterns | 0x40, patterns))


def test_bfloat16_is_the_nearest_and_of_two_the_even_one() -> None:
    """Random bits (also denormals, Inf and NaN), and around the middle between any two neighbours, where ties and overflow are."""
    middle = (np.arange(1 << 16, dtype=np.uint32) << 16) + 0x8000
    bits = np.concatenate([np.random.default_rng(1).integers(0, 1 << 32, 200_000, np.uint32), middle - 1, middle, middle + 1])
    x, out, wide = bits.view("f4"), np.zeros(bits.size, np.uint16), np.zeros(bits.size, "f4")
    nan = np.isnan(x)
    narrow(x, out)
    np.testing.assert_array_equal(out[~nan], nearest(x[~nan]))
    np.testing.assert_array_equal(out[nan], (bits[nan] >> 16) | 0x40)
    assert (out[np.isfinite(x)] & 0x7FFF == 0x7F80).any(), "nothing overflowed"
    # In one process what travels is rounded where it lies.
    widen(out, wide)
    same = x.copy()
    coarse(same, same)
    assert wide.tobytes() == same.tobytes()


def test_bfloat16_kernels_interpreted() -> None:
    bits = np.random.default_rng(2).integers(0, 1 << 32, 300, np.uint32)
    bits[:5] = 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0x7F800001, 0x80000000
    x, out, wide = bits.view("f4"), np.zeros(300, np.uint16), np.zeros(300, "f4")
    for kernel, arguments in ((narrow, (x, out)), (widen, (out + np.uint16(9), wide)), (coarse, (x, wide))):
        with np.errstate(over="ignore"):
            one, two = both(kernel, *arguments)
        assert one[1].tobytes() == two[1].tobytes()
