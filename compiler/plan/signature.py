"""What decides the time of a call, as a line of text: the key of measured times in a profile.

``1x64x25x5,c64x1x3x3,c64>1x64x25x5+Relu q`` is a depthwise convolution with a constant weight and bias, a Relu fused
behind it, that writes integers. Stride and groups follow from the shapes. `` beside int8`` behind that says that the
layer before it runs in int8: large weights push everything else out of the caches, so the same LayerNormalization
takes half as long again among float layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from bitwright.compiler.graph.cost import Shapes, is_depthwise, shape_of
from bitwright.compiler.graph.model import constant_array, is_op
from bitwright.compiler.graph.operands import stored_weight

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def signature(node: ir.Node, shapes: Shapes, tail: Sequence[ir.Node] = (), *, writes: str = "") -> str:
    """Return the key under which a call's measured time is kept.

    Args:
        node: The node that decides which kernel runs.
        shapes: Static shapes of tensors whose dimensions are symbolic in the model.
        tail: Nodes fused behind it.
        writes: ``"q"`` for an integer result, ``"f"`` for a float one; "" for float calls.

    Raises:
        ModelError: A shape is unknown.
    """
    inputs = ",".join(_operand(v, shapes, node) for v in node.inputs if v is not None and v.name)
    outputs = ",".join(_dims(shape_of(v, shapes, node)) for v in node.outputs if v.name)
    behind = "".join(f"+{n.op_type}" for n in tail)
    return f"{inputs}>{outputs}{behind}{' ' if writes else ''}{writes}"


def beside(key: str, neighbour: str) -> str:
    """Return the key of a call in a certain company: of the same call behind a layer in some format.

    Args:
        key: From :func:`signature`.
        neighbour: Format of the layer before it; "" for any.
    """
    return f"{key} beside {neighbour}" if neighbour else key


def boundary_signature(shape: Sequence[int]) -> str:
    """Return the key of a conversion of one tensor between float and integers."""
    return f"{_dims(shape)}>{_dims(shape)}"


def fit_names(node: ir.Node, shapes: Shapes) -> tuple[str, ...]:
    """Return the kinds of work whose fitted times apply to a node, closest first."""
    if is_op(node, "Conv"):
        if is_depthwise(node, shapes):
            return ("depthwise",)
        kernel = shape_of(node.inputs[1], shapes, node)[2:]
        return ("pointwise", "conv") if set(kernel) <= {1} else ("conv",)
    if is_op(node, "Gemm", "MatMul"):
        return ("gemm",) if _constant(node.inputs[1]) else ("product", "gemm")
    return (node.op_type, "elementwise")


def _operand(value: ir.Value, shapes: Shapes, node: ir.Node) -> str:
    return ("c" if _constant(value) else "") + _dims(shape_of(value, shapes, node))


def _constant(value: ir.Value | None) -> bool:
    """Tell whether a value is constant, read directly or through the Transpose of a tied weight."""
    return constant_array(value) is not None or constant_array(stored_weight(value)) is not None


def _dims(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "s"
