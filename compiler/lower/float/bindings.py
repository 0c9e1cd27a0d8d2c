"""Questions about the bindings of a Relax function: who computes a value, who reads it, what it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from tvm import ir, relax, tirx

Shape: TypeAlias = tuple[int, ...]

FLOATS = ("float32", "float16")  # how values are stored; kernels compute in float32


class Bindings:
    """The bindings of one function.

    Attributes:
        order: Bound variables, in order.
    """

    def __init__(self, function: Any) -> None:
        bindings = [b for block in function.body.blocks for b in block.bindings]
        self.order: list[Any] = [b.var for b in bindings]
        self._values = {b.var: b.value for b in bindings}
        self._users: dict[Any, list[Any]] = {}
        for binding in bindings:
            for variable in dict.fromkeys(_variables(binding.value)):
                self._users.setdefault(variable, []).append(binding.var)
        self._results = set(_variables(function.body.body))

    def call(self, value: Any, *names: str) -> Any | None:
        """Return the operator call that computes a value if it is one of the named, else None."""
        found = self._values.get(value) if isinstance(value, ir.Var) else None
        if isinstance(found, ir.Call) and isinstance(found.op, ir.Op) and found.op.name in names:
            return found
        return None

    def operator(self, value: Any) -> Any | None:
        """Return the operator call that computes a value, whatever the operator, else None."""
        found = self._values.get(value) if isinstance(value, ir.Var) else None
        return found if isinstance(found, ir.Call) and isinstance(found.op, ir.Op) else None

    def users(self, variable: Any) -> list[Any]:
        """Return the variables whose values read this one."""
        return self._users.get(variable, [])

    def is_result(self, variable: Any) -> bool:
        """Tell whether the function returns the variable."""
        return variable in self._results

    def only_user(self, variable: Any) -> Any | None:
        """Return the only reader of a variable that is no result, else None."""
        users = self.users(variable)
        return users[0] if len(users) == 1 and not self.is_result(variable) else None


def _variables(value: Any) -> Iterator[Any]:
    if isinstance(value, ir.Var):
        yield value
    elif isinstance(value, ir.Call):
        for argument in value.args:
            yield from _variables(argument)
    elif isinstance(value, relax.Tuple):
        for item in value.fields:
            yield from _variables(item)
    elif isinstance(value, relax.TupleGetItem):
        yield from _variables(value.tuple_value)
    elif not isinstance(value, ir.GenericConst | relax.ShapeExpr | ir.GlobalVar | ir.Op):
        yield from relax.analysis.free_vars(value) if isinstance(value, relax.Expr) else ()


def float_shape(value: Any) -> Shape | None:
    """Return the static shape of a float32 or float16 tensor, else None."""
    kind = value.ty
    if not isinstance(kind, relax.TensorType) or str(kind.dtype) not in FLOATS or kind.shape is None:
        return None
    if not all(isinstance(extent, tirx.IntImm) for extent in kind.shape):
        return None
    return tuple(int(extent) for extent in kind.shape)


def constant(value: Any) -> np.ndarray | None:
    """Return the array of a constant, else None."""
    if not isinstance(value, ir.GenericConst):
        return None
    array: np.ndarray = value.value.numpy()
    return array


def strides_of(shape: Shape) -> Shape:
    """Return the strides, in elements, of a row-major array."""
    found: list[int] = []
    step = 1
    for extent in reversed(shape):
        found.insert(0, step)
        step *= extent
    return tuple(found)


def permuted(call: Any) -> tuple[int, ...]:
    """Return the axes of a permute_dims call."""
    rank = len(call.args[0].ty.shape)
    axes = call.attrs.axes
    return tuple(range(rank))[::-1] if axes is None else tuple(int(a) % rank for a in axes)
