"""Kernels that move integers unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm.tirx.script import builder as tir

from bitwright.compiler.errors import InternalError
from bitwright.compiler.lower.kernels.loops import (
    Expr,
    Index,
    View,
    common_tail,
    for_each,
    kernel,
    map_elements,
)
from bitwright.compiler.lower.kernels.transpose import map_transposed, transposes_in_registers
from bitwright.compiler.lower.layout import Order
from bitwright.compiler.program.ops import Move, Program, QConcat, Tensor
from bitwright.targets.backend import Kernel


def concat(step: QConcat, program: Program, orders: Mapping[str, Order]) -> Kernel:
    """Return the kernel that copies each input to its place along the axis."""
    axis = step.axis % len(program.tensor(step.output).shape)

    def emit(inputs: list[View], _constants: list[Any], output: View) -> None:
        start = 0
        for source in inputs:
            _copy_at(source, output, axis, start)
            start += source.shape[axis]

    return kernel("concat", program, orders, (step.inputs, step.output), (), emit, axis)


def _copy_at(source: View, output: View, axis: int, start: int) -> None:
    # The part of the output that this input fills, as a view: loops and tails then see the input's extents.
    part = View(output.buffer, source.shape, output.order)

    def one(index: Index) -> None:
        moved = [v + start if a == axis else v for a, v in enumerate(index)]
        output.store(moved, source.at(index))

    for_each(source.shape, output.order, common_tail(part, [source]), one)


def reorder(tensor: Tensor, source: Order, target: Order) -> Kernel:
    """Return the kernel that copies a tensor from one storage order to another."""
    before, after = "x", "y"
    shapes = {name: Tensor(name, tensor.shape, tensor.dtype) for name in (before, after)}
    program = Program((before,), (after,), (), shapes)

    def emit(inputs: list[View], _constants: list[Any], output: View) -> None:
        if transposes_in_registers(inputs[0], output):
            map_transposed(inputs[0], output, lambda value: value)
        else:
            map_elements(inputs[0], output, lambda value: value)

    return kernel("reorder", program, {before: source, after: target}, ((before,), after), (), emit)


def move(step: Move, program: Program, orders: Mapping[str, Order]) -> Kernel:
    """Return the kernel of a slice, resize_nearest, pad or expand step.

    Reshape and transpose need no kernel of their own: they relabel bytes that are already in place.

    Raises:
        InternalError: The kind is not known.
    """
    if step.kind == "slice":
        return _gather(step, program, orders, tuple(zip(step.starts, step.steps, strict=True)))
    if step.kind == "resize_nearest":
        return _resize(step, program, orders)
    if step.kind == "pad":
        return _pad(step, program, orders)
    if step.kind == "expand":
        return _gather(step, program, orders, None)
    what = f"no kernel for Move of kind '{step.kind}'"
    raise InternalError(what, where=step.name)


def _gather(
    step: Move, program: Program, orders: Mapping[str, Order], strides: tuple[tuple[int, int], ...] | None
) -> Kernel:
    """Read position ``start + i * stride`` along each axis; without strides broadcast."""

    def emit(inputs: list[View], _constants: list[Any], output: View) -> None:
        (source,) = inputs

        def one(index: Index) -> None:
            pairs = strides or ((0, 1),) * len(index)
            read = [start + i * stride for i, (start, stride) in zip(index, pairs, strict=True)]
            output.store(index, source.at(read))

        for_each(output.shape, output.order, common_tail(output, inputs), one)

    return kernel(step.kind, program, orders, (step.inputs, step.output), (), emit, strides)


def _resize(step: Move, program: Program, orders: Mapping[str, Order]) -> Kernel:
    shape = program.tensor(step.inputs[0]).shape
    same = [
        np.array_equal(index, np.arange(extent)) for index, extent in zip(step.indices, shape, strict=True)
    ]
    tables = tuple(np.asarray(t, np.int32) for t, keep in zip(step.indices, same, strict=True) if not keep)

    def emit(inputs: list[View], constants: list[Any], output: View) -> None:
        remaining = iter(constants)
        table_of = [None if keep else next(remaining) for keep in same]

        def one(index: Index) -> None:
            read = [i if t is None else t[i] for i, t in zip(index, table_of, strict=True)]
            output.store(index, inputs[0].at(read))

        for_each(output.shape, output.order, _kept_tail(output, inputs[0], same), one)

    return kernel("resize_nearest", program, orders, (step.inputs, step.output), tables, emit, same)


def _kept_tail(output: View, source: View, kept: list[bool]) -> int:
    tail = common_tail(output, [source])
    while tail and not all(kept[axis] for axis in output.order[len(output.order) - tail :]):
        tail -= 1
    return tail


def _pad(step: Move, program: Program, orders: Mapping[str, Order]) -> Kernel:
    dtype, shape = program.tensor(step.output).dtype, program.tensor(step.inputs[0]).shape
    before, after = step.pads[: len(shape)], step.pads[len(shape) :]
    padded = [b != 0 or a != 0 for b, a in zip(before, after, strict=True)]

    def emit(inputs: list[View], _constants: list[Any], output: View) -> None:
        def one(index: Index) -> None:
            read = [i - b for i, b in zip(index, before, strict=True)]
            fill = tir.cast(tir.int32(step.fill), dtype)
            output.store(index, tir.if_then_else(_inside(read, shape, padded), inputs[0].at(read), fill))

        for_each(output.shape, output.order, common_tail(output, inputs), one)

    details = (before, after, step.fill)
    return kernel("pad", program, orders, (step.inputs, step.output), (), emit, details)


def _inside(read: Index, shape: tuple[int, ...], padded: list[bool]) -> Expr:
    condition: Expr = tir.boolean(True)
    for i, extent, guarded in zip(read, shape, padded, strict=True):
        if guarded:
            condition = tir.And(condition, tir.And(i >= 0, i < extent))
    return condition
