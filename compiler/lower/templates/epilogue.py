"""From int32 accumulators to output values: the one expression every runtime must reproduce bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.scaffold import Buffer, Expr, load, splat, vector_type
from bitwright.compiler.program.ops import Dot, Program


@dataclass(frozen=True)
class Epilogue:
    """What happens to an accumulator; everything in it is compiled into the function.

    Attributes:
        dtype: Output element type: ``uint8``, ``int8`` or ``float32``.
        zero_point: Of an integer output.
        lower, upper: Clamp of an integer output.
        relu: Clamp of a float output at 0.
        float_bias: A float bias array is among the constants.
    """

    dtype: str
    zero_point: int = 0
    lower: int = 0
    upper: int = 0
    relu: bool = False
    float_bias: bool = False


def epilogue_of(step: Dot, program: Program) -> Epilogue:
    """Return the epilogue of a step."""
    output = program.tensor(step.output)
    if output.quant is None:
        return Epilogue("float32", relu=step.relu, float_bias=step.float_bias is not None)
    return Epilogue(output.quant.dtype, output.quant.zero_point, step.lower, step.upper)


def channel_constants(step: Dot, program: Program, shift: int) -> dict[str, np.ndarray]:
    """Return the per-channel arrays [O] of the epilogue: folded bias int32, multiplier float32, float bias.

    The bias takes back the zero point and the shift: ``bias - (zx + shift) * sum_k w[o, k]``, modulo 2^32.

    Args:
        step: The dot product.
        program: For the scales of its tensors.
        shift: What staging adds to the activations, see ``Staging.shift``.
    """
    quant, out = program.tensor(step.inputs[0]).quant, program.tensor(step.output).quant
    assert quant is not None
    axes = 0 if step.weight.ndim == 2 else (1, 2, 3)
    bias = -(quant.zero_point + shift) * step.weight.sum(axis=axes, dtype=np.int64)
    if step.bias is not None:
        bias = bias + step.bias
    multiplier = np.float32(quant.scale) * step.weight_scale.astype(np.float32)
    if out is not None:
        multiplier = multiplier / np.float32(out.scale)
    arrays = {"bias": bias.astype(np.int32), "multiplier": multiplier.astype(np.float32)}
    if out is None and step.float_bias is not None:
        arrays["float_bias"] = step.float_bias.astype(np.float32)
    return arrays


def emit_epilogue(
    epilogue: Epilogue, accumulator: Expr, constants: list[Buffer], channel: Expr, lanes: int
) -> Expr:
    """Return the output values of ``lanes`` neighbouring channels.

    Args:
        epilogue: What to compute.
        accumulator: int32 vector without the bias.
        constants: Flat buffers in the order of ``channel_constants``.
        channel: Index of the first channel in those buffers.
        lanes: Number of channels.
    """
    bias, multiplier, *rest = (load(c, [channel], lanes) for c in constants)
    total = T.cast(accumulator + bias, vector_type("float32", lanes))
    if epilogue.dtype == "float32":
        addend = rest[0] if rest else splat(T.float32(0), lanes)
        # Spelled as the LLVM intrinsic: a product and a sum would round once or twice as the CPU pleases.
        value = T.call_llvm_pure_intrin(
            "llvm.fma", total, multiplier, addend, dtype=vector_type("float32", lanes)
        )
        return T.max(value, splat(T.float32(0), lanes)) if epilogue.relu else value
    low, high = (float(bound - epilogue.zero_point) for bound in (epilogue.lower, epilogue.upper))
    rounded = T.nearbyint(total * multiplier)
    clamped = T.max(T.min(rounded, splat(T.float32(high), lanes)), splat(T.float32(low), lanes))
    shifted = T.cast(clamped, vector_type("int32", lanes)) + splat(T.int32(epilogue.zero_point), lanes)
    return T.cast(shifted, vector_type(epilogue.dtype, lanes))
