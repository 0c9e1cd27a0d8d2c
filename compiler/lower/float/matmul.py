"""Products of float32 matrices: register tiles of rows times vectors, any strides, batches.

A constant right-hand side is packed when it is compiled: the vectors of one tile lie one after the other. A
right-hand side that lies transposed is turned around block by block; otherwise it is read where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import prod

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.float.storage import HALF, load, store, widened
from bitwright.compiler.lower.float.vectors import VectorUnit, keep, multiply_add, number, transpose
from bitwright.compiler.lower.templates import scaffold
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

# Starting and joining threads costs microseconds: about what a million multiply-accumulates cost on one core.
MIN_PARALLEL_MACS = 1 << 19
PARALLEL_PIECES = 16
MIN_ROWS_TO_COPY = 4
# Products that are summed in half precision before their sum is added to one in float32: each rounds by 2^-11 of what
# has been summed so far.
HALF_SUMS = 32
CHAINS = 8  # multiply-adds in flight: latency 4, two units


@dataclass(frozen=True)
class Operand:
    """Where element (batch..., row, column) of a matrix lies.

    Attributes:
        shape: Physical shape of the buffer.
        batch: Stride of each batch axis; 0 where the operand is the same for all.
        row, column: Strides.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    row: int
    column: int


@dataclass(frozen=True)
class MatmulGeometry:
    """``c[b, i, j] = act(scale * sum_k a[b, i, k] * b[b, k, j] + bias[j])``.

    Attributes:
        batch: Extents of the batch axes.
        m, n, k: Rows, columns, length of the sums.
        a, b, c: Where they lie; ``b`` is None for a constant, packed by ``pack``.
        scale: Factor of the sums.
        bias: A vector [n] is added.
        relu: Clamp at 0.
        dtype: How a, c and a b that is no constant are stored, ``"float32"`` or ``"float16"``.
        weight_dtype: How a constant b is.
    """

    batch: tuple[int, ...]
    m: int
    n: int
    k: int
    a: Operand
    b: Operand | None
    c: Operand
    scale: float = 1.0
    bias: bool = False
    relu: bool = False
    dtype: str = "float32"
    weight_dtype: str = "float32"

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return prod(self.batch) * self.m * self.n * self.k


@dataclass(frozen=True)
class MatmulParams:
    """What a tuner may change; results differ by the order of no sum.

    Attributes:
        rows: Rows of the register tile.
        vectors: Vectors of the register tile.
    """

    rows: int
    vectors: int


def choose_params(m: int, n: int, unit: VectorUnit) -> MatmulParams:
    """Choose the register tile with the fewest estimated issue slots."""
    limit = max(1, -(-n // unit.lanes))
    candidates = [
        MatmulParams(rows, vectors)
        for rows in range(1, min(m, unit.registers) + 1)
        for vectors in range(1, min(limit, 8) + 1)
        if rows * vectors + vectors + 1 <= unit.registers
    ]
    return min(candidates, key=lambda p: (_cost(m, limit, p), -p.rows * p.vectors))


def _cost(m: int, vectors: int, params: MatmulParams) -> float:
    def tile(rows: int, width: int) -> float:
        # Two multiply-adds or two loads a cycle; few sums wait for their own results.
        return max(rows * width, CHAINS, rows + width) + 0.1 * (rows + 2 * width) if rows and width else 0.0

    def row(width: int) -> float:
        full, tail = divmod(m, params.rows)
        return full * tile(params.rows, width) + tile(tail, width)

    full, tail = divmod(vectors, params.vectors)
    return full * row(params.vectors) + row(tail)


def pack(weight: np.ndarray, unit: VectorUnit, params: MatmulParams) -> np.ndarray:
    """Return [k, n] as one block of columns after the other, flat; zeros fill the last vector."""
    block = params.vectors * unit.lanes
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % unit.lanes)))
    parts = [padded[:, at : at + block].reshape(-1) for at in range(0, padded.shape[1], block)]
    return np.ascontiguousarray(np.concatenate(parts), np.float32)


def matmul_function(
    geometry: MatmulGeometry, unit: VectorUnit, params: MatmulParams | None = None
) -> tirx.PrimFunc:
    """Return the function; parameters: a, b (or packed), bias if there is one, c."""
    params = params or choose_params(geometry.m, geometry.n, unit)
    padded = geometry.n + -geometry.n % unit.lanes
    b_shape = (geometry.k * padded,) if geometry.b is None else geometry.b.shape
    parameters = matmul_parameters(geometry, b_shape)
    return build_function(parameters, MatmulWriter(geometry, unit, params).body)


def matmul_parameters(geometry: MatmulGeometry, b_shape: tuple[int, ...]) -> list[Parameter]:
    """Return the parameters of a product: a, b, the bias, c."""
    g = geometry
    return [
        Parameter("a", g.a.shape, g.dtype),
        Parameter("b", b_shape, g.weight_dtype if g.b is None else g.dtype),
        *([Parameter("bias", (g.n,), "float32")] if g.bias else []),
        Parameter("c", g.c.shape, g.dtype),
    ]


