"""From a block's accumulators to output values in global memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.epilogue import Epilogue
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.scaffold import Buffer, Expr, load, store
from bitwright.targets.nvidia_gpu.mma_device import act, pointer, registers, value
from bitwright.targets.nvidia_gpu.mma_engine import Engine, Pair
from bitwright.targets.nvidia_gpu.mma_tiles import CHUNK, OUTPUT_PADDING


@dataclass(frozen=True)
class Tile:
    """Where a block's tile lies.

    Attributes:
        row: First output pixel.
        channel: First channel in the padded constants.
        column: First channel of the tile inside its group.
        group: Which group.
    """

    row: Expr
    channel: Expr
    column: Expr
    group: Expr


@dataclass(frozen=True)
class Output:
    """Writes a block's tile.

    Attributes:
        geometry: Extents of the output.
        epilogue: What is computed from a sum.
        engine: Says which sums a thread holds.
    """

    geometry: DotGeometry
    epilogue: Epilogue
    engine: Engine

    @property
    def staged_bytes(self) -> int:
        """Bytes of an output element that is collected in shared memory first; 0 if it is stored from registers."""
        return 0 if self.epilogue.dtype == "float32" else 1

    def write(
        self, sums: Buffer, constants: list[Buffer], shared: Buffer, y: Buffer, tile: Tile, thread: Expr
    ) -> None:
        """Emit the epilogue; the block's shared memory must be free, and all threads come here."""
        column: Expr = None
        held: list[list[Expr]] = []
        for pair in self.engine.pairs(thread):
            if pair.column is not column:
                column, held = pair.column, self._constants(constants, tile.channel + pair.column)
            values = [self._value(load(sums, [pair.number + c]), held[c]) for c in range(2)]
            if self.staged_bytes:
                at = pair.row * self._pitch + pair.column
                act("bw_store_bytes_2", pointer(shared, at), *values)
            else:
                self._store_floats(y, tile, pair, values)
        if self.staged_bytes:
            act("bw_barrier")
            self._copy_out(shared, y, tile, thread)

    @property
    def _pitch(self) -> int:
        return self.engine.tiling.block_n + OUTPUT_PADDING

    def _constants(self, constants: list[Buffer], channel: Expr) -> list[list[Expr]]:
        """Return, for two neighbouring channels, each constant in a register of its own."""
        found: list[list[Expr]] = [[], []]
        for buffer in constants:
            kept = registers(2, buffer.dtype)
            for c in range(2):
                store(kept, load(buffer, [channel + c]), [c])
                found[c].append(load(kept, [c]))
        return found

    def _value(self, total: Expr, constants: list[Expr]) -> Expr:
        e, (bias, multiplier, *rest) = self.epilogue, constants
        if e.dtype != "float32":
            low, high = (T.float32(bound - e.zero_point) for bound in (e.lower, e.upper))
            arguments = (total + bias, multiplier, low, high, T.int32(e.zero_point))
            return value("bw_requantize", *arguments, dtype="int32")
        addend = rest[0] if rest else T.float32(0)
        real = value("bw_scaled", total + bias, multiplier, addend, dtype="float32")
        return T.max(real, T.float32(0)) if e.relu else real

    def _store_floats(self, y: Buffer, tile: Tile, pair: Pair, values: list[Expr]) -> None:
        g = self.geometry
        row, column = tile.row + pair.row, tile.column + pair.column
        at = row * g.outputs + tile.group * g.group_outputs + column
        if g.group_outputs % 2 == 0:
            with T.If(T.And(row < g.pixels, column < g.group_outputs)), T.Then():
                act("bw_store_floats_2", pointer(y, at), *values)
            return
        for c in range(2):
            with T.If(T.And(row < g.pixels, column + c < g.group_outputs)), T.Then():
                store(y, values[c], [at + c])

    def _copy_out(self, shared: Buffer, y: Buffer, tile: Tile, thread: Expr) -> None:
        """Emit stores of whole rows: neighbouring threads write neighbouring bytes."""
        g, t = self.geometry, self.engine.tiling
        width = gcd(CHUNK, g.group_outputs)
        across = t.block_n // width
        rounds = -(-t.block_m * across // t.threads)
        with T.serial(rounds) as turn:
            piece = turn * t.threads + thread
            row, column = piece // across, piece % across * width
            pixel, channel = tile.row + row, tile.column + column
            inside = T.And(T.And(row < t.block_m, pixel < g.pixels), channel < g.group_outputs)
            at = pixel * g.outputs + tile.group * g.group_outputs + channel
            with T.If(inside), T.Then():
                act(f"bw_move_{width}", pointer(y, at), pointer(shared, row * self._pitch + column))
