"""The building blocks: linear layers and RMS normalization, in the spellings of the common exporters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.graph.model import constant_array, is_op, node_label
from bitwright.compiler.graph.operands import stored_weight, weight_array, weight_of
from bitwright.compiler.llama.following import (
    CONTRIB,
    axes_of,
    made_by,
    refuse,
    scalar,
    through,
    with_constant,
)

NORM_OPERATORS = ("RMSNormalization", "SimplifiedLayerNormalization")
# ONNX Runtime's normalization of a sum; the sum itself is its last output.
SKIP_NORM, SKIP_SUM = "SkipSimplifiedLayerNormalization", 3
# Of all these operators.
DEFAULT_EPSILON = 1e-5
Stream = ir.Value | ir.Node


@dataclass(frozen=True, eq=False)
class Linear:
    """A product with a constant matrix.

    Attributes:
        node: MatMul or Gemm.
        data: What it is applied to.
        weight: The constant operand.
        bias: What is added, shape (outputs,), or None.
    """

    node: ir.Node
    data: ir.Value
    weight: ir.Value
    bias: NDArray[np.float32] | None

    @property
    def label(self) -> str:
        """Name of the node."""
        return node_label(self.node)

    @property
    def rows_first(self) -> bool:
        """Whether the consumer sees the weight as (outputs, inputs)."""
        return self.node.op_type == "Gemm" and self.node.attributes.get_int("transB", 0) == 1

    def matrix(self) -> NDArray[np.float32]:
        """Return the weight, shape (outputs, inputs)."""
        seen = weight_array(self.weight)
        return np.ascontiguousarray(seen if self.rows_first else seen.T, np.float32)

    def shape(self) -> tuple[int, int]:
        """Return (outputs, inputs)."""
        rows, columns = weight_array(self.weight).shape
        return (rows, columns) if self.rows_first else (columns, rows)

    def stored(self) -> ir.Value:
        """Return the initializer that holds the weight."""
        found = stored_weight(self.weight)
        assert found is not None, "weight_of() found it constant"
        return found


def linear(value: ir.Value | None) -> Linear | None:
    """Return the linear layer that makes a value, or None."""
    value = through(value, "Cast")
    bias = None
    node = made_by(value, "Add")
    if node is not None and (split := with_constant(node)) is not None and split[1].ndim == 1:
        value, bias = through(split[0], "Cast"), split[1].astype(np.float32)
    node = made_by(value, "MatMul", "Gemm")
    weight = None if node is None else weight_of(node)
    if node is None or weight is None or node.inputs[0] is None or weight_array(weight).ndim != 2:
        return None
    if node.op_type == "Gemm":
        plain = node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
        if not plain or node.attributes.get_int("transA", 0) == 1:
            return None
        added = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
        bias = bias if added is None else added.reshape(-1).astype(np.float32)
    return Linear(node, node.inputs[0], weight, bias)


def expect_linear(value: ir.Value | None, what: str) -> Linear:
    """Return the linear layer that makes a value.

    Raises:
        ModelError: Something else makes it.
    """
    found = linear(value)
    if found is None:
        refuse(what, value)
    return found


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMS normalization.

    Attributes:
        data: What is normalized.
        weight: Gains, shape (width,).
        epsilon: Added to the mean square.
        source: The initializer of the gains.
        summed: The operator that also adds what it normalizes, or None.
    """

    data: ir.Value
    weight: NDArray[np.float32]
    epsilon: float
    source: ir.Value
    summed: ir.Node | None = None

    @property
    def stream(self) -> Stream:
        """The residual stream that is normalized."""
        return residual(self.data) if self.summed is None else self.summed


def is_skip_norm(node: ir.Node | None) -> bool:
    """Tell whether a node adds two values and normalizes the sum."""
    return node is not None and node.domain == CONTRIB and node.op_type == SKIP_NORM


def residual(value: ir.Value) -> Stream:
    """Return what stands for a residual stream: the operator for a sum inside a normalization, else the value."""
    found = through(value, "Cast") or value
    node = found.producer()
    if node is not None and is_skip_norm(node) and found.index() == SKIP_SUM:
        return node
    return found


