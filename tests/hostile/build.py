"""Small models, and what can be done to them, for the tests of hostile input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

NET = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y)
{
  [conv1] c = Conv (x, w, b)
  [relu1] y = Relu (c)
}
"""


def net() -> onnx.ModelProto:
    """A convolution and a Relu with plausible weights."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(NET)
    arrays = {"w": rng.standard_normal((4, 3, 3, 3)), "b": rng.standard_normal(4)}
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return model


def parsed(text: str, opset: int = 17) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def set_weights(model: onnx.ModelProto, name: str, change: dict[int, float]) -> None:
    tensor = initializer(model, name)
    array = numpy_helper.to_array(tensor).copy()
    for index, value in change.items():
        array.reshape(-1)[index] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def write(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def make_external(model: onnx.ModelProto, name: str = "w", **entries: str) -> bytes:
    """Make an initializer external with these entries; returns the bytes that belong into its file."""
    tensor = initializer(model, name)
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return data


def nested_if(depth: int) -> onnx.ModelProto:
    """An If in an If in an If ..., built inside out."""
    body = onnx.parser.parse_graph("g () => (float[2] o0) { o0 = Constant <value = float[2] {1, 2}> () }")
    for k in range(1, depth + 1):
        outer = onnx.GraphProto(name=f"g{k}")
        node = outer.node.add(op_type="If", input=["flag"], output=[f"o{k}"])
        for branch in ("then_branch", "else_branch"):
            attribute = node.attribute.add(name=branch, type=onnx.AttributeProto.GRAPH)
            attribute.g.CopyFrom(body if branch == "then_branch" else _leaf(k))
        outer.output.add(name=f"o{k}").type.tensor_type.elem_type = TensorProto.FLOAT
        outer.output[0].type.tensor_type.shape.dim.add(dim_value=2)
        body = outer
    body.input.append(onnx.helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    return onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def _leaf(k: int) -> onnx.GraphProto:
    return onnx.parser.parse_graph(
        f"leaf () => (float[2] e{k}) {{ e{k} = Constant <value = float[2] {{3, 4}}> () }}"
    )
