"""The float array that the nodes behind a stored weight compute (the forms that ``stored_weights`` writes)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.graph.model import constant_array, int_attribute

Array = NDArray[np.generic]


def dequantized_array(value: ir.Value | None) -> NDArray[np.float32] | None:
    """Return what a quantized weight is when it is read, None if ``value`` is computed in any other way.

    Args:
        value: The operand of a MatMul, Gemm or Conv behind a rounding pass; a float constant is returned as it is.
    """
    found = _evaluate(value)
    return None if found is None else found.astype(np.float32)


def _evaluate(value: ir.Value | None) -> Array | None:
    array = constant_array(value)
    if array is not None or value is None:
        return array
    node = value.producer()
    compute = _OPERATORS.get(node.op_type) if node is not None else None
    if node is None or compute is None:
        return None
    operands = [_evaluate(v) for v in node.inputs]
    known = [a for a in operands if a is not None]
    return compute(node, known) if len(known) == len(operands) else None


def _dequantize(node: ir.Node, operands: list[Array]) -> Array:
    array, scale = operands[0].astype(np.float32), operands[1].astype(np.float32)
    zero = operands[2].astype(np.float32) if len(operands) > 2 else np.zeros_like(scale)
    axis, block = int_attribute(node, "axis", 1), int_attribute(node, "block_size", 0)
    if block:
        length = range(array.shape[axis])
        scale, zero = (np.repeat(a, block, axis=axis).take(length, axis=axis) for a in (scale, zero))
    elif scale.ndim:
        shape = [1] * array.ndim
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return (array - zero) * scale


_OPERATORS: dict[str, Callable[[ir.Node, list[Array]], Array]] = {
    "DequantizeLinear": _dequantize,
    "Cast": lambda node, a: a[0].astype(ir.DataType(int_attribute(node, "to", 0)).numpy()),
    "Gather": lambda node, a: np.take(a[0], a[1].astype(np.int64), axis=int_attribute(node, "axis", 0)),
    "Mul": lambda _, a: a[0].astype(np.float32) * a[1].astype(np.float32),
    "Reshape": lambda _, a: a[0].reshape(a[1].astype(np.int64)),
}