def expect_norm(value: ir.Value | None) -> Norm:
    """Return the RMS normalization that makes a value.

    Raises:
        ModelError: Something else makes it.
    """
    found = norm_of(value)
    if found is None:
        refuse("an RMS normalization with constant gains", value)
    return found


def norm_of(value: ir.Value | None, last: int = 2) -> Norm | None:
    """Return the RMS normalization over the last axis that makes a value, or None.

    Args:
        value: What may be normalized.
        last: Number of its last axis.

    Raises:
        ModelError: It is one that also adds a bias.
    """
    value = through(value, "Cast")
    return _fused(value, last) or _spelled_out(value, last)


def _fused(value: ir.Value | None, last: int) -> Norm | None:
    node = None if value is None else value.producer()
    if node is None or node.outputs[0] is not value:
        return None
    skip = is_skip_norm(node)
    if skip and len(node.inputs) > SKIP_SUM and node.inputs[SKIP_SUM] is not None:
        refuse("a sum without bias", value)
    if not skip and node.op_type not in NORM_OPERATORS:
        return None
    source, data = node.inputs[2 if skip else 1], node.inputs[0]
    gains = constant_array(source)
    if (
        gains is None
        or source is None
        or data is None
        or node.attributes.get_int("axis", -1) not in (-1, last)
    ):
        return None
    epsilon = node.attributes.get_float("epsilon", DEFAULT_EPSILON)
    if skip and node.inputs[1] is data:
        # What is added to itself is normalized alone: twice the value over twice its root mean square.
        return Norm(data, gains.astype(np.float32), epsilon / 4, source)
    return Norm(data, gains.astype(np.float32), epsilon, source, node if skip else None)


def _spelled_out(value: ir.Value | None, last: int) -> Norm | None:
    """Match ``gain * (x / sqrt(mean(x^2) + eps))`` with the division written in any way."""
    node = made_by(value, "Mul")
    if node is None or (split := with_constant(node)) is None or split[1].ndim != 1:
        return None
    source = next(v for v in node.inputs if v is not None and constant_array(v) is not None)
    unit = through(split[0], "Cast")
    for data, inverse in _quotients(unit):
        epsilon = _epsilon(inverse, data, last)
        if epsilon is not None:
            return Norm(data, split[1].astype(np.float32), epsilon, source)
    return None


def _quotients(value: ir.Value | None) -> list[tuple[ir.Value, ir.Value]]:
    """Return (x, sqrt(..)) for every reading of a value as x / sqrt(..)."""
    node = None if value is None else value.producer()
    if node is None or len(node.inputs) != 2:
        return []
    first, second = node.inputs
    if is_op(node, "Div") and first is not None and second is not None:
        return [(first, second)]
    if not is_op(node, "Mul"):
        return []
    pairs = [(first, second), (second, first)]
    return [(x, root) for x, r in pairs if x is not None and (root := _reciprocal(r)) is not None]


def _reciprocal(value: ir.Value | None) -> ir.Value | None:
    """Return v if a value is 1 / v."""
    node = made_by(value, "Reciprocal")
    if node is not None:
        return node.inputs[0]
    node = made_by(value, "Div")
    return node.inputs[1] if node is not None and scalar(node.inputs[0]) == 1.0 else None


def _epsilon(root: ir.Value, data: ir.Value, last: int) -> float | None:
    """Return eps if a value is sqrt(mean(data^2) + eps) over the last axis."""
    node = made_by(root, "Sqrt")
    node = None if node is None else made_by(node.inputs[0], "Add")
    if node is None or (split := with_constant(node)) is None or split[1].size != 1:
        return None
    mean = made_by(split[0], "ReduceMean")
    if mean is None or axes_of(mean) not in ((-1,), (last,)):
        return None
    square = made_by(mean.inputs[0], "Pow", "Mul")
    if square is None or through(square.inputs[0], "Cast") is not through(data, "Cast"):
        return None
    squared = (
        scalar(square.inputs[1]) == 2.0 if square.op_type == "Pow" else square.inputs[0] is square.inputs[1]
    )
    return float(split[1].reshape(())) if squared else None
