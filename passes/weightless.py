"""An ``onnx.ModelProto`` without the weights, for onnx's C++ functions, which cannot take more than 2 GB."""

from __future__ import annotations

import onnx
import onnx_ir as ir

KEEP_BYTES = 1024  # shapes, axes and scales stay: inference and conversion read their values


def weightless_proto(model: ir.Model) -> onnx.ModelProto:
    """Return ``model`` with every main-graph initializer above 1 KiB turned into an additional input.

    The model is unchanged afterwards, including the order of its initializers.
    """
    graph = model.graph
    initializers, inputs = list(graph.initializers.values()), list(graph.inputs)
    tensors = [value.const_value for value in initializers]
    try:
        for value in initializers:
            _set_aside(graph, value)
        return ir.serde.serialize_model(model)
    finally:
        graph.initializers.clear()
        for value, tensor in zip(initializers, tensors, strict=True):
            value.const_value = tensor
            graph.register_initializer(value)
        graph.inputs.clear()
        graph.inputs.extend(inputs)


def _set_aside(graph: ir.Graph, value: ir.Value) -> None:
    """Make a large initializer an input; bring a small one into memory, since onnx has no folder here."""
    tensor = value.const_value
    assert value.name is not None and tensor is not None, "a graph's initializer has a name and a value"
    if tensor.nbytes <= KEEP_BYTES:
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
        return
    value.dtype = value.dtype or tensor.dtype
    value.shape = value.shape if value.shape is not None else ir.Shape(tuple(tensor.shape.numpy()))
    graph.initializers.pop(value.name)
    if not value.is_graph_input():
        graph.inputs.append(value)
