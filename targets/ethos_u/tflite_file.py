"""Writing a TensorFlow Lite graph as a file."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitwright.targets.ethos_u.tflite_graph import Layer, TfliteGraph, TfliteTensor

FILE_VERSION = 3
IDENTIFIER = b"TFL3"
# Operator codes beyond this stand in a field of their own; the old one then holds this.
LAST_OLD_CODE = 127


def tflite_bytes(graph: TfliteGraph, description: str) -> bytes:
    """Return the content of a ``.tflite`` file.

    Args:
        graph: What to write.
        description: A line about where it comes from.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    codes = _operator_codes(graph)
    numbers = {name: number for number, name in enumerate(graph.tensors)}
    subgraph = schema.SubGraphT()
    subgraph.name = "main"
    subgraph.tensors, buffers = _tensors(schema, graph)
    subgraph.inputs = np.array([numbers[s.tensor] for s in graph.inputs.values()], np.int32)
    subgraph.outputs = np.array([numbers[s.tensor] for s in graph.outputs.values()], np.int32)
    subgraph.operators = [_operator(schema, layer, numbers, codes) for layer in graph.layers]
    model = schema.ModelT()
    model.version, model.description = FILE_VERSION, description
    model.operatorCodes = [_code(schema, *key) for key in codes]
    model.subgraphs, model.buffers = [subgraph], buffers
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def _operator_codes(graph: TfliteGraph) -> dict[tuple[str, int], int]:
    """Return operator -> its number, each with the newest version that is needed."""
    newest: dict[str, int] = {}
    for layer in graph.layers:
        newest[layer.operator] = max(layer.version, newest.get(layer.operator, 1))
    return {(name, version): number for number, (name, version) in enumerate(newest.items())}


def _code(schema: Any, operator: str, version: int) -> Any:
    found = schema.OperatorCodeT()
    found.builtinCode = getattr(schema.BuiltinOperator, operator)
    found.deprecatedBuiltinCode = min(found.builtinCode, LAST_OLD_CODE)
    found.version = version
    return found


def _tensors(schema: Any, graph: TfliteGraph) -> tuple[list[Any], list[Any]]:
    buffers = [schema.BufferT()]  # the first one is empty by convention: a tensor without data
    tensors = []
    for tensor in graph.tensors.values():
        found = schema.TensorT()
        found.name, found.shape = tensor.name, np.array(tensor.shape, np.int32)
        found.type = getattr(schema.TensorType, tensor.dtype.upper())
        found.quantization = _quantization(schema, tensor)
        if tensor.data is not None:
            content = np.ascontiguousarray(tensor.data, tensor.dtype)
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(content.astype(content.dtype.newbyteorder("<")).tobytes(), np.uint8)
            buffers.append(buffer)
            found.buffer = len(buffers) - 1
        tensors.append(found)
    return tensors, buffers


def _quantization(schema: Any, tensor: TfliteTensor) -> Any:
    if not tensor.scale.size:
        return None
    found = schema.QuantizationParametersT()
    found.scale = tensor.scale.astype(np.float32)
    found.zeroPoint = np.full(tensor.scale.size, tensor.zero_point, np.int64)
    found.quantizedDimension = tensor.axis
    return found


def _operator(schema: Any, layer: Layer, numbers: dict[str, int], codes: dict[tuple[str, int], int]) -> Any:
    found = schema.OperatorT()
    found.opcodeIndex = next(number for (name, _), number in codes.items() if name == layer.operator)
    found.inputs = np.array([numbers[name] for name in layer.inputs], np.int32)
    found.outputs = np.array([numbers[layer.output]], np.int32)
    if layer.options_type:
        options = getattr(schema, f"{layer.options_type}T")()
        for name, value in layer.options.items():
            setattr(options, name, value)
        found.builtinOptions = options
        found.builtinOptionsType = getattr(schema.BuiltinOptions, layer.options_type)
    return found
