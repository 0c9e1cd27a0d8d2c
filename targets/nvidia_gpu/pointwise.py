"""Integer steps that are no dot products, on a GPU: every thread computes a few neighbouring elements of the output.

The formulas are those of the integer program, operation by operation through ``device.cuh``: nvcc can neither fuse nor
reorder them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm.tirx.script import builder as tir

from bitwright.compiler.errors import InternalError
from bitwright.compiler.lower.kernels.elementwise import add_scalars
from bitwright.compiler.lower.kernels.loops import Expr, Index, View, kernel
from bitwright.compiler.lower.kernels.pool import average_multipliers
from bitwright.compiler.lower.layout import Order, physical_shape
from bitwright.compiler.program.ops import (
    Dequantize,
    Move,
    Program,
    QAdd,
    QConcat,
    QLut,
    QMul,
    QPool,
    Quantize,
    QuantParams,
    Step,
    Tensor,
)
from bitwright.targets.backend import Kernel
from bitwright.targets.nvidia_gpu.mma_device import WARP, act, pointer, registers, thread_block, value

THREADS = 256
WORD = 4  # bytes of an element each, written at once
ROW = "cuda"

Element = Callable[[list[View], list[Any], Index], Expr]


def step_kernel(step: Step, program: Program, orders: Mapping[str, Order]) -> Kernel:
    """Return the kernel of a pooling, elementwise, moving or quantizing step.

    Raises:
        InternalError: The step is of another kind.
    """
    build = _BUILDERS.get(type(step))
    if build is None:
        msg = f"no kernel for {type(step).__name__}"
        raise InternalError(msg, where=step.name)
    return build(step, program, orders)


def reorder(tensor: Tensor, source: Order, target: Order) -> Kernel:
    """Return the kernel that copies a tensor from one storage order to another."""
    shapes = {name: Tensor(name, tensor.shape, tensor.dtype) for name in ("x", "y")}
    program = Program(("x",), ("y",), (), shapes)
    orders = {"x": source, "y": target}
    return _kernel("reorder", (("x",), "y"), program, orders, (), lambda x, _, i: x[0].at(i))


def _kernel(
    operation: str,
    tensors: tuple[tuple[str, ...], str],
    program: Program,
    orders: Mapping[str, Order],
    constants: Sequence[np.ndarray],
    element: Element,
    details: object = (),
) -> Kernel:
    """Build a kernel whose threads compute elements one by one.

    Args:
        operation: Names the family in the key.
        tensors: Names of the activations, and of the output.
        program: Supplies shapes and dtypes.
        orders: Storage order by tensor name.
        constants: Constant arguments.
        element: Gives the value at a logical index of the output, from views of the activations and the constants'
            buffers.
        details: Everything else that the code depends on.
    """

    def emit(views: list[View], data: list[Any], output: View) -> None:
        extents = physical_shape(output.shape, output.order)
        total = math.prod(extents)
        bytes_each = np.dtype(str(output.buffer.dtype)).itemsize
        packed = bytes_each == 1 and total % WORD == 0
        per = WORD if packed else 1
        count = total // per
        with thread_block([-(-count // THREADS)], THREADS) as ((block,), thread):
            item = block * THREADS + thread
            with tir.If(item < count), tir.Then():

                def at(flat: Expr) -> Expr:
                    return element(views, data, _logical(flat, extents, output.order))

                if packed:
                    _store_word(output, item * per, at)
                else:
                    index = _logical(item, extents, output.order)
                    output.store(index, at(item))

    made = kernel(operation, program, orders, tensors, constants, emit, details)
    return replace(made, key=f"gpu {made.key}", intrinsic=ROW)


def _store_word(output: View, first: Expr, at: Callable[[Expr], Expr]) -> None:
    """Write four neighbouring bytes."""
    word = registers(1, "int32")
    tir.buffer_store(word, tir.int32(0), [0])
    for k in range(WORD):
        byte = tir.bitwise_and(tir.cast(at(first + k), "int32"), tir.int32(255))
        tir.buffer_store(word, tir.bitwise_or(word[0], tir.shift_left(byte, tir.int32(8 * k))), [0])
    extents = [int(e) for e in output.buffer.shape]
    act("bw_store_word", pointer(output.buffer, _physical(first, extents)), word[0])


def _physical(flat: Expr, extents: Sequence[int]) -> Index:
    index: Index = []
    for position in range(len(extents) - 1, -1, -1):
        index.insert(0, flat if position == 0 else flat % extents[position])
        flat = flat // extents[position]
    return index


def _logical(flat: Expr, extents: Sequence[int], order: Order) -> Index:
    index: Index = [None] * len(order)
    for variable, axis in zip(_physical(flat, extents), order, strict=True):
        index[axis] = variable
    return index


def _as_int(x: Expr) -> Expr:
    return tir.cast(x, "int32")


def _as_float(x: Expr) -> Expr:
    return tir.cast(_as_int(x), "float32")


def _rounded(real: Expr, lower: Expr, upper: Expr, zero: Expr) -> Expr:
    """Return ``clip(rint(real), lower, upper) + zero`` as int32: the bounds are integers, so clipping may come first.

    NaN becomes the lower bound.
    """
    clipped = tir.min(tir.max(real, lower), upper)
    return value("bw_round", clipped, dtype="int32") + zero


def _fma(a: Expr, b: Expr, c: Expr) -> Expr:
    return value("bw_fma", a, b, c, dtype="float32")


def _times(a: Expr, b: Expr) -> Expr:
    return value("bw_multiply", a, b, dtype="float32")


def _quant(program: Program, name: str) -> QuantParams:
    quant = program.tensor(name).quant
    assert quant is not None
    return quant


def _names(step: Step) -> tuple[tuple[str, ...], str]:
    return step.inputs, step.output


def _quantize(step: Step, program: Program, orders: Mapping[str, Order]) -> Kernel:
    quant = _quant(program, step.output)
    low, high = (bound - quant.zero_point for bound in quant.bounds)
    scalars, zero = np.array([quant.scale, low, high], np.float32), np.array([quant.zero_point], np.int32)

    def element(x: list[View], data: list[Any], index: Index) -> Expr:
        c, z = data
        real = value("bw_divide", x[0].at(index), c[0], dtype="float32")
        return tir.cast(_rounded(real, c[1], c[2], z[0]), quant.dtype)

    return _kernel("quantize", _names(step), program, orders, (scalars, zero), element)


def _dequantize(step: Step, program: Program, orders: Mapping[str, Order]) -> Kernel:
    quant = _quant(program, step.inputs[0])
    scale, zero = np.array([quant.scale], np.float32), np.array([quant.zero_point], np.int32)

    def element(x: list[View], data: list[Any], index: Index) -> Expr:
        s, z = data
        return _times(tir.cast(_as_int(x[0].at(index)) - z[0], "float32"), s[0])

    return _kernel("dequantize", _names(step), program, orders, (scale, zero), element)


def _add(step: Step, program: Program, orders: Mapping[str, Order]) -> Kernel:
    assert isinstance(step, QAdd)
    dtype = program.tensor(step.output).dtype

    def element(x: list[View], data: list[Any], index: Index) -> Expr:
        (c,) = data
        a, b = (_as_float(view.at(index)) for view in x)
        return tir.cast(_rounded(_fma(a, c[0], _fma(b, c[1], c[2])), c[3], c[4], tir.int32(0)), dtype)

    return _kernel("add", _names(step), program, orders, (add_scalars(step, program),), element)


def _multiply(step: Step, program: Program, orders: Mapping[str, Order]) -> Kernel:
    assert isinstance(step, QMul)
    a, b, y = (_quant(program, name) for name in (*step.inputs, step.output))
    m = (np.float32(a.scale) * np.float32(b.scale)) / np.float32(y.scale)
    bounds = [step.lower - y.zero_point, step.upper - y.zero_point]
    scalars = np.array([m, *bounds], np.float32)
    zeros = np.array([a.zero_point, b.zero_point, y.zero_point], np.int32)

    def element(x: list[View], data: list[Any], index: Index) -> Expr:
        c, z = data
        product = (_as_int(x[0].at(index)) - z[0]) * (_as_int(x[1].at(index)) - z[1])
        real = _times(tir.cast(product, "float32"), c[0])
        return tir.cast(_rounded(real, c[1], c[2], z[2]), y.dtype)

    return _kernel("multiply", _names(step), program, orders, (scalars, zeros), element)


def _look_up(step: Step, program: Program, orders: Mapping[str, Order]) -> Kernel:
    assert isinstance(step, QLut)
    smallest = int(np.iinfo(program.tensor(step.inputs[0]).dtype).min)
    table = np.ascontiguousarray(step.table, program.tensor(step.output).dtype)

    def element(x: list[View], data: list[Any], index: Index) -> Expr:
        return data[0][_as_int(x[0].at(index)) - smallest]

    return _kernel("look_up", _names(step), program, orders, (table,), element)


def _concat(step: Step, program: Program, orders: Mapping[str, Order]) -> Kernel:
    assert isinstance(step, QConcat)
    axis = step.axis % len(program.tensor(step.output).shape)

    def element(x: list[View], _: list[Any], index: Index) -> Expr:
        ends = np.cumsum([view.shape[axis] for view in x]).tolist()
        starts = [0, *ends[:-1]]
        parts = [
            view.at([v - start if a == axis else v for a, v in enumerate(index)])
            for view, start in zip(x, starts, strict=True)
        ]
        found = parts[-1]
        for part, end in reversed(list(zip(parts[:-1], ends[:-1], strict=True))):
            found = tir.if_then_else(index[axis] < end, part, found)
        return found

    return _kernel("concat", _names(step), program, orders, (), element, axis)


def _move(step: Step, program: Program, orders: Mapping[str, Order]) -> Kernel:
    assert isinstance(step, Move)
    builders = {"slice": _slice, "expand": _slice, "resize_nearest": _resize, "pad": _pad}
    if step.kind not in builders:
        msg = f"no kernel for Move of kind '{step.kind}'"
        raise InternalError(msg, where=step.name)
    return builders[step.kind](step, program, orders)


def _slice(step: Move, program: Program, orders: Mapping[str, Order]) -> Kernel:
    """Read position ``start + i * stride`` along each axis; an expansion has neither and broadcasts."""
    pairs = tuple(zip(step.starts, step.steps, strict=True)) if step.kind == "slice" else ()

    def element(x: list[View], _: list[Any], index: Index) -> Expr:
        read = [
            start + i * stride
            for i, (start, stride) in zip(index, pairs or ((0, 1),) * len(index), strict=True)
        ]
        return x[0].at(read)

    return _kernel(step.kind, _names(step), program, orders, (), element, pairs)


def _resize(step: Move, program: Program, orders: Mapping[str, Order]) -> Kernel:
    tables = tuple(np.asarray(table, np.int32) for table in step.indices)

    def element(x: list[View], data: list[Any], index: Index) -> Expr:
        return x[0].at([table[i] for i, table in zip(index, data, strict=True)])

    return _kernel("resize_nearest", _names(step), program, orders, tables, element)


def _pad(step: Move, program: Program, orders: Mapping[str, Order]) -> Kernel:
    shape, dtype = program.tensor(step.inputs[0]).shape, program.tensor(step.output).dtype
    before, after = step.pads[: len(shape)], step.pads[len(shape) :]

    def element(x: list[View], _: list[Any], index: Index) -> Expr:
        read = [i - b for i, b in zip(index, before, strict=True)]
        inside: Expr = tir.boolean(True)
        for i, extent, b, a in zip(read, shape, before, after, strict=True):
            if b or a:
                inside = tir.And(inside, tir.And(i >= 0, i < extent))
        return tir.if_then_else(inside, x[0].at(read), tir.cast(tir.int32(step.fill), dtype))

    return _kernel("pad", _names(step), program, orders, (), element, (before, after, step.fill))


def _pool(step: Step, program: Program, orders: Mapping[str, Order]) -> Kernel:
    assert isinstance(step, QPool)
    return (_maximum if step.kind == "max" else _average)(step, program, orders)


def _lanes(step: QPool) -> int:
    """Return how many threads share a window: a warp where one would wait for its loads one after the other."""
    return WARP if math.prod(step.kernel) >= WARP else 1


def _window(step: QPool, source: View, index: Index, visit: Callable[[Expr], None]) -> None:
    """Emit a loop over the elements of a window that lie inside the image; a thread of several takes its share."""
    lanes, size = _lanes(step), math.prod(step.kernel)
    n, c, oh, ow, lane = index
    with tir.serial(-(-size // lanes)) as turn:
        at = turn * lanes + lane
        ih = oh * step.strides[0] + at // step.kernel[1] * step.dilations[0] - step.pads[0]
        iw = ow * step.strides[1] + at % step.kernel[1] * step.dilations[1] - step.pads[1]
        inside = tir.And(tir.And(ih >= 0, ih < source.shape[2]), tir.And(iw >= 0, iw < source.shape[3]))
        with tir.If(tir.And(at < size, inside)), tir.Then():
            visit(_as_int(source.at([n, c, ih, iw])))


def _joined(step: QPool, result: Any, join: Callable[[Expr, Expr], Expr]) -> None:
    """Emit the exchange after which every thread of a window has the whole result."""
    offset = _lanes(step) // 2
    while offset:
        other = registers(1, "int32")
        tir.buffer_store(other, value("bw_shuffle_xor_int", result[0], tir.int32(offset), dtype="int32"), [0])
        tir.buffer_store(result, join(result[0], other[0]), [0])
        offset //= 2


def _window_kernel(
    step: QPool,
    program: Program,
    orders: Mapping[str, Order],
    constants: Sequence[np.ndarray],
    element: Element,
) -> Kernel:
    """Build a kernel whose threads, or warps, each compute one element; the index ends with the thread's lane."""
    lanes = _lanes(step)

    def emit(views: list[View], data: list[Any], output: View) -> None:
        extents = physical_shape(output.shape, output.order)
        count = math.prod(extents) * lanes
        with thread_block([-(-count // THREADS)], THREADS) as ((block,), thread):
            item = block * THREADS + thread
            # Whole warps pass or not: their threads exchange results.
            with tir.If(item < count), tir.Then():
                index = _logical(item // lanes, extents, output.order)
                found = element(views, data, [*index, item % lanes])
                if lanes == 1:
                    output.store(index, found)
                else:
                    with tir.If(item % lanes == 0), tir.Then():
                        output.store(index, found)

    details = (step.kernel, step.strides, step.pads, step.dilations)
    made = kernel(f"{step.kind}_pool", program, orders, _names(step), constants, emit, details)
    return replace(made, key=f"gpu {made.key}", intrinsic=ROW)


def _maximum(step: QPool, program: Program, orders: Mapping[str, Order]) -> Kernel:
    dtype = program.tensor(step.output).dtype
    smallest = int(np.iinfo(dtype).min)

    def element(x: list[View], _: list[Any], index: Index) -> Expr:
        best = registers(1, "int32")
        tir.buffer_store(best, tir.int32(smallest), [0])
        _window(step, x[0], index, lambda q: tir.buffer_store(best, tir.max(best[0], q), [0]))
        _joined(step, best, tir.max)
        return tir.cast(best[0], dtype)

    return _window_kernel(step, program, orders, (), element)


def _average(step: QPool, program: Program, orders: Mapping[str, Order]) -> Kernel:
    x_quant, y_quant = _quant(program, step.inputs[0]), _quant(program, step.output)
    bounds = [bound - y_quant.zero_point for bound in y_quant.bounds]
    zeros = np.array([x_quant.zero_point, y_quant.zero_point], np.int32)
    constants = (average_multipliers(step, program), np.array(bounds, np.float32), zeros)

    def element(x: list[View], data: list[Any], index: Index) -> Expr:
        multiplier, c, z = data
        total = registers(1, "int32")
        tir.buffer_store(total, tir.int32(0), [0])
        _window(step, x[0], index, lambda q: tir.buffer_store(total, total[0] + q - z[0], [0]))
        _joined(step, total, lambda a, b: a + b)
        real = _times(tir.cast(total[0], "float32"), multiplier[index[2], index[3]])
        return tir.cast(_rounded(real, c[0], c[1], z[1]), y_quant.dtype)

    return _window_kernel(step, program, orders, constants, element)


_BUILDERS: dict[type[Step], Callable[[Any, Program, Mapping[str, Order]], Kernel]] = {
    Quantize: _quantize,
    Dequantize: _dequantize,
    QAdd: _add,
    QMul: _multiply,
    QLut: _look_up,
    QConcat: _concat,
    QPool: _pool,
    Move: _move,
}
