"""Four-byte dot products on the ordinary lanes: for shapes that do not fill a tensor core's tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.scaffold import Buffer, Expr, load, store
from bitwright.targets.nvidia_gpu.mma_device import WARP, act, pointer, registers, value
from bitwright.targets.nvidia_gpu.mma_engine import Pair, Synchronous
from bitwright.targets.nvidia_gpu.mma_stage import swizzled
from bitwright.targets.nvidia_gpu.mma_tiles import CHUNK, Tiling

# A warp's lanes: four rows by eight pairs of columns.
ROWS, PAIRS = 4, 8
WORDS = 4


@dataclass(frozen=True)
class Dp4aEngine(Synchronous):
    """Every thread multiplies a few rows by a few pairs of columns, 16 bytes of the reduction at a time.

    Attributes:
        tiling: The cut; a warp's tile is a multiple of 4 rows by 16 columns.
    """

    tiling: Tiling

    @property
    def _steps(self) -> tuple[int, int]:
        """Rows and pairs of columns of a thread."""
        return self.tiling.warp_m // ROWS, self.tiling.warp_n // (2 * PAIRS)

    def _corner(self, thread: Expr) -> tuple[Expr, Expr]:
        """Return the thread's first row and column in the block's tile."""
        warp, lane, across = thread // WARP, thread % WARP, self.tiling.block_n // self.tiling.warp_n
        return (
            warp // across * self.tiling.warp_m + lane // PAIRS,
            warp % across * self.tiling.warp_n + lane % PAIRS * 2,
        )

    def start(self) -> Buffer:
        """Emit and return the accumulators, set to 0."""
        rows, pairs = self._steps
        sums = registers(2 * rows * pairs, "int32")
        for index in range(2 * rows * pairs):
            store(sums, T.int32(0), [index])
        return sums

    def multiply(self, shared: Buffer, at: Expr, thread: Expr, sums: Buffer) -> None:
        """Emit the products of the stage that begins at byte ``at``."""
        t, (rows, pairs) = self.tiling, self._steps
        top, left = self._corner(thread)
        weights = at + t.block_m * t.block_k
        left_words, right_words = registers(rows * WORDS, "int32"), registers(2 * pairs * WORDS, "int32")
        with T.serial(t.block_k // CHUNK) as chunk:
            for i in range(rows):
                source = at + swizzled(top + i * ROWS, chunk, t)
                act("bw_move_16", pointer(left_words, i * WORDS), pointer(shared, source))
            for j in range(2 * pairs):
                source = weights + swizzled(left + j // 2 * 2 * PAIRS + j % 2, chunk, t)
                act("bw_move_16", pointer(right_words, j * WORDS), pointer(shared, source))
            for i in range(rows):
                for j in range(2 * pairs):
                    self._add(sums, (j // 2 * rows + i) * 2 + j % 2, left_words, i, right_words, j)

    @staticmethod
    def _add(sums: Buffer, number: int, left: Buffer, i: int, right: Buffer, j: int) -> None:
        for word in range(WORDS):
            words = load(left, [i * WORDS + word]), load(right, [j * WORDS + word])
            store(sums, value("bw_dp4a", *words, load(sums, [number]), dtype="int32"), [number])

    def pairs(self, thread: Expr) -> Iterator[Pair]:
        """Yield the accumulators of a thread, column by column."""
        rows, pairs = self._steps
        top, left = self._corner(thread)
        for j in range(pairs):
            column = left + j * 2 * PAIRS
            for i in range(rows):
                yield Pair(top + i * ROWS, column, (j * rows + i) * 2)
