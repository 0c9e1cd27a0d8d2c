"""AMX: tiles of up to 16 pixels x 64 bytes of activations times 64 bytes x 16 channels of weights.

The process must have asked the operating system for the tile registers (arch_prctl) before the first call.
Other libraries in it may use them too and expect their configuration to survive, so a kernel puts it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.assemble import assemble_kernel
from bitwright.compiler.lower.templates.epilogue import (
    PACKED_VECTORS,
    Epilogue,
    Part,
    channel_constants,
    epilogue_of,
    store_parts,
)
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.packing import WeightLayout, pack_weight, pad_channels
from bitwright.compiler.lower.templates.register_tiles import first_activation
from bitwright.compiler.lower.templates.scaffold import (
    PARALLEL_PIECES,
    Buffer,
    Expr,
    allocate,
    allocate_addressed,
    load,
    loop,
    parallel_chunks,
    share,
    store,
)
from bitwright.compiler.lower.templates.staging import Staging, plan_staging, stage
from bitwright.compiler.program.ops import Dot, Program
from bitwright.targets.backend import Kernel
from bitwright.targets.x86_cpu.narrowing import AVX512_NARROWING

NAME = "amx_int8"
TILE_ROWS, TILE_BYTES, TILE_CHANNELS, CONFIG_BYTES = 16, 64, 16, 64
TASK_CYCLES, TILE_CYCLES, STEP_CYCLES, EPILOGUE_CYCLES = 400, 30, 20, 4
FIRST_ACTIVATION_TILE, FIRST_WEIGHT_TILE = 4, 6
# What one core does in about eight microseconds, twice what starting and joining threads takes.
PARALLEL_MACS = 1 << 22
# With fewer products in a tile there is nothing for an epilogue to hide behind.
MIN_OVERLAPPED = 4
# Where a weight block is used so few times its bytes come from far away; how far ahead of their use, in bytes.
STREAMED, PREFETCHED, CACHE_LINE = 2, 4096, 64


@dataclass(frozen=True)
class AmxParams:
    """What a tuner may change; the result never depends on it.

    Attributes:
        rows: Output pixels of an activation tile, at most 16.
        vectors: Weight tiles used side by side, 1 or 2.
        chunk: Bytes of an activation tile's row, a multiple of 4 and at most 64.
        chunks: Pieces the pixel tiles are split into; weight blocks x chunks is the parallel loop.
        parallel: Spread the work over threads.
        overlap: The epilogue of a tile runs between the products of the next one.
    """

    rows: int
    vectors: int
    chunk: int
    chunks: int
    parallel: bool
    overlap: bool


@dataclass(frozen=True)
class _Phase:
    """A run of equal steps under one tile configuration.

    Attributes:
        first: Number of its first tile among the tiles of its kind.
        steps: Steps; each handles ``tiles`` activation tiles.
        tiles: 1 or 2.
        rows: Pixels of one activation tile.
        column: Output column of the first tile of a row.
        per_row: Tiles of this kind in an output row.
    """

    first: int
    steps: int
    tiles: int
    rows: int
    column: int
    per_row: int


def choose_params(geometry: DotGeometry) -> AmxParams:
    """Choose tile sizes.

    A row of pixels, and a run of the reduction, is cut into the fewest tiles and these are made equal,
    because a tile instruction takes as long as its configured rows and columns. Two weight tiles side by
    side halve the loads of activations; one is better where the second of the last pair would be a large
    share of padding.
    """
    rows = _even(geometry.out_width, TILE_ROWS)
    chunk = _whole_words(_even(geometry.run, TILE_BYTES))
    tiles = -(-geometry.group_outputs // TILE_CHANNELS)
    return _with_chunks(geometry, rows, 1 if tiles in (1, 3) else 2, chunk)


def cycles(geometry: DotGeometry) -> float:
    """Return an estimate for Sapphire Rapids, fitted to forty layers of small networks."""
    params = choose_params(geometry)
    vectors = geometry.group * -(-geometry.group_outputs // TILE_CHANNELS)
    tiles = geometry.rows * -(-geometry.out_width // params.rows) * vectors
    steps = _products(geometry, params.chunk)
    products = tiles * (TILE_CYCLES + STEP_CYCLES * steps)
    return TASK_CYCLES + products + geometry.pixels * vectors * EPILOGUE_CYCLES


def space(geometry: DotGeometry) -> Iterator[AmxParams]:
    """Yield every sensible blocking: the one by rule, then by the number of tile instructions."""
    first = choose_params(geometry)
    yield from (first, replace(first, overlap=not first.overlap))
    tiles = -(-geometry.group_outputs // TILE_CHANNELS)
    rows = _parts(geometry.out_width, TILE_ROWS)
    chunks = {_whole_words(c) for c in _parts(geometry.run, TILE_BYTES)}
    found = [
        _with_chunks(geometry, r, v, c) for r in rows for v in (1, 2) if v <= tiles for c in sorted(chunks)
    ]
    yield from sorted(found, key=lambda params: (_tile_instructions(geometry, params), -params.vectors))


def _tile_instructions(geometry: DotGeometry, params: AmxParams) -> int:
    pixel_tiles = geometry.rows * -(-geometry.out_width // params.rows)
    steps = _products(geometry, params.chunk)
    blocks = -(-geometry.group_outputs // (TILE_CHANNELS * params.vectors))
    # A pair of activation tiles shares its weight tiles: 2 + V loads and 2V products.
    return geometry.group * blocks * pixel_tiles * steps * (2 + 3 * params.vectors)


def _parts(length: int, limit: int) -> list[int]:
    """Return the even cuts of ``length`` into the fewest pieces of at most ``limit`` and into some more."""
    fewest = -(-length // limit)
    return sorted({-(-length // n) for n in (fewest, fewest + 1, 2 * fewest)} | {min(length, limit)})


def _whole_words(length: int) -> int:
    return -(-length // 4) * 4


def _with_chunks(geometry: DotGeometry, rows: int, vectors: int, chunk: int) -> AmxParams:
    tiles = -(-geometry.group_outputs // TILE_CHANNELS)
    blocks = geometry.group * -(-tiles // vectors)
    pixel_tiles = geometry.rows * -(-geometry.out_width // rows)
    parallel = geometry.macs >= PARALLEL_MACS
    chunks = parallel_chunks(-(-pixel_tiles // 2), blocks) if parallel else 1
    overlap = _products(geometry, chunk) >= MIN_OVERLAPPED
    return AmxParams(rows, vectors, chunk, chunks, parallel, overlap)


def _products(geometry: DotGeometry, chunk: int) -> int:
    """Return how many products are summed in a tile."""
    return prod(geometry.taps) * -(-geometry.run // chunk)


def _even(length: int, limit: int) -> int:
    return -(-length // -(-length // limit))


def amx_kernel(step: Dot, program: Program, geometry: DotGeometry, params: AmxParams | None = None) -> Kernel:
    """Return the AMX kernel of a dot-product step of any shape.

    Args:
        step: Gemm or convolution.
        program: For shapes, scales and zero points.
        geometry: ``geometry_of(step, program)``.
        params: Blocking; chosen by rule when None.
    """
    params = params or choose_params(geometry)
    layout = WeightLayout(params.chunk, 4, params.vectors, TILE_CHANNELS)
    source = program.tensor(step.inputs[0])
    assert source.quant is not None
    staging = plan_staging(
        geometry, source.dtype, source.dtype, source.quant.zero_point, layout.overrun(geometry)
    )
    epilogue = epilogue_of(step, program)
    template = _Template(geometry, staging, epilogue, layout, params)
    arrays = channel_constants(step, program, staging.shift)
    constants = {
        "weight": pack_weight(step.weight, geometry, layout),
        **{name: pad_channels(array, geometry, layout) for name, array in arrays.items()},
        "configurations": template.configurations(),
    }
    return assemble_kernel(NAME, geometry, staging, epilogue, params, constants, template.body)


def _tile_instruction(name: str, *operands: Expr) -> None:
    T.evaluate(T.call_llvm_intrin(f"llvm.x86.{name}", *operands, dtype="void"))


def _tile(number: int) -> Expr:
    return T.int8(number)


@dataclass(frozen=True)
class _Buffers:
    """What the loops read and write.

    Attributes:
        staged, weight, constants, output: See ``assemble_kernel``.
        accumulators: The sums of the step that was finished last, in lines of a block.
        finished: int32 [units of its epilogue, weight block, first pixel of each tile].
    """

    staged: Buffer
    weight: Buffer
    constants: list[Buffer]
    output: Buffer
    accumulators: Buffer
    finished: Buffer


@dataclass(frozen=True)
class _Template:
    geometry: DotGeometry
    staging: Staging
    epilogue: Epilogue
    layout: WeightLayout
    params: AmxParams

    def phases(self) -> Iterator[_Phase]:
        """Yield pairs of full tiles, a single full tile, then the same for the rows' shorter last tiles."""
        full, tail = divmod(self.geometry.out_width, self.params.rows)
        kinds = [(full, self.params.rows, 0), (1 if tail else 0, tail, full * self.params.rows)]
        for per_row, rows, column in kinds:
            count = per_row * self.geometry.rows
            if count > 1:
                yield _Phase(0, count // 2, 2, rows, column, per_row)
            if count % 2:
                yield _Phase(count - 1, 1, 1, rows, column, per_row)

    def configurations(self) -> np.ndarray:
        """Return the tile configuration of every phase: uint8 [phases * 64]."""
        found = [self._configuration(phase.rows) for phase in self.phases()]
        return np.concatenate(found)

    def _configuration(self, rows: int) -> np.ndarray:
        config = np.zeros(CONFIG_BYTES, np.uint8)
        config[0] = 1  # palette
        widths = config[16:32].view(np.uint16)
        widths[:] = TILE_BYTES
        widths[FIRST_ACTIVATION_TILE:FIRST_WEIGHT_TILE] = self.layout.chunk
        heights = config[48:56]
        heights[:FIRST_WEIGHT_TILE] = rows
        heights[FIRST_WEIGHT_TILE:] = self.layout.chunk // 4
        return config

    def body(self, buffers: list[Buffer]) -> None:
        x, weight, *constants, configurations, y = buffers
        staged = stage(x, self.geometry, self.staging, parallel=self.params.parallel)
        blocks = self.geometry.group * self.layout.blocks(self.geometry)
        groups = min(blocks, max(1, PARALLEL_PIECES // self.params.chunks)) if self.params.parallel else 1
        with loop(groups * self.params.chunks, parallel=self.params.parallel) as task:
            group, chunk = task // self.params.chunks, task % self.params.chunks
            # Once a task: loading a configuration is as slow as many products, and so is asking for memory.
            accumulators = allocate_addressed(2 * TILE_ROWS * self.layout.block, "int32")
            views = _Buffers(staged, weight, constants, y, accumulators, allocate((4,), "int32"))
            saved = T.address_of(allocate_addressed(CONFIG_BYTES, "uint8")[0])
            _tile_instruction("sttilecfg", saved)
            for number, phase in enumerate(self.phases()):
                _tile_instruction("ldtilecfg", T.address_of(configurations[number * CONFIG_BYTES]))
                store(views.finished, T.int32(0), [0])
                with (
                    share(blocks, groups, group) as block,
                    share(phase.steps, self.params.chunks, chunk) as step,
                ):
                    self._step(views, block, step, phase)
                if self.params.overlap:
                    self._finish(views, phase)
            _tile_instruction("ldtilecfg", saved)

    def _step(self, views: _Buffers, block: Expr, step: Expr, phase: _Phase) -> None:
        """Emit the products of one or two activation tiles with a block of weights, and an epilogue.

        With ``overlap`` it is that of the step before: the tile unit and the vector units then work at the same time.
        """
        tiles = [phase.first + step * phase.tiles + i for i in range(phase.tiles)]
        places = [(t // phase.per_row, phase.column + t % phase.per_row * phase.rows) for t in tiles]
        self._multiply(views, block, places, phase)
        store(views.finished, T.int32(self._units(phase)), [0])
        store(views.finished, block, [1])
        for i, (row, column) in enumerate(places):
            store(views.finished, row * self.geometry.out_width + column, [2 + i])
        if not self.params.overlap:
            self._finish(views, phase)

    def _multiply(self, views: _Buffers, block: Expr, places: list[tuple[Expr, Expr]], phase: _Phase) -> None:
        """Emit the products of one or two activation tiles with one or two weight tiles."""
        vectors, stride = range(self.layout.vectors), T.int64(self.layout.block * 4)
        targets = [(i, v) for i in range(len(places)) for v in vectors]
        for i, v in targets:
            # A stride of 0 fills all rows with the bias, for less than adding it later takes.
            bias = T.address_of(views.constants[0][block * self.layout.block + v * TILE_CHANNELS])
            _tile_instruction("tileloadd64", _tile(2 * i + v), bias, T.int64(0))
        g, s = self.geometry, self.staging
        origins = [first_activation(g, s, self.layout, block, row, column) for row, column in places]
        self._reduce(views, block, origins, phase)
        for i, v in targets:
            at = i * TILE_ROWS * self.layout.block + v * TILE_CHANNELS
            _tile_instruction("tilestored64", _tile(2 * i + v), T.address_of(views.accumulators[at]), stride)

    def _reduce(self, views: _Buffers, block: Expr, origins: list[Expr], phase: _Phase) -> None:
        g = self.geometry
        (th, tw), chunks = g.taps, self.layout.chunks(g)
        stride = T.int64(g.strides[1] * g.channels)
        product = "tdpbusd" if self.staging.operand == "uint8" else "tdpbssd"
        tile_size = self.layout.chunk * TILE_CHANNELS
        with loop(th) as row, loop(tw) as column, loop(chunks) as chunk:
            number = (row * tw + column) * chunks + chunk
            step = block * (th * tw * chunks) + number
            for v in range(self.layout.vectors):
                address = T.address_of(views.weight[step * self.layout.step_size + v * tile_size])
                _tile_instruction("tileloadd64", _tile(FIRST_WEIGHT_TILE + v), address, T.int64(TILE_BYTES))
            if -(-phase.steps // self.params.chunks) <= STREAMED:
                self._prefetch(views, step)
            tap = row * g.dilations[0] * self.staging.width + column * g.dilations[1]
            offset = tap * g.channels + chunk * self.layout.chunk
            for i, origin in enumerate(origins):
                address = T.address_of(views.staged[origin + offset])
                _tile_instruction("tileloadd64", _tile(FIRST_ACTIVATION_TILE + i), address, stride)
                for v in range(self.layout.vectors):
                    operands = (2 * i + v, FIRST_ACTIVATION_TILE + i, FIRST_WEIGHT_TILE + v)
                    _tile_instruction(product, *map(_tile, operands))
            if self.params.overlap:
                each = -(-self._units(phase) // _products(g, self.layout.chunk))
                with loop(each) as i:
                    self._unit(views, number * each + i, phase)

    def _prefetch(self, views: _Buffers, step: Expr) -> None:
        """Ask for weights that come soon: tiles are loaded too far apart for the processor to see the stream."""
        size = self.layout.step_size
        for line in range(0, size, CACHE_LINE):
            ahead = T.address_of(views.weight[step * size + PREFETCHED + line])
            read, every_level, data = T.int32(0), T.int32(3), T.int32(1)
            name = "llvm.prefetch.p0"
            T.evaluate(T.call_llvm_intrin(name, ahead, read, every_level, data, dtype="void"))

    def _finish(self, views: _Buffers, phase: _Phase) -> None:
        with loop(self._units(phase)) as unit:
            self._unit(views, unit, phase)

    def _lines(self, phase: _Phase) -> int:
        """Return how many lines of the accumulators a unit of the epilogue takes: enough to pack four vectors."""
        vectors = -(-min(self.layout.block, self.geometry.group_outputs) // TILE_CHANNELS)
        return min(phase.rows, max(1, PACKED_VECTORS // vectors))

    def _units(self, phase: _Phase) -> int:
        return phase.tiles * -(-phase.rows // self._lines(phase))

    def _unit(self, views: _Buffers, unit: Expr, phase: _Phase) -> None:
        """Emit one unit of the epilogue of what was finished, if anything was, and has so many.

        The last block may have fewer channels; the last unit of a tile moves back over lines that are done.
        """
        blocks, lines = self.layout.blocks(self.geometry), self._lines(phase)
        last = self.geometry.group_outputs - (blocks - 1) * self.layout.block
        units = -(-phase.rows // lines)
        count, block = (load(views.finished, [i]) for i in range(2))

        def emit(channels: int) -> None:
            index = unit // units if phase.tiles > 1 else 0
            line = T.min(unit % units * lines, phase.rows - lines)
            pixel = load(views.finished, [2 + index]) + line
            self._store(views, block, index * TILE_ROWS + line, pixel, channels, lines)

        with T.If(unit < count), T.Then():
            if blocks == 1 or last == self.layout.block:
                emit(last)
                return
            with T.If(block % blocks < blocks - 1):
                with T.Then():
                    emit(self.layout.block)
                with T.Else():
                    emit(last)

    def _store(
        self,
        views: _Buffers,
        block: Expr,
        line: Expr,
        pixel: Expr,
        channels: int,
        count: int,
    ) -> None:
        """Emit the epilogue of ``count`` lines of the accumulators, neighbouring pixels."""
        g, blocks, lanes = self.geometry, self.layout.blocks(self.geometry), TILE_CHANNELS
        first = block // blocks * g.group_outputs + block % blocks * self.layout.block
        parts = [
            Part(
                load(views.accumulators, [(line + i) * self.layout.block + offset], lanes),
                block * self.layout.block + offset,
                (pixel + i) * g.outputs + first + offset,
                min(lanes, channels - offset),
                follows=offset > 0 or channels == g.outputs,
            )
            for i in range(count)
            for offset in range(0, channels, lanes)
        ]
        store_parts(self.epilogue, parts, views.constants, views.output, lanes, AVX512_NARROWING)
