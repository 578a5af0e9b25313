"""What other programs get: ONNX that computes what dbnet does, parameters to the bit; and runs that begin from such files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import onnx
import onnxruntime
import pytest
from finished import Finished
from safetensors.numpy import load_file, save_file

import dbnet as package
from dbnet.checkpoint import onnx as onnx_writer
from dbnet.checkpoint import weights
from dbnet.checkpoint.reader import Checkpoint
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range
from dbnet.core.registry import load_file as load_module
from dbnet.core.registry import make
from dbnet.data.file import write
from dbnet.data.preparation import normalized
from dbnet.network.losses.softmax import Softmax
from dbnet.network.model import Model
from dbnet.network.network import Network

GAIN = Path(__file__).parents[1] / "support" / "gain.py"
# Every kind of layer, odd fields, strides and paddings.
LAYERS = [
    {"kind": "local", "maps": 3, "field": [3, 2], "stride": [1, 2], "padding": [2, 1], "activation": "tanh"},
    {"kind": "norm", "radius": 2, "spread": 0.7},
    {"kind": "conv", "maps": 4, "field": [2, 3], "padding": [1, 2], "activation": "sigmoid"},
    {"kind": "gain"},
    {"kind": "pool", "over": "l2", "field": 3, "stride": 1, "padding": 1},
    {"kind": "conv", "maps": 5, "field": 2, "stride": [2, 1]},
    {"kind": "pool", "over": "max", "field": [2, 3], "stride": 1, "padding": [1, 2]},
    {"kind": "pool", "over": "average", "field": 3, "stride": 2, "padding": 2},
    {"kind": "local", "maps": 2, "field": 2},
    {"kind": "dropout", "rate": 0.3},
    {"kind": "dense", "units": 12, "activation": "tanh"},
    {"kind": "dense", "units": 10, "activation": "identity"},
]
RELU = [{"kind": "conv", "maps": 5, "field": 2, "activation": "relu"}, {"kind": "dense", "units": 9, "activation": "relu"}]
Command = Callable[..., Finished]


def tables(data: Path, **changes: dict) -> dict:
    """Return a run of a few steps on three shards."""
    return {
        "data": {"path": str(data)},
        "model": {"layers": LAYERS, "modules": [str(GAIN)]},
        "topology": {"shards": 3},
        "rule": {"rate": 0.01},
        "stop": {"steps": 5},
        "run": {"folder": "out", "picture": False},
        **changes,
    }


@pytest.fixture
def images(place: Path) -> Path:
    """Return random images of bytes with a scale."""
    rng = np.random.default_rng(5)
    with h5py.File(place / "images.h5", "w") as file:
        for part in ("train", "test"):
            file[f"{part}/x"], file[f"{part}/y"] = rng.integers(0, 256, (60, 9, 8, 2), np.uint8), np.arange(60) % 10
        file.attrs["classes"], file.attrs["scale"] = 10, 1 / 100
    return place / "images.h5"


@pytest.fixture
def trained(run_file: Path) -> str:
    """Return a checkpoint of a dense network on two shards."""
    return str(package.train(run_file, ["stop.epochs=", "stop.steps=9"], quiet=True).checkpoint)


def computed(path: str, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(["y"], {"x": x})[0]


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("float64", 1e-12)])
def test_onnx_computes_what_predict_does(
    dtype: str, near: float, images: Path, dbnet: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tables(images)
    if dtype == "float32":
        # The exported network takes raw inputs, too.
        with h5py.File(images) as file:
            raw = {f"{part}/{name}": file[f"{part}/{name}"][:] for part in ("train", "test") for name in "xy"}
        write(images, normalized({**raw, "classes": 10, "scale": 1 / 100}, "unit"), force=True)
    point = str(package.train({**tree, "model": {**tree["model"], "dtype": dtype}}, quiet=True).checkpoint)
    x = np.random.default_rng(6).integers(0, 256, (7, 9, 8, 2), np.uint8)
    wanted = package.load(point).predict(x)
    assert np.ptp(wanted, axis=0).min() > 0.01
    assert dbnet("export", point, "a.onnx").code == 0
    np.testing.assert_allclose(computed("a.onnx", x.astype(dtype)), wanted, atol=near, rtol=0)
    model = onnx.load("a.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {entry.key: entry.value for entry in model.metadata_props}["loss"] == "softmax"
    named = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert all(np.array_equal(named[name], value) for name, value in package.load(point).parameters.items())
    # As a network of more than 2 GB: the same graph, the parameters beside it, also where the two are moved to.
    monkeypatch.setattr(onnx_writer, "LIMIT", 1000)
    monkeypatch.setattr(weights, "_RUN", 100)
    Path("there").mkdir()
    assert "there/b.onnx and there/b.onnx.data" in dbnet("export", point, "there/b.onnx").out
    Path("there").rename("moved")
    np.testing.assert_array_equal(computed("moved/b.onnx", x.astype(dtype)), computed("a.onnx", x.astype(dtype)))
    assert "a.onnx.data" not in {path.name for path in Path().iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_layer_by_itself(dtype: str) -> None:
    load_module(str(GAIN))
    rng, near = np.random.default_rng(7), 1e-5 if dtype == "float32" else 1e-12
    for options in LAYERS + RELU:
        layer = make("network.layers", options, "layer")
        shape = layer.output_shape((9, 8, 2))
        model = Model([layer], make("network.losses", {"kind": "squared"}, "loss"), (9, 8, 2), int(np.prod(shape)), dtype)
        w = rng.standard_normal(model.layout.size).astype(dtype) / 4
        x = rng.standard_normal((9, 8, 2, 5)).astype(dtype)
        network = Network(model, 5, training=False)
        network.x[:] = x[tuple(part.slice for part in network.input_box)].reshape(-1, 5)
        wanted = network.forward(w, np.zeros((int(np.prod(shape)), 5), dtype))[-1].y.reshape(-1, 5).T
        graph = onnx_writer._graph(onnx, onnx_writer.nodes(model, 1.0), model)
        graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in model.layout.views(w).items())
        made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", onnx_writer.OPSET)], ir_version=10)
        found = computed(made.SerializeToString(), np.ascontiguousarray(np.moveaxis(x, -1, 0)))
        np.testing.assert_allclose(found, wanted, atol=near, rtol=near, err_msg=str(options))


def test_parameters_read_back_to_the_bit(trained: str, dbnet: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, asked, read = package.load(trained).parameters, [], Checkpoint.read

    def watched(self: Checkpoint, name: str, part: Range, out: np.ndarray) -> None:
        asked.append(part.size)
        read(self, name, part, out)

    monkeypatch.setattr(weights, "_RUN", 100)
    monkeypatch.setattr(Checkpoint, "read", watched)
    for name in ("w.safetensors", "w.npz", "w.onnx"):
        assert "1,210 parameters written to" in dbnet("export", trained, name).out
    # Ranges that end neither with arrays nor with shards.
    assert max(asked) == 100 and sum(asked) == 3 * 1210
    found = [load_file("w.safetensors"), dict(np.load("w.npz"))]
    found += [{t.name: onnx.numpy_helper.to_array(t) for t in onnx.load("w.onnx").graph.initializer}]
    for arrays in found:
        assert {name for name in arrays if not name.startswith("constant")} == set(wanted)
        assert all(np.array_equal(arrays[name], value) and arrays[name].dtype == value.dtype for name, value in wanted.items())


def test_a_run_begins_from_them(trained: str, run_file: Path, dbnet: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("w.safetensors", "w.npz"):
        assert dbnet("export", trained, name).code == 0
    arrays = load_file("w.safetensors")
    np.savez_compressed("packed.npz", **{name: value.astype(np.float64) for name, value in arrays.items()})
    monkeypatch.setattr(weights, "_RUN", 100)
    words = ["stop.epochs=", "stop.steps=4", "topology.shards=3", "topology.partitions=2"]
    ends = [
        package.train(run_file, [*words, f"run.start={start}"], quiet=True).params
        for start in (trained, "w.safetensors", "w.npz", "packed.npz")
    ]
    assert all(np.array_equal(params, ends[0]) for params in ends)
    assert not np.array_equal(ends[0], package.train(run_file, words, quiet=True).params)


def test_what_does_not_fit_is_one_sentence(trained: str, run_file: Path, dbnet: Command) -> None:
    assert dbnet("export", trained, "w.safetensors").code == 0
    arrays, whole = load_file("w.safetensors"), Path("w.safetensors").read_bytes()
    first = "0.dense.W"

    def header(**changes: object) -> bytes:
        text = json.dumps({first: {"dtype": "F32", "shape": [16, 64], "data_offsets": [0, 4096], **changes}}).encode()
        return struct.pack("<Q", len(text)) + text

    save_file({name: value for name, value in arrays.items() if name != first}, "lacks.safetensors")
    save_file({**arrays, "more": arrays[first]}, "more.safetensors")
    save_file({**arrays, first: arrays[first].T.copy()}, "shape.safetensors")
    save_file({**arrays, first: arrays[first] * np.float32("nan")}, "nan.safetensors")
    np.savez("integers.npz", **{**arrays, first: arrays[first].astype(int)})
    np.savez("columns.npz", **{**arrays, first: np.asfortranarray(arrays[first])})
    for name, content in {
        "cut.safetensors": whole[:-8], "empty.safetensors": b"", "text.safetensors": b"no weights here",
        "type.safetensors": header(dtype="BF16"), "bytes.safetensors": header(data_offsets=[0, 9]), "text.npz": b"no weights here",
    }.items():  # fmt: skip
        Path(name).write_bytes(content)
    for name, said in {
        "none.npz": "No file 'none.npz' to begin from; 'dbnet export' makes one",
        "lacks.safetensors": "lacks the array '0.dense.W' (16, 64) of the network; it holds '",
        "more.safetensors": "holds 'more', which the network has not; its arrays are '0.dense.W', '0.dense.b', '1.dense.W'",
        "shape.safetensors": "'0.dense.W' has shape (64, 16), in the network (16, 64); use a file of this network",
        "nan.safetensors": "cannot be read ('0.dense.W' holds values that are not finite); save it again",
        "integers.npz": "'0.dense.W' is int64; use float16, float32 or float64",
        "columns.npz": "'0.dense.W' is stored by columns; save numpy.ascontiguousarray of it",
        "cut.safetensors": "it is cut off in '",
        "empty.safetensors": "cannot be read (",
        "text.safetensors": "it is no safetensors file",
        "type.safetensors": "'0.dense.W' is BF16, which is not one of F16, F32, F64",
        "bytes.safetensors": "shape and bytes of '0.dense.W' do not fit each other",
        "text.npz": "cannot be read (File is not a zip file)",
    }.items():
        done = dbnet("train", run_file, "--quiet", f"run.start={name}", "run.name=no")
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1 and f"'{name}'" in done.err, (name, done.err)


def test_whatever_byte_is_wrong_it_is_a_sentence(place: Path) -> None:
    model = Model([make("network.layers", {"kind": "dense", "units": 2}, "layer")], Softmax(), (3,), 2, "float32")
    w = np.arange(8, dtype=np.float32)
    views, out, refused = model.layout.views(w), np.empty_like(w), 0
    save_file(dict(views), "w.safetensors")
    np.savez_compressed("w.npz", **views)
    for name in ("w.safetensors", "w.npz"):
        sound = Path(name).read_bytes()
        for at in range(len(sound)):
            Path(f"wrong-{name}").write_bytes(sound[:at] + bytes([sound[at] ^ 0x55]) + sound[at + 1 :])
            try:
                weights.Weights(f"wrong-{name}", model).read("params", Range(0, 8), out)
            except UserError as error:
                refused += 1
                assert str(error).startswith(f"'wrong-{name}'") and "\n" not in str(error)
    assert refused > 300


def test_export_refuses_with_a_sentence(trained: str, images: Path, dbnet: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("w.onnx", "w.npz", "w.safetensors"):
        Path(name).write_text("mine")
        assert "--force" in dbnet("export", trained, name).err and Path(name).read_text() == "mine"
        assert dbnet("export", trained, name, "--force").code == 0 and Path(name).read_bytes() != b"mine"
    assert dbnet("export", trained, "w.pb").err == "dbnet: 'w.pb' must end in .onnx, .safetensors or .npz.\n"
    monkeypatch.setattr(onnx_writer, "LIMIT", 1000)
    Path("a.onnx.data").write_text("mine")
    assert "'a.onnx.data'" in dbnet("export", trained, "a.onnx").err and Path("a.onnx.data").read_text() == "mine"
    # An own layer without nodes, and one whose nodes do not fit.
    text = GAIN.read_text()
    for name, method, said in (
        ("plain", "", "A 'plain' layer has no ONNX nodes; give its class a method onnx(graph, x, shape, p)"),
        ("wrong", 'return graph.add("MatMul", x, p["gain"])', "The layers' ONNX nodes do not fit each other ("),
    ):
        body = text[: text.index("    def onnx")] if not method else text.replace('return graph.add("Mul", x, p["gain"])', method)
        Path(f"{name}.py").write_text(
            body.replace('"gain"\n', f'"{name}"\n', 1).replace("class Gain", f"class {name.capitalize()}")
        )
        layers = [{"kind": name}, {"kind": "dense", "units": 10}]
        tree = tables(images, model={"layers": layers, "modules": [f"{name}.py"]})
        point = package.train(tree, ["stop.steps=1"], quiet=True).checkpoint
        done = dbnet("export", point, f"{name}.onnx")
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1 and not Path(f"{name}.onnx").exists()
        assert dbnet("export", point, f"{name}.npz").code == 0
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    assert dbnet("export", trained, "z.onnx").err.endswith("or pip install onnx.\n")
