"""Which loops a product with grouped weights has, what a tuner may change of them, and how its weights are packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from bitwright.compiler.lower.templates.scaffold import MIN_PARALLEL_MACS, PARALLEL_PIECES, Expr
from bitwright.compiler.program.ops import Program, WeightOnlyDot

FOLD = 4
MAX_ROWS, MAX_VECTORS = 8, 8
# Issue slots of a register that is put aside and fetched again, once or more often in a group.
SPILL = 4


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
        # Four activations are loaded and repeated for every row: the more columns use them, the better.
        products = r * steps * planes * (v * instruction.slots + 0.5)
        finish = r * v * (3 + 2 * (totals - 1)) + v
        zeros = 0 if geometry.zero is not None else v + 2 * r * v
        live = r * v * (1 + totals) + planes + 3
        spills = max(0, live - instruction.registers)
        return unpack + products + finish + zeros + SPILL * spills + 2

    full, rest = divmod(geometry.column_vectors(instruction.lanes), vectors)
    row_tiles, row_rest = divmod(geometry.rows, rows)
    return sum(
        count * other * tile(r, v)
        for r, count in ((rows, row_tiles), (row_rest, 1))
        for v, other in ((vectors, full), (rest, 1))
    )


def packed_codes(weight: np.ndarray, geometry: WeightOnlyGeometry, lanes: int) -> np.ndarray:
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


def columns_first(array: np.ndarray, lanes: int) -> np.ndarray:
    """Return an array [groups, N] as [column vectors, groups, 1, lanes], filled with zeros."""
    groups, columns = array.shape
    vectors = -(-columns // lanes)
    padded = np.zeros((groups, vectors * lanes), array.dtype)
    padded[:, :columns] = array
    return padded.reshape(groups, vectors, 1, lanes).transpose(1, 0, 2, 3)


def in_blocks(array: np.ndarray, vectors: int) -> np.ndarray:
    """Flatten [column vectors, groups, steps, width] block by block: [groups, steps, vectors, width] each."""
    full = array.shape[0] // vectors * vectors
    blocks = array[:full].reshape(-1, vectors, *array.shape[1:]).transpose(0, 2, 3, 1, 4)
    rest = array[full:].transpose(1, 2, 0, 3)
    return np.ascontiguousarray(np.concatenate([blocks.reshape(-1), rest.reshape(-1)]))
