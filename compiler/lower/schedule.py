"""A simple CPU schedule for the float rest.

Parallel outer loops, contiguous inner loops, register tiles for sums. TVM's own CPU pipeline leaves these
functions as naive serial loops with the reduction innermost.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm.tirx.analysis import undefined_vars

SPATIAL, REDUCTION = 0, 2  # tirx.IterVar.DataPar and CommReduce
PARALLEL_MIN_ELEMENTS = 8192
MAX_TASKS = 64
# A polynomial reads its argument some thirty times; a polynomial of a polynomial would grow beyond all bounds.
LARGEST_EXPRESSION = 4000
OPERANDS = ("a", "b", "value", "condition", "true_value", "false_value", "args", "indices")
ROW_TILE, COLUMN_TILE = 4, 32  # 16 AVX2 or 8 AVX-512 registers of sums


def schedule_float(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Schedule every function that no template has scheduled.

    Sums of products get register tiles; softmax and layer normalization go to dlight's CPU reduction rule;
    everything else parallel, contiguous loops. A block that fits no rule keeps its serial loops.
    """
    for variable, function in _unscheduled(module):
        if _has_product(function):
            module[variable] = schedule_function(function)
    with target:
        module = dlight.ApplyDefaultSchedule(dlight.cpu.Reduction())(module)
    for variable, function in _unscheduled(module):
        module[variable] = schedule_function(function)
    return module


def _unscheduled(module: tvm.IRModule) -> list[tuple[Any, tirx.PrimFunc]]:
    functions = list(module.functions_items())
    return [(v, f) for v, f in functions if isinstance(f, tirx.PrimFunc) and not _is_scheduled(f)]


def _has_product(function: tirx.PrimFunc) -> bool:
    """Tell whether a block sums over several inputs; dlight's rule would run that sum innermost."""
    if not isinstance(function.body, s_tir.SBlockRealize):
        return False
    schedule = s_tir.Schedule(function)
    blocks = [schedule.get(b) for b in blocks_of(schedule)]
    return any(
        len(b.reads) > 1 and _reads_along(b, b.iter_vars[spatial - 1].var)
        for b in blocks
        if (spatial := sum(int(v.iter_type) == SPATIAL for v in b.iter_vars)) and spatial < len(b.iter_vars)
    )


def blocks_of(schedule: s_tir.Schedule) -> list[Any]:
    """Return the blocks of a function; none where TVM wrote it as a whole (cumulative sums, sorts).

    Such a function's outermost block is not called ``root``.
    """
    outermost = schedule.mod["main"].body.block.name_hint
    return list(schedule.get_child_blocks(schedule.get_sblock(outermost)))


def _is_scheduled(function: tirx.PrimFunc) -> bool:
    return bool(function.attrs and "tirx.is_scheduled" in function.attrs)


