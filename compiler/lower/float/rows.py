"""One pass over rows in vectors: the kernel of a ``RowProgram``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.float.row_program import (
    CONSTANT,
    EXPENSIVE,
    LOAD,
    REDUCTIONS,
    Access,
    Node,
    RowProgram,
    apply,
    merged,
    stored_nodes,
)
from bitwright.compiler.lower.float.storage import load, store
from bitwright.compiler.lower.float.vectors import VectorUnit, across, keep, number
from bitwright.compiler.lower.templates.scaffold import (
    Buffer,
    Expr,
    Parameter,
    allocate,
    build_function,
    loop,
    pieces,
    splat,
)

# Starting and joining threads costs microseconds: about what so many elementary operations cost on one core.
MIN_PARALLEL_WORK = 1 << 17
MAX_TASKS = 16
# Vectors in flight: a sum has so many partial sums, as each addition waits four cycles for the one before.
ACCUMULATORS = 4
# A row of at most so many vectors stays in registers and is written without loops.
UNROLLED_VECTORS = 8


def row_function(program: RowProgram, unit: VectorUnit) -> tirx.PrimFunc:
    """Return the function of a pass over rows: its parameters are the sources, then the output."""
    parameters = [Parameter(f"x{k}", s.shape, program.dtype) for k, s in enumerate(program.sources)]
    parameters.append(Parameter("y", program.output.shape, program.dtype))
    whole = merged(program)
    if not whole.reduces and len(whole.extents) == 1:
        whole = _in_tasks(whole)
    return build_function(parameters, lambda buffers: _emit(whole, unit, buffers))


def _in_tasks(program: RowProgram) -> RowProgram:
    """Cut one long row into some, for threads."""
    (length,) = program.extents
    tasks = _tasks(length) if length * len(program.nodes) >= MIN_PARALLEL_WORK else 1
    extents = (tasks, length // tasks)

    def cut(access: Access) -> Access:
        (stride,) = access.strides
        return Access(access.shape, (stride * extents[1], stride))

    return replace(
        program, extents=extents, sources=tuple(map(cut, program.sources)), output=cut(program.output)
    )


def _emit(program: RowProgram, unit: VectorUnit, buffers: list[Buffer]) -> None:
    rows = program.rows
    work = rows * program.extents[-1] * len(program.nodes)
    # Pieces and not rows: TVM allocates what is inside a parallel loop anew for each of its iterations.
    tasks = _tasks(rows) if work >= MIN_PARALLEL_WORK else 1
    with loop(tasks, parallel=tasks > 1) as task, loop(rows // tasks) as row:
        emit_row(program, unit, buffers, keep(task * (rows // tasks) + row), RowWriter, T.int32)


def _tasks(rows: int) -> int:
    """Return into how many equal pieces rows are cut for threads."""
    return max(d for d in range(1, min(rows, MAX_TASKS) + 1) if rows % d == 0)


def emit_row(
    program: RowProgram,
    unit: VectorUnit,
    buffers: list[Buffer],
    row: Expr,
    writer: type[RowWriter],
    integer: Callable[[int], Expr],
) -> None:
    """Emit the passes over one row.

    Args:
        program: What is computed.
        unit: Vector registers.
        buffers: Flat sources and output.
        row: Number of the row, of all of them.
        writer: How a row is written.
        integer: Makes a constant of the type that indices have.
    """
    index: list[Expr] = []
    for extent in reversed(program.extents[1:-1]):
        index.insert(0, row % extent)
        row = row // extent
    if len(program.extents) > 1:
        index.insert(0, row)
    bases = [
        keep(sum((i * s for i, s in zip(index, a.strides, strict=False)), integer(0)))
        for a in (*program.sources, program.output)
    ]
    writer(program, unit, buffers, bases).run()


@dataclass
class RowWriter:
    """Writes the passes over one row.

    Attributes:
        program: What is computed.
        unit: Vector registers.
        buffers: Flat sources and output.
        bases: Where the row begins in each.
        slots: Vectors of values in use, then the numbers of the row.
        used: Slots handed out so far; they are reused in turn.
        numbers: Values of the nodes that have one a row.
        scratch: Rows of stored nodes, and where they begin.
        filled: Stored nodes that an earlier pass has computed.
    """

    program: RowProgram
    unit: VectorUnit
    buffers: list[Buffer]
    bases: list[Expr]
    slots: Buffer = None
    used: int = 0
    numbers: dict[int, Expr] = field(default_factory=dict)
    scratch: dict[int, tuple[Buffer, Expr]] = field(default_factory=dict)
    filled: set[int] = field(default_factory=set)

    @property
    def slot_count(self) -> int:
        """At most so many vectors are in use: one a function, and one that is combined across its lanes."""
        return sum(node.operation in EXPENSIVE for node in self.program.nodes) + 2

    @property
    def length(self) -> int:
        """Of a row."""
        return self.program.extents[-1]

    def run(self) -> None:
        """Emit all passes over the row."""
        nodes = self.program.nodes
        self.slots = allocate((self.slot_count * self.unit.lanes + len(nodes),), "float32", "local")
        self.scratch = self.scratch_rows(sorted(stored_nodes(nodes)))
        for position, node in enumerate(nodes):
            if node.operation in REDUCTIONS:
                self.numbers[position] = self.settled_number(position, self.reduced(position))
                self.filled |= self.scratch.keys() & self.reached(position)
            elif node.per_row:
                self.numbers[position] = self.number(position, node)
        last = len(nodes) - 1
        base, out = self.bases[-1], self.buffers[-1]
        if nodes[last].per_row:
            store(out, self.numbers[last], [base])
            return
        self.over_columns(
            lambda at, lanes, _: store(out, self.value(last, at, lanes, {}), [base + at], lanes)
        )

    def scratch_rows(self, stored: Sequence[int]) -> dict[int, tuple[Buffer, Expr]]:
        """Return where the rows of stored nodes are kept; one that is left out is computed again."""
        return {position: (allocate((self.length,), "float32", "local"), 0) for position in stored}

    def reached(self, end: int) -> set[int]:
        """Return all nodes a pass may have computed."""
        found, waiting = {end}, [end]
        while waiting:
            for operand in self.program.nodes[waiting.pop()].operands:
                if operand not in found and not self.program.nodes[operand].per_row:
                    found.add(operand)
                    waiting.append(operand)
        return found

    def settled(self, value: Expr, lanes: int) -> Expr:
        """Put a value into memory that LLVM keeps in a register.

        TVM's simplifiers put the value of a variable back where the variable is used; what is loaded they
        leave alone. Without this, expressions grow by a power with every function.
        """
        at = self.used % self.slot_count * self.unit.lanes
        self.used += 1
        store(self.slots, value, [at], lanes)
        return keep(load(self.slots, [at], lanes))

    def settled_number(self, position: int, value: Expr) -> Expr:
        """Put a number of the row into memory that LLVM keeps in a register."""
        at = self.slot_count * self.unit.lanes + position
        store(self.slots, value, [at])
        return keep(load(self.slots, [at]))

    def number(self, position: int, node: Node) -> Expr:
        """Return the value of a node that has one number a row."""
        if node.operation == CONSTANT:
            return T.float32(node.number)
        if node.operation == LOAD:
            return keep(load(self.buffers[int(node.number)], [self.bases[int(node.number)]]))
        return self.settled_number(position, apply(node, [self.numbers[k] for k in node.operands], 1))

    def value(self, position: int, at: Expr, lanes: int, known: dict[int, Expr]) -> Expr:
        """Return a node at some columns."""
        node = self.program.nodes[position]
        if node.per_row:
            return splat(self.numbers[position], lanes)
        if position not in known:
            known[position] = keep(self.computed(position, node, at, lanes, known))
        return known[position]

    def computed(self, position: int, node: Node, at: Expr, lanes: int, known: dict[int, Expr]) -> Expr:
        """Return a node at some columns, computed or loaded."""
        if node.operation == LOAD:
            source = int(node.number)
            return load(self.buffers[source], [self.bases[source] + at], lanes)
        if position in self.filled:
            row, first = self.scratch[position]
            return load(row, [first + at], lanes)
        result = apply(node, [self.value(k, at, lanes, known) for k in node.operands], lanes)
        if node.operation in EXPENSIVE:
            result = self.settled(result, lanes)
        if position in self.scratch:
            row, first = self.scratch[position]
            store(row, result, [first + at], lanes)
        return result

    def over_columns(self, emit: Callable[[Expr, int, int], None]) -> None:
        """Call ``emit(column, lanes, accumulator)`` for all columns; accumulator -1 marks what is left over."""
        lanes = self.unit.lanes
        vectors = self.length // lanes
        if vectors <= UNROLLED_VECTORS:
            for k in range(vectors):
                emit(k * lanes, lanes, k % ACCUMULATORS)
        else:
            with loop(vectors // ACCUMULATORS) as block:
                for k in range(ACCUMULATORS):
                    emit((block * ACCUMULATORS + k) * lanes, lanes, k)
            for k in range(vectors % ACCUMULATORS):
                emit((vectors - vectors % ACCUMULATORS + k) * lanes, lanes, k)
        for offset, narrow in pieces(self.length - vectors * lanes, lanes):
            emit(vectors * lanes + offset, narrow, -1)

    def reduced(self, position: int) -> Expr:
        """Emit the pass of a reduction and return its result."""
        node, lanes = self.program.nodes[position], self.unit.lanes
        start, combine = REDUCTIONS[node.operation]
        (operand,) = node.operands
        used = min(ACCUMULATORS, self.length // lanes)
        if self.length // lanes <= UNROLLED_VECTORS:
            return self.scaled(node, self.reduced_at_once(operand, combine))
        partial = allocate((used, lanes), "float32", "local")
        rest: list[Expr] = []
        for k in range(used):
            store(partial, number(start, lanes), [k, 0], lanes)

        def emit(at: Expr, width: int, accumulator: int) -> None:
            value = self.value(operand, at, width, {})
            if accumulator < 0:
                rest.append(across(self.settled(value, width), width, combine))
            else:
                total = combine(load(partial, [accumulator, 0], lanes), value)
                store(partial, total, [accumulator, 0], lanes)

        self.over_columns(emit)
        whole = load(partial, [0, 0], lanes)
        for k in range(1, used):
            whole = combine(whole, load(partial, [k, 0], lanes))
        rest.append(across(self.settled(whole, lanes), lanes, combine))
        return self.scaled(node, reduce(combine, rest))

    def reduced_at_once(self, operand: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
        """Emit the pass of a reduction over a short row: partial results are values, not memory."""
        whole: list[Expr] = []
        rest: list[Expr] = []

        def emit(at: Expr, width: int, accumulator: int) -> None:
            value = self.value(operand, at, width, {})
            if accumulator < 0:
                rest.append(across(self.settled(value, width), width, combine))
            else:
                whole.append(value)

        self.over_columns(emit)
        while len(whole) > 1:
            whole = [keep(reduce(combine, whole[k : k + 2])) for k in range(0, len(whole), 2)]
        if whole:
            rest.append(across(self.settled(whole[0], self.unit.lanes), self.unit.lanes, combine))
        return reduce(combine, rest)

    def scaled(self, node: Node, total: Expr) -> Expr:
        """Return a mean's sum as the mean."""
        return total * T.float32(1 / self.length) if node.operation == "mean" else total
