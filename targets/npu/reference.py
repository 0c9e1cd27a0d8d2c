"""What integer steps compute on this target: the interpreter's formulas, products requantized in fixed point."""

from __future__ import annotations

import numpy as np

from bitwright.compiler.errors import InternalError
from bitwright.compiler.interpret.dot import conv_products, gemm_products
from bitwright.compiler.interpret.fixed_point import FixedPoint, requantize
from bitwright.compiler.interpret.run import Arrays, run_step
from bitwright.compiler.program.ops import Dot, Program, QConv, QGemm, Step
from bitwright.targets.npu.problem import multipliers


def reference_step(step: Step, program: Program, inputs: Arrays) -> np.ndarray:
    """Return what an integer step computes from given inputs.

    Raises:
        PerformanceGateError: A product's output is float.
        InternalError: The step has no meaning here.
    """
    if isinstance(step, Dot):
        return reference_dot(step, program, inputs[0])
    (output,) = run_step(step, program, inputs)
    return output


def reference_dot(step: Dot, program: Program, x: np.ndarray) -> np.ndarray:
    """Return ``clip(((sum * multiplier + 2^(shift-1)) >> shift) + zero point)``; the sum is exact, bias included."""
    source, output = program.tensor(step.inputs[0]).quant, program.tensor(step.output)
    if source is None or output.quant is None:
        what = "a product on the array has integer inputs and outputs"
        raise InternalError(what, where=step.name)
    sums = (
        conv_products(step, x, source, output)
        if isinstance(step, QConv)
        else gemm_products(_gemm(step), x, source)
    )
    shape = (1, -1, *([1] * (sums.ndim - 2)))  # both have their channels in axis 1
    if step.bias is not None:
        sums = sums + step.bias.astype(np.int64).reshape(shape)
    by = multipliers(step, program)
    wide = FixedPoint(by.multiplier.reshape(shape), by.shift.reshape(shape), by.bits)
    moved = requantize(sums, wide, "half_up") + output.quant.zero_point
    return np.asarray(np.clip(moved, step.lower, step.upper), output.dtype).reshape(output.shape)


def _gemm(step: Dot) -> QGemm:
    assert isinstance(step, QGemm)
    return step
