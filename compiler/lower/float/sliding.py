"""Depthwise convolutions and pooling of float images, channels last: vectors along the channels.

A tile is some neighbouring pixels of a row. What its pixels read in common of a row of the image is loaded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, prod
from typing import Literal, TypeAlias

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.float.matmul import PARALLEL_PIECES
from bitwright.compiler.lower.float.storage import load, store
from bitwright.compiler.lower.float.vectors import VectorUnit, keep, multiply_add, number
from bitwright.compiler.lower.float.windows import (
    MIN_PARALLEL_WORK,
    Ending,
    Strip,
    kernel_rows,
    leaves_rows,
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

# "mean" counts padding, "mean_inside" does not.
Operation: TypeAlias = Literal["multiply", "max", "mean", "mean_inside"]
MOST_PIXELS, MOST_SUMS = 8, 8
# Rows of the kernel up to so long are written without a loop.
UNROLLED_TAPS = 7


def channel_weights(weight: np.ndarray) -> np.ndarray:
    """Return [C, KH, KW, 1] as [KH, KW, C], flat."""
    return np.ascontiguousarray(weight[..., 0].transpose(1, 2, 0).reshape(-1), np.float32)


def sliding_function(
    geometry: DotGeometry, operation: Operation, ending: Ending, unit: VectorUnit
) -> tirx.PrimFunc:
    """Return the function; parameters: x, weights if it multiplies, what the ending reads, y."""
    weights = (prod(geometry.kernel) * geometry.channels,)
    parameters = [
        Parameter("x", geometry.input_shape, ending.dtype),
        *([Parameter("w", weights, ending.weight_dtype)] if operation == "multiply" else []),
        *ending.parameters(geometry),
        Parameter("y", geometry.output_shape, ending.dtype),
    ]
    return build_function(parameters, _Sliding(geometry, operation, ending, unit).body)


def _pixels(geometry: DotGeometry, unit: VectorUnit) -> int:
    """Return the pixels of a tile with the fewest estimated issue slots."""
    taps = min(geometry.kernel[1], UNROLLED_TAPS)

    def tile(pixels: int) -> float:
        columns = (pixels - 1) * min(geometry.strides[1], taps) + taps
        # Two operations or two loads a cycle, and some for addresses.
        return max(pixels * taps, columns + taps) + 3.0 if pixels else 0.0

    most = min(geometry.out_width, MOST_PIXELS, max(1, unit.registers - taps - 4))

    def row(pixels: int) -> float:
        full, tail = divmod(geometry.out_width, pixels)
        return full * tile(pixels) + tile(tail)

    return min(range(1, most + 1), key=lambda p: (row(p), -p))


@dataclass(frozen=True)
class _Tile:
    """Pixels of a row, some vectors of channels.

    Attributes:
        strip: Its form.
        top: Image row of the window's first row.
        x, y: Where the first pixel's window and the first pixel lie; channel 0.
        channel: First channel.
        parts: (offset, lanes) of the vectors.
    """

    strip: Strip
    top: Expr
    x: Expr
    y: Expr
    channel: Expr
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Sliding:
    geometry: DotGeometry
    operation: Operation
    ending: Ending
    unit: VectorUnit

    def body(self, buffers: list[Buffer]) -> None:
        g = self.geometry
        parallel = g.pixels * g.channels * prod(g.kernel) >= MIN_PARALLEL_WORK
        pixels = _pixels(g, self.unit)
        chunks = max(1, min(g.pixels // pixels, PARALLEL_PIECES)) if parallel else 1
        with loop(chunks, parallel=chunks > 1) as chunk:
            for strip in strips(g, pixels):
                with share(g.rows * strip.count, chunks, chunk) as number_of:
                    column = strip.first + number_of % strip.count * strip.pixels
                    self.over_channels(buffers, strip, number_of // strip.count, column)

    def over_channels(self, buffers: list[Buffer], strip: Strip, row: Expr, column: Expr) -> None:
        g, lanes = self.geometry, self.unit.lanes
        top = keep(row % g.out_height * g.strides[0] - g.pads[0])
        line = row // g.out_height * g.height + top
        x = keep((line * g.width + column * g.strides[1] - g.pads[1]) * g.channels)
        y = keep((row * g.out_width + column) * g.channels)
        vectors = max(1, min(MOST_SUMS // strip.pixels, g.channels // lanes))
        full, tail = divmod(g.channels, vectors * lanes)
        if full:
            with loop(full) as block:
                parts = tuple((v * lanes, lanes) for v in range(vectors))
                self.emit_tile(buffers, _Tile(strip, top, x, y, keep(block * (vectors * lanes)), parts))
        if tail:
            parts = tuple(pieces(tail, lanes))
            self.emit_tile(buffers, _Tile(strip, top, x, y, full * vectors * lanes, parts))

    def emit_tile(self, buffers: list[Buffer], tile: _Tile) -> None:
        """Compute one tile."""
        g = self.geometry
        width = sum(lanes for _, lanes in tile.parts)
        sums = [allocate((width,), "float32", "local") for _ in range(tile.strip.pixels)]
        start = -inf if self.operation == "max" else 0.0
        for total in sums:
            for offset, lanes in tile.parts:
                store(total, number(start, lanes), [offset], lanes)
        rows = None
        if self.operation == "mean_inside" and leaves_rows(g):
            rows = allocate((1,), "float32", "local")
            store(rows, T.float32(0), [0])
        with kernel_rows(g, tile.top) as kernel_row:
            x_at = keep(tile.x + kernel_row * (g.dilations[0] * g.width * g.channels) + tile.channel)
            w_at = keep(kernel_row * (g.kernel[1] * g.channels) + tile.channel)
            self.sum_row(buffers, sums, tile, x_at, w_at)
            if rows is not None:
                store(rows, load(rows, [0]) + T.float32(1), [0])
        self.finish(buffers, sums, tile, rows)

    def sum_row(self, buffers: list[Buffer], sums: list[Buffer], tile: _Tile, x_at: Expr, w_at: Expr) -> None:
        """Add one row of the kernel."""
        g = self.geometry
        step, stride = g.dilations[1], g.strides[1]
        if tile.strip.whole and g.kernel[1] > UNROLLED_TAPS:
            with loop(g.kernel[1]) as tap:
                for part in tile.parts:
                    weight = self.weight(buffers, w_at + tap * g.channels, part)
                    for pixel, total in enumerate(sums):
                        at = x_at + (pixel * stride + tap * step) * g.channels
                        self.combine(total, keep(load(buffers[0], [at + part[0]], part[1])), weight, part)
            return
        readers: dict[int, list[tuple[int, int]]] = {}
        for tap, pixels in enumerate(tile.strip.inside):
            for pixel in pixels:
                readers.setdefault(pixel * stride + tap * step, []).append((tap, pixel))
        for part in tile.parts:
            weights = [self.weight(buffers, w_at + tap * g.channels, part) for tap in range(g.kernel[1])]
            for column in sorted(readers):
                value = keep(load(buffers[0], [x_at + column * g.channels + part[0]], part[1]))
                for tap, pixel in readers[column]:
                    self.combine(sums[pixel], value, weights[tap], part)

    def weight(self, buffers: list[Buffer], at: Expr, part: tuple[int, int]) -> Expr | None:
        return keep(load(buffers[1], [at + part[0]], part[1])) if self.operation == "multiply" else None

    def combine(self, total: Buffer, value: Expr, weight: Expr | None, part: tuple[int, int]) -> None:
        offset, lanes = part
        before = load(total, [offset], lanes)
        if weight is not None:
            after = multiply_add(value, weight, before, lanes)
        else:
            after = T.max(before, value) if self.operation == "max" else before + value
        store(total, after, [offset], lanes)

    def finish(self, buffers: list[Buffer], sums: list[Buffer], tile: _Tile, rows: Buffer | None) -> None:
        """Store the results of a tile."""
        g = self.geometry
        read = buffers[2 if self.operation == "multiply" else 1 : -1]
        for pixel, total in enumerate(sums):
            factor = self.factor(tile.strip, pixel, rows)
            for offset, lanes in tile.parts:
                value = load(total, [offset], lanes)
                if factor is not None:
                    value = value * splat(factor, lanes)
                at = tile.y + pixel * g.channels + tile.channel + offset
                value = self.ending.emit(value, read, tile.channel + offset, at, lanes)
                store(buffers[-1], value, [at], lanes)

    def factor(self, strip: Strip, pixel: int, rows: Buffer | None) -> Expr | None:
        """Return what a sum is multiplied by to be a mean."""
        if self.operation not in ("mean", "mean_inside"):
            return None
        if self.operation == "mean":
            return T.float32(1 / prod(self.geometry.kernel))
        columns = sum(pixel in pixels for pixels in strip.inside)
        if rows is None:
            return T.float32(1 / (self.geometry.kernel[0] * columns))
        return keep(T.float32(1) / (load(rows, [0]) * T.float32(columns)))
