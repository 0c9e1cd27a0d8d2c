"""Pooling kernels, channels-last: the loop over channels is innermost and is what LLVM vectorises."""

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
    kernel,
    parallel,
)
from bitwright.compiler.lower.layout import Order
from bitwright.compiler.program.ops import Program, QPool
from bitwright.targets.backend import Kernel


def pool(step: QPool, program: Program, orders: Mapping[str, Order]) -> Kernel:
    """Return the kernel of a maximum or average pooling step."""
    return _maximum(step, program, orders) if step.kind == "max" else _average(step, program, orders)


def _maximum(step: QPool, program: Program, orders: Mapping[str, Order]) -> Kernel:
    dtype = program.tensor(step.output).dtype
    smallest = int(np.iinfo(dtype).min)

    def emit(inputs: list[View], _constants: list[Any], output: View) -> None:
        (source,) = inputs
        channels = output.shape[1]
        with parallel(output.shape[0] * output.shape[2], _work(step, output)) as row:
            best = tir.alloc_buffer((channels,), dtype)
            n, oh = row // output.shape[2], row % output.shape[2]
            with tir.serial(output.shape[3]) as ow:
                with tir.serial(channels) as c:
                    tir.buffer_store(best, tir.cast(tir.int32(smallest), dtype), [c])

                def visit(c: Expr, ih: Expr, iw: Expr) -> None:
                    tir.buffer_store(best, tir.max(best[c], source.at([n, c, ih, iw])), [c])

                _window(step, source.shape, oh, ow, visit)
                with tir.serial(channels) as c:
                    output.store([n, c, oh, ow], best[c])

    details = _geometry(step)
    return kernel("max_pool", program, orders, (step.inputs, step.output), (), emit, details)


def average_multipliers(step: QPool, program: Program) -> np.ndarray:
    """Return float32 [OH, OW]: ``f32(f32(sx / sy) / f32(n))``, n elements averaged at that position."""
    x, y = program.tensor(step.inputs[0]), program.tensor(step.output)
    assert x.quant is not None and y.quant is not None
    counts = [
        _inside(y.shape[2 + d], step.kernel[d], step.strides[d], step.pads[d], x.shape[2 + d]) for d in (0, 1)
    ]
    n = np.outer(counts[0], counts[1])
    if step.count_include_pad:
        n = np.full_like(n, step.kernel[0] * step.kernel[1])
    ratio = np.float32(x.quant.scale) / np.float32(y.quant.scale)
    multipliers: np.ndarray = np.maximum(n, 1).astype(np.float32)
    np.divide(ratio, multipliers, out=multipliers)
    return multipliers


def _inside(out: int, kernel_size: int, stride: int, before: int, size: int) -> np.ndarray:
    positions = np.arange(out)[:, None] * stride - before + np.arange(kernel_size)[None]
    counts: np.ndarray = np.count_nonzero((positions >= 0) & (positions < size), axis=1)
    return counts


def _average(step: QPool, program: Program, orders: Mapping[str, Order]) -> Kernel:
    x, y = program.tensor(step.inputs[0]).quant, program.tensor(step.output).quant
    assert x is not None and y is not None
    zero = np.array([x.zero_point], np.int32)
    scalars = np.array([y.zero_point, *y.bounds], np.float32)
    constants = (average_multipliers(step, program), scalars, zero)

    def emit(inputs: list[View], data: list[Any], output: View) -> None:
        (source,), (multiplier, c, z) = inputs, data
        channels = output.shape[1]
        with parallel(output.shape[0] * output.shape[2], _work(step, output)) as row:
            total = tir.alloc_buffer((channels,), "int32")
            n, oh = row // output.shape[2], row % output.shape[2]
            with tir.serial(output.shape[3]) as ow:
                with tir.serial(channels) as k:
                    tir.buffer_store(total, tir.int32(0), [k])

                def visit(k: Expr, ih: Expr, iw: Expr) -> None:
                    tir.buffer_store(total, total[k] + as_int32(source.at([n, k, ih, iw])) - z[0], [k])

                _window(step, source.shape, oh, ow, visit)
                with tir.serial(channels) as k:
                    real = tir.nearbyint(tir.cast(total[k], "float32") * multiplier[oh, ow]) + c[0]
                    output.store([n, k, oh, ow], clamp_cast(real, c[1], c[2], y.dtype))

    return kernel(
        "average_pool", program, orders, (step.inputs, step.output), constants, emit, _geometry(step)
    )


def _geometry(step: QPool) -> tuple[tuple[int, ...], ...]:
    return (step.kernel, step.strides, step.pads, step.dilations)


def _work(step: QPool, output: View) -> int:
    return int(np.prod(output.shape)) * step.kernel[0] * step.kernel[1]


def _window(step: QPool, shape: tuple[int, ...], oh: Expr, ow: Expr, visit: Any) -> None:
    with tir.serial(step.kernel[0]) as kh, tir.serial(step.kernel[1]) as kw:
        ih = oh * step.strides[0] + kh * step.dilations[0] - step.pads[0]
        iw = ow * step.strides[1] + kw * step.dilations[1] - step.pads[1]
        inside = tir.And(tir.And(ih >= 0, ih < shape[2]), tir.And(iw >= 0, iw < shape[3]))
        with tir.If(inside), tir.Then(), tir.serial(shape[1]) as c:
            visit(c, ih, iw)
