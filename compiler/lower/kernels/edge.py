"""Kernels between float32 and integers, with the change of storage order fused in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm.tirx.script import builder as tir

from bitwright.compiler.lower.kernels.loops import (
    Expr,
    View,
    as_int32,
    is_nan,
    kernel,
    map_elements,
    map_vectors,
)
from bitwright.compiler.lower.kernels.reciprocal import multiplies_exactly, reciprocal
from bitwright.compiler.lower.kernels.transpose import BLOCK, map_transposed, transposes_in_registers
from bitwright.compiler.lower.layout import Order
from bitwright.compiler.lower.templates.scaffold import held, splat, vector_type
from bitwright.compiler.program.ops import Dequantize, Program, Quantize
from bitwright.targets.backend import Kernel


def quantize(step: Quantize, program: Program, orders: Mapping[str, Order]) -> Kernel:
    """Return the kernel of ``q = clip(rint(x / s) + z)``; float32 in row-major, integers out in any order."""
    target = program.tensor(step.output)
    assert target.quant is not None
    quant, (low, high) = target.quant, target.quant.bounds
    multiplies = multiplies_exactly(quant.scale, quant.zero_point, low, high)
    factors = reciprocal(quant.scale) if multiplies else (quant.scale, 0)
    bounds = (low - quant.zero_point, high - quant.zero_point)
    scalars = np.array([*factors, *bounds], np.float32)
    offset = np.array([quant.zero_point - ROUNDING_BITS], np.int32)

    def emit(inputs: list[View], constants: list[Any], output: View) -> None:
        def integers(x: Expr, lanes: int) -> Expr:
            return _quantized(x, constants, low, lanes, multiplies=multiplies)

        if transposes_in_registers(inputs[0], output):
            map_transposed(inputs[0], output, lambda x: integers(held(x, "float32", BLOCK), BLOCK))
        elif inputs[0].order == output.order:
            map_vectors(
                inputs[0], output, lambda x, lanes: tir.cast(integers(x, lanes), f"{target.dtype}x{lanes}")
            )
        else:
            map_elements(inputs[0], output, lambda x: tir.cast(integers(x, 1), target.dtype))

    tensors = (step.inputs, step.output)
    return kernel("quantize", program, orders, tensors, (scalars, offset), emit, multiplies)


# Adding it to a small float32 leaves the number, rounded half to even, in the lowest bits.
ROUNDING = 12582912.0
ROUNDING_BITS = int(np.float32(ROUNDING).view(np.int32))


def _quantized(x: Expr, constants: list[Any], low: int, lanes: int, *, multiplies: bool) -> Expr:
    """Return quantized values as int32; ``constants`` hold the factors and the bounds, and the offset."""
    scalars, offset = constants
    factor, rest, least, most = (splat(scalars[i], lanes) for i in range(4))
    real = vector_type("float32", lanes)
    quotient = (
        tir.call_llvm_pure_intrin("llvm.fma", x, factor, x * rest, dtype=real) if multiplies else x / factor
    )
    rounded = tir.max(tir.min(quotient, most), least) + splat(tir.float32(ROUNDING), lanes)
    integers = tir.reinterpret(rounded, dtype=vector_type("int32", lanes)) + splat(offset[0], lanes)
    return tir.Select(is_nan(x, lanes), splat(tir.int32(low), lanes), integers)


def dequantize(step: Dequantize, program: Program, orders: Mapping[str, Order]) -> Kernel:
    """Return the kernel of ``x = f32(q - z) * s``; integers in any order, float32 out row-major."""
    quant = program.tensor(step.inputs[0]).quant
    assert quant is not None
    zero, scale = np.array([quant.zero_point], np.int32), np.array([quant.scale], np.float32)

    def emit(inputs: list[View], constants: list[Any], output: View) -> None:
        z, s = constants
        if transposes_in_registers(inputs[0], output):
            map_transposed(
                inputs[0],
                output,
                lambda q: tir.cast(q - splat(z[0], BLOCK), f"float32x{BLOCK}") * splat(s[0], BLOCK),
            )
            return
        map_elements(inputs[0], output, lambda q: tir.cast(as_int32(q) - z[0], "float32") * s[0])

    return kernel("dequantize", program, orders, (step.inputs, step.output), (zero, scale), emit)
