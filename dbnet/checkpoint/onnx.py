"""A checkpoint's network as an ONNX model: nodes from the layers, parameters streamed into the file by ranges.

A model is a protobuf message whose graph holds the parameters as raw bytes. All lengths are known before, so the message is written
in order, without ever being in memory: the model's own fields, then the graph's head with its length, then each parameter. Protobuf
ends at 2 GB; beyond it the parameters go into OUT.onnx.data (ONNX's external data), each at a page of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from dbnet.checkpoint.reader import Checkpoint
from dbnet.checkpoint.weights import about, arrays, runs
from dbnet.core.errors import UserError
from dbnet.core.files import refuse_taken, writing
from dbnet.core.version import __version__
from dbnet.data.preparation import Normalization
from dbnet.network.layers.base import Graph
from dbnet.network.model import Model

# Both of 2024, so that runtimes of some age read it.
OPSET, IR = 21, 10
LIMIT = (1 << 31) - (1 << 20)
_PAGE = 4096
# Field numbers and wire type of ModelProto.graph, GraphProto.initializer and TensorProto.raw_data.
_GRAPH, _INITIALIZER, _RAW = (bytes([number << 3 | 2]) for number in (7, 5, 9))


def library() -> Any:
    """Return the onnx package; UserError where it is not installed."""
    try:
        import onnx
    except ImportError:
        raise UserError("ONNX needs the package onnx; install it with jobs/install --extra export, or pip install onnx.") from None
    return onnx


def write(point: Checkpoint, model: Model, path: Path, force: bool) -> list[Path]:
    """Write the network of a checkpoint as it is evaluated: x [examples, *shape] as in the data file -> y [examples, outputs].

    Returns
    -------
    The files.

    Raises
    ------
    UserError
        onnx is not installed, a layer has no ONNX nodes or wrong ones, or a file is there and may not be replaced.
    """
    onnx, beside = library(), path.with_name(path.name + ".data")
    graph = nodes(model, point.scale, Normalization.of(point.data.get("normalization"), model.shapes[0]))
    made = _graph(onnx, graph, model)
    _check(onnx, made, model)
    shell = onnx.ModelProto(ir_version=IR, producer_name="dbnet", producer_version=__version__)
    shell.opset_import.add(domain="", version=OPSET)
    for key, value in about(point).items():
        shell.metadata_props.add(key=key, value=value)
    large = model.layout.size * model.dtype.itemsize + made.ByteSize() > LIMIT
    with ExitStack() as files:
        if large:
            refuse_taken(beside, force)
        out = files.enter_context(writing(path, force))
        if large:
            data = files.enter_context(writing(beside, force))
            _write_beside(point, onnx, data, beside.name, made)
            shell.graph.CopyFrom(made)
            out.write_bytes(shell.SerializeToString(deterministic=True))
        else:
            with open(out, "wb") as file:
                file.write(shell.SerializeToString(deterministic=True))
                _stream(point, onnx, made.SerializeToString(deterministic=True), file)
    return [path, beside] if large else [path]


def nodes(model: Model, scale: float, normalization: Normalization | None = None) -> Graph:
    """Return the nodes of a whole network; its input is x, as it was before it was scaled and normalized, its output y."""
    graph = Graph(model.dtype)
    scale = scale if normalization is None else normalization.scale
    value = graph.add("Mul", "x", scale) if scale != 1 else "x"
    if normalization is not None:
        value = graph.add("Div", graph.add("Sub", value, normalization.mean), normalization.spread)
    for i, layer in enumerate(model.layers):
        names = {name: f"{i}.{layer.kind}.{name}" for name in model.parameters[i]}
        value = layer.onnx(graph, value, model.shapes[i], names)
    graph.add("Flatten", value, axis=1)
    operator, inputs, _, attributes = graph.nodes.pop()
    graph.nodes.append((operator, inputs, "y", attributes))
    return graph


def _graph(onnx: Any, graph: Graph, model: Model) -> Any:
    """Return the message of a graph without the parameters."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(model.dtype)
    ends = [
        onnx.helper.make_tensor_value_info(name, kind, ["examples", *shape])
        for name, shape in (("x", model.shapes[0]), ("y", (int(np.prod(model.shapes[-1])),)))
    ]
    made = [onnx.helper.make_node(operator, names, [out], name=out, **options) for operator, names, out, options in graph.nodes]
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in graph.constants.items()]
    return onnx.helper.make_graph(made, "dbnet", ends[:1], ends[1:], constants)


def _check(onnx: Any, made: Any, model: Model) -> None:
    """Raise UserError where the nodes do not fit each other, as those of a user's own layer may."""
    trial = onnx.GraphProto()
    trial.CopyFrom(made)
    kind = onnx.helper.np_dtype_to_tensor_dtype(model.dtype)
    trial.input.extend(onnx.helper.make_tensor_value_info(e.name, kind, e.shape) for e in model.layout.entries)
    whole = onnx.helper.make_model(trial, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR)
    try:
        onnx.checker.check_model(whole, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"The layers' ONNX nodes do not fit each other ({said}); mend the method onnx of your own layers."
        ) from None


def _tensor(onnx: Any, point: Checkpoint, name: str, shape: tuple[int, ...]) -> Any:
    return onnx.TensorProto(name=name, dims=shape, data_type=onnx.helper.np_dtype_to_tensor_dtype(point.dtype))


def _stream(point: Checkpoint, onnx: Any, head: bytes, file: IO[bytes]) -> None:
    """Write the field of a model that is its graph: the head as it is, then the parameters."""
    heads, total = [], len(head)
    for name, shape, part in arrays(point):
        size = part.size * point.dtype.itemsize
        tensor = _tensor(onnx, point, name, shape).SerializeToString(deterministic=True) + _RAW + _varint(size)
        heads.append(_INITIALIZER + _varint(len(tensor) + size) + tensor)
        total += len(heads[-1]) + size
    file.write(_GRAPH + _varint(total) + head)
    for first, (_, _, part) in zip(heads, arrays(point), strict=True):
        file.write(first)
        for values in runs(point, part):
            file.write(values)


def _write_beside(point: Checkpoint, onnx: Any, path: Path, location: str, made: Any) -> None:
    """Write the parameters to a file of their own, and into the graph where they lie there."""
    with open(path, "wb") as file:
        for name, shape, part in arrays(point):
            file.seek(-(-file.tell() // _PAGE) * _PAGE)
            tensor = made.initializer.add()
            tensor.CopyFrom(_tensor(onnx, point, name, shape))
            tensor.data_location = onnx.TensorProto.EXTERNAL
            place = {"location": location, "offset": file.tell(), "length": part.size * point.dtype.itemsize}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            for values in runs(point, part):
                file.write(values)


def _varint(number: int) -> bytes:
    """Return a number as protobuf writes lengths: seven bits a byte, the lowest first."""
    return bytes(_sevens(number))


def _sevens(number: int) -> Iterator[int]:
    while number > 127:
        yield number & 127 | 128
        number >>= 7
    yield number
