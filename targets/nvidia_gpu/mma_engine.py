"""Multiplying the two matrices of a stage: the part of the template that depends on the instruction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.scaffold import Buffer, Expr, store
from bitwright.targets.nvidia_gpu.mma_device import WARP, act, pointer, registers
from bitwright.targets.nvidia_gpu.mma_stage import swizzled
from bitwright.targets.nvidia_gpu.mma_tiles import CHUNK, MMA_BYTES, MMA_M, MMA_N, Tiling


@dataclass(frozen=True)
class Pair:
    """Two sums of a thread that are neighbours in a row of the block's tile.

    Attributes:
        row, column: Of the first one in the tile.
        number: Index of the first one in the accumulators.
    """

    row: Expr
    column: Expr
    number: int


class Engine(Protocol):
    """How a block multiplies a stage, and which sums each of its threads holds."""

    @property
    def tiling(self) -> Tiling:
        """The block's tile."""
        ...

    def start(self) -> Buffer:
        """Emit and return the accumulators, set to 0."""
        ...

    def multiply(self, shared: Buffer, at: Expr, thread: Expr, sums: Buffer) -> None:
        """Emit the products of the stage that begins at byte ``at``."""
        ...

    @property
    def is_asynchronous(self) -> bool:
        """Multiplications are only issued by ``multiply``; ``wait`` ends them."""
        ...

    def publish(self) -> None:
        """Emit what makes a thread's finished copies visible to the multiplier, before the barrier."""
        ...

    def wait(self, sums: Buffer) -> None:
        """Emit the end of the multiplications: the stage may be written again, the sums may be read."""
        ...

    def pairs(self, thread: Expr) -> Iterator[Pair]:
        """Yield the accumulators of a thread, column by column."""
        ...


class Synchronous:
    """What engines have in common whose multiplications are done when they are issued."""

    @property
    def is_asynchronous(self) -> bool:
        """Nothing is left to wait for."""
        return False

    def publish(self) -> None:
        """Copies are visible behind the barrier."""

    def wait(self, sums: Buffer) -> None:
        """Nothing is under way."""
        del sums


@dataclass(frozen=True)
class MmaEngine(Synchronous):
    """Tensor cores: every warp multiplies ``warp_m`` rows by ``warp_n`` columns with mma.sync.

    Attributes:
        tiling: The cut.
        instruction: Device function of the multiplication.
        sums: Type of the accumulators.
    """

    tiling: Tiling
    instruction: str
    sums: str

    @property
    def _tiles(self) -> tuple[int, int]:
        """Matrices of a warp along M and N."""
        return self.tiling.warp_m // MMA_M, self.tiling.warp_n // MMA_N

    def _corner(self, thread: Expr) -> tuple[Expr, Expr]:
        """Return the first row and column of the thread's warp in the block's tile."""
        warp, across = thread // WARP, self.tiling.block_n // self.tiling.warp_n
        return warp // across * self.tiling.warp_m, warp % across * self.tiling.warp_n

    def start(self) -> Buffer:
        """Emit and return the accumulators, set to 0."""
        along_m, along_n = self._tiles
        sums = registers(along_m * along_n * 4, self.sums)
        for index in range(along_m * along_n * 4):
            store(sums, T.cast(0, self.sums), [index])
        return sums

    def multiply(self, shared: Buffer, at: Expr, thread: Expr, sums: Buffer) -> None:
        """Emit the products of the stage that begins at byte ``at``."""
        t, (along_m, along_n) = self.tiling, self._tiles
        lane, (top, left) = thread % WARP, self._corner(thread)
        weights = at + t.block_m * t.block_k
        for k in range(t.block_k // MMA_BYTES):
            rows, columns = registers(4 * along_m, "int32"), registers(2 * along_n, "int32")
            chunk = k * (MMA_BYTES // CHUNK)
            for i in range(along_m):
                source = swizzled(top + i * MMA_M + lane % MMA_M, chunk + lane // MMA_M, t)
                act("bw_load_matrix_4", pointer(rows, 4 * i), pointer(shared, at + source))
            for j in range(0, along_n, 2):
                row = left + j * MMA_N + lane % MMA_N + lane // MMA_M * MMA_N
                source = swizzled(row, chunk + lane // MMA_N % 2, t)
                act("bw_load_matrix_4", pointer(columns, 2 * j), pointer(shared, weights + source))
            for i in range(along_m):
                for j in range(along_n):
                    to = pointer(sums, 4 * (i * along_n + j))
                    act(self.instruction, to, pointer(rows, 4 * i), pointer(columns, 2 * j))

    def pairs(self, thread: Expr) -> Iterator[Pair]:
        """Yield the accumulators of a thread, column by column."""
        along_m, along_n = self._tiles
        lane, (top, left) = thread % WARP, self._corner(thread)
        for j in range(along_n):
            column = left + j * MMA_N + lane % 4 * 2
            for i in range(along_m):
                for half in range(2):
                    row = top + i * MMA_M + half * MMA_N + lane // 4
                    yield Pair(row, column, 4 * (i * along_n + j) + 2 * half)


def s8_engine(tiling: Tiling) -> MmaEngine:
    """Return the engine of int8 factors and int32 sums."""
    return MmaEngine(tiling, "bw_mma_s8", "int32")


def f16_engine(tiling: Tiling) -> MmaEngine:
    """Return the engine of fp16 factors and float32 sums."""
    return MmaEngine(tiling, "bw_mma_f16", "float32")
