"""Layers of a streaming network, each made of one step of the integer program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

import numpy as np

from bitwright.compiler.errors import PerformanceGateError
from bitwright.compiler.program.ops import (
    Program,
    QAdd,
    QConcat,
    QConv,
    QGemm,
    QLut,
    QPool,
    QuantParams,
    Step,
)
from bitwright.targets.fpga.carried import STREAM_BITS, Carried, carried
from bitwright.targets.fpga.engines.dot import RAW_BITS, DepthwiseLayer, MatrixVectorLayer
from bitwright.targets.fpga.engines.pointwise import AddLayer, ConcatLayer, TableLayer
from bitwright.targets.fpga.engines.pooling import GlobalAverageLayer, MaxPoolLayer
from bitwright.targets.fpga.engines.requantization import (
    Requantization,
    Signed,
    requantization,
    signed,
)
from bitwright.targets.fpga.engines.window import Window
from bitwright.targets.fpga.network import Integers, Layer
from bitwright.targets.fpga.reference import add_scales, average_multiplier, dot_multipliers

IMAGE_RANK = 4
# What accumulators that leave as they are have in place of the parameters of a quantized result.
ACCUMULATORS = Signed(0, -128, 127, 0)


class Common(TypedDict):
    """Fields that every layer has."""

    name: str
    node: str
    sources: tuple[str, ...]
    tensor: str
    positions: int
    channels: int


@dataclass(frozen=True)
class LayerMaker:
    """Makes layers of steps."""

    program: Program
    bits: int
    aliases: dict[str, str]

    def layer(self, step: Step) -> Layer:
        """Return the layer of a step."""
        makers: dict[type, Callable[..., Layer]] = {
            QConv: self._conv,
            QGemm: self._gemm,
            QAdd: self._add,
            QPool: self._pool,
            QLut: self._table,
            QConcat: self._concat,
        }
        return makers[type(step)](step)

    def _quant(self, name: str) -> QuantParams:
        quant = self.program.tensor(name).quant
        assert quant is not None
        return quant

    @cached_property
    def _carried(self) -> dict[str, Carried]:
        return carried(self.program)

    def _signed(self, name: str, lower: int | None = None, upper: int | None = None) -> Signed:
        return signed(self._quant(name), self._carried[name], lower, upper)

    def _image(self, name: str) -> tuple[int, int, int]:
        """Return (C, H, W) of a stream; rows of vectors are an image of one column."""
        shape = self.program.tensor(self.aliases.get(name, name)).shape
        if len(shape) == IMAGE_RANK and shape[0] == 1:
            return shape[1], shape[2], shape[3]
        return shape[-1], int(np.prod(shape[:-1], dtype=np.int64)), 1

    def _common(self, step: Step) -> Common:
        image = self._image(step.output)
        return Common(
            name=step.name,
            node=step.name,
            sources=tuple(self.aliases.get(name, name) for name in step.inputs),
            tensor=step.output,
            positions=image[1] * image[2],
            channels=image[0],
        )

    def _requantization(self, step: QConv | QGemm, weight: Integers) -> tuple[Requantization, int]:
        """Return what follows the sums (zero point of the input in the bias), and bits of the result."""
        x, output = self._quant(step.inputs[0]), self.program.tensor(step.output)
        zero = self._signed(step.inputs[0]).zero_point
        bias = np.zeros(len(weight), np.int64) if step.bias is None else step.bias.astype(np.int64)
        bias = bias - zero * weight.sum(axis=1)
        if output.quant is None:
            return Requantization(bias, None, ACCUMULATORS), RAW_BITS
        real = np.broadcast_to(dot_multipliers(step, x, output.quant), bias.shape)
        bounds = self._signed(step.output, step.lower, step.upper)
        return requantization(bias, real, bounds, self.bits), STREAM_BITS

    def _window(self, step: QConv | QPool, fill: int) -> Window:
        channels, height, width = self._image(step.inputs[0])
        kernel = step.kernel if isinstance(step, QPool) else (step.weight.shape[2], step.weight.shape[3])
        output = self.program.tensor(step.output).shape
        if tuple(step.dilations) != (1, 1):
            raise refusal(step, "windows have no dilation")
        if any(pad >= size for pad, size in zip(step.pads, (*kernel, *kernel), strict=True)):
            raise refusal(step, "the padding is as large as the kernel")
        return Window(
            channels,
            (height, width),
            (kernel[0], kernel[1]),
            step.strides,
            step.pads,
            (output[2], output[3]),
            fill,
            self._carried[step.inputs[0]].bits,
        )

    def _conv(self, step: QConv) -> Layer:
        x = self._signed(step.inputs[0])
        window = self._window(step, x.zero_point)
        outputs, per_group = step.weight.shape[:2]
        if step.group == outputs == window.channels and per_group == 1:
            weight = step.weight.reshape(outputs, -1).astype(np.int64)
            requantizing, bits = self._requantization(step, weight)
            return DepthwiseLayer(
                **self._common(step),
                weight=weight,
                requantization=requantizing,
                window=window,
                bits=bits,
                input_bits=x.bits,
            )
        if step.group != 1:
            raise refusal(step, f"convolutions in {step.group} groups have no circuit (1, or depthwise)")
        weight = step.weight.transpose(0, 2, 3, 1).reshape(outputs, -1).astype(np.int64)
        requantizing, bits = self._requantization(step, weight)
        return MatrixVectorLayer(
            **self._common(step),
            weight=weight,
            requantization=requantizing,
            window=None if window.trivial else window,
            inner=window.channels,
            bits=bits,
            input_bits=x.bits,
        )

    def _gemm(self, step: QGemm) -> Layer:
        if len(self.program.tensor(step.inputs[0]).shape) == IMAGE_RANK:
            raise refusal(step, "a matrix product along the width of an image")
        weight = step.weight.T.astype(np.int64)
        channels, height, width = self._image(step.inputs[0])
        if channels != weight.shape[1]:  # a flattened image: the stream has its channels last
            weight = weight.reshape(len(weight), channels, height, width).transpose(0, 2, 3, 1)
            weight = weight.reshape(len(weight), -1)
        requantizing, bits = self._requantization(step, weight)
        return MatrixVectorLayer(
            **self._common(step),
            weight=weight,
            requantization=requantizing,
            inner=weight.shape[1],
            bits=bits,
            input_bits=self._carried[step.inputs[0]].bits,
        )

    def _add(self, step: QAdd) -> Layer:
        if {self._image(name) for name in step.inputs} != {self._image(step.output)}:
            raise refusal(step, "the operands of a sum have different shapes, or are a flattened image")
        a, b, y = (self._quant(name) for name in (*step.inputs, step.output))
        scales = add_scales(a, b, y, self.bits)
        zeros = [self._signed(name).zero_point for name in step.inputs]
        offset = -sum(m * z for m, z in zip(scales.multipliers, zeros, strict=True))
        return AddLayer(
            **self._common(step),
            multipliers=scales.multipliers,
            shift=scales.shift,
            offset=offset,
            output=self._signed(step.output, step.lower, step.upper),
        )

    def _pool(self, step: QPool) -> Layer:
        x, y = (self._quant(name) for name in (step.inputs[0], step.output))
        channels = self._image(step.inputs[0])[0]
        if step.kind == "max":
            lowest = -(1 << (self._carried[step.inputs[0]].bits - 1))
            return MaxPoolLayer(**self._common(step), window=self._window(step, lowest))
        taken = self._signed(step.inputs[0])
        window = self._window(step, taken.zero_point)
        if any(step.pads) and not step.count_include_pad:
            raise refusal(step, "an average that leaves out padding divides by another number at the border")
        bias = np.full(channels, -taken.zero_point * window.taps, np.int64)
        by = np.broadcast_to(average_multiplier(step, x, y), (channels,))
        requantizing = requantization(bias, by, self._signed(step.output), self.bits)
        if window.whole:
            return GlobalAverageLayer(**self._common(step), pixels=window.taps, requantization=requantizing)
        weight = np.ones((channels, window.taps), np.int64)
        return DepthwiseLayer(
            **self._common(step),
            weight=weight,
            requantization=requantizing,
            window=window,
            input_bits=taken.bits,
        )

    def _table(self, step: QLut) -> Layer:
        if self._image(step.inputs[0]) != self._image(step.output):
            raise refusal(step, "a table behind a flattened image")
        # Index 0 belongs to what travels as -128; what cannot travel may have any entry.
        first = self._carried[step.inputs[0]].offset - 128 - self._quant(step.inputs[0]).bounds[0]
        entries = step.table.astype(np.int64) - self._carried[step.output].offset
        table = entries[np.clip(np.arange(256) + first, 0, 255)]
        return TableLayer(**self._common(step), table=table, function=step.function)

    def _concat(self, step: QConcat) -> Layer:
        shape = self.program.tensor(step.inputs[0]).shape
        axis = step.axis % len(shape)
        parts = tuple(self._image(name)[0] for name in step.inputs)
        if len(parts) != 2 or axis != (1 if len(shape) == IMAGE_RANK else len(shape) - 1):
            raise refusal(step, "two streams are joined along their channels, and nothing else")
        return ConcatLayer(**self._common(step), parts=(parts[0], parts[1]))


def refusal(step: Step, why: str) -> PerformanceGateError:
    """Return the error for a step that has no circuit."""
    nodes = ", ".join(f"'{name}'" for name in step.nodes[:6] or (step.name,))
    what = f"the step cannot be part of the circuit: {why}"
    fix = "quantize it, move it to an end of the model, or choose another target"
    return PerformanceGateError(what, where=f"node {nodes}", fix=fix)
