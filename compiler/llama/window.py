"""Windows of attention: how far back a mask lets a position see, and how far it must be followed to prove that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array, is_op
from bitwright.compiler.llama.following import made_by, scalar, through

COMPARISONS = ("Less", "LessOrEqual", "Greater", "GreaterOrEqual")
MOVED = ("Cast", "Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
# Operators whose float operands may be positions; elsewhere floats are what masked scores become.
OF_POSITIONS = (*COMPARISONS, "Sub", "Range", "Clip", "Trilu")
# Numbers beyond stand for "to the end" in slices.
LARGEST = 1 << 30
# A table is looked at as a whole, a shorter constant number by number.
TABLE = 4096
# A window of one position looks like the usual mask from the other side; comparing two tokens tells them apart.
SHORTEST = 2


@dataclass(frozen=True)
class Sight:
    """What a mask lets a position see of those before it.

    Attributes:
        window: So many positions, its own included; None if no comparison of positions limits them.
        largest: The largest number that the mask is computed with, 0 if there is none. A limit of a kind that is not
            understood is no longer, so sequences that are longer by two show it.
    """

    window: int | None = None
    largest: int = 0


EVERYTHING = Sight()


def sight_of(mask: ir.Value | None) -> Sight:
    """Return what a mask lets a position see, read from what computes it.

    Args:
        mask: What is added to scores or selects among them, or None.
    """
    if mask is None:
        return EVERYTHING
    nodes, constants = _behind(mask)
    windows = {w for node in nodes if (w := _window(node)) is not None}
    numbers = [n for value, readers in constants.items() for n in _numbers(value, readers)]
    return Sight(windows.pop() if len(windows) == 1 else None, max(numbers, default=0))


def _behind(value: ir.Value) -> tuple[list[ir.Node], dict[ir.Value, list[ir.Node]]]:
    """Return the nodes that compute a value from sizes, and the constants that they read, each with its readers."""
    nodes: list[ir.Node] = []
    constants: dict[ir.Value, list[ir.Node]] = {}
    if constant_array(value) is not None:
        return nodes, {value: []}
    todo, seen = [value], {value}
    while todo:
        node = todo.pop().producer()
        if node is None or is_op(node, "Shape", "Size"):
            continue
        nodes.append(node)
        for operand in node.inputs:
            if operand is None:
                continue
            if constant_array(operand) is not None:
                constants.setdefault(operand, []).append(node)
            elif operand not in seen:
                seen.add(operand)
                todo.append(operand)
    return nodes, constants


def _window(node: ir.Node) -> int | None:
    """Return the window w if a node compares positions: q - w < k sees k, k <= q - w hides it."""
    if not is_op(node, *COMPARISONS):
        return None
    smaller, larger = node.inputs if node.op_type.startswith("Less") else node.inputs[::-1]
    (first, below), (second, above) = _shifted(smaller), _shifted(larger)
    alone = second if first is None else first
    if first is None or second is None:
        difference = made_by(alone, "Sub")
        if difference is None:
            return None
        (left, plus), (right, minus) = (_shifted(v) for v in difference.inputs)
        if left is None or right is None:
            return None
        shift = plus - minus
        below, above = (below + shift, above) if second is None else (below, above + shift)
    distance, nonstrict = above - below, node.op_type.endswith("OrEqual")
    window = distance + nonstrict if distance > 0 else -distance + (not nonstrict)
    return window if window >= SHORTEST and distance else None


def _shifted(value: ir.Value | None) -> tuple[ir.Value | None, int]:
    """Return positions without the constant number that is added to them; None if there is nothing else."""
    shift = 0
    while True:
        value = through(value, *MOVED)
        number = scalar(value)
        if number is not None:
            return None, shift + round(number)
        node = made_by(value, "Add", "Sub")
        if node is None:
            return value, shift
        by = scalar(through(node.inputs[1], *MOVED))
        if by is not None:
            value, shift = node.inputs[0], shift + round(by if node.op_type == "Add" else -by)
        elif node.op_type == "Add" and (by := scalar(through(node.inputs[0], *MOVED))) is not None:
            value, shift = node.inputs[1], shift + round(by)
        else:
            return value, shift


def _numbers(value: ir.Value, readers: list[ir.Node]) -> Iterator[int]:
    """Yield the numbers of a constant that may be a distance between positions."""
    array = constant_array(value)
    assert array is not None, "only constants are asked for"
    if array.ndim > 1 and array.size > TABLE:
        if not _is_triangle(array):
            yield array.shape[-1]
        return
    if array.dtype == bool or (array.ndim == 1 and np.array_equal(array, np.arange(array.size))):
        return
    if not np.issubdtype(array.dtype, np.integer) and not any(is_op(n, *OF_POSITIONS) for n in readers):
        return
    finite = np.abs(array[np.isfinite(array)].astype(np.float64))
    yield int(max(finite[finite < LARGEST], default=0.0))


def _is_triangle(table: np.ndarray) -> bool:
    """Tell whether every row of a table shows one value up to the diagonal and one behind it."""
    rows = table.reshape(-1, *table.shape[-2:])
    if rows.shape[1] != rows.shape[2]:
        return False
    lower = np.tri(rows.shape[1], dtype=bool)
    return bool((rows[:, lower] == rows[0, 0, 0]).all() and (rows[:, ~lower] == rows[0, 0, 1]).all())
