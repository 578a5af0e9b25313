"""Small kernels that no family's suite covers: interpreted equals compiled, and both equal NumPy."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import linecache
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
import pytest
from bfloat16 import nearest, value_of

from dbnet.core import jit
from dbnet.core.errors import UserError
from dbnet.core.kernels import folder, objects, vector
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
    one, two = folder.cache_folder(), folder.cache_folder()
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
    one, two = folder.cache_folder(), folder.cache_folder()
    assert one != two and sorted(path for path in no_home.parent.rglob("*") if path in before) == before
    for made in (one, two):
        fresh = made.parent
        assert made.is_dir() and fresh.parent == no_home.parent and fresh not in before and fresh.stat().st_mode & 0o777 == 0o700


def test_kernels_are_loaded_by_many_at_the_same_time_and_compiled_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folder, "_PATIENCE", 0)
    jit.warm("float32", {"dbnet.core.jit"}.__contains__)
    # A lock of its own: others may be compiling now.
    monkeypatch.setattr(folder, "cache", lambda: tmp_path)
    with folder.lock(fcntl.LOCK_SH):
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


def test_machine_code_is_made_anew_where_it_is_another_or_of_another_processor(monkeypatch) -> None:
    names = [(dropout, "dropout.py"), (softmax, "softmax.py jit.py"), (filters, "filters.py products.py")]
    for module, wanted in names:
        mine = {(kernel.__name__, words): kernel for words, kernel in jit.KERNELS if kernel.__module__ == module.__name__}
        files, digest = [], folder.digest
        monkeypatch.setattr(
            folder, "digest", lambda found, files=files, digest=digest: files.extend(found := list(found)) or digest(found)
        )
        before = jit._stamp(module.__name__, mine)
        assert {file.name for file in files} == set(wanted.split())
        for where, name, other in (
            (objects, "machine", lambda: "another processor"), (folder, "digest", lambda found: "changed"),
            (folder, "digest_of_entries", lambda: "changed"),
        ):  # fmt: skip
            with monkeypatch.context() as changed:
                changed.setattr(where, name, other)
                assert jit._stamp(module.__name__, mine) != before


def test_of_old_machine_code_some_is_kept_and_of_what_was_begun_nothing(tmp_path: Path, monkeypatch) -> None:
    for i in range(objects._KEPT + 3):
        path = tmp_path / f"a.b-float32-{i:02}.kernels"
        objects.write(path, {"entries": {}, "rest": []}, b"")
        os.utime(path, (i, i))
    objects.write(tmp_path / "a-float32-0.kernels", {"entries": {}, "rest": []}, b"")
    objects.write(path, {"entries": {}, "rest": [1]}, b"")
    assert objects.load(path) == ({"entries": {}, "rest": [1]}, {}) and objects.load(tmp_path / "c.kernels") is None
    names = [f"a.b-float32-{i:02}.kernels" for i in range(3, objects._KEPT + 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a-float32-0.kernels", *names])
    (tmp_path / ".new-killed").touch()
    monkeypatch.setattr(folder, "cache", lambda: tmp_path)
    jit.warm("float32", lambda module: False, False)
    assert (tmp_path / ".new-killed").exists(), "another may be writing it"
    jit.warm("float32", lambda module: False, True)
    assert not (tmp_path / ".new-killed").exists()


WARM = """
import resource, signal, sys
from dbnet.core import jit
from dbnet.core.kernels import objects
if sys.argv[1:]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
jit.warm("float32", {"dbnet.core.jit"}.__contains__)
assert jit.fence() is None
print(type(jit.fence._first).__name__, "numba" in sys.modules)
"""


def warmed(cache: Path, *words: str) -> tuple[str, str]:
    """Have a process warm `fence` with this cache, and call it; return what it printed."""
    names = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "NUMBA_BOUNDSCHECK")}
    command = [sys.executable, "-c", WARM, *words]
    done = subprocess.run(command, env={**names, "DBNET_CACHE": str(cache)}, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout, done.stderr


MADE, LOADED = ("builtin_function_or_method True\n", ""), ("builtin_function_or_method False\n", "")


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache that has been filled."""
    cache = tmp_path_factory.mktemp("cache")
    assert warmed(cache) == MADE and warmed(cache) == LOADED
    return cache


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "not ours"])
def test_damaged_machine_code_is_made_anew(damage: str, machine_code: Path, tmp_path: Path) -> None:
    """What the linker is given may end the process."""
    shutil.copytree(machine_code, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.rglob("*.kernels")
    data = file.read_bytes()
    middle = len(data) // 2
    changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    file.write_bytes({"empty": b"", "cut": data[:middle], "changed": changed, "not ours": b"{}\n" * 9}[damage])
    assert warmed(tmp_path) == MADE and warmed(tmp_path) == LOADED


def test_on_a_full_disk_kernels_are_compiled_all_the_same(tmp_path: Path) -> None:
    out, said = warmed(tmp_path, "100")
    assert out == MADE[0] and said.count("\n") == 1
    assert "dbnet: Compiled kernels cannot be written to" in said and "File too large; the next start" in said
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".kernels" or path.name.startswith(".new-")]


