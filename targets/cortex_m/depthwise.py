"""Depthwise convolution: lanes run along the channels, taps outside the image add the zero point, nothing is copied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.assemble import assemble_kernel
from bitwright.compiler.lower.templates.epilogue import Epilogue, channel_constants, epilogue_of
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.scaffold import (
    Buffer,
    Expr,
    allocate,
    load,
    loop,
    splat,
    store,
    vector_type,
)
from bitwright.compiler.lower.templates.staging import Staging
from bitwright.compiler.program.ops import Dot, Program
from bitwright.targets.backend import Kernel
from bitwright.targets.cortex_m.epilogue import emit_epilogue, whole_vectors


@dataclass(frozen=True)
class DepthwiseParams:
    """What a tuner may change; the result never depends on it.

    Attributes:
        lanes: Channels handled at once.
    """

    lanes: int


def space(geometry: DotGeometry) -> Iterator[DepthwiseParams]:
    """Yield the legal parameters: four channels at once, where there are so many."""
    yield from (DepthwiseParams(lanes) for lanes in (4, 1) if lanes <= geometry.channels)


def depthwise_kernel(
    step: Dot, program: Program, geometry: DotGeometry, params: DepthwiseParams, epilogue_lanes: int
) -> Kernel:
    """Return the kernel of a depthwise step (``geometry.is_depthwise``).

    Args:
        step: The convolution; activations of type int8.
        program: For shapes, scales and zero points.
        geometry: ``geometry_of(step, program)``.
        params: Blocking.
        epilogue_lanes: float32 values that one instruction of the epilogue handles.
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
    template = _Template(geometry, staging.fill, epilogue, params, epilogue_lanes)
    details = (params, epilogue_lanes)
    return assemble_kernel("llvm", geometry, staging, epilogue, details, constants, template.body)


@dataclass(frozen=True)
class _Template:
    geometry: DotGeometry
    fill: int
    epilogue: Epilogue
    params: DepthwiseParams
    epilogue_lanes: int

    def body(self, buffers: list[Buffer]) -> None:
        channels, lanes = self.geometry.channels, self.params.lanes
        full = channels // lanes
        with loop(self.geometry.pixels) as pixel:
            with loop(full) as block:
                self._pixel(buffers, pixel, block * lanes, lanes)
            for offset, rest in whole_vectors(channels - full * lanes, lanes):
                self._pixel(buffers, pixel, full * lanes + offset, rest)

    def _pixel(self, buffers: list[Buffer], pixel: Expr, channel: Expr, lanes: int) -> None:
        x, weight, bias, *scales, y = buffers
        totals = allocate((lanes,), "int32", "local")
        store(totals, load(bias, [channel], lanes), [0], lanes)
        self._accumulate(totals, x, weight, pixel, channel, lanes)
        for offset, width in whole_vectors(lanes, self.epilogue_lanes):
            total = load(totals, [offset], width)
            value = emit_epilogue(self.epilogue, total, scales, channel + offset, width)
            store(y, value, [pixel * self.geometry.channels + channel + offset], width)

    def _accumulate(
        self, totals: Buffer, x: Buffer, weight: Buffer, pixel: Expr, channel: Expr, lanes: int
    ) -> None:
        g = self.geometry
        row, column = pixel // g.out_width, pixel % g.out_width
        top = row % g.out_height * g.strides[0] - g.pads[0]
        left = column * g.strides[1] - g.pads[1]
        image = row // g.out_height * g.height
        wide = vector_type("int32", lanes)

        def add(value: Expr, tap: Expr) -> None:
            factor = T.cast(load(weight, [tap * g.channels + channel], lanes), wide)
            store(totals, load(totals, [0], lanes) + value * factor, [0], lanes)

        with loop(g.kernel[0]) as kh, loop(g.kernel[1]) as kw:
            ih, iw, tap = top + kh * g.dilations[0], left + kw * g.dilations[1], kh * g.kernel[1] + kw
            at = ((image + ih) * g.width + iw) * g.channels + channel
            if not any(g.pads):
                add(T.cast(load(x, [at], lanes), wide), tap)
                return
            with T.If(tirx.all(ih >= 0, ih < g.height, iw >= 0, iw < g.width)):
                with T.Then():
                    add(T.cast(load(x, [at], lanes), wide), tap)
                with T.Else():
                    add(splat(T.int32(self.fill), lanes), tap)
