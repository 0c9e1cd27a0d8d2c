"""Depthwise convolution: every thread sums a few output columns of four neighbouring channels, straight from memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.assemble import kernel_of
from bitwright.compiler.lower.templates.epilogue import Epilogue, channel_constants, epilogue_of
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.scaffold import Buffer, Expr, Parameter, load, store
from bitwright.compiler.program.ops import Dot, Program
from bitwright.targets.backend import Kernel
from bitwright.targets.nvidia_gpu.mma import require_offsets, require_symmetric
from bitwright.targets.nvidia_gpu.mma_device import act, pointer, registers, thread_block, value

QUAD = 4


@dataclass(frozen=True)
class DepthwiseParams:
    """What a tuner may change; the result never depends on it.

    Attributes:
        columns: Output columns of a thread.
        threads: Threads of a block.
    """

    columns: int
    threads: int


def space(geometry: DotGeometry) -> Iterator[DepthwiseParams]:
    """Yield the parameters, the best guess first: several columns only where enough threads are left."""
    busy = 1 << 17
    work = geometry.pixels * geometry.channels // channels_together(geometry)
    first = 4 if work >= 4 * busy and geometry.out_width >= 4 else 1
    columns = sorted((c for c in (1, 2, 4) if c <= geometry.out_width), key=lambda c: (c != first, c))
    yield from (DepthwiseParams(c, threads) for threads in (128, 256, 64) for c in columns)


def channels_together(geometry: DotGeometry) -> int:
    """Return how many channels a thread takes: four where words of the image hold four of them."""
    return QUAD if geometry.channels % QUAD == 0 else 1


def depthwise_kernel(
    step: Dot, program: Program, geometry: DotGeometry, params: DepthwiseParams, intrinsic: str
) -> Kernel:
    """Return the kernel of a depthwise convolution.

    Args:
        step: One input and one output channel a group.
        program: For shapes and scales.
        geometry: ``geometry_of(step, program)``.
        params: Work of a thread and a block.
        intrinsic: Compute row it is counted to.

    Raises:
        ProfileError: The activations are not symmetric int8, or a tensor is too large for 32-bit offsets.
    """
    require_symmetric(step, program)
    require_offsets(geometry, step.name)
    epilogue = epilogue_of(step, program)
    taps = step.weight.reshape(geometry.channels, -1).T
    constants = {"weight": np.ascontiguousarray(taps), **channel_constants(step, program, 0)}
    constants = {
        n: a if n == "weight" else np.broadcast_to(a, geometry.channels).copy() for n, a in constants.items()
    }
    template = _Template(geometry, epilogue, params)
    return kernel_of(
        f"depthwise|{intrinsic}|{geometry}|{epilogue}|{params}",
        intrinsic,
        Parameter("x", geometry.input_shape, "int8"),
        constants,
        Parameter("y", geometry.output_shape, epilogue.dtype),
        template.body,
    )


def finished(epilogue: Epilogue, total: Expr, bias: Expr, multiplier: Expr, addend: Expr | None) -> Expr:
    """Return the output value of one sum."""
    if epilogue.dtype != "float32":
        low, high = (T.float32(bound - epilogue.zero_point) for bound in (epilogue.lower, epilogue.upper))
        arguments = (total + bias, multiplier, low, high, T.int32(epilogue.zero_point))
        return value("bw_requantize", *arguments, dtype="int32")
    real = value(
        "bw_scaled", total + bias, multiplier, T.float32(0) if addend is None else addend, dtype="float32"
    )
    return T.max(real, T.float32(0)) if epilogue.relu else real


@dataclass(frozen=True)
class _Template:
    geometry: DotGeometry
    epilogue: Epilogue
    params: DepthwiseParams

    @property
    def _lanes(self) -> int:
        return channels_together(self.geometry)

    def body(self, buffers: list[Buffer]) -> None:
        x, weight, *constants, y = buffers
        g, p = self.geometry, self.params
        across, strips = g.channels // self._lanes, -(-g.out_width // p.columns)
        work = g.rows * strips * across
        with thread_block((-(-work // p.threads),), p.threads) as ((block,), thread):
            index = block * p.threads + thread
            with T.If(index < work), T.Then():
                place = index // across
                channel, strip, row = index % across * self._lanes, place % strips, place // strips
                sums = registers(p.columns * self._lanes, "int32")
                for number in range(p.columns * self._lanes):
                    store(sums, T.int32(0), [number])
                self._taps(x, weight, sums, channel, strip * p.columns, row)
                self._finish(y, constants, sums, channel, strip * p.columns, row)

    def _taps(self, x: Buffer, weight: Buffer, sums: Buffer, channel: Expr, column: Expr, row: Expr) -> None:
        g = self.geometry
        top = row % g.out_height * g.strides[0] - g.pads[0]
        with T.serial(g.kernel[0]) as kh, T.serial(g.kernel[1]) as kw:
            height = top + kh * g.dilations[0]
            with T.If(T.And(height >= 0, height < g.height)), T.Then():
                line = row // g.out_height * g.height + height
                taps = self._bytes(weight, (kh * g.kernel[1] + kw) * g.channels + channel)
                for c in range(self.params.columns):
                    width = (column + c) * g.strides[1] - g.pads[1] + kw * g.dilations[1]
                    with T.If(T.And(width >= 0, width < g.width)), T.Then():
                        pixel = self._bytes(x, (line * g.width + width) * g.channels + channel)
                        for lane in range(self._lanes):
                            number = c * self._lanes + lane
                            store(sums, load(sums, [number]) + pixel[lane] * taps[lane], [number])

    def _bytes(self, buffer: Buffer, at: Expr) -> list[Expr]:
        """Return neighbouring int8 elements as int32: one load for four of them."""
        if self._lanes == 1:
            return [T.cast(load(buffer, [at]), "int32")]
        word = registers(1, "int32")
        store(word, value("bw_load_word", pointer(buffer, at), dtype="int32"), [0])
        return [
            T.shift_right(T.shift_left(load(word, [0]), T.int32(24 - 8 * lane)), T.int32(24))
            for lane in range(QUAD)
        ]

    def _finish(
        self, y: Buffer, constants: list[Buffer], sums: Buffer, channel: Expr, column: Expr, row: Expr
    ) -> None:
        g, lanes = self.geometry, self._lanes
        for c in range(self.params.columns):
            at = (row * g.out_width + column + c) * g.channels + channel
            with T.If(column + c < g.out_width), T.Then():
                values = [
                    finished(
                        self.epilogue,
                        load(sums, [c * lanes + lane]),
                        *self._constants(constants, channel + lane),
                    )
                    for lane in range(lanes)
                ]
                self._store(y, at, values)

    @staticmethod
    def _constants(constants: list[Buffer], channel: Expr) -> tuple[Expr, Expr, Expr | None]:
        bias, multiplier, *rest = (load(c, [channel]) for c in constants)
        return bias, multiplier, rest[0] if rest else None

    def _store(self, y: Buffer, at: Expr, values: list[Expr]) -> None:
        if self.epilogue.dtype == "float32" or len(values) == 1:
            for lane, found in enumerate(values):
                store(y, T.cast(found, self.epilogue.dtype), [at + lane])
            return
        word: Expr = T.int32(0)
        for lane, found in enumerate(values):
            word = word + T.shift_left(T.bitwise_and(found, T.int32(255)), T.int32(8 * lane))
        act("bw_store_word", pointer(y, at), word)