# --- kernels of users' own -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict]:
    """Return a function that runs a cell of a notebook, which has no file, and returns what is defined then."""
    monkeypatch.setattr(jit, "KERNELS", [])
    names: dict = {"__name__": "notebook"}
    monkeypatch.setitem(sys.modules, "notebook", ModuleType("notebook"))

    def run(text: str) -> dict:
        file = f"<ipython-input-{len(linecache.cache)}-{hashlib.sha256(text.encode()).hexdigest()[:12]}>"
        monkeypatch.setitem(linecache.cache, file, (len(text), None, text.splitlines(True), file))
        exec(compile(text, file, "exec"), names)
        return names

    return run


def test_a_kernel_that_is_edited_in_a_notebook_is_another(cell: Callable[[str], dict]) -> None:
    cell("import numpy as np; from dbnet.core.jit import inline, kernel")
    text = "@inline\ndef more(x):\n    return x + {}\n\n@kernel('T[:]')\ndef f(x):\n    x[0] = more(np.{}(x[0]))\n"
    for more, name in ((1, "sin"), (1, "cos"), (3, "cos")):
        f, x = cell(text.format(more, name))["f"], np.full(1, 0.25, "f4")
        jit.warm("float32", {"notebook"}.__contains__)
        f(x)
        np.testing.assert_allclose(x, more + getattr(np, name)(0.25), rtol=1e-6)


OWN = """
import numba
from dbnet.core.jit import exp, inline, kernel, prange
from dbnet.core.kernels.vector import axpy
from dbnet.network.layers.dropout import mix

@inline
def twice(x):
    return 2 * x

def times(n):
    @kernel("T[:]; f8", parallel=True)
    def f(x, by):
        for i in prange(x.size):
            x[i] = n * twice(by)
    return f

@kernel("i8; b1[:]", "f8; b1[:]")
def factorial(n, wrong):
    if wrong[0]:
        raise ValueError("that is wrong")
    return 1 if n < 2 else n * factorial(n - 1, wrong)

@numba.njit
def raw(x, y):
    axpy(exp(x[0]), x, y)
    y[0] += twice(1) + mix(1)
"""


def test_users_kernels_are_numbas(cell: Callable[[str], dict]) -> None:
    """With all that works with these; and dbnet's own are taken by them."""
    own = cell(OWN)
    f, x, y, no = own["times"](3), np.zeros(4, "f4"), np.zeros(4), np.zeros(1, bool)
    jit.warm("float32", {"notebook"}.__contains__)
    f(by=0.5, x=x)
    assert x.tolist() == [3] * 4 and list(inspect.signature(f).parameters) == ["x", "by"]
    factorial = own["factorial"]
    assert factorial(5, no) == 120 and factorial(2.5, no) == 2.5 and factorial.py_func(3, no) == 6
    with pytest.raises(ValueError, match="that is wrong"):
        factorial(5, ~no)
    own["raw"](np.ones(4), y)
    np.testing.assert_allclose(y, [np.e + 2 + dropout.mix.py_func(1), np.e, np.e, np.e], rtol=1e-12)
    assert pickle.loads(pickle.dumps(factorial))(4, no) == 24


def test_what_dbnet_has_for_kernels_brings_its_compiler() -> None:
    """Where Numba has begun to compile before anything has imported that."""
    code = (
        "import sys, numba; from dbnet.core import jit; assert 'dbnet.core.kernels.compiler' not in sys.modules\n"
        "print(numba.njit(lambda x: jit.exp(x) + jit.expm1(0.0))(1.0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0 and abs(float(done.stdout) - np.e) < 1e-12, done.stderr


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
