"""Register tiles for instructions that multiply small matrices: rows of pixels x reduction x output channels.

ARM's smmla multiplies 2 pixels x 8 elements by 8 elements x 2 channels; sdot by element is the same with one pixel, 4
elements and 4 channels. Both read 16 bytes of activations at once and use them several times out of a register,
which is what this template adds to ``implicit_gemm``. Convolutions have the same structure of runs as there; where a
row of pixels ends in an odd one, the last pair is that pixel twice and the second result is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.assemble import assemble_kernel
from bitwright.compiler.lower.templates.epilogue import (
    Epilogue,
    Part,
    channel_constants,
    epilogue_of,
    store_parts,
)
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.instruction import Narrowing
from bitwright.compiler.lower.templates.packing import WeightLayout, pack_weight, pad_channels
from bitwright.compiler.lower.templates.register_tiles import Tile, by_channels, first_activation, over_tiles
from bitwright.compiler.lower.templates.scaffold import (
    MIN_PARALLEL_MACS,
    Buffer,
    Expr,
    allocate,
    load,
    loop,
    parallel_chunks,
    pieces,
    shuffle,
    splat,
    store,
)
from bitwright.compiler.lower.templates.staging import Staging, plan_staging, stage
from bitwright.compiler.program.ops import Dot, Program
from bitwright.targets.backend import Kernel

# Bytes of a vector register: what is read of a pixel's activations at once, and one vector of weights.
SPAN = 16
QUAD = 4
# Sums below 2^22 become float32 by an addition: as the lowest bits of a float between 2^23 and 2^24, whose last bit is
# 1, they are off by a constant. ARM's conversions take four times as long as a subtraction.
FLOAT_OFFSET, FLOAT_OFFSET_BITS, OFFSET_LIMIT = 12582912.0, 0x4B400000, 1 << 22
# Estimated instructions of the epilogue per output, and of the loops around one chunk and one tile.
OUTPUT_COST, CHUNK_COST, TILE_COST = 1.5, 3.0, 20.0


@dataclass(frozen=True)
class MatrixInstruction:
    """An instruction that adds ``rows`` x ``fold`` activations times ``fold`` x ``lanes`` weights to int32 sums.

    Attributes:
        name: Name of the profile's compute row.
        rows: Pixels of one accumulator.
        lanes: Output channels of one accumulator; ``rows * lanes`` int32 fill a register, pixel by pixel.
        fold: Reduction elements consumed at once.
        operand: Element type activations must have.
        registers: Vector registers.
        spread: (activations of ``rows`` pixels, each operand x bytes; bytes) -> one operand vector of 16 bytes
            for each ``fold`` elements.
        spread_cost: Instructions that takes for each operand vector.
        multiply: (accumulator int32 x rows * lanes, operand vector, weights int8 x 16) -> the new accumulator.
        narrowing: The way from sums to bytes.
    """

    name: str
    rows: int
    lanes: int
    fold: int
    operand: str
    registers: int
    spread: Callable[[list[Expr], int], list[Expr]]
    spread_cost: int
    multiply: Callable[[Expr, Expr, Expr], Expr]
    narrowing: Narrowing | None = None

    @property
    def width(self) -> int:
        """int32 sums of one accumulator."""
        return self.rows * self.lanes

    def fits(self, groups: int, vectors: int) -> bool:
        """Tell whether a tile of groups of pixels x weight vectors stays in registers."""
        return groups * vectors + groups * self.rows + 1 <= self.registers


@dataclass(frozen=True)
class MmlaParams:
    """What a tuner may change; the result never depends on it.

    Attributes:
        groups: Groups of ``rows`` output pixels of the register tile.
        vectors: Weight vectors of the register tile.
        chunks: Pieces the pixel tiles are split into; weight blocks x chunks is the parallel loop.
        parallel: Spread the work over threads.
    """

    groups: int
    vectors: int
    chunks: int
    parallel: bool


def space(geometry: DotGeometry, instruction: MatrixInstruction) -> Iterator[MmlaParams]:
    """Yield every legal member of the parameter space, fewest estimated instructions first."""
    rows, step = instruction.rows, QUAD // instruction.lanes
    widest = min(-(-geometry.out_width // rows), instruction.registers)
    vectors = range(step, instruction.registers, step)
    legal = [(g, v) for g in range(1, widest + 1) for v in vectors if instruction.fits(g, v)]
    for groups, count in sorted(legal, key=lambda t: (estimate(geometry, instruction, *t), -t[0] * t[1], t)):
        yield _with_pieces(geometry, instruction, groups, count)


def choose_params(geometry: DotGeometry, instruction: MatrixInstruction) -> MmlaParams:
    """Return the member of the space with the fewest estimated instructions."""
    return next(space(geometry, instruction))


def _with_pieces(
    geometry: DotGeometry, instruction: MatrixInstruction, groups: int, vectors: int
) -> MmlaParams:
    blocks = geometry.group * -(-geometry.group_outputs // (vectors * instruction.lanes))
    tiles = geometry.rows * -(-geometry.out_width // (groups * instruction.rows))
    parallel = geometry.macs >= MIN_PARALLEL_MACS
    return MmlaParams(groups, vectors, parallel_chunks(tiles, blocks) if parallel else 1, parallel)


def estimate(geometry: DotGeometry, instruction: MatrixInstruction, groups: int, vectors: int) -> float:
    """Return about how many instructions a kernel executes; comparable between instructions."""
    block = vectors * instruction.lanes
    blocks = geometry.group * -(-geometry.group_outputs // block)
    full, tail = divmod(geometry.out_width, groups * instruction.rows)
    used = geometry.group_outputs / (blocks / geometry.group * block)

    def tile(pixels: int) -> float:
        count = -(-pixels // instruction.rows)
        taps = geometry.taps[0] * geometry.taps[1]
        chunks = [
            _chunk_cost(instruction, count, vectors, size) for size in chunk_sizes(geometry, instruction)
        ]
        epilogue = OUTPUT_COST * pixels * block * used + count * vectors * (instruction.rows - 1)
        return TILE_COST + count * vectors + taps * sum(chunks) + epilogue if pixels else 0.0

    return blocks * geometry.rows * (full * tile(groups * instruction.rows) + tile(tail))


def _chunk_cost(instruction: MatrixInstruction, groups: int, vectors: int, size: int) -> float:
    steps = size // instruction.fold
    operands = groups * (instruction.rows + steps * instruction.spread_cost)
    return CHUNK_COST + operands + steps * (vectors + groups * vectors)


def chunk_sizes(geometry: DotGeometry, instruction: MatrixInstruction) -> list[int]:
    """Return the bytes read at once along a run: full spans, then what is left in powers of two."""
    padded = -(-geometry.run // instruction.fold) * instruction.fold
    return [lanes for _, lanes in pieces(padded, SPAN)]


def mmla_kernel(
    step: Dot,
    program: Program,
    geometry: DotGeometry,
    instruction: MatrixInstruction,
    params: MmlaParams | None = None,
) -> Kernel:
    """Return the kernel of a dot-product step for one matrix instruction.

    Args:
        step: Gemm or convolution of any shape, grouping and padding.
        program: For shapes, scales and zero points.
        geometry: ``geometry_of(step, program)``.
        instruction: How to multiply.
        params: Blocking; chosen by rule when None.
    """
    params = params or choose_params(geometry, instruction)
    layout = WeightLayout(instruction.fold, instruction.fold, params.vectors, instruction.lanes)
    source = program.tensor(step.inputs[0])
    assert source.quant is not None
    staging = plan_staging(
        geometry, source.dtype, instruction.operand, source.quant.zero_point, layout.overrun(geometry)
    )
    epilogue = epilogue_of(step, program)
    arrays = channel_constants(step, program, staging.shift)
    small = largest_sum(step, arrays["bias"], instruction.operand) < OFFSET_LIMIT
    if small:
        arrays["bias"] = arrays["bias"] + np.int32(FLOAT_OFFSET_BITS)
    padded = {name: pad_channels(array, geometry, layout) for name, array in arrays.items()}
    # The bias is what the accumulators start from, so it lies as they do: the same channels for every row.
    lanes = padded["bias"].reshape(-1, 1, instruction.lanes)
    padded["bias"] = np.repeat(lanes, instruction.rows, axis=1).reshape(-1)
    constants = {"weight": pack_weight(step.weight, geometry, layout), **padded}
    template = _Template(geometry, staging, epilogue, instruction, layout, params, small)
    key = (params, small)
    return assemble_kernel(instruction.name, geometry, staging, epilogue, key, constants, template.body)


def largest_sum(step: Dot, bias: np.ndarray, operand: str) -> int:
    """Return a bound on the magnitude of sums, over all activations, given the folded bias."""
    info = np.iinfo(operand)
    axes = 0 if step.weight.ndim == 2 else (1, 2, 3)
    weights = np.abs(step.weight.astype(np.int64)).sum(axis=axes)
    return int((max(-info.min, info.max) * weights + np.abs(bias.astype(np.int64))).max())


@dataclass(frozen=True)
class _Buffers:
    staged: Buffer
    weight: Buffer
    bias: Buffer
    constants: list[Buffer]
    output: Buffer


@dataclass(frozen=True)
class _Template:
    geometry: DotGeometry
    staging: Staging
    epilogue: Epilogue
    instruction: MatrixInstruction
    layout: WeightLayout
    params: MmlaParams
    small: bool

    def body(self, buffers: list[Buffer]) -> None:
        x, weight, bias, *constants, y = buffers
        staged = stage(x, self.geometry, self.staging, parallel=self.params.parallel)
        views = _Buffers(staged, weight, bias, constants, y)
        over_tiles(
            self.geometry,
            self.layout,
            self.params.groups * self.instruction.rows,
            self.params.chunks,
            lambda tile: self._tile(views, tile),
            parallel=self.params.parallel,
        )

    def _tile(self, views: _Buffers, tile: Tile) -> None:
        width, groups = self.instruction.width, -(-tile.pixels // self.instruction.rows)
        sums = allocate((groups, self.params.vectors * width), "int32", "local")
        for vector in range(self.params.vectors):
            bias = load(views.bias, [(tile.block * self.params.vectors + vector) * width], width)
            for group in range(groups):
                store(sums, bias, [group, vector * width], width)
        self._reduce(views, tile, sums)
        lines = self._by_pixel(sums, tile.pixels)
        by_channels(
            self.geometry, self.layout, tile.block, lambda channels: self._store(views, tile, lines, channels)
        )

    def _reduce(self, views: _Buffers, tile: Tile, sums: Buffer) -> None:
        g, s = self.geometry, self.staging
        origin = first_activation(g, s, self.layout, tile.block, tile.row, tile.column)
        (th, tw), steps = g.taps, self.layout.chunks(g)
        sizes = chunk_sizes(g, self.instruction)
        spans = sizes.count(SPAN)
        with loop(th) as row, loop(tw) as column:
            start = origin + (row * g.dilations[0] * s.width + column * g.dilations[1]) * g.channels
            weight_at = ((tile.block * th + row) * tw + column) * steps * self.layout.step_size

            def chunk(offset: Expr, size: int) -> None:
                at = weight_at + offset * self.layout.block
                self._multiply(views, tile.pixels, start + offset, at, size, sums)

            if spans:
                with loop(spans) as span:
                    chunk(span * SPAN, SPAN)
            done = spans * SPAN
            for size in sizes[spans:]:
                chunk(done, size)
                done += size

    def _multiply(
        self, views: _Buffers, pixels: int, start: Expr, weight_at: Expr, size: int, sums: Buffer
    ) -> None:
        """Emit the products of ``size`` reduction elements; of the weights one vector is alive at a time."""
        instruction = self.instruction
        stride = self.geometry.strides[1] * self.geometry.channels
        operands = []
        for first in range(0, pixels, instruction.rows):
            places = [min(first + row, pixels - 1) for row in range(instruction.rows)]
            loaded = [load(views.staged, [start + place * stride], size) for place in places]
            operands.append(instruction.spread(loaded, size))
        for step in range(size // instruction.fold):
            for vector in range(self.params.vectors):
                at = weight_at + (step * self.params.vectors + vector) * SPAN
                weights = load(views.weight, [at], SPAN)
                for group, operand in enumerate(operands):
                    place = [group, vector * instruction.width]
                    total = load(sums, place, instruction.width)
                    store(sums, instruction.multiply(total, operand[step], weights), place, instruction.width)

    def _by_pixel(self, sums: Buffer, pixels: int) -> Buffer:
        """Return the sums as [pixels, channels]: accumulators of two pixels are taken apart."""
        rows, lanes, width = self.instruction.rows, self.instruction.lanes, self.instruction.width
        if rows == 1:
            return sums
        lines = allocate((pixels, self.layout.block), "int32", "local")
        for pixel in range(pixels):
            group, row = divmod(pixel, rows)
            for vector in range(0, self.params.vectors, rows):
                parts = [load(sums, [group, (vector + i) * width], width) for i in range(rows)]
                taken = [i * width + row * lanes + lane for i in range(rows) for lane in range(lanes)]
                store(lines, shuffle(parts, taken), [pixel, vector * lanes], width)
        return lines

    def _store(self, views: _Buffers, tile: Tile, lines: Buffer, channels: int) -> None:
        parts = [
            self._part(tile, lines, pixel, first, channels)
            for pixel in range(tile.pixels)
            for first in range(0, channels, QUAD)
        ]
        narrowing = self.instruction.narrowing
        store_parts(self.epilogue, parts, [views.bias, *views.constants], views.output, QUAD, narrowing)

    def _part(self, tile: Tile, lines: Buffer, pixel: int, first: int, channels: int) -> Part:
        g, blocks = self.geometry, self.layout.blocks(self.geometry)
        block_at = tile.block // blocks * g.group_outputs + tile.block % blocks * self.layout.block
        total = load(lines, [pixel, first], QUAD)
        if self.small:
            total = T.reinterpret(total, dtype="float32x4") - splat(T.float32(FLOAT_OFFSET), QUAD)
        return Part(
            accumulator=total,
            channel=tile.block * self.layout.block + first,
            at=(tile.row * g.out_width + tile.column + pixel) * g.outputs + block_at + first,
            used=min(QUAD, channels - first),
            follows=first > 0 or (pixel > 0 and channels == g.outputs),
        )
