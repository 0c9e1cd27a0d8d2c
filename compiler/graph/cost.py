"""What one call of a node computes and touches: multiply-accumulates, elements, the length of a reduction."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import constant_array, int_attribute, is_op, node_label, static_shape

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> static shape; takes precedence over the shapes stored in the model."""


def shape_of(value: ir.Value | None, shapes: Shapes, node: ir.Node) -> tuple[int, ...]:
    """Return a tensor's static shape.

    Raises:
        ModelError: The shape is neither in ``shapes`` nor static in the model.
    """
    name = "" if value is None or value.name is None else value.name
    found = shapes[name] if name in shapes else static_shape(value)
    if found is None and (constant := constant_array(value)) is not None:
        found = constant.shape
    if found is None:
        what = f"the shape of '{name}' is unknown, so its cost cannot be computed"
        raise ModelError(
            what, where=f"node '{node_label(node)}'", fix="give the sizes of the dynamic dimensions"
        )
    return found


def _gemm_sizes(node: ir.Node, shapes: Shapes) -> tuple[int, int, int]:
    a, b = (shape_of(v, shapes, node) for v in node.inputs[:2])
    m, k = reversed(a) if int_attribute(node, "transA", 0) else a
    n = b[0] if int_attribute(node, "transB", 0) else b[1]
    return m, k, n


def reduction(node: ir.Node, shapes: Shapes | None = None) -> int:
    """Return how many products one accumulator of a Conv, Gemm or MatMul sums; 0 for other operators.

    Raises:
        ModelError: A shape is unknown.
    """
    known = shapes or {}
    if is_op(node, "Conv"):
        return prod(shape_of(node.inputs[1], known, node)[1:])
    if is_op(node, "Gemm"):
        return _gemm_sizes(node, known)[1]
    if is_op(node, "MatMul"):
        return shape_of(node.inputs[0], known, node)[-1]
    return 0


def node_macs(node: ir.Node, shapes: Shapes | None = None) -> int:
    """Return the multiply-accumulates of one call of a Conv, Gemm or MatMul; 0 for other operators.

    Args:
        node: The node.
        shapes: Static shapes of tensors whose dimensions are symbolic in the model.

    Raises:
        ModelError: A shape is unknown.
    """
    known = shapes or {}
    if is_op(node, "Gemm"):
        return prod(_gemm_sizes(node, known))
    if is_op(node, "Conv"):
        # Every output element sums one reduction: ONNX keeps I / group in the weight's shape.
        return prod(shape_of(node.outputs[0], known, node)) * reduction(node, known)
    if is_op(node, "MatMul"):
        return prod(_matmul_result(node, known)) * reduction(node, known)
    return 0


def _matmul_result(node: ir.Node, shapes: Shapes) -> tuple[int, ...]:
    a, b = (shape_of(v, shapes, node) for v in node.inputs[:2])
    rows = a[-2:-1]
    columns = b[-1:] if len(b) > 1 else ()
    batch_a, batch_b = a[:-2], b[:-2]
    longer, shorter = (batch_a, batch_b) if len(batch_a) >= len(batch_b) else (batch_b, batch_a)
    padded = (1,) * (len(longer) - len(shorter)) + shorter
    return (*(max(x, y) for x, y in zip(longer, padded, strict=True)), *rows, *columns)


def is_depthwise(node: ir.Node, shapes: Shapes | None = None) -> bool:
    """Tell whether a Conv has one input channel a group and more than one group."""
    return (
        is_op(node, "Conv")
        and int_attribute(node, "group", 1) > 1
        and shape_of(node.inputs[1], shapes or {}, node)[1] == 1
    )
