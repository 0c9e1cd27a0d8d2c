"""The integer reference of the circuits: the program's steps with fixed-point requantization, in numpy.

Sums of products are those of the reference interpreter. What follows them is a multiplier of a few bits and a shift
instead of a float32 multiplication, so results may differ from the Q/DQ model by one step now and then;
:func:`run_fixed` is what the circuits compute, to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.errors import InternalError
from bitwright.compiler.interpret import dot, pool
from bitwright.compiler.interpret.fixed_point import FixedPoint, fixed_point, requantize
from bitwright.compiler.interpret.run import FloatRunner, run_step
from bitwright.compiler.program.ops import (
    Dot,
    FloatIsland,
    Program,
    QAdd,
    QConv,
    QGemm,
    QPool,
    QuantParams,
    Step,
    Tensor,
)


@dataclass(frozen=True)
class AddScales:
    """Both operands of a sum as integers with a common shift.

    Attributes:
        multipliers: (ma, mb); the larger one has all its bits.
        shift: Places that the sum is shifted to the right.
    """

    multipliers: tuple[int, int]
    shift: int


def dot_multipliers(step: Dot, x: QuantParams, y: QuantParams) -> NDArray[np.float32]:
    """Return the real multipliers of a dot product with integer output, one a channel."""
    factor = np.float32(x.scale) * step.weight_scale.astype(np.float32)
    return np.asarray(factor / np.float32(y.scale), np.float32)


def average_multiplier(step: QPool, x: QuantParams, y: QuantParams) -> NDArray[np.float32]:
    """Return the real multiplier of an average whose windows all have the same number of elements."""
    ratio = np.float32(x.scale) / np.float32(y.scale)
    return np.asarray([ratio / np.float32(step.kernel[0] * step.kernel[1])], np.float32)


def add_scales(a: QuantParams, b: QuantParams, y: QuantParams, bits: int) -> AddScales:
    """Return the integers that stand for both operands' scales over the output's."""
    ratios = [np.float32(q.scale) / np.float32(y.scale) for q in (a, b)]
    top = fixed_point(max(ratios), bits)
    shift = int(top.shift)
    first, second = (round(float(r) * 2.0**shift) for r in ratios)
    return AddScales((first, second), shift)


def run_fixed(
    program: Program,
    feeds: Mapping[str, np.ndarray],
    bits: int,
    *,
    float_runner: FloatRunner | None = None,
) -> dict[str, np.ndarray]:
    """Run a whole program with fixed-point requantization.

    Args:
        program: The program.
        feeds: Array for every input name.
        bits: Bits of the multipliers.
        float_runner: Executes float islands.

    Returns:
        Every tensor by name.
    """
    values = dict(program.constants) | dict(feeds)
    for step in program.steps:
        inputs = tuple(values[name] for name in step.inputs)
        if isinstance(step, FloatIsland):
            results = run_step(step, program, inputs, float_runner=float_runner)
        else:
            results = (run_fixed_step(step, program, inputs, bits),)
        values |= zip(step.outputs, results, strict=True)
    return values


def run_fixed_step(step: Step, program: Program, inputs: tuple[np.ndarray, ...], bits: int) -> np.ndarray:
    """Run one integer step; steps without scales are those of the reference interpreter.

    Args:
        step: A step with one output.
        program: Knows the tensors' parameters.
        inputs: One array per input of the step.
        bits: Bits of the multipliers.
    """
    output = program.tensor(step.output)
    match step:
        case QGemm() | QConv() if output.quant is not None:
            return _dot(step, program, inputs[0], output, output.quant, bits)
        case QAdd():
            return _add(step, program, inputs, output, bits)
        case QPool(kind="average"):
            return _average(step, program, inputs[0], output, bits)
    return np.asarray(run_step(step, program, inputs)[0])


def accumulators(step: QGemm | QConv, program: Program, x: np.ndarray) -> np.ndarray:
    """Return the exact sums of a dot product with its integer bias, int64; axis 1 holds the channels."""
    quant, output = _quant(program, step.inputs[0]), program.tensor(step.output)
    match step:
        case QGemm():
            sums = dot.gemm_products(step, x, quant)
        case QConv():
            sums = dot.conv_products(step, x, quant, output)
    return sums if step.bias is None else sums + _along_channels(step.bias.astype(np.int64), sums.ndim)


def _dot(
    step: QGemm | QConv, program: Program, x: np.ndarray, output: Tensor, quant: QuantParams, bits: int
) -> np.ndarray:
    sums = accumulators(step, program, x)
    real = np.broadcast_to(dot_multipliers(step, _quant(program, step.inputs[0]), quant), sums.shape[1:2])
    by = fixed_point(real, bits)
    by = FixedPoint(_along_channels(by.multiplier, sums.ndim), _along_channels(by.shift, sums.ndim), bits)
    values = requantize(sums, by, "half_up") + quant.zero_point
    return np.clip(values, step.lower, step.upper).astype(output.dtype).reshape(output.shape)


def _add(
    step: QAdd, program: Program, inputs: tuple[np.ndarray, ...], output: Tensor, bits: int
) -> np.ndarray:
    a, b, y = (_quant(program, name) for name in (*step.inputs, step.output))
    scales = add_scales(a, b, y, bits)
    centred = [x.astype(np.int64) - q.zero_point for x, q in zip(inputs, (a, b), strict=True)]
    total = centred[0] * scales.multipliers[0] + centred[1] * scales.multipliers[1]
    values = ((total + (1 << (scales.shift - 1))) >> scales.shift) + y.zero_point
    return np.asarray(np.clip(values, step.lower, step.upper), output.dtype)


def _average(step: QPool, program: Program, x: np.ndarray, output: Tensor, bits: int) -> np.ndarray:
    quant, result = _quant(program, step.inputs[0]), _quant(program, step.output)
    sums = pool.windows(step, x.astype(np.int64) - quant.zero_point, 0, output).sum(axis=(4, 5))
    values = requantize(sums, fixed_point(average_multiplier(step, quant, result), bits), "half_up")
    return np.clip(values + result.zero_point, *result.bounds).astype(output.dtype)


def _along_channels(values: np.ndarray, rank: int) -> np.ndarray:
    return values.reshape([-1 if axis == 1 else 1 for axis in range(rank)])


def _quant(program: Program, name: str) -> QuantParams:
    quant = program.tensor(name).quant
    if quant is None:
        what = "an integer step uses a tensor without quantization"
        raise InternalError(what, where=f"tensor '{name}'")
    return quant
