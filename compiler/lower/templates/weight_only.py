"""Products of float activations with weights of 2, 4 or 8 bits: unpacked in registers, multiplied as integers.

One load brings a vector of bytes, each of which holds ``8 / bits`` weights of one output column; masks and shifts
take them apart, and an instruction that multiplies bytes adds them to int32 lanes, one lane a column. Activations are
rounded in the groups of the weight first. A group's sum is exact, so its order is free; groups are summed in rising
order by fused multiply-adds, as ``WeightOnlyDot`` demands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.assemble import kernel_of
from bitwright.compiler.lower.templates.rounded_blocks import BlockRounding, RoundedBlocks, round_blocks
from bitwright.compiler.lower.templates.scaffold import (
    Buffer,
    Expr,
    Parameter,
    allocate,
    load,
    loop,
    pieces,
    share,
    splat,
    store,
    vector_type,
)
from bitwright.compiler.lower.templates.weight_only_geometry import (
    FOLD,
    CodeInstruction,
    WeightOnlyGeometry,
    WeightOnlyParams,
    columns_first,
    in_blocks,
    packed_codes,
    space,
    stored_offset,
    weight_only_geometry,
)
from bitwright.compiler.program.ops import Program, WeightOnlyDot
from bitwright.targets.backend import Kernel

# Steps of a group that are written out one behind the other.
UNROLLED_STEPS = 8
CACHE_LINE = 64
# How far ahead of the multiplications memory is asked for; processors look ahead by themselves within a page only.
PREFETCHED_BYTES = 2048


def weight_only_kernel(
    step: WeightOnlyDot,
    program: Program,
    instruction: CodeInstruction,
    params: WeightOnlyParams | None = None,
) -> Kernel:
    """Return the kernel of a step.

    Args:
        step: Any number of rows, any group length.
        program: For shapes.
        instruction: How to multiply.
        params: Blocking; chosen by rule when None.
    """
    geometry = weight_only_geometry(step, program, instruction)
    params = params or next(space(geometry, instruction))
    constants = _constants(step, geometry, instruction, params.vectors)
    template = _Template(geometry, instruction, params)
    return kernel_of(
        f"weight_only|{instruction.name}|{geometry}|{params}",
        instruction.name,
        Parameter("x", geometry.input_shape, "float32"),
        constants,
        Parameter("y", geometry.output_shape, "float32"),
        template.body,
    )


def _constants(
    step: WeightOnlyDot, geometry: WeightOnlyGeometry, instruction: CodeInstruction, vectors: int
) -> dict[str, np.ndarray]:
    """Return the arrays in the order of the function's parameters."""
    lanes, offset = instruction.lanes, stored_offset(step.bits, instruction)
    packed = packed_codes(step.weight, geometry, lanes) ^ np.uint8(offset)
    arrays = {
        "weight": in_blocks(packed, vectors),
        "scale": in_blocks(columns_first(step.scale, lanes), vectors),
    }
    if geometry.zero is None:
        zeros = (step.zero_point.astype(np.int16) - offset).astype("int8" if offset else "uint8")
        arrays["zero_point"] = in_blocks(columns_first(zeros, lanes), vectors)
    if step.bias is not None:
        width = geometry.column_vectors(lanes) * lanes
        arrays["bias"] = np.pad(step.bias.astype(np.float32), (0, width - geometry.columns))
    return arrays


@dataclass(frozen=True)
class _Views:
    blocks: RoundedBlocks
    weight: Buffer
    scale: Buffer
    zero: Buffer | None
    bias: Buffer | None
    output: Buffer


@dataclass(frozen=True)
class _Tile:
    """Where a register tile lies: its first row and column vector, and its size."""

    row: Expr
    vector: Expr
    rows: int
    vectors: int


