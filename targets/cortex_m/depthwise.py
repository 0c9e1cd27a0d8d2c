"""Depthwise convolution: lanes run along the channels, taps outside the image add the zero point, nothing is copied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.assemble import assemble_kernel
from bitwright.compiler.lower.templates.epilogue import Epilogue, channel_constants, epilogue_of
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.scaffold import (
    Buffer,
    Expr,
    load,
    loop,
    splat,
    store,
)
from bitwright.compiler.lower.templates.staging import Staging
from bitwright.compiler.program.ops import Dot, Program
from bitwright.targets.backend import Kernel
from bitwright.targets.cortex_m.accumulators import Accumulators, Scalars, Vector
from bitwright.targets.cortex_m.epilogue import emit_epilogue, whole_vectors
from bitwright.targets.cortex_m.instruction import CHANNELS, PatchInstruction

# More taps stay a loop: code is flash.
MAX_UNROLLED_TAPS = 9


@dataclass(frozen=True)
class DepthwiseParams:
    """What a tuner may change; the result never depends on it.

    Attributes:
        lanes: Channels handled at once.
    """

    lanes: int


def space(geometry: DotGeometry) -> Iterator[DepthwiseParams]:
    """Yield the legal parameters: four channels at once, where there are so many."""
    yield from (DepthwiseParams(lanes) for lanes in (CHANNELS, 1) if lanes <= geometry.channels)


def depthwise_kernel(
    step: Dot,
    program: Program,
    geometry: DotGeometry,
    instruction: PatchInstruction,
    params: DepthwiseParams,
) -> Kernel:
    """Return the kernel of a depthwise step (``geometry.is_depthwise``).

    Args:
        step: The convolution; activations of type int8.
        program: For shapes, scales and zero points.
        geometry: ``geometry_of(step, program)``.
        instruction: How to multiply and to convert.
        params: Blocking.
    """
    source = program.tensor(step.inputs[0])
    assert source.quant is not None
    staging = Staging(source.dtype, "int8", 0, 0, 0, False, source.quant.zero_point)
    epilogue = epilogue_of(step, program)
    arrays = channel_constants(step, program, 0)
    constants = {
        "weight": np.ascontiguousarray(step.weight.reshape(geometry.channels, -1).T).reshape(-1),
        **{name: np.broadcast_to(array, (geometry.outputs,)).copy() for name, array in arrays.items()},
    }
    template = _Template(geometry, staging.fill, epilogue, params, instruction)
    details = (params, instruction.name)
    return assemble_kernel("llvm", geometry, staging, epilogue, details, constants, template.body)


@dataclass(frozen=True)
class _Template:
    geometry: DotGeometry
    fill: int
    epilogue: Epilogue
    params: DepthwiseParams
    instruction: PatchInstruction

    def body(self, buffers: list[Buffer]) -> None:
        with loop(self.geometry.pixels) as pixel:
            inside = self._whole_window(pixel)
            if inside is None:
                self._channels(buffers, pixel, border=False)
                return
            with T.If(inside):
                with T.Then():
                    self._channels(buffers, pixel, border=False)
                with T.Else():
                    self._channels(buffers, pixel, border=True)

    def _origin(self, pixel: Expr) -> tuple[Expr, Expr, Expr]:
        """Return (first row of the image in memory, first row and column under the kernel)."""
        g = self.geometry
        row, column = pixel // g.out_width, pixel % g.out_width
        top, left = row % g.out_height * g.strides[0] - g.pads[0], column * g.strides[1] - g.pads[1]
        return row // g.out_height * g.height, top, left

    def _whole_window(self, pixel: Expr) -> Expr | None:
        """Return when no tap lies in the padding, or None if there is none."""
        g = self.geometry
        if not any(g.pads):
            return None
        _, top, left = self._origin(pixel)
        high, wide = ((k - 1) * d + 1 for k, d in zip(g.kernel, g.dilations, strict=True))
        return tirx.all(top >= 0, top + high <= g.height, left >= 0, left + wide <= g.width)

    def _channels(self, buffers: list[Buffer], pixel: Expr, *, border: bool) -> None:
        """Emit all channels of a pixel; ``border``: some taps may lie in the padding."""
        channels, lanes = self.geometry.channels, self.params.lanes
        full = channels // lanes
        if full:
            with loop(full) as block:
                self._block(buffers, pixel, block * lanes, lanes, border=border)
        if channels % lanes:
            with loop(channels % lanes) as rest:
                self._block(buffers, pixel, full * lanes + rest, 1, border=border)

    def _block(self, buffers: list[Buffer], pixel: Expr, channel: Expr, lanes: int, *, border: bool) -> None:
        x, weight, bias, *scales, y = buffers
        vector = lanes > 1 and self.instruction.lanes > 1
        totals: Accumulators = Vector(lanes) if vector else Scalars(lanes)
        if vector:
            totals.store(0, load(bias, [channel], lanes))
        else:
            for lane in range(lanes):
                totals.store(lane, load(bias, [channel + lane]))
        self._taps(totals, (x, weight), pixel, channel, lanes, border=border)
        for offset, width in whole_vectors(lanes, self.instruction.lanes):
            value = emit_epilogue(
                self.epilogue,
                totals.load(offset, width),
                scales,
                channel + offset,
                width,
                self.instruction.convert,
            )
            store(y, value, [pixel * self.geometry.channels + channel + offset], width)

    def _taps(
        self,
        totals: Accumulators,
        operands: tuple[Buffer, Buffer],
        pixel: Expr,
        channel: Expr,
        lanes: int,
        *,
        border: bool,
    ) -> None:
        g, (x, weight) = self.geometry, operands
        image, top, left = self._origin(pixel)

        def tap(kh: Expr, kw: Expr) -> None:
            ih, iw = top + kh * g.dilations[0], left + kw * g.dilations[1]
            at = ((image + ih) * g.width + iw) * g.channels + channel
            factor = load(weight, [(kh * g.kernel[1] + kw) * g.channels + channel], lanes)
            if not border:
                self._add(totals, load(x, [at], lanes), factor, lanes)
                return
            with T.If(tirx.all(ih >= 0, ih < g.height, iw >= 0, iw < g.width)):
                with T.Then():
                    self._add(totals, load(x, [at], lanes), factor, lanes)
                with T.Else():
                    self._add(totals, splat(T.int8(self.fill), lanes), factor, lanes)

        if not border and prod(g.kernel) <= MAX_UNROLLED_TAPS:
            for kh, kw in product(*map(range, g.kernel)):
                tap(kh, kw)
            return
        with loop(g.kernel[0]) as kh, loop(g.kernel[1]) as kw:
            tap(kh, kw)

    def _add(self, totals: Accumulators, activations: Expr, weights: Expr, lanes: int) -> None:
        if lanes > 1:
            self.instruction.tap(totals, activations, weights)
            return
        totals.store(0, totals.load(0) + T.cast(activations, "int32") * T.cast(weights, "int32"))
