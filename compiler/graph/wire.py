"""Writing a model as protobuf without building the message: weights go from where they are into the file.

Built and serialized by protobuf, every weight exists three more times. Here protobuf serializes a model whose large
weights are missing, and their bytes are written in between.
https://protobuf.dev/programming-guides/encoding describes the format, onnx.proto the numbers.
"""

from __future__ import annotations

from typing import BinaryIO

import onnx
import onnx_ir as ir

LENGTH_DELIMITED = 2
# Below this a copy costs nothing.
SPLICE_ABOVE_BYTES = 64 << 10
GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
RAW_DATA = onnx.TensorProto.DESCRIPTOR.fields_by_name["raw_data"].number
_CONTINUED = 0x80


def varint(value: int) -> bytes:
    """Return a non-negative number in seven bits a byte, lowest first."""
    found = bytearray()
    while value >= _CONTINUED:
        found.append(value & 0x7F | _CONTINUED)
        value >>= 7
    return bytes([*found, value])


def field_head(number: int, length: int) -> bytes:
    """Return what stands before the payload of a length-delimited field."""
    return varint(number << 3 | LENGTH_DELIMITED) + varint(length)


def write_model(model: ir.Model, stream: BinaryIO) -> None:
    """Write a model as one self-contained protobuf message; external weights are copied into it.

    Args:
        model: At most 2 GiB; not changed.
        stream: A binary file open for writing, or ``io.BytesIO``.
    """
    large = {
        value: value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and (
            isinstance(value.const_value, ir.ExternalTensor) or value.const_value.nbytes > SPLICE_ABOVE_BYTES
        )
    }
    proto = _without(model, large)
    tensors = [(t, large.get(model.graph.initializers[t.name])) for t in proto.graph.initializer]
    heads = [_head(message, tensor) for message, tensor in tensors]
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    lengths = [
        len(h) + (tensor.nbytes if tensor else 0) for h, (_, tensor) in zip(heads, tensors, strict=True)
    ]
    fields = [field_head(INITIALIZER, length) for length in lengths]
    stream.write(proto.SerializeToString())
    stream.write(field_head(GRAPH, len(graph) + sum(lengths) + sum(map(len, fields))) + graph)
    for field, head, (_, tensor) in zip(fields, heads, tensors, strict=True):
        stream.write(field + head)
        if tensor is not None:
            _write_bytes(tensor, stream)


def _without(model: ir.Model, large: dict[ir.Value, ir.TensorProtocol]) -> onnx.ModelProto:
    """Return the message of a model in which the tensors ``large`` have no data."""
    try:
        for value, tensor in large.items():
            shape = ir.Shape(tuple(tensor.shape.numpy()))
            value.const_value = ir.ExternalTensor("", 0, 0, tensor.dtype, shape=shape, name=value.name or "")
        return ir.to_proto(model)
    finally:
        for value, tensor in large.items():
            value.const_value = tensor


def _head(message: onnx.TensorProto, tensor: ir.TensorProtocol | None) -> bytes:
    """Return the message of a tensor up to its data, if they were taken out."""
    if tensor is not None:
        del message.external_data[:]
        message.ClearField("data_location")
    serialized: bytes = message.SerializeToString()
    return serialized if tensor is None else serialized + field_head(RAW_DATA, tensor.nbytes)


def _write_bytes(tensor: ir.TensorProtocol, stream: BinaryIO) -> None:
    start = stream.tell()
    if isinstance(tensor, ir.Tensor | ir.ExternalTensor):
        tensor.tofile(stream)
    else:
        stream.write(tensor.tobytes())
    assert stream.tell() - start == tensor.nbytes, "the length of the field was written before"
