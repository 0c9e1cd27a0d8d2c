"""Rules on constant tensors as they stand in the file: type, dimensions, amount of data."""

from __future__ import annotations

import math

import onnx
import onnx_ir as ir
from onnx import TensorProto

from bitwright.compiler.ingest.detach import Detached
from bitwright.compiler.ingest.limits import Limits
from bitwright.compiler.ingest.protos import Body, body_tensors
from bitwright.compiler.ingest.text import refused, size

_INT32_FIELD = "int32_data"
# Where the elements of a type are when they are not in raw_data (the comments of onnx.proto).
_FIELD: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
}


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Return the packed size that the type and the dimensions ask for."""
    bits: int = ir.DataType(tensor.data_type).bitwidth
    elements: int = math.prod(tensor.dims)
    return (elements * bits + 7) // 8


def check_tensors(found: list[Body], detached: Detached, file: str, limits: Limits) -> None:
    """Check every constant tensor that is stored in the model file, of external ones the declaration.

    Raises:
        ModelError: Names the tensor, or the node whose attribute it is.
    """
    for body in found:
        if isinstance(body.graph, onnx.GraphProto) and body.graph.sparse_initializer:
            name = body.graph.sparse_initializer[0].values.name
            raise refused(file, f"tensor '{name}'", "is a sparse initializer", "store the weights densely")
        for node in body.graph.node:
            if any(a.HasField("sparse_tensor") or a.sparse_tensors for a in node.attribute):
                part = f"node '{node.name}'"
                raise refused(file, part, "has a sparse tensor as attribute", "store the weights densely")
        for tensor, part in body_tensors(body):
            _check_declaration(tensor, part, file, limits)
            span = detached.span(tensor)
            if span is not None:
                _check_held(tensor, span.length, tensor_bytes(tensor), "bytes", part, file)
            elif tensor.data_location != TensorProto.EXTERNAL:
                _check_amount(tensor, part, file)


def _check_declaration(tensor: onnx.TensorProto, part: str, file: str, limits: Limits) -> None:
    if tensor.data_type == TensorProto.UNDEFINED or tensor.data_type not in TensorProto.DataType.values():
        raise refused(
            file, part, f"has the unknown element type {tensor.data_type}", "export the model again"
        )
    if tensor.data_type == TensorProto.STRING:
        fix = "cut the text processing off the model"
        raise refused(file, part, "is a constant of strings, which cannot be quantized or compiled", fix)
    if tensor.HasField("segment"):
        raise refused(file, part, "is stored in segments", "store the tensor in one piece")
    if len(tensor.dims) > limits.rank:
        raise refused(file, part, f"has {len(tensor.dims)} dimensions, more than {limits.rank}", "reshape it")
    for axis, dim in enumerate(tensor.dims):
        if not 0 <= dim <= limits.dimension:
            what = f"dimension {axis} is {dim}, outside 0..{limits.dimension}"
            raise refused(file, part, what, "export the model again; the file is damaged or hostile")
    if tensor_bytes(tensor) > limits.tensor_bytes:
        what = f"its dimensions {list(tensor.dims)} mean {size(tensor_bytes(tensor))}"
        fix = f"the limit for one tensor is {size(limits.tensor_bytes)}; split it"
        raise refused(file, part, what, fix)


def _check_amount(tensor: onnx.TensorProto, part: str, file: str) -> None:
    elements = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        held, wanted, unit = len(tensor.raw_data), tensor_bytes(tensor), "bytes"
    else:
        held = len(getattr(tensor, _FIELD.get(tensor.data_type, _INT32_FIELD)))
        wanted, unit = _field_entries(tensor, elements), "entries"
    _check_held(tensor, held, wanted, unit, part, file)


def _check_held(tensor: onnx.TensorProto, held: int, wanted: int, unit: str, part: str, file: str) -> None:
    if held != wanted:
        what = f"dimensions {list(tensor.dims)} need {wanted} {unit} of data, the file holds {held}"
        raise refused(file, part, what, "export the model again; dimensions and data must agree")


def _field_entries(tensor: onnx.TensorProto, elements: int) -> int:
    if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        return 2 * elements
    bits = ir.DataType(tensor.data_type).bitwidth
    # int4 and int2 are packed into the bytes of int32_data, everything else takes one entry an element.
    return (elements * bits + 7) // 8 if bits in (2, 4) else elements
