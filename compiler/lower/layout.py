"""Storage orders: which permutation of its logical axes a tensor lies in memory.

An order is a tuple of logical axes, outermost first: ``(0, 1, 2, 3)`` is row-major NCHW, ``(0, 2, 3, 1)`` is
channels-last. Graph inputs and outputs and what float islands read and write are row-major, unless an island
maps element to element or what its convolutions read and write; everything else takes the order that saves
conversions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array, is_op, static_shape
from bitwright.compiler.program.ops import (
    FloatIsland,
    Move,
    Program,
    QConv,
    QGemm,
    QPool,
    Step,
    WeightOnlyDot,
)

Order: TypeAlias = tuple[int, ...]

CHANNELS_LAST: Order = (0, 2, 3, 1)
# Operators whose result at one position depends on nothing but their operands at that position.
ELEMENTWISE = (
    *(
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Min",
        "Max",
        "Neg",
        "Abs",
        "Sqrt",
        "Reciprocal",
        "Exp",
        "Log",
        "Erf",
        "Tanh",
    ),
    *(
        "Sigmoid",
        "Relu",
        "LeakyRelu",
        "Elu",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Mish",
        "Softplus",
        "Clip",
        "Identity",
    ),
)
# Operators that a float convolution's channels-last order goes through without a conversion.
IMAGE_OPERATORS = ("Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", *ELEMENTWISE)


def row_major(rank: int) -> Order:
    """Return the identity order."""
    return tuple(range(rank))


def physical_shape(shape: Sequence[int], order: Order) -> tuple[int, ...]:
    """Return the extents in memory order."""
    return tuple(shape[axis] for axis in order)


def same_storage(shape: Sequence[int], first: Order, second: Order) -> bool:
    """Tell whether both orders put a tensor of this logical shape into memory byte for byte alike.

    Axes of one element do not count: with H = W = 1 channels-last and row-major are the same bytes.
    """
    return [a for a in first if shape[a] != 1] == [a for a in second if shape[a] != 1]


def transposed(order: Order, perm: Sequence[int]) -> Order:
    """Return the order of ``transpose(x, perm)`` when the bytes of ``x``, in ``order``, stay in place."""
    position = {source: axis for axis, source in enumerate(perm)}
    return tuple(position[axis] for axis in order)


def before_transpose(order: Order, perm: Sequence[int]) -> Order:
    """Return the order of ``x`` for which ``transpose(x, perm)`` lies in ``order``."""
    return tuple(perm[axis] for axis in order)


def dot_order(step: Step, rank: int) -> Order:
    """Return the order in which a Conv, Pool or Gemm step reads and writes its tensors."""
    if isinstance(step, QConv | QPool):
        return CHANNELS_LAST
    assert isinstance(step, QGemm | WeightOnlyDot)
    return row_major(rank)


def demanded_orders(program: Program) -> dict[str, Order]:
    """Return for each integer tensor the order that its first demanding consumer wants.

    Elementwise steps pass the demand for their output on to inputs of the same rank, a transpose passes it
    on permuted; graph outputs and float islands want row-major.

    Returns:
        Orders by tensor name; a tensor nobody has a wish for is absent.
    """
    demand: dict[str, Order] = {name: row_major(len(program.tensor(name).shape)) for name in program.outputs}
    for step in reversed(program.steps):
        for name in step.inputs:
            wish = _wish(step, name, program, demand)
            if wish is not None:
                demand[name] = wish
    return demand


def _wish(step: Step, name: str, program: Program, demand: Mapping[str, Order]) -> Order | None:
    rank = len(program.tensor(name).shape)
    if isinstance(step, QConv | QPool | QGemm):
        return dot_order(step, rank)
    if isinstance(step, FloatIsland) and order_free(step, program):
        return demand.get(step.outputs[0])
    if isinstance(step, FloatIsland):
        return CHANNELS_LAST if is_read_as_image(step, name) else row_major(rank)
    if isinstance(step, WeightOnlyDot):
        return row_major(rank)
    if len(step.outputs) != 1 or step.output not in demand:
        return None
    wanted = demand[step.output]
    if isinstance(step, Move) and step.kind == "transpose":
        return before_transpose(wanted, step.perm)
    if isinstance(step, Move) and step.kind == "reshape":
        return row_major(rank)
    return wanted if len(wanted) == rank else None


def order_free(island: FloatIsland, program: Program) -> bool:
    """Tell whether an island maps elements of one shape, so that it computes the same in any order of its tensors."""
    graph = island.model.graph
    shapes = {program.tensor(name).shape for name in (*island.inputs, *island.outputs)}
    if len(shapes) != 1:
        return False
    (shape,) = shapes
    values = [v for n in graph for v in (*n.inputs, *n.outputs) if v is not None]
    return all(is_op(n, *ELEMENTWISE) or _is_number(n.outputs[0]) for n in graph) and all(
        static_shape(v) == shape or _is_number(v) for v in values
    )


def is_read_as_image(island: FloatIsland, name: str) -> bool:
    """Tell whether a float island reads one of its inputs in the order of its convolutions."""
    value = island.model.graph.inputs[island.inputs.index(name)]
    readers = value.consumers()
    return _has_convolutions(island) and _is_image(value) and all(is_op(n, *IMAGE_OPERATORS) for n in readers)


def is_written_as_image(island: FloatIsland, name: str) -> bool:
    """Tell whether a float island has one of its outputs in the order of its convolutions."""
    value = island.model.graph.outputs[island.outputs.index(name)]
    producer = value.producer()
    written = producer is not None and is_op(producer, *IMAGE_OPERATORS)
    return written and _has_convolutions(island) and _is_image(value)


def _is_image(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 4


def _has_convolutions(island: FloatIsland) -> bool:
    return any(is_op(n, "Conv") and _is_image(n.outputs[0]) for n in island.model.graph)


def _is_number(value: ir.Value) -> bool:
    array = constant_array(value)
    return array is not None and array.size == 1


def elementwise_order(
    inputs: Sequence[str],
    output: str,
    program: Program,
    orders: Mapping[str, Order],
    demand: Mapping[str, Order],
) -> Order:
    """Return the order a step writes that can read every input in any order.

    The common order of the full-rank inputs, so that reads and writes run along memory; where they differ,
    the demand for the output decides, else the order of the largest input.
    """
    rank = len(program.tensor(output).shape)
    full = [name for name in inputs if len(program.tensor(name).shape) == rank]
    found = {orders[name] for name in full}
    if len(found) == 1:
        return found.pop()
    if output in demand or not full:
        return demand.get(output, row_major(rank))
    return orders[max(full, key=lambda name: _elements(program.tensor(name).shape))]


def _elements(shape: Sequence[int]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total
