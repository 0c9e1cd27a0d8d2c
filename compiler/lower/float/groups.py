"""Elementwise operators and reductions along rows of a Relax function, gathered into passes over rows.

A value joins the pass that computes its readers if all of them are in it; so nothing is computed twice, and
the passes depend on each other in no circle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from bitwright.compiler.lower.float.bindings import (
    Bindings,
    Shape,
    constant,
    float_shape,
    permuted,
    strides_of,
)
from bitwright.compiler.lower.float.row_program import CONSTANT, LOAD, Access, Node, RowProgram

PREFIX = "relax."
BINARY = ("add", "subtract", "multiply", "divide", "maximum", "minimum")
UNARY = ("negative", "abs", "square", "sqrt", "rsqrt", "exp", "erf", "tanh", "sigmoid")
NEURAL = ("relu", "silu", "gelu", "gelu_tanh")
REDUCTION = ("sum", "mean", "max", "min")
POWERS = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt"}
SHORTEST_ROW = 4
# Functions of so many nodes take LLVM long and gain nothing more.
MOST_NODES = 60


@dataclass
class Group:
    """A pass over rows.

    Attributes:
        root: The variable it computes.
        shape: Of the result.
        members: Variables it computes on the way, ``root`` included.
    """

    root: Any
    shape: Shape
    members: set[Any] = field(default_factory=set)

    @property
    def row_shape(self) -> Shape:
        """Shape of a value that has one number a row."""
        return (*self.shape[:-1], 1)


def find_groups(bindings: Bindings) -> list[Group]:
    """Return the passes over rows of a function, in order of their results."""
    of: dict[Any, Group] = {}
    found: list[Group] = []
    for variable in reversed(bindings.order):
        kind = _kind(bindings, variable)
        if kind is None:
            continue
        group = _joined(bindings, variable, kind, of)
        if group is None and kind == "elementwise":
            shape = float_shape(variable)
            assert shape is not None
            group = Group(variable, shape)
            found.insert(0, group)
        if group is not None:
            group.members.add(variable)
            of[variable] = group
    return [group for group in found if group.shape and prod(group.shape) >= SHORTEST_ROW]


def _kind(bindings: Bindings, variable: Any) -> str | None:
    """Return ``"elementwise"`` (also Softmax and LayerNormalization), ``"reduction"``, or None."""
    call, shape = bindings.operator(variable), float_shape(variable)
    if call is None or shape is None or not call.op.name.startswith(PREFIX):
        return None
    name = call.op.name.removeprefix(PREFIX)
    operands = [float_shape(argument) for argument in call.args]
    if name in (*BINARY, *UNARY) or name.removeprefix("nn.") in NEURAL or _power(call) is not None:
        return "elementwise" if None not in operands or name == "power" else None
    if name == "nn.softmax":
        last = int(call.attrs.axis) % len(shape) == len(shape) - 1
        return "elementwise" if last and shape[-1] > 1 else None
    if name == "nn.layer_norm":
        axes = [int(a) % len(shape) for a in call.attrs.axes]
        return "elementwise" if axes == [len(shape) - 1] and shape[-1] > 1 else None
    if name in REDUCTION and operands[0] is not None:
        rank = len(operands[0])
        axes = [int(a) % rank for a in call.attrs.axis] if call.attrs.axis is not None else []
        along_row = axes == [rank - 1] and bool(call.attrs.keepdims) and operands[0][-1] > 1
        return "reduction" if along_row else None
    return None


def _power(call: Any) -> str | None:
    """Return the function that a power with a constant exponent is, else None."""
    if call.op.name != "relax.power":
        return None
    exponent = constant(call.args[1])
    if exponent is None or exponent.size != 1 or float_shape(call.args[0]) is None:
        return None
    return POWERS.get(float(exponent.reshape(())))


def _joined(bindings: Bindings, variable: Any, kind: str, of: dict[Any, Group]) -> Group | None:
    """Return the group of all readers if the value can be computed there."""
    users = bindings.users(variable)
    groups = {id(of[u]): of[u] for u in users if u in of}
    if not users or bindings.is_result(variable) or len(groups) != 1 or any(u not in of for u in users):
        return None
    (group,) = groups.values()
    if len(group.members) >= MOST_NODES:
        return None
    shape = float_shape(variable)
    call = bindings.operator(variable)
    assert call is not None
    if kind == "reduction":
        return group if shape == group.row_shape and float_shape(call.args[0]) == group.shape else None
    if shape == group.shape:
        return group
    composite = call.op.name.startswith("relax.nn.") and call.op.name.removeprefix("relax.nn.") not in NEURAL
    return group if shape == group.row_shape and not composite else None


class RowBuilder:
    """Writes the ``RowProgram`` of one group.

    Attributes:
        sources: Variables and constants that the program reads, in the order of its sources.
    """

    def __init__(self, bindings: Bindings, group: Group) -> None:
        self._bindings, self._group = bindings, group
        self._nodes: list[Node] = []
        self._known: dict[Any, int] = {}
        self._accesses: list[Access] = []
        self.sources: list[Any] = []

    def program(self) -> RowProgram:
        """Return the program of the group."""
        result = self._value(self._group.root)
        if result != len(self._nodes) - 1:  # a member of another name: copy it
            result = self._add("maximum", result, result)
        shape = self._group.shape
        output = Access(shape, strides_of(shape))
        dtype = str(self._group.root.ty.dtype)
        return RowProgram(shape, tuple(self._accesses), output, tuple(self._nodes), dtype)

    def _add(self, operation: str, *operands: int, number: float = 0, per_row: bool | None = None) -> int:
        if per_row is None:
            per_row = all(self._nodes[k].per_row for k in operands)
        self._nodes.append(Node(operation, operands, number, per_row))
        return len(self._nodes) - 1

    def _number(self, value: float) -> int:
        return self._add(CONSTANT, number=value, per_row=True)

    def _value(self, value: Any) -> int:
        if value not in self._known:
            self._known[value] = self._member(value) if value in self._group.members else self._load(value)
        return self._known[value]

    def _load(self, value: Any) -> int:
        array = constant(value)
        if array is not None and array.size == 1:
            return self._number(float(array.reshape(())))
        source, access = self._access(value)
        self.sources.append(source)
        self._accesses.append(access)
        moves = access.strides[-1] != 0
        return self._add(LOAD, number=len(self.sources) - 1, per_row=not moves)

    def _access(self, value: Any) -> tuple[Any, Access]:
        """Return what is read for a value, looking through transposes that keep rows, and how it lies."""
        shape = float_shape(value)
        assert shape is not None
        call = self._bindings.call(value, "relax.permute_dims")
        strides = strides_of(shape)
        if call is not None and permuted(call)[-1] == len(shape) - 1:
            value = call.args[0]
            inner = float_shape(value)
            assert inner is not None
            strides = tuple(strides_of(inner)[axis] for axis in permuted(call))
        missing = len(self._group.shape) - len(shape)
        steps = [0 if extent == 1 else step for extent, step in zip(shape, strides, strict=True)]
        physical = float_shape(value)
        assert physical is not None
        return value, Access(physical, (*[0] * missing, *steps))

    def _member(self, variable: Any) -> int:
        call = self._bindings.operator(variable)
        assert call is not None
        name = call.op.name.removeprefix(PREFIX).removeprefix("nn.")
        if name == "softmax":
            return self._softmax(self._value(call.args[0]))
        if name == "layer_norm":
            return self._layer_norm(call)
        power = _power(call)
        if power is not None:
            return self._add(power, self._value(call.args[0]))
        operands = [self._value(argument) for argument in call.args]
        if name in REDUCTION:
            return self._add(name, operands[0], per_row=True)
        if name == "divide" and self._nodes[operands[1]].per_row and not self._nodes[operands[0]].per_row:
            return self._add("multiply", operands[0], self._reciprocal(operands[1]))
        return self._add(name, *operands)

    def _reciprocal(self, operand: int) -> int:
        node = self._nodes[operand]
        if node.operation == CONSTANT and node.number != 0:
            return self._number(float(np.float32(1) / np.float32(node.number)))
        return self._add("reciprocal", operand)

    def _softmax(self, x: int) -> int:
        largest = self._add("max", x, per_row=True)
        powers = self._add("exp", self._add("subtract", x, largest))
        total = self._add("sum", powers, per_row=True)
        return self._add("multiply", powers, self._add("reciprocal", total))

    def _layer_norm(self, call: Any) -> int:
        x, gamma, beta = (self._value(argument) for argument in call.args)
        centred = self._add("subtract", x, self._add("mean", x, per_row=True))
        variance = self._add("mean", self._add("square", centred), per_row=True)
        shifted = self._add("add", variance, self._number(float(call.attrs.epsilon)))
        normal = self._add("multiply", centred, self._add("rsqrt", shifted))
        if call.attrs.scale:
            normal = self._add("multiply", normal, gamma)
        return self._add("add", normal, beta) if call.attrs.center else normal
