"""Building blocks of the target-neutral kernels: buffers, loop nests and exact float32 primitives.

Scalars that depend on scales are passed in constant buffers and never baked into the code. That lets steps
with different scales share one function, and it keeps divisions: TVM rewrites division by a literal into
multiplication by its reciprocal, which rounds differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as tir

from bitwright.compiler.lower.layout import Order, physical_shape
from bitwright.compiler.lower.templates.root_block import with_root_block
from bitwright.compiler.lower.templates.scaffold import for_span, load, splat, store, vector_type
from bitwright.compiler.program.ops import Program
from bitwright.targets.backend import Kernel

Expr: TypeAlias = Any  # tvm.tirx expressions are untyped
Index: TypeAlias = list[Any]

# relax.op_pattern_kind kOpaque: Relax must not fuse float code into an integer kernel, nor two of them into
# one.
OPAQUE = 8
# Fewer elements are done before threads have started.
PARALLEL_MIN_ELEMENTS = 1 << 15
TASK_ELEMENTS, MAX_TASKS = 8192, 64
# Elements of a vector along a row, widest first: more than a register holds is several registers.
ROW_VECTORS = (32, 16)
VECTOR_LANES = 16


@dataclass(frozen=True)
class View:
    """A buffer of a kernel and how the logical tensor lies in it.

    Attributes:
        buffer: The TensorIR buffer, of physical shape.
        shape: Logical shape.
        order: Storage order.
    """

    buffer: Any
    shape: tuple[int, ...]
    order: Order

    def at(self, index: Sequence[Expr]) -> Expr:
        """Return the element at a logical index of a tensor this one broadcasts to (numpy rules)."""
        missing = len(index) - len(self.shape)
        axes = [0 if self.shape[a] == 1 else index[a + missing] for a in self.order]
        return self.buffer[tuple(axes)]

    def store(self, index: Sequence[Expr], value: Expr) -> None:
        """Write one element at a logical index."""
        tir.buffer_store(self.buffer, value, [index[a] for a in self.order])


Emit: TypeAlias = Callable[[list[View], list[Any], View], None]


def kernel(
    operation: str,
    program: Program,
    orders: Mapping[str, Order],
    tensors: tuple[tuple[str, ...], str],
    constants: Sequence[np.ndarray],
    emit: Emit,
    details: object = (),
) -> Kernel:
    """Build a kernel whose parameters are the activations, the constants and the output.

    Args:
        operation: Names the family in the key.
        program: Supplies shapes and dtypes.
        orders: Storage order by tensor name; the output's included.
        tensors: Names of the activations, and of the output.
        constants: Constant arguments.
        emit: Writes the loops, given views of the activations, the constants' buffers and a view of the
            output.
        details: Everything else that the code depends on, with a repr that tells all; part of the key.
    """
    names, output = tensors
    specs = [(program.tensor(n).shape, orders[n], program.tensor(n).dtype) for n in (*names, output)]
    with IRBuilder() as builder, tir.prim_func(s_tir=True, private=True):
        tir.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": OPAQUE})
        views = [_argument(f"x{i}", *spec) for i, spec in enumerate(specs[:-1])]
        data = [tir.arg(f"c{i}", tir.buffer(c.shape, c.dtype.name)) for i, c in enumerate(constants)]
        emit(views, data, _argument("y", *specs[-1]))
    shape, order, dtype = specs[-1]
    layout = [(c.shape, c.dtype.name) for c in constants]
    return Kernel(
        key=f"{operation}|{specs}|{layout}|{details!r}",
        function=with_root_block(builder.get()),
        constants=tuple(constants),
        output_shape=physical_shape(shape, order),
        output_dtype=dtype,
        intrinsic="llvm",
    )


def _argument(name: str, shape: tuple[int, ...], order: Order, dtype: str) -> View:
    buffer = tir.arg(name, tir.buffer(physical_shape(shape, order), dtype))
    return View(buffer, shape, order)


def common_tail(output: View, inputs: Sequence[View]) -> int:
    """Return how many innermost dimensions of the output every input runs through contiguously, too."""
    tails = [_tail(output, view) for view in inputs]
    return min(tails, default=len(output.shape))


def _tail(output: View, view: View) -> int:
    missing = len(output.shape) - len(view.shape)
    count = 0
    for axis, source in zip(reversed(output.order), reversed(view.order), strict=False):
        if axis != source + missing or output.shape[axis] != view.shape[source]:
            break
        count += 1
    return count


def for_each(
    shape: Sequence[int], order: Order, tail: int, body: Callable[[Index], None], *, vectors: bool = True
) -> None:
    """Run ``body`` for each logical index, in storage order.

    Args:
        shape: Logical shape.
        order: Storage order of the loops.
        tail: How many innermost dimensions may run as one flat loop.
        body: Called with the loop variables as a logical index, for whole vectors and for what is left.
        vectors: Vectors along the innermost dimension: for bodies that are one expression, without buffers of
            their own. Else that is left to LLVM, which gives up where it cannot prove that buffers do not
            overlap, as in loops run by threads.
    """
    extents = physical_shape(shape, order)
    if vectors and tail and extents[-1] >= ROW_VECTORS[0] and math.prod(extents[:-1]) > 1:
        _for_each_row(extents, order, body)
        return
    split = len(extents) - max(tail, min(1, len(extents)))
    outer, inner = math.prod(extents[:split]), math.prod(extents[split:])
    if outer == 1:
        outer = _tasks(inner)
        with parallel(outer, inner) as task, tir.serial(inner // outer) as i:
            flat = task * (inner // outer) + i
            body(_logical(_unravel(flat, extents), order))
        return
    with parallel(outer, outer * inner) as row:
        lead = _unravel(row, extents[:split])
        with tir.serial(inner) as i:
            body(_logical(lead + _unravel(i, extents[split:]), order))


def _for_each_row(extents: Sequence[int], order: Order, body: Callable[[Index], None]) -> None:
    rows, length = math.prod(extents[:-1]), extents[-1]
    tasks = _tasks(rows * length)
    while rows % tasks:
        tasks -= 1
    with parallel(tasks, rows * length) as task, tir.serial(rows // tasks) as row:
        lead = _unravel(task * (rows // tasks) + row, extents[:-1])
        lanes = next(width for width in ROW_VECTORS if width <= length)
        with tir.serial(length // lanes) as block, tir.vectorized(lanes) as lane:
            body(_logical([*lead, block * lanes + lane], order))
        if length % lanes:
            with tir.serial(length % lanes) as i:
                body(_logical([*lead, length - length % lanes + i], order))


def parallel(extent: int, elements: int) -> Any:
    """Return a loop over ``extent``: in the thread pool if there are enough elements to earn its cost."""
    return tir.parallel(extent) if elements >= PARALLEL_MIN_ELEMENTS else tir.serial(extent)


def _tasks(elements: int) -> int:
    limit = min(MAX_TASKS, elements // TASK_ELEMENTS)
    return max((d for d in range(1, limit + 1) if elements % d == 0), default=1)


def _unravel(flat: Expr, extents: Sequence[int]) -> Index:
    index: Index = []
    for position, extent in reversed(list(enumerate(extents))):
        index.insert(0, flat if position == 0 else flat % extent)
        flat = flat // extent
    return index


def _logical(physical: Index, order: Order) -> Index:
    index: Index = [None] * len(order)
    for variable, axis in zip(physical, order, strict=True):
        index[axis] = variable
    return index


def map_elements(
    source: View, output: View, function: Callable[[Expr], Expr], *, vectors: bool = True
) -> None:
    """Write ``output[i] = function(source[i])`` for equal logical shapes in any two storage orders.

    ``vectors`` as in ``for_each``. Where the innermost axes differ, a tile over both is computed along the
    input's memory and then written along the output's, so that neither side walks with a stride through main
    memory.
    """
    inner_in, inner_out = source.order[-1:], output.order[-1:]
    if inner_in == inner_out:
        tail = common_tail(output, [source])
        for_each(
            source.shape,
            output.order,
            tail,
            lambda i: output.store(i, function(source.at(i))),
            vectors=vectors,
        )
        return
    (a, b) = (*inner_in, *inner_out)
    rest = [axis for axis in output.order if axis not in (a, b)]
    extents = [source.shape[axis] for axis in rest]
    with parallel(math.prod(extents), math.prod(source.shape)) as task:
        index = dict(zip(rest, _unravel(task, extents), strict=True))
        _transpose_tile(source, output, function, (a, b), index)


def map_vectors(source: View, output: View, function: Callable[[Expr, int], Expr]) -> None:
    """Write ``output[i] = function(source[i], lanes)`` for one storage order, a vector of elements at a time."""
    total = math.prod(source.shape)
    x, y = (tir.decl_buffer((total,), v.buffer.dtype, data=v.buffer.data) for v in (source, output))
    tasks = _tasks(total)
    with parallel(tasks, total) as task:
        first = task * (total // tasks)

        def emit(at: Expr, lanes: int) -> None:
            store(y, function(load(x, [first + at], lanes), lanes), [first + at], lanes)

        for_span(total // tasks, emit, VECTOR_LANES)


def _transpose_tile(
    source: View,
    output: View,
    function: Callable[[Expr], Expr],
    axes: tuple[int, int],
    index: dict[int, Expr],
) -> None:
    a, b = axes
    tile = tir.alloc_buffer((source.shape[b], source.shape[a]), output.buffer.dtype)
    with tir.serial(source.shape[b]) as j, tir.serial(source.shape[a]) as i:
        at = {**index, a: i, b: j}
        tir.buffer_store(tile, function(source.at([at[k] for k in range(len(at))])), [j, i])
    with tir.serial(source.shape[a]) as i, tir.serial(source.shape[b]) as j:
        at = {**index, a: i, b: j}
        output.store([at[k] for k in range(len(at))], tile[j, i])


def as_int32(value: Expr) -> Expr:
    """Widen an integer to int32."""
    return tir.cast(value, "int32")


def as_float(value: Expr) -> Expr:
    """Convert an 8-bit or 32-bit integer to float32, rounding half to even."""
    return tir.cast(as_int32(value), "float32")


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """Return ``a * b + c`` rounded once; TVM's own fma is LLVM's ``fmuladd``, which may round twice."""
    return tir.call_llvm_pure_intrin("llvm.fma", a, b, c, dtype="float32")


def clamp_cast(value: Expr, lower: Expr, upper: Expr, dtype: str) -> Expr:
    """Clip a finite or infinite float that is already an integer and convert it."""
    return tir.cast(tir.cast(tir.max(tir.min(value, upper), lower), "int32"), dtype)


def is_nan(value: Expr, lanes: int = 1) -> Expr:
    """Test the bits: TVM tells LLVM that no float is NaN, so a float comparison may be optimised away."""
    bits = tir.bitwise_and(
        tir.reinterpret(value, dtype=vector_type("int32", lanes)), splat(tir.int32(0x7FFFFFFF), lanes)
    )
    return bits > splat(tir.int32(0x7F800000), lanes)