@dataclass(frozen=True)
class Panel:
    """Columns of the right-hand side as a tile reads them.

    Attributes:
        buffer: Where.
        start: Of the first row and column.
        row: Stride.
        columns: Number of columns that are stored.
        width: Number of columns that are computed; those behind the last meet zeros.
    """

    buffer: Buffer
    start: Expr
    row: int
    columns: int
    width: int


@dataclass(frozen=True)
class MatmulWriter:
    """Writes the loops of a product."""

    geometry: MatmulGeometry
    unit: VectorUnit
    params: MatmulParams

    @property
    def block(self) -> int:
        """Columns of a register tile."""
        return self.params.vectors * self.unit.lanes

    @property
    def copied(self) -> bool:
        """Vectors of the right-hand side cannot be loaded from where it is, or not often enough."""
        b = self.geometry.b
        ragged = self.geometry.n % self.unit.lanes != 0 and self.geometry.m >= MIN_ROWS_TO_COPY
        return b is not None and (b.column != 1 or ragged)

    @property
    def halves(self) -> bool:
        """Products are computed in half precision."""
        narrow = self.geometry.dtype == HALF and self.geometry.weight_dtype in (HALF, "float32")
        same = self.geometry.b is not None or self.geometry.weight_dtype == HALF
        return narrow and same and not self.copied and self.unit.half_lanes > 0

    def readable(self, buffers: list[Buffer]) -> list[Buffer]:
        """Return the buffers with the left-hand side as the tiles read it."""
        if self.geometry.dtype != HALF or self.halves:
            return buffers
        size = reduce(lambda a, b: a * b, self.geometry.a.shape, 1)
        return [widened(buffers[0], size, self.unit.lanes), *buffers[1:]]

    def body(self, buffers: list[Buffer]) -> None:
        """Emit the whole product."""
        buffers = self.readable(buffers)
        g = self.geometry
        full, tail = divmod(g.n, self.block)
        batches = prod(g.batch)
        chunks = 1
        if g.macs >= MIN_PARALLEL_MACS:
            chunks = max(
                1, min(g.m // self.params.rows, -(-PARALLEL_PIECES // (batches * (full + bool(tail)))))
            )
        if self.copied:
            chunks = 1  # each piece would copy the panel again
        for blocks, first, columns in ((full, 0, self.block), (1 if tail else 0, full * self.block, tail)):
            if blocks:
                extent = batches * blocks * chunks
                with loop(extent, parallel=g.macs >= MIN_PARALLEL_MACS and extent > 1) as piece:
                    at = keep(first + piece // chunks % blocks * columns)
                    self.piece(buffers, piece // chunks // blocks, at, columns, (piece % chunks, chunks))

    def piece(
        self, buffers: list[Buffer], batch: Expr, column: Expr, columns: int, chunk: tuple[Expr, int]
    ) -> None:
        """Emit the tiles of some columns, and of a part of the rows."""
        g = self.geometry
        index: list[Expr] = []
        for extent in reversed(g.batch):
            index.insert(0, batch % extent)
            batch = batch // extent
        a_at, c_at = (keep(offset(index, operand)) for operand in (g.a, g.c))
        panel = self.panel(buffers[1], index, column, columns)
        full, tail = divmod(g.m, self.params.rows)
        number_of, parts = chunk
        share = -(-full // parts)
        if full:
            first = number_of * share if parts > 1 else 0
            end = T.min((number_of + 1) * share, full) if parts > 1 else full
            with T.serial(first, end) as tile:
                self.tile(
                    buffers, panel, (a_at, c_at), keep(tile * self.params.rows), self.params.rows, column
                )
        if tail:
            last = full * self.params.rows
            if parts == 1:
                self.tile(buffers, panel, (a_at, c_at), last, tail, column)
                return
            with T.If(number_of == parts - 1), T.Then():
                self.tile(buffers, panel, (a_at, c_at), last, tail, column)

    def panel(self, b: Buffer, index: list[Expr], column: Expr, columns: int) -> Panel:
        """Return where the columns are read, turned around if need be."""
        g = self.geometry
        width = columns + -columns % self.unit.lanes
        if g.b is None:
            # Blocks before this one are whole.
            return Panel(b, keep(column * g.k), width, columns, width)
        start = keep(offset(index, g.b) + column * g.b.column)
        if not self.copied:
            return Panel(b, start, g.b.row, columns, columns)
        scratch = allocate((g.k * width,), "float32")
        self.copy(b, start, scratch, columns, width)
        return Panel(scratch, 0, width, columns, width)

    def copy(self, b: Buffer, start: Expr, scratch: Buffer, columns: int, width: int) -> None:
        """Copy b[k, column] to scratch, whose rows are the columns' vectors."""
        g, lanes = self.geometry, self.unit.lanes
        assert g.b is not None
        wide = columns - columns % lanes if g.b.row == 1 else 0
        deep = g.k - g.k % lanes if wide else 0
        if wide and deep:
            with loop(deep // lanes) as kb, loop(wide // lanes) as jb:
                at = keep(start + kb * lanes + jb * (lanes * g.b.column))
                rows = [keep(load(b, [at + j * g.b.column], lanes)) for j in range(lanes)]
                for k, vector in enumerate(transpose(rows, lanes)):
                    store(scratch, vector, [(kb * lanes + k) * width + jb * lanes], lanes)
        for k0, k1, j0, j1 in ((0, g.k, wide, columns), (deep, g.k, 0, wide)):
            if k1 > k0 and j1 > j0:
                with loop(k1 - k0) as k:
                    if g.b.column == 1:
                        for at, w in pieces(j1 - j0, lanes):
                            row = load(b, [start + (k0 + k) * g.b.row + j0 + at], w)
                            store(scratch, row, [(k0 + k) * width + j0 + at], w)
                        continue
                    with loop(j1 - j0) as j:
                        value = load(b, [start + (k0 + k) * g.b.row + (j0 + j) * g.b.column])
                        store(scratch, value, [(k0 + k) * width + j0 + j])
        if width > columns:
            with loop(g.k) as k:
                for at, w in pieces(width - columns, lanes):
                    store(scratch, number(0, w), [k * width + columns + at], w)

    def tile(
        self,
        buffers: list[Buffer],
        panel: Panel,
        bases: tuple[Expr, Expr],
        row: Expr,
        rows: int,
        column: Expr,
    ) -> None:
        """Emit one register tile."""
        g = self.geometry
        a, c = buffers[0], buffers[-1]
        a_at = keep(bases[0] + row * g.a.row)
        sums = self.sums(a, a_at, panel, rows)
        c_at = keep(bases[1] + row * g.c.row + column)
        for i in range(rows):
            for at, w in pieces(panel.columns, self.unit.lanes):
                value = self.finished(buffers, load(sums, [i, at], w), column + at, w)
                store(c, value, [c_at + i * g.c.row + at], w)

    def sums(self, a: Buffer, a_at: Expr, panel: Panel, rows: int) -> Buffer:
        """Emit the sums of a tile; return them [rows, width]."""
        g, lanes = self.geometry, self.unit.lanes
        sums = allocate((rows, panel.width), "float32", "local")
        _clear(sums, rows, panel.width, lanes)
        if not self.halves:
            self.add_products(a, a_at, panel, sums, rows, (0, g.k))
            return sums
        with loop(g.k // HALF_SUMS) as block:
            self.add_halves(a, a_at, panel, sums, rows, (keep(block * HALF_SUMS), HALF_SUMS))
        if not isinstance(g.k, int) or g.k % HALF_SUMS:
            self.add_halves(a, a_at, panel, sums, rows, (g.k // HALF_SUMS * HALF_SUMS, g.k % HALF_SUMS))
        return sums

    def add_products(
        self, a: Buffer, a_at: Expr, panel: Panel, sums: Buffer, rows: int, span: tuple[Expr, Expr]
    ) -> None:
        """Emit the loop over a span (first, count) of the sums' length, in the type of ``sums``."""
        g, dtype = self.geometry, str(sums.dtype)
        half = dtype == HALF
        read = scaffold.load if half else load
        parts = list(pieces(panel.width, self.unit.half_lanes if half else self.unit.lanes))
        first, count = span
        with loop(count) as turn:
            k = first + turn
            vectors = [keep(read(panel.buffer, [panel.start + k * panel.row + at], w)) for at, w in parts]
            for i in range(rows):
                left = keep(read(a, [a_at + i * g.a.row + k * g.a.column]))
                for vector, (at, w) in zip(vectors, parts, strict=True):
                    total = multiply_add(splat(left, w), vector, read(sums, [i, at], w), w, dtype)
                    scaffold.store(sums, total, [i, at], w)

    def add_halves(
        self, a: Buffer, a_at: Expr, panel: Panel, sums: Buffer, rows: int, span: tuple[Expr, Expr]
    ) -> None:
        """Emit the sum of a span in half precision, and add it to the float32 sums."""
        lanes = self.unit.lanes
        partial = allocate((rows, panel.width), HALF, "local")
        _clear(partial, rows, panel.width, self.unit.half_lanes)
        self.add_products(a, a_at, panel, partial, rows, span)
        for i in range(rows):
            for at, w in pieces(panel.width, lanes):
                store(sums, load(sums, [i, at], w) + load(partial, [i, at], w), [i, at], w)

    def finished(self, buffers: list[Buffer], value: Expr, column: Expr, lanes: int) -> Expr:
        """Return what is stored for a sum."""
        g = self.geometry
        if g.bias:
            bias = load(buffers[2], [column], lanes)
            value = multiply_add(value, number(g.scale, lanes), bias, lanes) if g.scale != 1 else value + bias
        elif g.scale != 1:
            value = value * number(g.scale, lanes)
        return T.max(value, number(0, lanes)) if g.relu else value


def _clear(sums: Buffer, rows: int, width: int, lanes: int) -> None:
    for i in range(rows):
        for at, w in pieces(width, lanes):
            store(sums, number(0, w), [i, at], w)


def offset(index: list[Expr], operand: Operand) -> Expr:
    """Return where the matrix of one batch index begins."""
    return sum((i * s for i, s in zip(index, operand.batch, strict=True)), T.int32(0))
