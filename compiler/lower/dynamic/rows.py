"""Passes over rows of tensors whose number or length follows the length of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.dynamic.sizes import Polynomial, expression, substituted
from bitwright.compiler.lower.dynamic.threads import spread
from bitwright.compiler.lower.float.row_program import REDUCTIONS, Access, RowProgram
from bitwright.compiler.lower.float.rows import MIN_PARALLEL_WORK, RowWriter, emit_row
from bitwright.compiler.lower.float.storage import load, store
from bitwright.compiler.lower.float.vectors import VectorUnit, across, number
from bitwright.compiler.lower.templates.scaffold import (
    Buffer,
    Expr,
    Parameter,
    allocate,
    build_function,
    loop,
)


def any_row_function(program: RowProgram, unit: VectorUnit) -> tirx.PrimFunc:
    """Return the function of a pass over rows.

    Args:
        program: Its extents, shapes and strides may be polynomials of the length.
        unit: Vector registers.
    """
    length = tirx.Var("length", "int64")
    compact = _without_single(program)
    written: RowProgram = substituted(compact, length)
    parameters = [Parameter(f"x{k}", s.shape, written.dtype) for k, s in enumerate(written.sources)]
    parameters.append(Parameter("y", written.output.shape, written.dtype))

    def emit(buffers: list[Buffer]) -> None:
        rows: Any = reduce(lambda a, b: a * b, compact.extents[:-1], 1)
        work = expression(rows * compact.extents[-1], length) * len(program.nodes)
        writer = _AnyRow if isinstance(compact.extents[-1], Polynomial) else RowWriter
        spread(
            expression(rows, length),
            work >= MIN_PARALLEL_WORK,
            lambda row: emit_row(written, unit, buffers, row, writer, T.int64),
        )

    return build_function(parameters, emit)


def _without_single(program: RowProgram) -> RowProgram:
    """Return the program without loops of one turn; the row stays."""
    kept = [k for k, extent in enumerate(program.extents[:-1]) if extent != 1] + [len(program.extents) - 1]

    def cut(access: Access) -> Access:
        return Access(access.shape, tuple(access.strides[k] for k in kept))

    return replace(
        program,
        extents=tuple(program.extents[k] for k in kept),
        sources=tuple(map(cut, program.sources)),
        output=cut(program.output),
    )


@dataclass
class _AnyRow(RowWriter):
    """Writes the passes over one row of a length that is known at run time."""

    def scratch_rows(self, stored: Sequence[int]) -> dict[int, tuple[Buffer, Expr]]:
        """Keep one value where the result will be: it is read again before that is written."""
        if self.program.output.strides[-1] != 1 or self.program.dtype != "float32":
            return {}
        return dict.fromkeys(stored[:1], (self.buffers[-1], self.bases[-1]))

    def over_columns(self, emit: Callable[[Expr, int, int], None]) -> None:
        """Call ``emit(column, lanes, accumulator)`` for whole vectors, then (-1) for what is left, by halves."""
        lanes = self.unit.lanes
        with loop(self.length // lanes) as block:
            emit(block * lanes, lanes, 0)
        width = lanes // 2
        while width:
            with T.If((self.length // width) % 2 == 1), T.Then():
                emit(self.length // (2 * width) * (2 * width), width, -1)
            width //= 2

    def reduced(self, position: int) -> Expr:
        """Emit the pass of a reduction and return its result."""
        node, lanes = self.program.nodes[position], self.unit.lanes
        start, combine = REDUCTIONS[node.operation]
        (operand,) = node.operands
        partial = allocate((lanes,), "float32", "local")
        rest = allocate((1,), "float32", "local")
        store(partial, number(start, lanes), [0], lanes)
        store(rest, T.float32(start), [0])

        def emit(at: Expr, width: int, accumulator: int) -> None:
            value = self.value(operand, at, width, {})
            if accumulator >= 0:
                store(partial, combine(load(partial, [0], lanes), value), [0], lanes)
                return
            total = across(self.settled(value, width), width, combine)
            store(rest, combine(load(rest, [0]), total), [0])

        self.over_columns(emit)
        whole = across(self.settled(load(partial, [0], lanes), lanes), lanes, combine)
        total = combine(whole, load(rest, [0]))
        return total / T.cast(self.length, "float32") if node.operation == "mean" else total
