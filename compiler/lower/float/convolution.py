"""Convolutions of float images, channels last: a register tile of output pixels times vectors of weights.

The activations under one row of the kernel are one contiguous run, so nothing is unfolded in memory; and tiles
at an edge know which of their pixels meet the image, so nothing is padded. Weights are packed at compile time:
the vectors of one tile lie one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from tvm import tirx

from bitwright.compiler.lower.float.matmul import PARALLEL_PIECES, MatmulParams, choose_params
from bitwright.compiler.lower.float.storage import HALF, load, store, widened
from bitwright.compiler.lower.float.vectors import VectorUnit, keep, multiply_add, number
from bitwright.compiler.lower.float.windows import (
    MIN_PARALLEL_WORK,
    Ending,
    Strip,
    kernel_rows,
    padded_columns,
    strips,
)
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.scaffold import (
    Buffer,
    Expr,
    Parameter,
    allocate,
    build_function,
    loop,
    pieces,
    share,
    splat,
)


def choose_tile(geometry: DotGeometry, unit: VectorUnit) -> MatmulParams:
    """Return pixels ("rows") and vectors of the register tile with the fewest estimated issue slots."""
    return choose_params(geometry.out_width, geometry.group_outputs, unit)


def pack_filters(weight: np.ndarray, geometry: DotGeometry, unit: VectorUnit) -> np.ndarray:
    """Return [O, KH, KW, I] flat, one block of output channels after the other, groups outermost.

    Within a block the order is row, column, input channel, output channel; zeros fill the last vector.
    """
    block = choose_tile(geometry, unit).vectors * unit.lanes
    outputs = geometry.group_outputs
    columns = weight.reshape(geometry.group, outputs, -1).transpose(0, 2, 1)
    short = padded_columns(outputs, unit.lanes) - outputs
    padded = np.pad(columns, ((0, 0), (0, 0), (0, short)))
    parts = [
        group[:, at : at + block].reshape(-1) for group in padded for at in range(0, padded.shape[2], block)
    ]
    return np.ascontiguousarray(np.concatenate(parts), np.float32)


def convolution_function(geometry: DotGeometry, ending: Ending, unit: VectorUnit) -> tirx.PrimFunc:
    """Return the function; parameters: x, packed weights, what the ending reads, y."""
    depth = prod(geometry.kernel) * geometry.group_channels
    packed = geometry.group * depth * padded_columns(geometry.group_outputs, unit.lanes)
    parameters = [
        Parameter("x", geometry.input_shape, ending.dtype),
        Parameter("w", (packed,), ending.weight_dtype),
        *ending.parameters(geometry),
        Parameter("y", geometry.output_shape, ending.dtype),
    ]
    template = _Convolution(geometry, ending, unit, choose_tile(geometry, unit))
    return build_function(parameters, template.body)


@dataclass(frozen=True)
class _Block:
    """Output channels that are computed together.

    Attributes:
        group: Of the convolution.
        column: First channel within its group.
        columns: Channels that are stored.
        width: Channels that are computed.
        weights: Where the packed weights begin.
    """

    group: Expr
    column: Expr
    columns: int
    width: int
    weights: Expr


@dataclass(frozen=True)
class _Convolution:
    geometry: DotGeometry
    ending: Ending
    unit: VectorUnit
    tile: MatmulParams

    @property
    def depth(self) -> int:
        """Products of one sum."""
        return prod(self.geometry.kernel) * self.geometry.group_channels

    def body(self, buffers: list[Buffer]) -> None:
        g = self.geometry
        size = self.tile.vectors * self.unit.lanes
        full, tail = divmod(g.group_outputs, size)
        parallel = g.macs >= MIN_PARALLEL_WORK
        if self.ending.dtype == HALF:
            buffers = [widened(buffers[0], prod(g.input_shape), self.unit.lanes), *buffers[1:]]
        for blocks, first, columns in ((full, 0, size), (1 if tail else 0, full * size, tail)):
            if not blocks:
                continue
            count = g.group * blocks
            chunks = max(1, min(g.pixels // self.tile.rows, PARALLEL_PIECES // count)) if parallel else 1
            with loop(count * chunks, parallel=parallel and count * chunks > 1) as piece:
                block = self.block(piece // chunks, blocks, first, columns)
                for strip in strips(g, self.tile.rows):
                    with share(g.rows * strip.count, chunks, piece % chunks) as number_of:
                        column = strip.first + number_of % strip.count * strip.pixels
                        self.emit_tile(buffers, block, strip, number_of // strip.count, column)

    def block(self, position: Expr, blocks: int, first: int, columns: int) -> _Block:
        width = padded_columns(columns, self.unit.lanes)
        group, column = keep(position // blocks), keep(first + position % blocks * columns)
        row = padded_columns(self.geometry.group_outputs, self.unit.lanes)
        # Blocks before this one are whole.
        return _Block(group, column, columns, width, keep((group * row + column) * self.depth))

    def emit_tile(self, buffers: list[Buffer], block: _Block, strip: Strip, row: Expr, column: Expr) -> None:
        """Compute one register tile."""
        g = self.geometry
        sums = [allocate((block.width,), "float32", "local") for _ in range(strip.pixels)]
        for total in sums:
            for at, lanes in pieces(block.width, self.unit.lanes):
                store(total, number(0, lanes), [at], lanes)
        top = keep(row % g.out_height * g.strides[0] - g.pads[0])
        line = row // g.out_height * g.height + top
        start = keep(
            (line * g.width + column * g.strides[1] - g.pads[1]) * g.channels + block.group * g.group_channels
        )
        with kernel_rows(g, top) as kernel_row:
            x_at = keep(start + kernel_row * (g.dilations[0] * g.width * g.channels))
            w_at = keep(block.weights + kernel_row * (g.kernel[1] * g.group_channels * block.width))
            self.sum_row(buffers, sums, strip, block.width, (x_at, w_at))
        pixel_at = keep(
            (row * g.out_width + column) * g.outputs + block.group * g.group_outputs + block.column
        )
        self.finish(buffers, sums, block, pixel_at)

    def sum_row(
        self, buffers: list[Buffer], sums: list[Buffer], strip: Strip, width: int, at: tuple[Expr, Expr]
    ) -> None:
        """Add the products of one row of the kernel."""
        g = self.geometry
        x_at, w_at = at
        step = g.dilations[1] * g.channels
        if strip.whole:
            with loop(g.taps[1]) as tap, loop(g.run) as k:
                where = (x_at + tap * step + k, w_at + (tap * g.run + k) * width)
                self.multiply(buffers, sums, range(strip.pixels), width, where)
            return
        for tap, pixels in enumerate(strip.inside):
            if pixels:
                with loop(g.group_channels) as k:
                    where = (x_at + tap * step + k, w_at + (tap * g.group_channels + k) * width)
                    self.multiply(buffers, sums, pixels, width, where)

    def multiply(
        self,
        buffers: list[Buffer],
        sums: list[Buffer],
        pixels: range | tuple[int, ...],
        width: int,
        at: tuple[Expr, Expr],
    ) -> None:
        """Add one product to the sums of some pixels."""
        x, w = buffers[:2]
        x_at, w_at = at
        parts = list(pieces(width, self.unit.lanes))
        vectors = [keep(load(w, [w_at + offset], lanes)) for offset, lanes in parts]
        stride = self.geometry.strides[1] * self.geometry.channels
        for pixel in pixels:
            left = keep(load(x, [x_at + pixel * stride]))
            for vector, (offset, lanes) in zip(vectors, parts, strict=True):
                total = multiply_add(splat(left, lanes), vector, load(sums[pixel], [offset], lanes), lanes)
                store(sums[pixel], total, [offset], lanes)

    def finish(self, buffers: list[Buffer], sums: list[Buffer], block: _Block, start: Expr) -> None:
        """Store the results of a tile."""
        channel = block.group * self.geometry.group_outputs + block.column
        for pixel, total in enumerate(sums):
            for offset, lanes in pieces(block.columns, self.unit.lanes):
                at = start + pixel * self.geometry.outputs + offset
                value = load(total, [offset], lanes)
                value = self.ending.emit(value, buffers[2:-1], channel + offset, at, lanes)
                store(buffers[-1], value, [at], lanes)
