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
    clamp_cast,
    is_nan,
    kernel,
    map_elements,
)
from bitwright.compiler.lower.layout import Order
from bitwright.compiler.program.ops import Dequantize, Program, Quantize
from bitwright.targets.backend import Kernel


def quantize(step: Quantize, program: Program, orders: Mapping[str, Order]) -> Kernel:
    """Return the kernel of ``q = clip(rint(x / s) + z)``; float32 in row-major, integers out in any order."""
    target = program.tensor(step.output)
    assert target.quant is not None
    low, high = target.quant.bounds
    scalars = np.array([target.quant.scale, target.quant.zero_point, low, high], np.float32)

    def emit(inputs: list[View], constants: list[Any], output: View) -> None:
        (c,) = constants

        def one(x: Expr) -> Expr:
            q = clamp_cast(tir.nearbyint(x / c[0]) + c[1], c[2], c[3], target.dtype)
            return tir.Select(is_nan(x), tir.cast(tir.int32(low), target.dtype), q)

        map_elements(inputs[0], output, one)

    return kernel("quantize", program, orders, (step.inputs, step.output), (scalars,), emit)


def dequantize(step: Dequantize, program: Program, orders: Mapping[str, Order]) -> Kernel:
    """Return the kernel of ``x = f32(q - z) * s``; integers in any order, float32 out row-major."""
    quant = program.tensor(step.inputs[0]).quant
    assert quant is not None
    zero, scale = np.array([quant.zero_point], np.int32), np.array([quant.scale], np.float32)

    def emit(inputs: list[View], constants: list[Any], output: View) -> None:
        z, s = constants
        map_elements(inputs[0], output, lambda q: tir.cast(as_int32(q) - z[0], "float32") * s[0])

    return kernel("dequantize", program, orders, (step.inputs, step.output), (zero, scale), emit)
