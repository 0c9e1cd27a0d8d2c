"""ONNX's own checker and shape inference, on a copy of the model without its weights."""

from __future__ import annotations

import math

import onnx
import onnx_ir as ir
from onnx import TensorProto

from bitwright.compiler.ingest.limits import Limits
from bitwright.compiler.ingest.protos import attribute_graphs, node_part, tensor_part
from bitwright.compiler.ingest.tensor_checks import tensor_bytes
from bitwright.compiler.ingest.text import one_line, refused, size

# Shape inference reads constants that are shapes, axes or indices; those are never this large.
_KEPT_BYTES = 64 * 1024
_KEPT_FIELDS = ("ir_version", "opset_import", "producer_name", "domain", "model_version", "functions")


def run_checker(model: onnx.ModelProto, file: str, limits: Limits) -> None:
    """Run the ONNX checker and strict shape inference, and hold inferred sizes to the budget.

    Graph outputs without a shape, which ONNX Runtime accepts and the checker does not, get the inferred one
    in place.

    Raises:
        ModelError: The model is invalid, or a value of static shape is larger than the budget.
    """
    bare = without_weights(model)
    fix = "export the model again with a current exporter"
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True)
        _complete_outputs(bare, model, inferred)
        onnx.checker.check_model(bare)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        what = f"the ONNX checker refuses it: {one_line(error)}"
        raise refused(file, "", what, fix) from error
    _check_values(inferred.graph, file, limits, "")


def _complete_outputs(bare: onnx.ModelProto, model: onnx.ModelProto, inferred: onnx.ModelProto) -> None:
    outputs = zip(bare.graph.output, model.graph.output, inferred.graph.output, strict=True)
    for checked, declared, found in outputs:
        kind = declared.type.tensor_type
        if declared.type.WhichOneof("value") in (None, "tensor_type") and not kind.HasField("shape"):
            declared.type.CopyFrom(found.type)
            checked.type.CopyFrom(found.type)
            # An unknown rank stays unknown in the model; the checker asks for the field, not for its content.
            checked.type.tensor_type.shape.SetInParent()


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with its large and external constants turned into graph inputs of the same type and shape.

    Inside control flow and functions, where there is no input to turn them into, external constants become
    zeros.
    """
    bare = onnx.ModelProto()
    for field in _KEPT_FIELDS:
        value = getattr(model, field)
        if isinstance(value, str | int):
            setattr(bare, field, value)
        else:
            getattr(bare, field).extend(value)
    graph = model.graph
    bare.graph.name = graph.name or "main"
    bare.graph.input.extend(graph.input)
    bare.graph.output.extend(graph.output)
    bare.graph.value_info.extend(graph.value_info)
    for tensor in graph.initializer:
        if _is_weight(tensor):
            bare.graph.input.append(_stand_in(tensor, tensor.name))
        else:
            bare.graph.initializer.append(tensor)
    for node in graph.node:
        value = node.attribute[0] if node.op_type == "Constant" and len(node.attribute) == 1 else None
        if value is not None and value.name == "value" and value.HasField("t") and _is_weight(value.t):
            bare.graph.input.append(_stand_in(value.t, node.output[0]))
        else:
            bare.graph.node.append(node)
    for body in [bare.graph, *bare.functions]:
        _fill_external(body)
    return bare


def _is_weight(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL or tensor_bytes(tensor) > _KEPT_BYTES


def _stand_in(tensor: onnx.TensorProto, name: str) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))


def _fill_external(graph: onnx.GraphProto | onnx.FunctionProto) -> None:
    tensors = list(graph.initializer) if isinstance(graph, onnx.GraphProto) else []
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t] if attribute.HasField("t") else []
            tensors += attribute.tensors
        for _, inner in attribute_graphs(node):
            _fill_external(inner)
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL:
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.raw_data = bytes(tensor_bytes(tensor))


def _check_values(graph: onnx.GraphProto, file: str, limits: Limits, place: str) -> None:
    for value in [*graph.value_info, *graph.output]:
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
            continue
        sizes = [d.dim_value for d in kind.shape.dim if d.HasField("dim_value")]
        if any(d < 0 for d in sizes):
            what = f"has a negative dimension in {sizes}"
            fix = "declare its size, or give it a name (dim_param) if it varies"
            raise refused(file, _value_part(graph, value.name, place), what, fix)
        known = kind.elem_type in TensorProto.DataType.values() and kind.elem_type != TensorProto.STRING
        bits = ir.DataType(kind.elem_type).bitwidth if known and kind.elem_type else 8
        needed = math.prod(sizes) * bits // 8
        if needed > limits.value_bytes:
            what = f"its shape {sizes} means at least {size(needed)}"
            fix = f"the limit for one value is {size(limits.value_bytes)}"
            raise refused(file, _value_part(graph, value.name, place), what, fix)
    for node in graph.node:
        for name, inner in attribute_graphs(node):
            _check_values(inner, file, limits, f"{name} of {node_part(node)}")


def _value_part(graph: onnx.GraphProto, name: str, place: str) -> str:
    producer = next((node for node in graph.node if name in node.output), None)
    if producer is None:
        return tensor_part(name, place)
    return f"{node_part(producer, place)}: {tensor_part(name)}"
