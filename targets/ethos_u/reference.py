"""The integer reference of each step with the accelerator's requantization: logical arrays in, logical arrays out.

It is what TensorFlow Lite's reference kernels compute: sums of products are exact, multipliers have 31 bits, and the
profile says for each operator whether the product is rounded once or twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.errors import InternalError
from bitwright.compiler.interpret import dot, move
from bitwright.compiler.interpret.fixed_point import FixedPoint, Rounding, fixed_point, requantize
from bitwright.compiler.interpret.pool import windows
from bitwright.compiler.program.ops import (
    Dot,
    Move,
    Program,
    QAdd,
    QConcat,
    QConv,
    QGemm,
    QLut,
    QMul,
    QPool,
    QuantParams,
    Step,
)
from bitwright.targets.ethos_u.averages import as_products, rescaled_behind
from bitwright.targets.ethos_u.functions import LookUp
from bitwright.targets.ethos_u.integer_steps import QSoftmax
from bitwright.targets.ethos_u.softmax import softmax
from bitwright.targets.schema import Requantize

Integers = NDArray[np.int64]
# Places that the operands of a sum are shifted to the left before their scales are applied.
SUM_SHIFT = 20
OPERATORS: dict[type[Step], str] = {QConv: "Conv", QGemm: "Gemm", QAdd: "Add", QMul: "Mul"}


@dataclass(frozen=True)
class Reference:
    """Computes steps of one program.

    Attributes:
        program: Knows the tensors' parameters.
        requantization: How the profile says accumulators become outputs.
        functions: Step -> the function of one tensor that stands for its table.
    """

    program: Program
    requantization: Requantize
    functions: Mapping[str, LookUp]

    def run(self, step: Step, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
        """Return the integers that ``step`` writes, given the logical integers it reads.

        Raises:
            InternalError: The step is of a kind that has no reference.
        """
        match step:
            case QConv() | QGemm():
                return self._dot(step, inputs[0])
            case QAdd():
                return self._sum(step, inputs)
            case QMul():
                return self._product(step, inputs)
            case QPool():
                return self._pool(step, inputs[0])
            case QLut():
                return self.functions[step.name].table[inputs[0].astype(np.int64) + 128]
            case QSoftmax():
                return softmax(inputs[0], self._quant(step.inputs[0]))
            case QConcat():
                return move.concat(step, inputs)
            case Move():
                return move.move(step, inputs[0], self.program.tensor(step.output))
        what = f"there is no reference of {type(step).__name__}"
        raise InternalError(what, where=f"step '{step.name}'")

    def _quant(self, name: str) -> QuantParams:
        quant = self.program.tensor(name).quant
        assert quant is not None
        return quant

    def _rounding(self, step: Step) -> Rounding:
        rule = self.requantization
        return rule.rounding_of.get(OPERATORS[type(step)], rule.rounding)

    def _dot(self, step: QConv | QGemm, x: np.ndarray) -> np.ndarray:
        quant, output = self._quant(step.inputs[0]), self.program.tensor(step.output)
        if isinstance(step, QConv):
            acc = dot.conv_products(step, x, quant, output)
        else:
            acc = dot.gemm_products(step, x, quant)
        columns = [-1 if axis == 1 else 1 for axis in range(acc.ndim)]
        if step.bias is not None:
            acc = acc + step.bias.astype(np.int64).reshape(columns)
        factor = fixed_point(self._factors(step), self.requantization.multiplier_bits)
        by = FixedPoint(factor.multiplier.reshape(columns), factor.shift.reshape(columns), factor.bits)
        y = requantize(acc, by, self._rounding(step)) + self._quant(step.output).zero_point
        return _int8(np.clip(y, step.lower, step.upper)).reshape(output.shape)

    def _factors(self, step: Dot) -> NDArray[np.float64]:
        """Return the real multipliers of the channels, in the arithmetic that the kernels prepare them with."""
        sx, sy = np.float32(self._quant(step.inputs[0]).scale), np.float64(self._quant(step.output).scale)
        sw = step.weight_scale.astype(np.float32)
        if sw.size == 1 and isinstance(step, QGemm):
            return np.asarray((sx * sw).astype(np.float64) / sy)
        return np.asarray(np.float64(sx) * sw.astype(np.float64) / sy)

    def _sum(self, step: QAdd, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
        quants, y = [self._quant(name) for name in step.inputs], self._quant(step.output)
        largest = 2 * max(float(np.float32(q.scale)) for q in quants)
        rounding = self._rounding(step)
        total: Integers = np.zeros(1, np.int64)
        for array, quant in zip(inputs, quants, strict=True):
            by = fixed_point(float(np.float32(quant.scale)) / largest, self.requantization.multiplier_bits)
            shifted = (array.astype(np.int64) - quant.zero_point) << SUM_SHIFT
            total = total + requantize(shifted, by, rounding)
        factor = largest / (2.0**SUM_SHIFT * float(np.float32(y.scale)))
        by = fixed_point(factor, self.requantization.multiplier_bits)
        return _int8(np.clip(requantize(total, by, rounding) + y.zero_point, step.lower, step.upper))

    def _product(self, step: QMul, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
        quants, y = [self._quant(name) for name in step.inputs], self._quant(step.output)
        a, b = (x.astype(np.int64) - q.zero_point for x, q in zip(inputs, quants, strict=True))
        # Both scales are multiplied in float32, as the kernel prepares them.
        scale = np.float32(quants[0].scale) * np.float32(quants[1].scale)
        by = fixed_point(float(scale / np.float32(y.scale)), self.requantization.multiplier_bits)
        return _int8(
            np.clip(requantize(a * b, by, self._rounding(step)) + y.zero_point, step.lower, step.upper)
        )

    def _pool(self, step: QPool, x: np.ndarray) -> np.ndarray:
        output, quant = self.program.tensor(step.output), self._quant(step.inputs[0])
        if step.kind == "max":
            return _int8(windows(step, x, quant.bounds[0], output).max(axis=(4, 5)))
        fill = quant.zero_point if step.count_include_pad else 0
        y = self._quant(step.output)
        if as_products(step, quant, y):
            return self._average(step, x, quant, y)
        total = windows(step, x.astype(np.int64), fill, output).sum(axis=(4, 5))
        count = np.full((1, 1, 1, 1), step.kernel[0] * step.kernel[1])
        if not step.count_include_pad:
            count = windows(step, np.ones((1, 1, *x.shape[2:]), np.int64), 0, output).sum(axis=(4, 5))
        # Half is added away from zero, then C's division cuts towards it.
        nearest = np.sign(total) * ((np.abs(total) + count // 2) // count)
        averaged = np.clip(nearest, *quant.bounds)
        if not rescaled_behind(step, quant, y):
            return _int8(averaged)
        factor = float(np.float32(quant.scale)) / float(np.float32(y.scale))
        by = fixed_point(factor, self.requantization.multiplier_bits)
        scaled = requantize(averaged - quant.zero_point, by, self.requantization.rounding) + y.zero_point
        return _int8(np.clip(scaled, *y.bounds))

    def _average(self, step: QPool, x: np.ndarray, quant: QuantParams, y: QuantParams) -> np.ndarray:
        """The sum of a window times one over its size, as a convolution computes it."""
        centred = x.astype(np.int64) - quant.zero_point
        total = windows(step, centred, 0, self.program.tensor(step.output)).sum(axis=(4, 5))
        share = np.float64(np.float32(1 / (step.kernel[0] * step.kernel[1])))
        factor = np.float64(np.float32(quant.scale)) * share / np.float64(np.float32(y.scale))
        by = fixed_point(factor, self.requantization.multiplier_bits)
        rounding = self.requantization.rounding_of.get("Conv", self.requantization.rounding)
        return _int8(np.clip(requantize(total, by, rounding) + y.zero_point, *y.bounds))


def _int8(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.int8)
