"""How far a decoder's tables of rotary positions reach, whatever form its attention has."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import is_op, static_shape
from bitwright.compiler.llama.following import CONTRIB, made_by
from bitwright.compiler.llama.rotary import OPERATOR, Rotation, rotation, source_of

ATTENTION = "GroupQueryAttention"
COS_TABLE, SIN_TABLE = 7, 8
# One row is no table: the position is fixed.
FEWEST_ROWS = 2


def table_positions(model: ir.Model) -> int | None:
    """Return how many positions the tables that rotate queries and keys hold, the fewest of all layers.

    Beyond its end a table gives no row, or its last one for several tokens, which runtimes do not always refuse.

    Args:
        model: In any form; not changed.

    Returns:
        None where angles are computed, or nothing is rotated by a table.
    """
    found = (_rows(v) for node in model.graph for v in _tables(node))
    return min((rows for rows in found if rows is not None), default=None)


def _tables(node: ir.Node) -> Iterator[ir.Value | None]:
    """Yield what a node reads cosines and sines from, if it rotates."""
    if node.domain == CONTRIB and node.op_type == ATTENTION:
        yield from node.inputs[COS_TABLE : SIN_TABLE + 1]
    elif node.op_type == OPERATOR or _may_rotate(node):
        turn = _rotation(node.outputs[0])
        if turn is not None:
            yield source_of(turn.cos, "Cos")
            yield source_of(turn.sin, "Sin")


def _may_rotate(node: ir.Node) -> bool:
    return is_op(node, "Add") and all(made_by(v, "Mul") is not None for v in node.inputs)


def _rotation(value: ir.Value) -> Rotation | None:
    try:
        return rotation(value)
    except ModelError:
        return None


def _rows(table: ir.Value | None) -> int | None:
    """Return the number of rows of a constant table, [..., positions, width]."""
    if table is None or (table.const_value is None and made_by(table, "Constant") is None):
        return None
    shape = static_shape(table) if table.const_value is None else tuple(table.const_value.shape.numpy())
    rows = None if shape is None or len(shape) < 2 else int(shape[-2])
    return rows if rows is not None and rows >= FEWEST_ROWS else None
