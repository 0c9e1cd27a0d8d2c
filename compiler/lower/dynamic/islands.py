"""What stays float in a function for sequences of any length: which of its nodes there is code for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from bitwright.compiler.graph.model import node_label, static_shape
from bitwright.compiler.lower.layout import ELEMENTWISE
from bitwright.compiler.program.ops import FloatIsland, Program

# Tensors of one node: shapes of what it reads and writes.
NodeShapes: TypeAlias = tuple[str, str, tuple[tuple[int, ...] | None, ...]]

# Executed at lengths from 1 to 130 in the tests; TVM's code for others may be written for one length.
ANY_LENGTH = (
    *ELEMENTWISE,
    *("And", "Or", "Not", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Where"),
    *("Cast", "Ceil", "Floor", "Round", "Sign", "Cos", "Sin", "PRelu"),
    *("MatMul", "Gemm", "Softmax", "LogSoftmax", "LayerNormalization"),
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare"),
    *("Gather", "Concat", "Split", "Slice", "Expand", "Transpose"),
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Constant", "Shape", "DequantizeLinear"),
)


def node_shapes(program: Program) -> list[NodeShapes]:
    """Return name, operator and shapes of every node that stays float."""
    islands = [step for step in program.steps if isinstance(step, FloatIsland)]
    return [
        (
            node_label(node),
            node.op_type,
            tuple(None if v is None else static_shape(v) for v in (*node.inputs, *node.outputs)),
        )
        for island in islands
        for node in island.model.graph
    ]


def without_code(versions: Sequence[Sequence[NodeShapes]]) -> str | None:
    """Return the first node, in words, that follows the length and has no code for any; None if there is none.

    Args:
        versions: Nodes of the same model at several lengths.
    """
    for found in zip(*versions, strict=False):
        label, operator, shapes = found[0]
        if operator not in ANY_LENGTH and any(other[2] != shapes for other in found[1:]):
            return f"node '{label}' ({operator})"
    return None
