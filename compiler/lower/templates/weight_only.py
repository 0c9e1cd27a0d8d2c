"""Products of float activations with weights of 2, 4 or 8 bits: unpacked in registers, multiplied as integers.

One load brings a vector of bytes, each of which holds ``8 / bits`` weights of one output column; masks and shifts
take them apart, and an instruction that multiplies bytes adds them to int32 lanes, one lane a column. Activations are
rounded in the groups of the weight first. A group's sum is exact, so its order is free; groups are summed in rising
order by fused multiply-adds, as ``WeightOnlyDot`` demands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.implicit_gemm import MIN_PARALLEL_MACS, PARALLEL_PIECES
from bitwright.compiler.lower.templates.rounded_blocks import BlockRounding, RoundedBlocks, round_blocks
from bitwright.compiler.lower.templates.scaffold import (
    Buffer,
    Expr,
    Parameter,
    allocate,
    build_function,
    load,
    loop,
    pieces,
    splat,
    store,
    vector_type,
)
from bitwright.compiler.program.ops import Program, WeightOnlyDot
from bitwright.targets.backend import Kernel

FOLD = 4
MAX_ROWS, MAX_VECTORS = 8, 8
# Steps of a group that are written out one behind the other.
UNROLLED_STEPS = 8


@dataclass(frozen=True)
class CodeInstruction:
    """How a processor multiplies small unsigned integers (codes) by int8 activations.

    Attributes:
        name: Name of the profile's compute row.
        lanes: int32 lanes of an accumulator; a vector of codes has four bytes for each.
        registers: Vector registers.
        signed: Codes are multiplied as int8: those of 8 bits are stored less 128.
        in_place: Codes may stay in the upper bits of their bytes: unsigned bytes of any size are multiplied exactly.
        slots: Issue slots of one multiplication of a vector.
        batch: Multiplications that are best given to ``emit`` together.
        emit: (accumulator int32 x lanes, pairs of codes uint8 x 4 * lanes and activations int8 x 4 * lanes, largest
            code) -> the accumulator plus all products.
    """

    name: str
    lanes: int
    registers: int
    signed: bool
    in_place: bool
    slots: float
    batch: int
    emit: Callable[[Expr, Sequence[tuple[Expr, Expr]], int], Expr]


@dataclass(frozen=True)
class WeightOnlyParams:
    """What a tuner may change; the result never depends on it.

    Attributes:
        rows: Rows of the register tile.
        vectors: Vectors of output columns of the register tile.
        shifted: Codes are shifted to the bottom of their bytes and share an accumulator; otherwise codes of each
            position in the byte have their own, shifted once a group.
        chunks: Pieces that the column blocks are split into.
        parallel: Spread the pieces over threads.
    """

    rows: int
    vectors: int
    shifted: bool
    chunks: int
    parallel: bool


@dataclass(frozen=True)
class WeightOnlyGeometry:
    """Loop bounds; with the instruction and the parameters they determine the function.

    Attributes:
        input_shape, output_shape: Of the buffers.
        depth, columns: K and N.
        bits, group: Of the weight.
        zero: The zero point of all weights as stored, or None if they differ.
        bias: There is a bias.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    depth: int
    columns: int
    bits: int
    group: int
    zero: int | None
    bias: bool

    @property
    def rows(self) -> int:
        """M: all leading axes of the activations."""
        return prod(self.input_shape[:-1])

    @property
    def groups(self) -> int:
        """Groups of a column."""
        return -(-self.depth // self.group)

    @property
    def planes(self) -> int:
        """Codes of a byte."""
        return 8 // self.bits

    @property
    def steps(self) -> int:
        """Byte vectors of a group and a vector of columns."""
        return -(-self.group // (FOLD * self.planes))

    @property
    def stride(self) -> int:
        """Activations of a group with those that fill the last step."""
        return self.steps * FOLD * self.planes

    def column_vectors(self, lanes: int) -> int:
        """Vectors that hold all columns."""
        return -(-self.columns // lanes)


def weight_only_geometry(
    step: WeightOnlyDot, program: Program, instruction: CodeInstruction
) -> WeightOnlyGeometry:
    """Return the loop bounds of a step."""
    depth, columns = step.weight.shape
    zeros = np.unique(step.zero_point)
    zero = int(zeros[0]) - stored_offset(step.bits, instruction) if zeros.size == 1 else None
    shape, out = program.tensor(step.inputs[0]).shape, program.tensor(step.output).shape
    return WeightOnlyGeometry(shape, out, depth, columns, step.bits, step.group, zero, step.bias is not None)


def stored_offset(bits: int, instruction: CodeInstruction) -> int:
    """Return what is subtracted from codes and zero points before they are stored."""
    return 128 if instruction.signed and bits == 8 else 0


def space(geometry: WeightOnlyGeometry, instruction: CodeInstruction) -> Iterator[WeightOnlyParams]:
    """Yield the legal parameters, by estimated cost."""
    vectors = range(1, min(MAX_VECTORS, geometry.column_vectors(instruction.lanes)) + 1)
    forms = (False, True) if instruction.in_place and geometry.planes > 1 else (True,)
    tiles = [
        (_cost(geometry, instruction, r, v, shifted=s), -r * v, r, v, s)
        for r in range(1, min(MAX_ROWS, geometry.rows) + 1)
        for v in vectors
        for s in forms
    ]
    parallel = geometry.rows * geometry.depth * geometry.columns >= MIN_PARALLEL_MACS
    for _, _, r, v, s in sorted(tiles):
        blocks = geometry.column_vectors(instruction.lanes) // v
        chunks = min(blocks, PARALLEL_PIECES) if parallel else 1
        yield WeightOnlyParams(r, v, s, chunks, parallel and chunks > 1)


def _cost(
    geometry: WeightOnlyGeometry, instruction: CodeInstruction, rows: int, vectors: int, *, shifted: bool
) -> float:
    """Return issue slots of one group over all rows and columns."""

    def tile(r: int, v: int) -> float:
        if not r or not v:
            return 0.0
        planes, steps = geometry.planes, geometry.steps
        totals = 1 if shifted else planes
        unpack = v * steps * (0.5 + (planes > 1) * planes + shifted * (planes - 1))
        products = r * v * steps * planes * instruction.slots
        finish = r * v * (3 + 2 * (totals - 1)) + v
        zeros = 0 if geometry.zero is not None else v + 2 * r * v
        live = r * v * (1 + totals) + planes + 1
        spills = max(0, live - instruction.registers)
        return unpack + products + finish + zeros + 2 * spills + 2

    full, rest = divmod(geometry.column_vectors(instruction.lanes), vectors)
    row_tiles, row_rest = divmod(geometry.rows, rows)
    return sum(
        count * other * tile(r, v)
        for r, count in ((rows, row_tiles), (row_rest, 1))
        for v, other in ((vectors, full), (rest, 1))
    )


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
    parameters = [
        Parameter("x", geometry.input_shape, "float32"),
        *(Parameter(name, array.shape, array.dtype.name) for name, array in constants.items()),
        Parameter("y", geometry.output_shape, "float32"),
    ]
    template = _Template(geometry, instruction, params)
    return Kernel(
        key=f"weight_only|{instruction.name}|{geometry}|{params}",
        function=build_function(parameters, template.body),
        constants=tuple(constants.values()),
        output_shape=geometry.output_shape,
        output_dtype="float32",
        intrinsic=instruction.name,
    )


def _constants(
    step: WeightOnlyDot, geometry: WeightOnlyGeometry, instruction: CodeInstruction, vectors: int
) -> dict[str, np.ndarray]:
    """Return the arrays in the order of the function's parameters."""
    lanes, offset = instruction.lanes, stored_offset(step.bits, instruction)
    packed = _packed_codes(step.weight, geometry, lanes) ^ np.uint8(offset)
    arrays = {
        "weight": _in_blocks(packed, vectors),
        "scale": _in_blocks(_columns_first(step.scale, lanes), vectors),
    }
    if geometry.zero is None:
        zeros = (step.zero_point.astype(np.int16) - offset).astype("int8" if offset else "uint8")
        arrays["zero_point"] = _in_blocks(_columns_first(zeros, lanes), vectors)
    if step.bias is not None:
        width = geometry.column_vectors(lanes) * lanes
        arrays["bias"] = np.pad(step.bias.astype(np.float32), (0, width - geometry.columns))
    return arrays


def _packed_codes(weight: np.ndarray, geometry: WeightOnlyGeometry, lanes: int) -> np.ndarray:
    """Return bytes [column vectors, groups, steps, lanes * FOLD].

    Byte f of a lane in step s holds, from its lowest bits up, the codes ``k = (s * planes + p) * FOLD + f`` of the
    group for p = 0, 1, ...: the activations of one plane lie side by side.
    """
    g, planes = geometry, geometry.planes
    vectors = g.column_vectors(lanes)
    codes = np.zeros((g.groups, g.stride, vectors * lanes), np.uint8)
    flat = np.zeros((g.groups * g.group, g.columns), np.uint8)
    flat[: g.depth] = weight
    codes[:, : g.group, : g.columns] = flat.reshape(g.groups, g.group, g.columns)
    parts = codes.reshape(g.groups, g.steps, planes, FOLD, vectors, lanes).transpose(4, 0, 1, 5, 3, 2)
    shifts = (np.arange(planes) * g.bits).astype(np.uint8)
    packed: np.ndarray = np.bitwise_or.reduce(parts << shifts, axis=-1)
    return packed.reshape(vectors, g.groups, g.steps, lanes * FOLD)


def _columns_first(array: np.ndarray, lanes: int) -> np.ndarray:
    """Return an array [groups, N] as [column vectors, groups, 1, lanes], filled with zeros."""
    groups, columns = array.shape
    vectors = -(-columns // lanes)
    padded = np.zeros((groups, vectors * lanes), array.dtype)
    padded[:, :columns] = array
    return padded.reshape(groups, vectors, 1, lanes).transpose(1, 0, 2, 3)


def _in_blocks(array: np.ndarray, vectors: int) -> np.ndarray:
    """Flatten [column vectors, groups, steps, width] block by block: [groups, steps, vectors, width] each."""
    full = array.shape[0] // vectors * vectors
    blocks = array[:full].reshape(-1, vectors, *array.shape[1:]).transpose(0, 2, 3, 1, 4)
    rest = array[full:].transpose(1, 2, 0, 3)
    return np.ascontiguousarray(np.concatenate([blocks.reshape(-1), rest.reshape(-1)]))


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
            share = -(-full // self.params.chunks)
            chunks = loop(self.params.chunks, parallel=self.params.parallel)
            with chunks as chunk, T.serial(chunk * share, T.min((chunk + 1) * share, full)) as block:
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
            self._start(views, tile, group, totals)
            self._multiply(views, tile, group, totals)
            self._add(views, tile, group, totals, sums)
        self._store(views, tile, sums)

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
