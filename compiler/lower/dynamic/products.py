"""Products of float32 matrices whose bounds follow the length of a sequence: attention's scores and mixtures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.dynamic.sizes import Polynomial, expression, substituted
from bitwright.compiler.lower.dynamic.threads import spread
from bitwright.compiler.lower.float.matmul import (
    MIN_PARALLEL_MACS,
    MatmulGeometry,
    MatmulParams,
    MatmulWriter,
    Panel,
    matmul_parameters,
    offset,
)
from bitwright.compiler.lower.float.storage import load, store
from bitwright.compiler.lower.float.vectors import VectorUnit, keep, number
from bitwright.compiler.lower.templates.scaffold import (
    Buffer,
    Expr,
    allocate,
    build_function,
    loop,
    pieces,
)

VECTORS = 2  # of a tile: a short sequence's last columns waste less than one tile


def any_params(unit: VectorUnit) -> MatmulParams:
    """Return the register tile of products with any number of rows: a power of two, so that the rest is halved."""
    return MatmulParams(rows=8 if unit.registers >= 32 else 4, vectors=VECTORS)


def why_not(geometry: MatmulGeometry) -> str | None:
    """Return why there is no kernel for a product, or None."""
    if isinstance(geometry.n, Polynomial) and isinstance(geometry.k, Polynomial):
        return "both the columns and the length of its sums follow the sequence"
    if isinstance(geometry.n, Polynomial) and (geometry.b is None or geometry.bias):
        return "its weight or its bias follows the sequence"
    if isinstance(geometry.k, Polynomial) and (geometry.b is None or geometry.b.column != 1):
        return "its sums follow the sequence across the memory's order"
    return None


def any_matmul_function(geometry: MatmulGeometry, unit: VectorUnit) -> tirx.PrimFunc:
    """Return the function of a product; parameters as those of ``matmul_function``.

    Args:
        geometry: Extents and strides may be polynomials of the length; ``why_not`` must be None.
        unit: Vector registers. A constant right-hand side is packed for ``any_params``.
    """
    assert why_not(geometry) is None
    length, params = tirx.Var("length", "int64"), any_params(unit)
    g: MatmulGeometry = substituted(geometry, length)
    padded = -(-g.n // unit.lanes) * unit.lanes if g.b is None else 0
    parameters = matmul_parameters(g, (g.k * padded,) if g.b is None else g.b.shape)
    writer = _AnyMatmul(g, unit, params)
    batches = reduce(lambda a, b: a * b, geometry.batch, 1)
    work = batches * geometry.m
    macs = expression(work, length) * expression(geometry.n, length) * expression(geometry.k, length)
    turns = expression(batches, length)

    def emit(buffers: list[Buffer]) -> None:
        read = writer.readable(buffers)
        spread(turns, macs >= MIN_PARALLEL_MACS, lambda i: writer.batch(read, i))

    return build_function(parameters, emit)


@dataclass(frozen=True)
class _AnyMatmul(MatmulWriter):
    """Writes the loops; extents of the geometry are numbers or expressions."""

    @property
    def copied(self) -> bool:
        """Columns are read from a copy in float32."""
        return self.follows

    @property
    def follows(self) -> bool:
        """The number of columns is known at run time."""
        return not isinstance(self.geometry.n, int)

    def batch(self, buffers: list[Buffer], batch: Expr) -> None:
        """Emit one product."""
        index: list[Expr] = []
        for extent in reversed(self.geometry.batch):
            index.insert(0, batch % extent)
            batch = batch // extent
        n, block = self.geometry.n, self.block
        if self.follows:
            with loop((n + block - 1) // block) as number_of:
                column = keep(number_of * block)
                self.columns(buffers, index, column, keep(T.min(n - column, T.int64(block))))
            return
        for blocks, first, width in ((n // block, 0, block), (1, n // block * block, n % block)):
            if blocks and width:
                with loop(blocks) as number_of:
                    self.columns(buffers, index, keep(first + number_of * block), width)

    def columns(self, buffers: list[Buffer], index: list[Expr], column: Expr, columns: Any) -> None:
        """Emit all rows of some columns: whole tiles, one that begins inside the last, or tiles of half the size."""
        rows = self.params.rows
        m: Any = T.int64(self.geometry.m) if isinstance(self.geometry.m, int) else self.geometry.m
        bases = (keep(offset(index, self.geometry.a)), keep(offset(index, self.geometry.c)))
        panel = self.any_panel(buffers[1], index, column, columns)

        def tile(row: Expr, height: int) -> None:
            self.tile(buffers, panel, bases, keep(row), height, column)

        with loop(m // rows) as full:
            tile(full * rows, rows)
        with T.If(T.And(m % rows > 0, m > rows)):
            with T.Then():
                tile(m - rows, rows)
            with T.Else():
                height = rows // 2
                while height:
                    with T.If(m % (2 * height) >= height), T.Then():
                        tile(m // (2 * height) * (2 * height), height)
                    height //= 2

    def any_panel(self, b: Buffer, index: list[Expr], column: Expr, columns: Any) -> Panel:
        """Return where the columns are read: in place, or from a copy that has whole vectors."""
        g, block = self.geometry, self.block
        if g.b is None:
            width = columns + -columns % self.unit.lanes
            return Panel(b, keep(column * g.k), width, columns, width)
        start = keep(offset(index, g.b) + column * g.b.column)
        if isinstance(columns, int):
            return Panel(b, start, g.b.row, columns, columns)
        scratch = allocate((g.k * block,), "float32")
        with T.If(columns == block):
            with T.Then():
                self.copy(b, start, scratch, block, block)
            with T.Else():
                self.copy_some(b, start, scratch, columns)
        return Panel(scratch, 0, block, columns, block)

    def copy_some(self, b: Buffer, start: Expr, scratch: Buffer, columns: Expr) -> None:
        """Copy fewer columns than a tile has; zeros fill the rest."""
        g, lanes = self.geometry, self.unit.lanes
        assert g.b is not None
        with loop(g.k * self.block // lanes) as at:
            store(scratch, number(0, lanes), [at * lanes], lanes)
        with loop(columns) as j, loop(g.k) as k:
            value = load(b, [start + k * g.b.row + j * g.b.column])
            store(scratch, value, [k * self.block + j])

    def tile(
        self,
        buffers: list[Buffer],
        panel: Panel,
        bases: tuple[Expr, Expr],
        row: Expr,
        rows: int,
        column: Expr,
    ) -> None:
        """Emit one register tile; one whose columns are counted at run time writes them through memory."""
        if isinstance(panel.columns, int):
            super().tile(buffers, panel, bases, row, rows, column)
            return
        g = self.geometry
        a_at, c_at = keep(bases[0] + row * g.a.row), keep(bases[1] + row * g.c.row + column)
        sums = self.sums(buffers[0], a_at, panel, rows)
        self.write(buffers, sums, panel, c_at, rows)

    def write(self, buffers: list[Buffer], sums: Buffer, panel: Panel, at: Expr, rows: int) -> None:
        """Emit the stores of a tile: vectors if it has all its columns."""
        c, row, parts = buffers[-1], self.geometry.c.row, list(pieces(panel.width, self.unit.lanes))

        def result(i: int, j: int, lanes: int) -> Expr:
            return self.finished(buffers, load(sums, [i, j], lanes), T.int64(j), lanes)

        with T.If(panel.columns == panel.width):
            with T.Then():
                for i in range(rows):
                    for j, w in parts:
                        store(c, result(i, j, w), [at + i * row + j], w)
            with T.Else():
                line = allocate((panel.width,), "float32")
                for i in range(rows):
                    for j, w in parts:
                        store(line, result(i, j, w), [j], w)
                    with loop(panel.columns) as j:
                        store(c, load(line, [j]), [at + i * row + j])
