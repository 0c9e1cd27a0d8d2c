"""Steps through a graph against its edges, with a refusal that names the node where the path ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import constant_array, is_op, node_label

CONTRIB = "com.microsoft"
FIX = "give a decoder of the llama family (RMSNorm, rotary positions, SwiGLU)"


def refuse(what: str, value: ir.Value | None) -> NoReturn:
    """Refuse a value that is not what the architecture has there.

    Raises:
        ModelError: Always; it names the node.
    """
    node = None if value is None else value.producer()
    where = f"node '{node_label(node)}'" if node is not None else f"tensor '{value.name if value else ''}'"
    found = f", found {node.op_type}" if node is not None else ""
    msg = f"not a llama decoder: {what} expected here{found}"
    raise ModelError(msg, where=where, fix=FIX)


def made_by(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """Return the node that makes a value if it is one of these operators."""
    node = None if value is None else value.producer()
    return node if is_op(node, *ops) else None


def expect(value: ir.Value | None, what: str, *ops: str) -> ir.Node:
    """Return the node that makes a value.

    Raises:
        ModelError: It is none of these operators.
    """
    node = made_by(value, *ops)
    if node is None:
        refuse(what, value)
    return node


def through(value: ir.Value | None, *ops: str) -> ir.Value | None:
    """Return what a value is before any of these operators rearranged or converted it."""
    while (node := made_by(value, *ops)) is not None:
        value = node.inputs[0]
    return value


def scalar(value: ir.Value | None) -> float | None:
    """Return a constant of one element."""
    array = constant_array(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def numbers(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return a constant list of integers."""
    array = constant_array(value)
    if array is None or not np.issubdtype(array.dtype, np.integer):
        return None
    return tuple(int(n) for n in array.ravel())


def with_constant(node: ir.Node) -> tuple[ir.Value, np.ndarray] | None:
    """Return the computed and the constant operand of a commutative operator."""
    first, second = node.inputs
    for data, fixed in ((first, second), (second, first)):
        array = constant_array(fixed)
        if array is not None and data is not None and constant_array(data) is None:
            return data, array
    return None


def unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Return a value before it was multiplied or divided by constant numbers, and their product."""
    factor = 1.0
    while (node := made_by(value, "Mul", "Div", "Cast")) is not None:
        if node.op_type == "Cast":
            value = node.inputs[0]
            continue
        by = scalar(node.inputs[1])
        if by is not None:
            factor, value = (factor * by if node.op_type == "Mul" else factor / by), node.inputs[0]
        elif node.op_type == "Mul" and (by := scalar(node.inputs[0])) is not None:
            factor, value = factor * by, node.inputs[1]
        else:
            break
    return value, factor


def last_sizes(shape: ir.Value | None, count: int) -> tuple[int, ...] | None:
    """Return the last sizes of a Reshape's target if they are constant, whatever comes before."""
    fixed = numbers(shape)
    if fixed is not None:
        return fixed[-count:] if len(fixed) >= count else None
    node = made_by(shape, "Concat")
    if node is None or len(node.inputs) < count:
        return None
    parts = [numbers(v) for v in node.inputs[-count:]]
    return tuple(p[0] for p in parts if p and len(p) == 1) if all(p and len(p) == 1 for p in parts) else None


def axes_of(node: ir.Node) -> tuple[int, ...]:
    """Return the axes of an Unsqueeze, ReduceMean or the like, given as input or attribute."""
    given = node.attributes.get("axes")
    if given is not None:
        return tuple(int(a) for a in given.as_ints())
    return (numbers(node.inputs[1]) or ()) if len(node.inputs) > 1 else ()


def permutation(node: ir.Node) -> Sequence[int]:
    """Return the permutation of a Transpose, empty if it is the default."""
    return tuple(node.attributes.get_ints("perm", ()) or ())
