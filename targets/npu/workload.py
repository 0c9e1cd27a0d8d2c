"""A Gemm or convolution as unscheduled TensorIR: gathered patches, the array's operands, sums, requantized outputs.

The stages are what the accelerator has: ``patches`` in the host's memory, ``activations`` and ``weights`` in the words
of their buffers, ``sums`` in the accumulator buffer, ``tiles`` as the accelerator stores them, ``y`` as the next layer
reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.targets.npu.machine import Machine
from bitwright.targets.npu.problem import Problem
from bitwright.targets.npu.tiling import Grid, Tiling, pixel_blocks

Expr = Any


@dataclass(frozen=True)
class Output:
    """What requantization does beyond the parameters of the channels."""

    zero_point: int
    lower: int
    upper: int


def requantized(total: Expr, parameters: Sequence[Expr], output: Output) -> Expr:
    """Return ``clip(((sum + bias) * multiplier + 2^(shift-1)) >> shift) + zero point)`` as int8."""
    bias, multiplier, shift = (p.astype("int64") for p in parameters)
    half = tirx.const(1, "int64") << (shift - 1)
    moved = (((total.astype("int64") + bias) * multiplier + half) >> shift) + _int64(output.zero_point)
    return tirx.max(tirx.min(moved, _int64(output.upper)), _int64(output.lower)).astype("int8")


def _int64(value: int) -> Expr:
    return tirx.const(value, "int64")


@dataclass(frozen=True)
class Workload:
    """The numbers of one kernel.

    Attributes:
        geometry: Of the layer.
        problem, grid, tiling: How it is computed.
        machine: The accelerator.
        fill: The activations' zero point, which padding holds.
        output: Requantization.
    """

    geometry: DotGeometry
    problem: Problem
    grid: Grid
    tiling: Tiling
    machine: Machine
    fill: int
    output: Output

    @property
    def pixels(self) -> int:
        """Pixels, rounded up to whole blocks."""
        return pixel_blocks(self.grid, self.tiling) * self.tiling.pixels * self.grid.pixel_unit

    def function(self) -> tirx.PrimFunc:
        """Return the unscheduled function of (x, weights, parameters, y)."""
        m, grid = self.machine, self.grid
        x = te.placeholder(self.geometry.input_shape, "int8", name="x")
        weights = te.placeholder((grid.groups, grid.blocks, grid.depth, m.columns), "int8", name="w")
        parameters = te.placeholder((grid.groups, grid.blocks, 3, m.columns), "int32", name="p")
        patches = te.compute(
            (grid.groups, self.pixels, grid.depth), lambda g, p, k: self._patch(x, g, p, k), name="patches"
        )
        held = te.compute(weights.shape, lambda g, b, k, j: weights[g, b, k, j], name="weights")
        stage = self._weight_stationary if m.weight_stationary else self._output_stationary
        tiles, at = stage(patches, held, parameters)

        def output(*index: Expr) -> Expr:
            *position, channel = index
            return at(self._ravel(position), channel)

        y = te.compute(self.geometry.output_shape, output, name="y")
        assert tiles is not None
        return te.create_prim_func([x, weights, parameters, y])

    def _output_stationary(self, patches: Expr, weights: Expr, parameters: Expr) -> tuple[Expr, Any]:
        m, grid = self.machine, self.grid
        units = self.pixels // m.rows
        activations = te.compute(
            (grid.groups, units, grid.depth, m.rows),
            lambda g, u, k, i: patches[g, u * m.rows + i, k],
            name="activations",
        )
        k = te.reduce_axis((0, grid.depth), "k")
        shape = (grid.groups, units, grid.blocks, m.rows, m.columns)
        sums = te.compute(
            shape,
            lambda g, u, b, i, j: te.sum(
                activations[g, u, k, i].astype("int32") * weights[g, b, k, j].astype("int32"), axis=k
            ),
            name="sums",
        )
        tiles = te.compute(
            shape,
            lambda g, u, b, i, j: requantized(
                sums[g, u, b, i, j], [parameters[g, b, n, j] for n in range(3)], self.output
            ),
            name="tiles",
        )

        def at(pixel: Expr, channel: Expr) -> Expr:
            group, block, column = self._column(channel)
            return tiles[group, pixel // m.rows, block, pixel % m.rows, column]

        return tiles, at

    def _weight_stationary(self, patches: Expr, weights: Expr, parameters: Expr) -> tuple[Expr, Any]:
        m, grid = self.machine, self.grid
        activations = te.compute(
            (grid.groups, grid.depth_units, self.pixels, m.rows),
            lambda g, u, p, i: patches[g, p, u * m.rows + i],
            name="activations",
        )
        u, i = te.reduce_axis((0, grid.depth_units), "u"), te.reduce_axis((0, m.rows), "i")
        shape = (grid.groups, grid.blocks, self.pixels, m.columns)
        sums = te.compute(
            shape,
            lambda g, b, p, j: te.sum(
                activations[g, u, p, i].astype("int32") * weights[g, b, u * m.rows + i, j].astype("int32"),
                axis=[u, i],
            ),
            name="sums",
        )
        tiles = te.compute(
            shape,
            lambda g, b, p, j: requantized(
                sums[g, b, p, j], [parameters[g, b, n, j] for n in range(3)], self.output
            ),
            name="tiles",
        )

        def at(pixel: Expr, channel: Expr) -> Expr:
            group, block, column = self._column(channel)
            return tiles[group, block, pixel, column]

        return tiles, at

    def _column(self, channel: Expr) -> tuple[Expr, Expr, Expr]:
        """Return group, block of columns and column of an output channel."""
        own = channel % self.problem.outputs
        return channel // self.problem.outputs, own // self.machine.columns, own % self.machine.columns

    def _ravel(self, position: Sequence[Expr]) -> Expr:
        pixel: Expr = 0
        for index, size in zip(position, self.geometry.output_shape[:-1], strict=True):
            pixel = pixel * size + index
        return pixel

    def _patch(self, x: Expr, group: Expr, pixel: Expr, k: Expr) -> Expr:
        """Return the activation at an index of the depth of a pixel; the zero point outside the image."""
        g, merged = self.geometry, self.problem.merged * self.geometry.group_channels
        tap, channel = k // merged, group * merged + k % merged
        inside = []
        if self.problem.depth < self.grid.depth:
            inside.append(k < self.problem.depth)
        if g.pixels < self.pixels:
            inside.append(pixel < g.pixels)
        if g.group % self.problem.merged:
            inside.append(channel < g.channels)
        if g.kernel == (1, 1) and g.strides == (1, 1) and not any(g.pads):
            return self._or_fill(inside, x, [*_unravel(pixel, g.input_shape[:-1]), channel])
        image, row, column = _unravel(pixel, (g.batch, g.out_height, g.out_width))
        row = row * g.strides[0] - g.pads[0] + tap // g.kernel[1] * g.dilations[0]
        column = column * g.strides[1] - g.pads[1] + tap % g.kernel[1] * g.dilations[1]
        if any(g.pads):
            inside += [row >= 0, row < g.height, column >= 0, column < g.width]
        return self._or_fill(inside, x, [image, row, column, channel])

    def _or_fill(self, inside: list[Expr], x: Expr, index: list[Expr]) -> Expr:
        if not inside:
            return x(*index)
        return tirx.if_then_else(tirx.all(*inside), x(*index), tirx.const(self.fill, "int8"))


def _unravel(pixel: Expr, shape: Sequence[int]) -> list[Expr]:
    index: list[Expr] = []
    for size in reversed(shape[1:]):
        index.insert(0, pixel % size)
        pixel = pixel // size
    return [pixel, *index]
