"""How a matrix product is cut into tiles for thread blocks and warps, and which cuts a processor can hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import gcd, prod

from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.targets.nvidia_gpu.ptxas import registers_left
from bitwright.targets.sections.gpu import Gpu

WARP = 32
# Bytes of one asynchronous copy at most, and of a row of the matrices that ldmatrix reads.
CHUNK = 16
# Bytes of the reduction that one mma takes: 32 of int8, 16 of fp16.
MMA_BYTES = 32
MMA_M, MMA_N = 16, 8
# Registers for addresses, loop counters and the epilogue beside accumulators and fragments.
OTHER_REGISTERS = 56
# Cycles of a copy from DRAM, of a barrier, and around the reduction; bytes and elements a cycle.
# Guesses that only order candidates.
COPY_LATENCY, BARRIER, START = 1100.0, 60.0, 900.0
COPIED_PER_CYCLE, STORED_PER_CYCLE = 32.0, 64.0
MAX_RASTER = 8
OUTPUT_PADDING = 16
LINE = 128


@dataclass(frozen=True)
class Unit:
    """What multiplies: which cuts it allows, and how fast it is.

    Attributes:
        rows, columns: A warp's tile is a multiple of these.
        fragment_rows, fragment_columns: Registers of operands for each step of rows and of columns.
        macs_per_cycle: int8 multiply-accumulates of a multiprocessor.
        blocks_m: Rows of a block that are worth a try.
        warps_m, warps_n: Rows and columns of a warp.
        depths: Bytes of a stage's rows.
        warps: Most warps of a block.
        sharing_rows: Rows that are multiplied by one reading of the columns, if they are more than a warp's.
    """

    rows: int
    columns: int
    fragment_rows: int
    fragment_columns: int
    macs_per_cycle: float
    blocks_m: tuple[int, ...]
    warps_m: tuple[int, ...]
    warps_n: tuple[int, ...] = (16, 32, 64)
    depths: tuple[int, ...] = (32, 64, 128)
    warps: int = 8
    sharing_rows: int = 0


# A tensor core's fragments: 4 registers for 16 rows, 4 for 16 columns.
MMA_UNIT = Unit(16, 16, 4, 4, 2048, (16, 32, 64, 128, 256), (16, 32, 64))
# A thread's 16 bytes of a row, for every fourth row, and of two columns, for every sixteen.
DP4A_UNIT = Unit(4, 16, 4, 8, 256, (4, 8, 16, 32, 64), (4, 8, 16, 32, 64))
# Four warps share 64 rows; operands stay in shared memory, whose rows have to be as wide as the swizzle.
WGMMA_UNIT = Unit(16, 64, 0, 0, 4096, (64, 128, 256), (16,), (64, 128, 256), (128,), 16, 64)


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

    def registers(self, unit: Unit) -> int:
        """Return the estimated registers of a thread."""
        fragments = (
            self.warp_m // unit.rows * unit.fragment_rows
            + self.warp_n // unit.columns * unit.fragment_columns
        )
        return self.warp_m * self.warp_n // WARP + fragments + OTHER_REGISTERS

    def is_legal(self, unit: Unit, gpu: Gpu, output_bytes: int) -> bool:
        """Tell whether a block fits the processor and its threads can share the loads evenly."""
        steps = self.threads // self.chunks
        return (
            self.threads <= gpu.threads_per_block
            and self.shared_bytes(output_bytes) <= gpu.shared_bytes_per_block
            and self.registers(unit) <= min(gpu.registers_per_thread, registers_left(self.threads))
            and self.block_m % self.warp_m == self.block_n % self.warp_n == 0
            and self.warp_m % unit.rows == self.warp_n % unit.columns == 0
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


BLOCKS_N, STAGES = (16, 32, 64, 128, 256), (2, 3, 4)
# Fewer warps on a multiprocessor do not keep it busy.
BUSY_WARPS = 8


def space(extent: Extent, gpu: Gpu, output_bytes: int, unit: Unit = MMA_UNIT) -> Iterator[Tiling]:
    """Yield the legal tilings, the least estimated time first.

    Args:
        extent: The product.
        gpu: What a block may take.
        output_bytes: Bytes of an output element collected in shared memory, 0 if there are none.
        unit: What multiplies.
    """
    cuts = product(unit.blocks_m, BLOCKS_N, unit.depths, unit.warps_m, unit.warps_n, STAGES)
    tiles = (Tiling(*cut) for cut in cuts)
    few = (t for t in tiles if 0 < t.warps <= unit.warps and _is_useful(t, extent, unit))
    legal = [t for t in few if t.is_legal(unit, gpu, output_bytes)]
    yield from sorted(legal, key=lambda t: (cost(t, extent, gpu, unit), -t.warp_m * t.warp_n, -t.stages))


def _is_useful(tiling: Tiling, extent: Extent, unit: Unit) -> bool:
    """Tell whether a tile is not twice as large as what it covers, and has enough steps for its stages."""
    sides = (
        (tiling.block_m, extent.rows, unit.blocks_m[0]),
        (tiling.block_n, extent.columns, unit.warps_n[0]),
        (tiling.block_k, extent.depth, unit.depths[0]),
    )
    fits = all(tile <= least or tile < 2 * size for tile, size, least in sides)
    return fits and tiling.stages <= max(2, extent.tiles(tiling)[2] + 1)


def cost(tiling: Tiling, extent: Extent, gpu: Gpu, unit: Unit) -> float:
    """Return estimated cycles: waves of blocks, each bound by multiplications, shared memory or latency.

    A multiprocessor reads 128 bytes of shared memory a cycle; a step of the reduction cannot take less than its
    share of a copy's latency.
    """
    along_m, along_n, steps = extent.tiles(tiling)
    by_shared = gpu.shared_bytes_per_multiprocessor // max(tiling.shared_bytes(1), 1)
    by_registers = gpu.registers_per_multiprocessor // (tiling.threads * tiling.registers(unit))
    resident = max(1, min(by_shared, by_registers, gpu.threads_per_multiprocessor // tiling.threads))
    blocks = along_m * along_n * extent.groups
    waves = -(-blocks // (gpu.multiprocessors * resident))
    together = min(resident, -(-blocks // gpu.multiprocessors))
    area = tiling.block_m * tiling.block_n
    multiply = area * tiling.block_k / unit.macs_per_cycle * max(1.0, BUSY_WARPS / (tiling.warps * together))
    read = tiling.block_k * area * (1 / tiling.warp_n + 1 / max(tiling.warp_m, unit.sharing_rows)) / LINE
    latency = COPY_LATENCY / (tiling.stages - 1)
    step = max(together * max(multiply, read, tiling.stage_bytes / COPIED_PER_CYCLE), latency) + BARRIER
    return waves * (steps * step + START + area * together / STORED_PER_CYCLE)


def raster(tiles_m: int) -> int:
    """Return how many neighbouring row tiles share a column tile before the next: they find it in the cache."""
    return max(d for d in range(1, MAX_RASTER + 1) if tiles_m % d == 0)


def gather_width(geometry: DotGeometry, element_bytes: int = 1) -> int:
    """Return the bytes that neighbouring elements of the reduction share in memory, aligned: 16, 8, 4, or 1."""
    common = gcd(geometry.channels * element_bytes, geometry.group_channels * element_bytes, CHUNK)
    return common if common >= 4 else 1