@dataclass(frozen=True)
class _Template:
    geometry: WeightOnlyGeometry
    instruction: CodeInstruction
    params: WeightOnlyParams

    @property
    def _accumulators(self) -> int:
        """Accumulators of an output: one, or one for each position of a code in its byte."""
        return 1 if self.params.shifted else self.geometry.planes

    def body(self, buffers: list[Buffer]) -> None:
        x, weight, scale, *rest, y = buffers
        g, lanes = self.geometry, self.instruction.lanes
        # The zero point is taken back as its product with the activations' sum.
        factor = -1 if g.zero is None else -g.zero
        rounding = BlockRounding(g.rows, g.depth, g.group, g.stride, lanes, factor)
        blocks = round_blocks(x, rounding, parallel=self.params.parallel)
        bias = rest.pop() if g.bias else None
        views = _Views(blocks, weight, scale, rest.pop() if rest else None, bias, y)
        full, tail = self._column_blocks()
        if full:
            chunks = loop(self.params.chunks, parallel=self.params.parallel)
            with chunks as chunk, share(full, self.params.chunks, chunk) as block:
                self._rows(views, block * self.params.vectors, self.params.vectors)
        if tail:
            self._rows(views, full * self.params.vectors, tail)

    def _column_blocks(self) -> tuple[int, int]:
        """Return the number of whole blocks, and the vectors of the one behind them, which may be partly empty."""
        lanes, vectors = self.instruction.lanes, self.params.vectors
        full, tail = divmod(self.geometry.column_vectors(lanes), vectors)
        return (full, tail) if tail or self.geometry.columns % lanes == 0 else (full - 1, vectors)

    def _rows(self, views: _Views, vector: Expr, vectors: int) -> None:
        """Emit all rows of a block of columns: its weights stay in the nearest cache meanwhile."""
        full, tail = divmod(self.geometry.rows, self.params.rows)
        if full:
            with loop(full) as tile:
                self._tile(views, _Tile(tile * self.params.rows, vector, self.params.rows, vectors))
        if tail:
            self._tile(views, _Tile(full * self.params.rows, vector, tail, vectors))

    def _tile(self, views: _Views, tile: _Tile) -> None:
        lanes, width = self.instruction.lanes, tile.vectors * self.instruction.lanes
        sums = allocate((tile.rows, width), "float32", "local")
        totals = allocate((self._accumulators, tile.rows, width), "int32", "local")
        for r in range(tile.rows):
            for v in range(tile.vectors):
                at = (tile.vector + v) * lanes
                start = splat(T.float32(0), lanes) if views.bias is None else load(views.bias, [at], lanes)
                store(sums, start, [r, v * lanes], lanes)
        with loop(self.geometry.groups) as group:
            if self.geometry.rows == 1:
                self._prefetch(views, tile, group)
            self._start(views, tile, group, totals)
            self._multiply(views, tile, group, totals)
            self._add(views, tile, group, totals, sums)
        self._store(views, tile, sums)

    def _prefetch(self, views: _Views, tile: _Tile, group: Expr) -> None:
        """Ask for weights and scales that come soon: with a single row, reading them is all that takes time."""
        each = tile.vectors * self.geometry.steps * self.instruction.lanes * FOLD
        ahead = -(-PREFETCHED_BYTES // each)
        streams = (
            (views.weight, self._weight_at(tile, group + ahead, 0, 0), each, 1),
            (views.scale, self._scale_at(tile, group + ahead, 0), tile.vectors * self.instruction.lanes, 4),
        )
        for buffer, first, elements, size in streams:
            for at in range(0, elements, CACHE_LINE // size):
                address = T.address_of(buffer[first + at])
                read, every_level, data = T.int32(0), T.int32(3), T.int32(1)
                name = "llvm.prefetch.p0"
                T.evaluate(T.call_llvm_intrin(name, address, read, every_level, data, dtype="void"))

    def _start(self, views: _Views, tile: _Tile, group: Expr, totals: Buffer) -> None:
        """Start the accumulators with what the zero point takes away."""
        lanes = self.instruction.lanes
        for r in range(tile.rows):
            taken = splat(load(views.blocks.sums, [self._cell(tile, r, group)]), lanes)
            for v in range(tile.vectors):
                value = taken
                if views.zero is not None:
                    zeros = load(views.zero, [self._scale_at(tile, group, v)], lanes)
                    value = T.cast(zeros, vector_type("int32", lanes)) * taken
                for plane in range(self._accumulators):
                    store(
                        totals,
                        value if plane == 0 else splat(T.int32(0), lanes),
                        [plane, r, v * lanes],
                        lanes,
                    )

    def _multiply(self, views: _Views, tile: _Tile, group: Expr, totals: Buffer) -> None:
        """Emit the steps of a group, several written out one behind the other."""
        steps, batch = self.geometry.steps, max(1, self.instruction.batch // self.geometry.planes)
        written = max(d for d in range(1, min(UNROLLED_STEPS, steps) + 1) if steps % d == 0)
        with loop(steps // written) as outer:
            first = outer * written if steps > written else 0
            for start in range(0, written, batch):
                together = range(start, min(start + batch, written))
                self._steps(views, tile, group, totals, [first + s for s in together])

    def _steps(self, views: _Views, tile: _Tile, group: Expr, totals: Buffer, steps: Sequence[Expr]) -> None:
        lanes, planes = self.instruction.lanes, self.geometry.planes
        largest = 2**self.geometry.bits - 1
        for v in range(tile.vectors):
            for r in range(tile.rows):
                pairs: list[list[tuple[Expr, Expr]]] = [[] for _ in range(self._accumulators)]
                for step in steps:
                    codes = load(views.weight, [self._weight_at(tile, group, step, v)], lanes * FOLD)
                    for plane in range(planes):
                        activations = self._activations(views, tile, r, group, step, plane)
                        own = 0 if self.params.shifted else plane
                        pairs[own].append((self._plane(codes, plane), activations))
                for own, found in enumerate(pairs):
                    at = [own, r, v * lanes]
                    total = self.instruction.emit(load(totals, at, lanes), found, largest)
                    store(totals, total, at, lanes)

    def _plane(self, codes: Expr, plane: int) -> Expr:
        """Take the codes of one position out of their bytes."""
        g, width = self.geometry, self.instruction.lanes * FOLD
        if g.planes == 1:
            return codes
        mask = 2**g.bits - 1
        if not self.params.shifted:
            return T.bitwise_and(codes, splat(T.uint8(mask << (plane * g.bits)), width))
        down = T.shift_right(codes, splat(T.uint8(plane * g.bits), width)) if plane else codes
        return down if plane == g.planes - 1 else T.bitwise_and(down, splat(T.uint8(mask), width))

    def _activations(self, views: _Views, tile: _Tile, row: int, group: Expr, step: Expr, plane: int) -> Expr:
        """Return four activations, repeated for every lane."""
        g, lanes = self.geometry, self.instruction.lanes
        at = self._cell(tile, row, group) * g.stride + (step * g.planes + plane) * FOLD
        four = T.reinterpret(load(views.blocks.integers, [at], FOLD), dtype="int32")
        return T.reinterpret(T.broadcast(four, lanes), dtype=f"int8x{lanes * FOLD}")

    def _add(self, views: _Views, tile: _Tile, group: Expr, totals: Buffer, sums: Buffer) -> None:
        """Add a group's sums, scaled."""
        lanes = self.instruction.lanes
        kind = vector_type("float32", lanes)
        for r in range(tile.rows):
            activation_scale = splat(load(views.blocks.scales, [self._cell(tile, r, group)]), lanes)
            for v in range(tile.vectors):
                at = [r, v * lanes]
                factor = activation_scale * load(views.scale, [self._scale_at(tile, group, v)], lanes)
                total = T.cast(self._total(totals, r, v), kind)
                # Spelled as the LLVM intrinsic: a product and a sum would round once or twice as the CPU pleases.
                value = T.call_llvm_pure_intrin("llvm.fma", total, factor, load(sums, at, lanes), dtype=kind)
                store(sums, value, at, lanes)

    def _total(self, totals: Buffer, row: int, vector: int) -> Expr:
        """Return a group's sum: accumulators of higher positions in the byte hold multiples of their place value."""
        lanes, bits = self.instruction.lanes, self.geometry.bits
        planes = [load(totals, [p, row, vector * lanes], lanes) for p in range(self._accumulators)]
        total = planes[0]
        for plane, part in enumerate(planes[1:], start=1):
            total = total + T.shift_right(part, splat(T.int32(plane * bits), lanes))
        return total

    def _store(self, views: _Views, tile: _Tile, sums: Buffer) -> None:
        g, lanes = self.geometry, self.instruction.lanes
        last = g.columns - (g.column_vectors(lanes) - 1) * lanes
        is_last_block = isinstance(tile.vector, int)
        for r in range(tile.rows):
            for v in range(tile.vectors):
                at = (tile.row + r) * g.columns + (tile.vector + v) * lanes
                length = last if is_last_block and v == tile.vectors - 1 else lanes
                for offset, width in pieces(length, lanes):
                    store(views.output, load(sums, [r, v * lanes + offset], width), [at + offset], width)

    def _cell(self, tile: _Tile, row: int, group: Expr) -> Expr:
        return (tile.row + row) * self.geometry.groups + group

    def _weight_at(self, tile: _Tile, group: Expr, step: Expr, vector: int) -> Expr:
        """Bytes before a step's codes: whole column vectors, then steps of the block's vectors side by side."""
        g, width = self.geometry, self.instruction.lanes * FOLD
        inside = (group * g.steps + step) * tile.vectors + vector
        return (tile.vector * g.groups * g.steps + inside) * width

    def _scale_at(self, tile: _Tile, group: Expr, vector: int) -> Expr:
        return (tile.vector * self.geometry.groups + group * tile.vectors + vector) * self.instruction.lanes
