"""Kernels of integer additions, products and table look-ups, with numpy broadcasting in any storage order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tvm.tirx.script import builder as tir

from bitwright.compiler.lower.kernels.loops import (
    Expr,
    View,
    as_float,
    as_int32,
    clamp_cast,
    common_tail,
    fma,
    for_each,
    kernel,
    map_elements,
)
from bitwright.compiler.lower.layout import Order
from bitwright.compiler.program.ops import Program, QAdd, QLut, QMul, QuantParams, Step
from bitwright.targets.backend import Kernel


def _params(step: Step, program: Program) -> tuple[QuantParams, QuantParams, QuantParams]:
    a, b, y = (program.tensor(name).quant for name in (*step.inputs, step.output))
    assert a is not None and b is not None and y is not None
    return a, b, y


def add_scalars(step: QAdd, program: Program) -> np.ndarray:
    """Return float32 [ra, rb, c, lower, upper] of the formula in :class:`QAdd`."""
    a, b, y = _params(step, program)
    f32 = np.float32
    ra, rb = f32(a.scale) / f32(y.scale), f32(b.scale) / f32(y.scale)
    c = f32(y.zero_point) - (ra * f32(a.zero_point) + rb * f32(b.zero_point))
    return np.array([ra, rb, c, step.lower, step.upper], np.float32)


def _binary(output: View, inputs: list[View], function: Callable[[Expr, Expr], Expr]) -> None:
    first, second = inputs
    tail = common_tail(output, inputs)
    for_each(output.shape, output.order, tail, lambda i: output.store(i, function(first.at(i), second.at(i))))


def add(step: QAdd, program: Program, orders: Mapping[str, Order]) -> Kernel:
    """Return the kernel of ``clip(rint(fma(a, ra, fma(b, rb, c))), lower, upper)``."""
    dtype = program.tensor(step.output).dtype

    def emit(inputs: list[View], constants: list[Any], output: View) -> None:
        (c,) = constants

        def one(a: Expr, b: Expr) -> Expr:
            total = fma(as_float(a), c[0], fma(as_float(b), c[1], c[2]))
            return clamp_cast(tir.nearbyint(total), c[3], c[4], dtype)

        _binary(output, inputs, one)

    tensors = (step.inputs, step.output)
    return kernel("add", program, orders, tensors, (add_scalars(step, program),), emit)


def multiply(step: QMul, program: Program, orders: Mapping[str, Order]) -> Kernel:
    """Return the kernel of ``clip(rint(f32((a - za) * (b - zb)) * m) + zy, lower, upper)``."""
    a, b, y = _params(step, program)
    m = (np.float32(a.scale) * np.float32(b.scale)) / np.float32(y.scale)
    scalars = np.array([m, y.zero_point, step.lower, step.upper], np.float32)
    zeros = np.array([a.zero_point, b.zero_point], np.int32)

    def emit(inputs: list[View], constants: list[Any], output: View) -> None:
        c, z = constants

        def one(left: Expr, right: Expr) -> Expr:
            product = (as_int32(left) - z[0]) * (as_int32(right) - z[1])
            real = tir.nearbyint(tir.cast(product, "float32") * c[0]) + c[1]
            return clamp_cast(real, c[2], c[3], y.dtype)

        _binary(output, inputs, one)

    return kernel("multiply", program, orders, (step.inputs, step.output), (scalars, zeros), emit)


def look_up(step: QLut, program: Program, orders: Mapping[str, Order]) -> Kernel:
    """Return the kernel of ``table[q - qmin]``."""
    smallest = int(np.iinfo(program.tensor(step.inputs[0]).dtype).min)
    table = np.ascontiguousarray(step.table, program.tensor(step.output).dtype)

    def emit(inputs: list[View], constants: list[Any], output: View) -> None:
        map_elements(inputs[0], output, lambda q: constants[0][as_int32(q) - smallest], vectors=False)

    return kernel("look_up", program, orders, (step.inputs, step.output), (table,), emit)
