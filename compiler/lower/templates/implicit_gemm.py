"""Implicit GEMM for vector dot-product instructions: a register tile of output pixels times weight vectors.

In channels-last order the activations under one kernel row are one contiguous run, so a convolution is a Gemm
whose rows overlap; nothing is unfolded in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bitwright.compiler.lower.templates.assemble import assemble_kernel
from bitwright.compiler.lower.templates.epilogue import (
    Epilogue,
    Part,
    channel_constants,
    epilogue_of,
    store_parts,
)
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.instruction import DotInstruction
from bitwright.compiler.lower.templates.packing import WeightLayout, pack_weight, pad_channels
from bitwright.compiler.lower.templates.register_tiles import Tile, by_channels, first_activation, over_tiles
from bitwright.compiler.lower.templates.scaffold import (
    Buffer,
    Expr,
    allocate,
    load,
    loop,
    parallel_chunks,
    store,
)
from bitwright.compiler.lower.templates.staging import Staging, plan_staging, stage
from bitwright.compiler.program.ops import Dot, Program
from bitwright.targets.backend import Kernel


@dataclass(frozen=True)
class ImplicitGemmParams:
    """What a tuner may change; the result never depends on it.

    Attributes:
        pixels: Output pixels of the register tile.
        vectors: Weight vectors of the register tile.
        chunks: Pieces the pixel tiles are split into; weight blocks x chunks is the parallel loop.
        parallel: Spread the work over threads.
    """

    pixels: int
    vectors: int
    chunks: int
    parallel: bool


def choose_params(geometry: DotGeometry, instruction: DotInstruction) -> ImplicitGemmParams:
    """Choose the register tile with the fewest estimated issue slots.

    A reduction step of a tile of P pixels and V vectors issues P*V multiplications and P+V loads; fewer than
    ``chains`` multiplications wait for their own results. Partial tiles at the end of a row and unused
    lanes of the last block are counted, which is what separates the candidates.
    """
    return next(space(geometry, instruction))


def space(geometry: DotGeometry, instruction: DotInstruction) -> Iterator[ImplicitGemmParams]:
    """Yield every blocking that stays in registers, the least estimated cost first."""
    needed = -(-geometry.group_outputs // instruction.lanes)
    tiles = sorted(
        (_cost(geometry, instruction, p, v), -p * v, p, v)
        for p in range(1, min(geometry.out_width, instruction.registers) + 1)
        for v in range(1, min(needed, 8) + 1)
        if instruction.fits(p, v)
    )
    ordered = [_with_chunks(geometry, instruction, pixels, vectors) for _, _, pixels, vectors in tiles]
    yield from ordered
    # Other cuts of the parallel loop, for the tiles that may be the best.
    for params in ordered[:4]:
        for chunks in (params.chunks // 2, params.chunks * 2):
            if params.parallel and chunks:
                yield replace(params, chunks=chunks)


def _with_chunks(
    geometry: DotGeometry, instruction: DotInstruction, pixels: int, vectors: int
) -> ImplicitGemmParams:
    blocks = geometry.group * -(-geometry.group_outputs // (vectors * instruction.lanes))
    tiles = geometry.rows * -(-geometry.out_width // pixels)
    parallel = geometry.macs >= instruction.parallel_macs
    return ImplicitGemmParams(pixels, vectors, parallel_chunks(tiles, blocks) if parallel else 1, parallel)


def _cost(geometry: DotGeometry, instruction: DotInstruction, pixels: int, vectors: int) -> float:
    def tile(p: int) -> float:
        # Loads run beside multiplications. The small share orders tiles that are equal otherwise: vectors
        # cost more than single activations, and measured a tile of 6 x 4 beats 4 x 6 by up to a half.
        loads = 0.1 * (p + 2 * vectors)
        return max(p * vectors, p + vectors, instruction.chains) + loads if p else 0.0

    full, tail = divmod(geometry.out_width, pixels)
    blocks = -(-geometry.group_outputs // (vectors * instruction.lanes))
    return blocks * (full * tile(pixels) + tile(tail))


def implicit_gemm_kernel(
    step: Dot,
    program: Program,
    geometry: DotGeometry,
    instruction: DotInstruction,
    params: ImplicitGemmParams | None = None,
) -> Kernel:
    """Return the kernel of a dot-product step for one vector instruction.

    Args:
        step: Gemm or convolution of any shape, grouping and padding.
        program: For shapes, scales and zero points.
        geometry: ``geometry_of(step, program)``.
        instruction: How to multiply.
        params: Blocking; chosen by rule when None.
    """
    params = params or choose_params(geometry, instruction)
    layout = WeightLayout(instruction.step, instruction.fold, params.vectors, instruction.lanes)
    source = program.tensor(step.inputs[0])
    assert source.quant is not None
    staging = plan_staging(
        geometry, source.dtype, instruction.operand, source.quant.zero_point, layout.overrun(geometry)
    )
    epilogue = epilogue_of(step, program)
    arrays = channel_constants(step, program, staging.shift)
    constants = {
        "weight": pack_weight(step.weight, geometry, layout),
        **{name: pad_channels(array, geometry, layout) for name, array in arrays.items()},
    }
    template = _Template(geometry, staging, epilogue, instruction, layout, params)
    return assemble_kernel(instruction.name, geometry, staging, epilogue, params, constants, template.body)


@dataclass(frozen=True)
class _Buffers:
    staged: Buffer
    weight: Buffer
    constants: list[Buffer]
    output: Buffer


@dataclass(frozen=True)
class _Template:
    geometry: DotGeometry
    staging: Staging
    epilogue: Epilogue
    instruction: DotInstruction
    layout: WeightLayout
    params: ImplicitGemmParams

    def body(self, buffers: list[Buffer]) -> None:
        x, weight, *constants, y = buffers
        staged = stage(x, self.geometry, self.staging, parallel=self.params.parallel)
        views = _Buffers(staged, weight, constants, y)
        over_tiles(
            self.geometry,
            self.layout,
            self.params.pixels,
            self.params.chunks,
            lambda tile: self._tile(views, tile),
            parallel=self.params.parallel,
        )

    def _tile(self, views: _Buffers, tile: Tile) -> None:
        # One for each pixel: a single one of them all would be too large for the stack, and asked for at every tile.
        accumulators = [allocate((self.layout.block,), "int32", "local") for _ in range(tile.pixels)]
        lanes = self.layout.lanes
        for pixel in range(tile.pixels):
            for vector in range(self.layout.vectors):
                bias = load(views.constants[0], [tile.block * self.layout.block + vector * lanes], lanes)
                store(accumulators[pixel], bias, [vector * lanes], lanes)
        self._reduce(views, tile, accumulators)
        by_channels(
            self.geometry,
            self.layout,
            tile.block,
            lambda channels: self._store(views, tile, accumulators, channels),
        )

    def _reduce(self, views: _Buffers, tile: Tile, accumulators: list[Buffer]) -> None:
        g, s = self.geometry, self.staging
        origin = first_activation(g, s, self.layout, tile.block, tile.row, tile.column)
        (th, tw), chunks = g.taps, self.layout.chunks(g)
        with loop(th) as row, loop(tw) as column, loop(chunks) as chunk:
            tap = row * g.dilations[0] * s.width + column * g.dilations[1]
            start = origin + tap * g.channels + chunk * self.layout.chunk
            step = ((tile.block * th + row) * tw + column) * chunks + chunk
            self._multiply(views, tile.pixels, start, step * self.layout.step_size, accumulators)

    def _multiply(
        self, views: _Buffers, pixels: int, start: Expr, weight_at: Expr, accumulators: list[Buffer]
    ) -> None:
        lanes, step = self.layout.lanes, self.layout.chunk
        stride = self.geometry.strides[1] * self.geometry.channels
        for pixel in range(pixels):
            activations = load(views.staged, [start + pixel * stride], step)
            for vector in range(self.layout.vectors):
                weights = load(views.weight, [weight_at + vector * lanes * step], lanes * step)
                at = [vector * lanes]
                total = self.instruction.emit(load(accumulators[pixel], at, lanes), activations, weights)
                store(accumulators[pixel], total, at, lanes)

    def _store(self, views: _Buffers, tile: Tile, accumulators: list[Buffer], channels: int) -> None:
        g, blocks, lanes = self.geometry, self.layout.blocks(self.geometry), self.layout.lanes
        first = tile.block // blocks * g.group_outputs + tile.block % blocks * self.layout.block
        pixel_at = tile.row * g.out_width + tile.column
        parts = [
            Part(
                load(accumulators[pixel], [offset], lanes),
                tile.block * self.layout.block + offset,
                (pixel_at + pixel) * g.outputs + first + offset,
                min(lanes, channels - offset),
                follows=offset > 0 or channels == g.outputs,
            )
            for pixel in range(tile.pixels)
            for offset in range(0, channels, lanes)
        ]
        store_parts(self.epilogue, parts, views.constants, views.output, lanes, self.instruction.narrowing)
