"""Which operand of an operator is its data and which its constant weight."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array


def table_of(node: ir.Node) -> ir.Value | None:
    """Return the constant float matrix whose rows a Gather looks up, or None if it does something else."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return None
    array = constant_array(node.inputs[0])
    return node.inputs[0] if array is not None and array.ndim == 2 and array.dtype == np.float32 else None


def weight_of(node: ir.Node) -> ir.Value | None:
    """Return the constant weight operand of a MatMul, Gemm or Conv, or None if it is computed at run time."""
    if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.inputs) < 2:
        return None
    weight = node.inputs[1]
    return weight if constant_array(stored_weight(weight)) is not None else None


def stored_weight(weight: ir.Value | None) -> ir.Value | None:
    """Return the initializer behind a weight: itself, or the source of the Transpose that a tied weight is read by."""
    if weight is None:
        return None
    producer = weight.producer()
    if producer is not None and producer.op_type == "Transpose":
        return producer.inputs[0]
    return weight


def weight_array(weight: ir.Value) -> np.ndarray:
    """Return the weight as its consumer sees it (transposed where a tied weight is read through a Transpose)."""
    array = constant_array(stored_weight(weight))
    if array is None:
        msg = f"weight '{weight.name}' is not constant"
        raise TypeError(msg)
    producer = weight.producer()
    if producer is not None and producer.op_type == "Transpose":
        perm = producer.attributes.get_ints("perm", None)
        return np.transpose(array, None if perm is None else tuple(perm))
    return array


def activations_of(node: ir.Node) -> tuple[ir.Value, ...]:
    """Return the data operands that would be read as integers (weights, biases and parameters are not)."""
    if node.op_type == "Gather":
        return ()
    limit = 1
    if node.op_type in ("Add", "Mul"):
        limit = 2
    elif node.op_type == "Concat":
        limit = len(node.inputs)
    return tuple(v for v in node.inputs[:limit] if v is not None)