def schedule_function(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return the function with each of its blocks scheduled on its own."""
    if not isinstance(function.body, s_tir.SBlockRealize):
        return function
    schedule = s_tir.Schedule(function)
    for block in blocks_of(schedule):
        _inline(schedule, block)
    for block in blocks_of(schedule):
        _schedule_block(schedule, block)
    return schedule.mod["main"].with_attr("tirx.is_scheduled", True)


def _inline(schedule: s_tir.Schedule, block: Any) -> None:
    """Compute an element where it is read, if every reader reads it once an element: no pass over memory between."""
    readers = schedule.get_consumers(block)
    extents = _spatial_extents(schedule, block)
    if not readers or extents is None or any(_spatial_extents(schedule, r) != extents for r in readers):
        return
    statement = schedule.get(block).body
    bodies = [_nodes(schedule.get(reader).body.value) for reader in readers]
    reads = max(sum(_loads(node, statement.buffer) for node in body) for body in bodies)
    if reads * len(_nodes(statement.value)) <= LARGEST_EXPRESSION:
        schedule.compute_inline(block)


def _loads(node: Any, buffer: Any) -> bool:
    return isinstance(node, tvm.ir.expr.TensorLoad) and node.source.same_as(buffer)


def _spatial_extents(schedule: s_tir.Schedule, block: Any) -> list[int] | None:
    """Return the extents of a block that only maps elements, sizes of 1 left out, else None."""
    statement, loops = schedule.get(block), schedule.get_loops(block)
    extents = [schedule.get(loop).extent for loop in loops]
    if any(int(v.iter_type) != SPATIAL for v in statement.iter_vars):
        return None
    if not all(isinstance(e, tirx.IntImm) for e in extents) or not isinstance(
        statement.body, tirx.BufferStore
    ):
        return None
    return [int(e) for e in extents if int(e) != 1]


def _nodes(expression: Any) -> list[Any]:
    """Return the nodes of an expression as a tree; stops above the size that matters."""
    found: list[Any] = []
    waiting = [expression]
    while waiting and len(found) <= LARGEST_EXPRESSION:
        node = waiting.pop()
        found.append(node)
        for name in OPERANDS:
            operand = getattr(node, name, None)
            if isinstance(operand, tvm.ir.Expr):
                waiting.append(operand)
            elif operand is not None and name in ("args", "indices"):
                waiting.extend(operand)
    return found


def _schedule_block(schedule: s_tir.Schedule, block: Any) -> None:
    statement, loops = schedule.get(block), schedule.get_loops(block)
    kinds = [int(v.iter_type) for v in statement.iter_vars]
    extents = [schedule.get(loop).extent for loop in loops]
    if not loops or len(loops) != len(kinds) or not all(isinstance(e, tirx.IntImm) for e in extents):
        return
    sizes = [int(e) for e in extents]
    spatial = kinds.count(SPATIAL)
    if kinds == [SPATIAL] * len(kinds):
        _contiguous(schedule, loops, sizes)
    elif kinds == [SPATIAL] * spatial + [REDUCTION] * (len(kinds) - spatial) and spatial:
        if _reads_along(statement, statement.iter_vars[spatial - 1].var):
            _tiled_sum(schedule, block, loops, sizes, spatial)
        else:
            _parallel(schedule, loops[:spatial], math.prod(sizes))


def _contiguous(schedule: s_tir.Schedule, loops: list[Any], sizes: list[int]) -> None:
    total = math.prod(sizes)
    if len(loops) > 1 and sizes[-1] >= 16:
        _parallel(schedule, loops[:-1], total)
        return
    tasks = _divisor(total, min(MAX_TASKS, total // PARALLEL_MIN_ELEMENTS))
    outer, _ = schedule.split(schedule.fuse(*loops), [tasks, total // tasks])
    _parallel(schedule, [outer], total)


def _parallel(schedule: s_tir.Schedule, loops: list[Any], work: int) -> None:
    fused = schedule.fuse(*loops) if len(loops) > 1 else loops[0]
    if work >= PARALLEL_MIN_ELEMENTS:
        schedule.parallel(fused)


def _divisor(number: int, limit: int) -> int:
    return max((d for d in range(1, limit + 1) if number % d == 0), default=1)


def _reads_along(statement: Any, variable: Any) -> bool:
    """Tell whether some input's innermost index moves with ``variable``: vectors are contiguous."""
    innermost = [read.region[-1].min for read in statement.reads if len(read.region)]
    return any(v.same_as(variable) for index in innermost for v in undefined_vars(index))


def _row_axis(statement: Any, spatial: int) -> int:
    """Return the last leading axis that the vector operand does not depend on: its vectors serve every row.

    That is the row of a matrix product and the output channel of a convolution.
    """
    column = statement.iter_vars[spatial - 1].var
    operands = [[v for r in read.region for v in undefined_vars(r.min)] for read in statement.reads]
    moving = [v for used in operands if any(column.same_as(u) for u in used) for v in used]
    free = [
        axis
        for axis in range(spatial - 1)
        if not any(statement.iter_vars[axis].var.same_as(v) for v in moving)
    ]
    return free[-1] if free else spatial - 2


def _tiled_sum(
    schedule: s_tir.Schedule, block: Any, loops: list[Any], sizes: list[int], spatial: int
) -> None:
    """Keep a tile of ROW_TILE x COLUMN_TILE sums in registers while the reduction loops run."""
    row = _row_axis(schedule.get(block), spatial)
    store = schedule.cache_write(block, 0, "local")
    columns = schedule.split(loops[spatial - 1], _column_halves(sizes[spatial - 1]))
    lead, row_inner, reductions = list(loops[: spatial - 1]), [], loops[spatial:]
    if lead:
        lead[row], inner = schedule.split(lead[row], _halves(sizes[row], ROW_TILE))
        row_inner = [inner]
    schedule.reorder(*lead, columns[0], *reductions, *row_inner, columns[1])
    schedule.reverse_compute_at(store, columns[0])
    for loop in row_inner:
        schedule.unroll(loop)
    schedule.vectorize(columns[1])
    schedule.vectorize(schedule.get_loops(store)[-1])
    _parallel(schedule, lead or [columns[0]], math.prod(sizes))
    schedule.decompose_reduction(block, reductions[0])


def _column_halves(size: int) -> list[int]:
    """Split into whole vectors where the size allows it: odd lane counts are taken apart by LLVM."""
    tile = max(
        (d for d in range(1, COLUMN_TILE + 1) if size % d == 0), key=lambda d: (d & -d if d > 3 else 0, d)
    )
    return [size // tile, tile]


def _halves(size: int, limit: int) -> list[int]:
    tile = _divisor(size, limit)
    return [size // tile, tile]
