"""What is computed in one pass over the rows of tensors: elementwise functions and sums along rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.float import functions as f
from bitwright.compiler.lower.float.vectors import multiply_add, number
from bitwright.compiler.lower.templates.scaffold import Expr

LOAD, CONSTANT = "load", "constant"
# The operand that changes nothing, and how two partial results are combined.
REDUCTIONS: dict[str, tuple[float, Callable[[Expr, Expr], Expr]]] = {
    "sum": (0.0, lambda a, b: a + b),
    "mean": (0.0, lambda a, b: a + b),
    "max": (-3.4028234663852886e38, T.max),
    "min": (3.4028234663852886e38, T.min),
}
Function: TypeAlias = Callable[..., Expr]
# Name -> function of (operands..., lanes).
ELEMENTWISE: dict[str, Function] = {
    "add": lambda a, b, _: a + b,
    "subtract": lambda a, b, _: a - b,
    "multiply": lambda a, b, _: a * b,
    "divide": lambda a, b, _: a / b,
    "maximum": lambda a, b, _: T.max(a, b),
    "minimum": lambda a, b, _: T.min(a, b),
    "multiply_add": multiply_add,
    "negative": lambda a, lanes: number(-1, lanes) * a,
    "abs": lambda a, lanes: T.max(a, number(-1, lanes) * a),
    "square": lambda a, _: a * a,
    "reciprocal": lambda a, lanes: number(1, lanes) / a,
    "sqrt": lambda a, _: T.sqrt(a),
    "rsqrt": lambda a, lanes: number(1, lanes) / T.sqrt(a),
    "relu": lambda a, lanes: T.max(a, number(0, lanes)),
    "exp": f.exp,
    "erf": f.erf,
    "tanh": f.tanh,
    "sigmoid": f.sigmoid,
    "silu": f.silu,
    "gelu": f.gelu,
    "gelu_tanh": f.gelu_tanh,
}
# What is computed once and stored in a scratch row if several passes need it; the rest is computed again.
EXPENSIVE = frozenset(
    ("exp", "erf", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "divide", "sqrt", "rsqrt")
)


@dataclass(frozen=True)
class Node:
    """One value of the program.

    Attributes:
        operation: ``"load"``, ``"constant"``, a key of ``REDUCTIONS`` or of ``ELEMENTWISE``.
        operands: Positions of earlier nodes.
        number: The constant, or the source that is loaded.
        per_row: One number a row: a constant, a reduction, a load of something that does not move along the
            row, or a function of such.
    """

    operation: str
    operands: tuple[int, ...] = ()
    number: float = 0
    per_row: bool = False


@dataclass(frozen=True)
class Access:
    """Where a tensor lies.

    Attributes:
        shape: Physical shape of the buffer.
        strides: Elements from one position to the next along each axis of the loops, the row's last; 0 where
            the tensor is broadcast.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class RowProgram:
    """A pass over rows.

    Attributes:
        extents: Of the loops; the last is the length of a row.
        sources: What is read.
        output: What is written.
        nodes: In topological order; the last is the result.
        dtype: How sources and output are stored, ``"float32"`` or ``"float16"``.
    """

    extents: tuple[int, ...]
    sources: tuple[Access, ...]
    output: Access
    nodes: tuple[Node, ...]
    dtype: str = "float32"

    @property
    def rows(self) -> int:
        """Number of rows."""
        return prod(self.extents[:-1])

    @property
    def reduces(self) -> bool:
        """Some node needs a whole row."""
        return any(node.operation in REDUCTIONS for node in self.nodes)


def merged(program: RowProgram) -> RowProgram:
    """Return the program with neighbouring axes as one where every tensor lies so; sums keep their rows."""
    tensors = (*program.sources, program.output)
    axes = list(zip(program.extents, *(t.strides for t in tensors), strict=True))
    kept = [axes[-1]]
    for axis in reversed(axes[:-1]):
        inner = kept[0]
        is_row = len(kept) == 1
        if axis[0] == 1:
            continue
        if is_row and program.reduces:
            kept.insert(0, axis)
        elif inner[0] == 1:
            kept[0] = axis
        elif all(a == b * inner[0] for a, b in zip(axis[1:], inner[1:], strict=True)):
            kept[0] = (axis[0] * inner[0], *inner[1:])
        else:
            kept.insert(0, axis)
    extents, *strides = (tuple(column) for column in zip(*kept, strict=True))
    *sources, output = (Access(t.shape, s) for t, s in zip(tensors, strides, strict=True))
    # Rows of one element have one number each; where they are made one row, they do not.
    nodes = _with_row_numbers(program.nodes, sources) if program.extents[-1] == 1 else program.nodes
    return RowProgram(extents, tuple(sources), output, nodes, program.dtype)


def _with_row_numbers(nodes: Sequence[Node], sources: Sequence[Access]) -> tuple[Node, ...]:
    """Return nodes without reductions that know which of them have one number a row."""
    found: list[Node] = []
    for node in nodes:
        per_row = all(found[k].per_row for k in node.operands)
        if node.operation == LOAD:
            per_row = sources[int(node.number)].strides[-1] == 0
        found.append(replace(node, per_row=per_row))
    return tuple(found)


def stages(nodes: Sequence[Node]) -> list[int]:
    """Return the nodes that end a pass over the row: every reduction, and the result."""
    last = len(nodes) - 1
    ends = [k for k, node in enumerate(nodes) if node.operation in REDUCTIONS]
    return [*ends, last] if last not in ends else ends


def _needs(nodes: Sequence[Node], end: int) -> set[int]:
    """Return the values along the row that a pass computes, loads left out."""
    found: set[int] = set()
    waiting = [end]
    while waiting:
        position = waiting.pop()
        for operand in nodes[position].operands:
            if not nodes[operand].per_row and nodes[operand].operation != LOAD and operand not in found:
                found.add(operand)
                waiting.append(operand)
    return found


def stored_nodes(nodes: Sequence[Node]) -> frozenset[int]:
    """Return the expensive values that more than one pass needs."""
    passes = [_needs(nodes, end) | {end} for end in stages(nodes)]
    return frozenset(
        k
        for k, node in enumerate(nodes)
        if node.operation in EXPENSIVE and not node.per_row and sum(k in p for p in passes) > 1
    )


def apply(node: Node, operands: Sequence[Expr], lanes: int) -> Expr:
    """Return the value of an elementwise node."""
    result: Expr = ELEMENTWISE[node.operation](*operands, lanes)
    return result
