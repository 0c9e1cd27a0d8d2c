"""The reference interpreter: what the integer program computes, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import DataError, InternalError
from bitwright.compiler.interpret import dot, move, pointwise, pool
from bitwright.compiler.interpret.attention import cached_attention
from bitwright.compiler.interpret.weight_only import weight_only_dot
from bitwright.compiler.program.affine import dequantize, quantize
from bitwright.compiler.program.ops import (
    CachedAttention,
    Dequantize,
    FloatIsland,
    Move,
    Program,
    QAdd,
    QConcat,
    QConv,
    QGemm,
    QLut,
    QMul,
    QPool,
    Quantize,
    QuantParams,
    Step,
    WeightOnlyDot,
)

FloatRunner = Callable[[ir.Model, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
Arrays = tuple[np.ndarray, ...]


def run_program(
    program: Program,
    feeds: Mapping[str, np.ndarray],
    *,
    float_runner: FloatRunner | None = None,
    keep: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """Run a whole program.

    Args:
        program: The program.
        feeds: Array for every input name, of its exact shape and dtype.
        float_runner: Executes the model of a float island; ONNX Runtime without optimizations by default.
            Pass one :class:`~bitwright.compiler.interpret.island.OrtRunner` to keep sessions over many calls.
        keep: Further tensor names to return.

    Returns:
        The outputs and the tensors in ``keep``, by name.

    Raises:
        DataError: A feed is missing, unknown, or of another shape or dtype.
    """
    _check_feeds(program, feeds)
    values = dict(program.constants) | dict(feeds)
    wanted = {*program.outputs, *keep}
    remaining = _reader_counts(program)
    for step in program.steps:
        inputs = tuple(values[name] for name in step.inputs)
        if isinstance(step, FloatIsland) and float_runner is None:
            float_runner = _default_runner()
        values |= zip(step.outputs, run_step(step, program, inputs, float_runner=float_runner), strict=True)
        for name in step.inputs:
            remaining[name] -= 1
            if not remaining[name] and name not in wanted:
                values.pop(name, None)
    return {name: values[name] for name in (*program.outputs, *(n for n in keep if n not in program.outputs))}


def run_step(
    step: Step, program: Program, inputs: Arrays, *, float_runner: FloatRunner | None = None
) -> Arrays:
    """Run one step on given inputs, e.g. on inputs that another runtime recorded.

    Args:
        step: A step of ``program``.
        program: Knows the tensors' parameters.
        inputs: One array per input of the step, in order.
        float_runner: As for :func:`run_program`.

    Returns:
        One array per output of the step, in order.

    Raises:
        InternalError: The step is of a kind that has no meaning here.
    """
    if isinstance(step, FloatIsland):
        found = (float_runner or _default_runner())(step.model, dict(zip(step.inputs, inputs, strict=True)))
        return tuple(np.asarray(found[name]) for name in step.outputs)
    if isinstance(step, CachedAttention):
        return cached_attention(step, inputs)
    return (_integer_step(step, program, inputs),)


def _integer_step(step: Step, program: Program, inputs: Arrays) -> np.ndarray:
    """Run a step with one output."""
    output = program.tensor(step.output)
    match step:
        case Quantize():
            return quantize(inputs[0], _quant(program, step.output))
        case Dequantize():
            return dequantize(inputs[0], _quant(program, step.inputs[0]))
        case QGemm():
            return dot.gemm(step, inputs[0], _quant(program, step.inputs[0]), output)
        case QConv():
            return dot.conv(step, inputs[0], _quant(program, step.inputs[0]), output)
        case WeightOnlyDot():
            return weight_only_dot(step, inputs[0])
        case QAdd():
            return pointwise.add(step, (inputs[0], inputs[1]), _pair(program, step), output)
        case QMul():
            return pointwise.mul(step, (inputs[0], inputs[1]), _pair(program, step), output)
        case QLut():
            return pointwise.lookup(step, inputs[0])
        case QPool():
            return pool.pool(step, inputs[0], _quant(program, step.inputs[0]), output)
        case QConcat():
            return move.concat(step, inputs)
        case Move():
            return move.move(step, inputs[0], output)
    what = f"the interpreter knows no {type(step).__name__}"
    raise InternalError(what, where=f"step '{step.name}'")


def _quant(program: Program, name: str) -> QuantParams:
    quant = program.tensor(name).quant
    if quant is None:
        what = "an integer step uses a tensor without quantization"
        raise InternalError(what, where=f"tensor '{name}'")
    return quant


def _pair(program: Program, step: Step) -> tuple[QuantParams, QuantParams]:
    return _quant(program, step.inputs[0]), _quant(program, step.inputs[1])


def _default_runner() -> FloatRunner:
    from bitwright.compiler.interpret.island import OrtRunner

    return OrtRunner()


def _reader_counts(program: Program) -> dict[str, int]:
    counts: dict[str, int] = {}
    for step in program.steps:
        for name in step.inputs:
            counts[name] = counts.get(name, 0) + 1
    return counts


def _check_feeds(program: Program, feeds: Mapping[str, np.ndarray]) -> None:
    """Refuse feeds that do not match the program's inputs exactly."""
    if set(feeds) != set(program.inputs):
        what = f"the program's inputs are {sorted(program.inputs)}, given are {sorted(feeds)}"
        raise DataError(what)
    for name in program.inputs:
        tensor, array = program.tensor(name), feeds[name]
        if array.shape != tensor.shape or array.dtype.name != tensor.dtype:
            what = f"expected {tensor.dtype} {list(tensor.shape)}, got {array.dtype.name} {list(array.shape)}"
            raise DataError(
                what,
                where=f"input '{name}'",
                fix="convert the data to the model's input type and fixed shape",
            )
