"""How a matrix product is cut into tiles for thread blocks and warps, and which cuts a processor can hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import gcd, prod

from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.targets.sections.gpu import Gpu

WARP = 32
# Bytes of one asynchronous copy at most, and of a row of the matrices that ldmatrix reads.
CHUNK = 16
# Bytes of the reduction that one mma takes: 32 of int8, 16 of fp16.
MMA_BYTES = 32
MMA_M, MMA_N = 16, 8
# Registers for addresses, loop counters and the epilogue beside accumulators and fragments.
OTHER_REGISTERS = 56
REGISTER_FILE = 65536
MAX_RASTER = 8
OUTPUT_PADDING = 16
LINE = 128


@dataclass(frozen=True)
class Tiling:
    """What a tuner may change; the result never depends on it.

    Attributes:
        block_m, block_n: Output rows and columns of a thread block.
        block_k: Bytes of the reduction in shared memory at once, for each row and column.
        warp_m, warp_n: Output rows and columns of a warp.
        stages: Tiles of the reduction in flight.
    """

    block_m: int
    block_n: int
    block_k: int
    warp_m: int
    warp_n: int
    stages: int

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return (self.block_m // self.warp_m) * (self.block_n // self.warp_n)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps

    @property
    def chunks(self) -> int:
        """16-byte pieces of a row of a stage."""
        return self.block_k // CHUNK

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage."""
        return (self.block_m + self.block_n) * self.block_k

    def shared_bytes(self, output_bytes: int) -> int:
        """Return a block's shared memory, given the bytes of an output element that is staged there (0: none)."""
        output = self.block_m * (self.block_n * output_bytes + OUTPUT_PADDING) if output_bytes else 0
        return max(self.stages * self.stage_bytes, output)

    @property
    def registers(self) -> int:
        """Estimated registers of a thread."""
        fragments = 4 * (self.warp_m // MMA_M) + 2 * (self.warp_n // MMA_N)
        return self.warp_m * self.warp_n // WARP + fragments + OTHER_REGISTERS

    def is_legal(self, gpu: Gpu, output_bytes: int) -> bool:
        """Tell whether a block fits the processor and its threads can share the loads evenly."""
        steps = self.threads // self.chunks
        return (
            self.threads <= gpu.threads_per_block
            and self.shared_bytes(output_bytes) <= gpu.shared_bytes_per_block
            and self.registers <= min(gpu.registers_per_thread, REGISTER_FILE // self.threads)
            and self.block_m % self.warp_m == self.block_n % self.warp_n == 0
            and self.warp_n % (2 * MMA_N) == self.warp_m % MMA_M == 0
            and (self.block_m % steps == 0 or steps % self.block_m == 0)
            and (self.block_n % steps == 0 or steps % self.block_n == 0)
        )


@dataclass(frozen=True)
class Extent:
    """A matrix product in bytes and tiles.

    Attributes:
        rows, columns: M, and N of one group.
        depth: Bytes of the reduction of one group.
        groups: Independent products side by side.
    """

    rows: int
    columns: int
    depth: int
    groups: int

    def tiles(self, tiling: Tiling) -> tuple[int, int, int]:
        """Return the number of tiles along (M, N, reduction)."""
        return (
            -(-self.rows // tiling.block_m),
            -(-self.columns // tiling.block_n),
            -(-self.depth // tiling.block_k),
        )


def extent_of(geometry: DotGeometry, element_bytes: int = 1) -> Extent:
    """Return a dot product's extent."""
    depth = prod(geometry.kernel) * geometry.group_channels * element_bytes
    return Extent(geometry.pixels, geometry.group_outputs, depth, geometry.group)


BLOCKS = (16, 32, 64, 128, 256)
WARPS_M, WARPS_N = (16, 32, 64), (16, 32, 64)
DEPTHS, STAGES = (32, 64, 128), (2, 3, 4)


def space(extent: Extent, gpu: Gpu, output_bytes: int) -> Iterator[Tiling]:
    """Yield the legal tilings, the least estimated time first."""
    cuts = (
        Tiling(bm, bn, bk, wm, wn, stages)
        for bm, bn, bk, wm, wn, stages in product(BLOCKS, BLOCKS, DEPTHS, WARPS_M, WARPS_N, STAGES)
        if wm <= bm and wn <= bn
    )
    legal = [t for t in cuts if t.warps <= 8 and t.is_legal(gpu, output_bytes) and _is_useful(t, extent)]
    smallest = Tiling(16, 16, 32, 16, 16, 2)
    yield from sorted(legal, key=lambda t: (_cost(t, extent, gpu), t.shared_bytes(0))) or [smallest]


def _is_useful(tiling: Tiling, extent: Extent) -> bool:
    """Tell whether a tile is not twice as large as what it covers, and has enough steps for its stages."""
    sides = ((tiling.block_m, extent.rows, 16), (tiling.block_n, extent.columns, 16), (tiling.block_k, extent.depth, 32))
    fits = all(tile < 2 * max(size, least) for tile, size, least in sides)
    return fits and tiling.stages <= max(2, extent.tiles(tiling)[2] + 1)


def _cost(tiling: Tiling, extent: Extent, gpu: Gpu) -> float:
    """Return estimated cycles: waves of blocks, each bound by multiplications, shared memory or latency.

    A multiprocessor of these families does about 2048 int8 multiply-accumulates of mma.sync a cycle and reads 128
    bytes of shared memory; a step of the reduction cannot take less than its share of a copy's latency.
    """
    along_m, along_n, steps = extent.tiles(tiling)
    by_shared = gpu.shared_bytes_per_block // max(tiling.shared_bytes(1), 1)
    by_registers = REGISTER_FILE // (tiling.threads * tiling.registers)
    resident = max(1, min(by_shared, by_registers, 2048 // tiling.threads))
    blocks = along_m * along_n * extent.groups
    waves = -(-blocks // (gpu.multiprocessors * resident))
    together = min(resident, -(-blocks // gpu.multiprocessors))
    multiply = tiling.block_m * tiling.block_n * tiling.block_k / 2048
    read = tiling.block_k * (
        tiling.block_m * tiling.block_n / tiling.warp_n + tiling.block_n * tiling.block_m / tiling.warp_m
    ) / 128
    latency = 700 / (tiling.stages - 1)
    few_warps = max(1.0, 8 / (tiling.warps * together))
    step = max(together * max(multiply * few_warps, read, tiling.stage_bytes / 32), latency, 60.0)
    return waves * (steps * step + 900 + tiling.block_m * tiling.block_n * together / 64)


def raster(tiles_m: int) -> int:
    """Return how many neighbouring row tiles share a column tile before the next: they find it in the cache."""
    return max(d for d in range(1, MAX_RASTER + 1) if tiles_m % d == 0)


def gather_width(geometry: DotGeometry, element_bytes: int = 1) -> int:
    """Return the bytes that neighbouring elements of the reduction share in memory, aligned: 16, 8, 4, or 1."""
    common = gcd(geometry.channels * element_bytes, geometry.group_channels * element_bytes, CHUNK)
    return common if common >= 4 else 1
