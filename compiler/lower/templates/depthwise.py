"""Depthwise convolution: one input and one output channel a group, so lanes run along the channels.

There is no reduction over channels that a dot-product instruction could do. Products of 8-bit integers are
exact in 16 bits (255 * -128 = -32640), so they are multiplied there, twice as many at once, and added in 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.assemble import assemble_kernel
from bitwright.compiler.lower.templates.epilogue import (
    Epilogue,
    channel_constants,
    emit_epilogue,
    epilogue_of,
)
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.scaffold import (
    MIN_PARALLEL_MACS,
    Buffer,
    Expr,
    allocate,
    load,
    loop,
    pieces,
    splat,
    store,
    vector_type,
)
from bitwright.compiler.lower.templates.staging import Staging, plan_staging, stage
from bitwright.compiler.program.ops import Dot, Program
from bitwright.targets.backend import Kernel

# Up to so many kernel positions are unrolled, so that their weights stay in registers along a row of pixels.
MAX_UNROLLED_TAPS = 25


@dataclass(frozen=True)
class DepthwiseParams:
    """What a tuner may change; the result never depends on it.

    Attributes:
        lanes: Channels handled at once, a power of two.
        parallel: Spread the output rows over threads.
    """

    lanes: int
    parallel: bool


def space(geometry: DotGeometry, register_bytes: int) -> Iterator[DepthwiseParams]:
    """Yield every blocking, the likeliest first: one register of 16-bit products at once."""
    parallel = geometry.macs >= MIN_PARALLEL_MACS
    for lanes in (register_bytes // 2, register_bytes // 4, register_bytes, register_bytes // 8):
        yield DepthwiseParams(lanes, parallel)


def depthwise_kernel(
    step: Dot,
    program: Program,
    geometry: DotGeometry,
    *,
    register_bytes: int,
    params: DepthwiseParams | None = None,
) -> Kernel:
    """Return the kernel of a depthwise step (``geometry.is_depthwise``).

    Args:
        step: The convolution.
        program: For shapes, scales and zero points.
        geometry: ``geometry_of(step, program)``.
        register_bytes: Width of a vector register; by rule one register of 16-bit products at once.
        params: Blocking; chosen by rule when None.
    """
    params = params or next(space(geometry, register_bytes))
    source = program.tensor(step.inputs[0])
    assert source.quant is not None
    staging = plan_staging(geometry, source.dtype, source.dtype, source.quant.zero_point)
    epilogue = epilogue_of(step, program)
    weight = np.ascontiguousarray(step.weight.reshape(geometry.channels, -1).T).reshape(-1)
    arrays = channel_constants(step, program, staging.shift)
    constants = {
        "weight": weight,
        **{name: np.broadcast_to(array, (geometry.outputs,)).copy() for name, array in arrays.items()},
    }
    template = _Template(geometry, staging, epilogue, params)
    return assemble_kernel("llvm", geometry, staging, epilogue, params, constants, template.body)


@dataclass(frozen=True)
class _Template:
    geometry: DotGeometry
    staging: Staging
    epilogue: Epilogue
    params: DepthwiseParams

    def body(self, buffers: list[Buffer]) -> None:
        x, weight, *constants, y = buffers
        staged = stage(x, self.geometry, self.staging, parallel=self.params.parallel)
        full = self.geometry.channels // self.params.lanes
        with loop(self.geometry.rows, parallel=self.params.parallel) as row:
            if full:
                with loop(full) as block:
                    self._row(staged, weight, constants, y, row, block * self.params.lanes, self.params.lanes)
            done = full * self.params.lanes
            for offset, lanes in pieces(self.geometry.channels - done, self.params.lanes):
                self._row(staged, weight, constants, y, row, done + offset, lanes)

    def _row(
        self,
        staged: Buffer,
        weight: Buffer,
        constants: list[Buffer],
        output: Buffer,
        row: Expr,
        channel: Expr,
        lanes: int,
    ) -> None:
        """Emit one row of output pixels for ``lanes`` channels."""
        g = self.geometry
        with loop(g.out_width) as column:
            accumulator = allocate((lanes,), "int32", "local")
            store(accumulator, splat(T.int32(0), lanes), [0], lanes)
            self._accumulate(accumulator, staged, weight, row, column, channel, lanes)
            value = emit_epilogue(self.epilogue, load(accumulator, [0], lanes), constants, channel, lanes)
            store(output, value, [(row * g.out_width + column) * g.channels + channel], lanes)

    def _accumulate(
        self,
        accumulator: Buffer,
        staged: Buffer,
        weight: Buffer,
        row: Expr,
        column: Expr,
        channel: Expr,
        lanes: int,
    ) -> None:
        g = self.geometry
        (kh, kw), (dh, dw) = g.kernel, g.dilations
        image = row // g.out_height * self.staging.height + row % g.out_height * g.strides[0]

        def tap(i: Expr, j: Expr) -> None:
            pixel = (image + i * dh) * self.staging.width + column * g.strides[1] + j * dw
            x = T.cast(load(staged, [pixel * g.channels + channel], lanes), vector_type("int16", lanes))
            w = load(weight, [(i * kw + j) * g.channels + channel], lanes)
            product = T.cast(x * T.cast(w, vector_type("int16", lanes)), vector_type("int32", lanes))
            store(accumulator, load(accumulator, [0], lanes) + product, [0], lanes)

        if kh * kw <= MAX_UNROLLED_TAPS:
            for i in range(kh):
                for j in range(kw):
                    tap(i, j)
        else:
            with loop(kh) as i, loop(kw) as j:
                tap(i, j)
