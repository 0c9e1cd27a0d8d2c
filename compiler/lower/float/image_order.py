"""Puts the float convolutions of a module channels last, and everything between them; only true edges are turned.

TVM's own pass carries the order on through operators that can have any; what is here removes what stands in its
way before (limits that are calls of functions), and the pairs of transposes that it leaves.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import tvm
from tvm import ir, relax, s_tir, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from bitwright.compiler.lower.float.bindings import FLOATS, constant, permuted
from bitwright.compiler.lower.float.groups import BINARY, NEURAL, UNARY
from bitwright.compiler.lower.schedule import blocks_of


class SlowerOrder(UserWarning):
    """Convolutions keep TVM's own loops, which are slower than ours."""


CHANNELS_LAST = {"relax.nn.conv2d": ["NHWC", "OHWI"], "relax.nn.conv1d": ["NWC", "OWI"]}

WHY = 120  # characters of what TVM says
COMMUTATIVE = ("relax.add", "relax.multiply", "relax.maximum", "relax.minimum")
THROUGH = (*BINARY, *UNARY, *NEURAL, "max_pool2d", "avg_pool2d")
# Reductions, and the operators of two that do the same.
STACKED = {"relax.min": relax.op.minimum, "relax.max": relax.op.maximum, "relax.sum": relax.op.add}


def channels_last(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module with convolutions of constant float32 weights channels last.

    Args:
        module: Operators are not legalized yet.
    """
    if not any(_has_convolution(f) for _, f in module.functions_items() if isinstance(f, relax.Function)):
        return module
    module = _Simplify(module).run()
    for variable, function in list(module.functions_items()):
        if isinstance(function, relax.Function):
            module[variable] = _turned(variable, function)
    module = _Simplify(module).run()
    return relax.transform.DeadCodeElimination()(module)


def _turned(variable: Any, function: Any) -> Any:
    """Return the function with its convolutions channels last, or as it is if TVM's pass cannot read an operator.

    What it cannot read (``stack``, for one) is no reason to refuse a model that TVM's own loops can run. A
    ``SlowerOrder`` says so.
    """
    try:
        found = relax.transform.ConvertLayout({}, layout_cb=_wanted)(tvm.IRModule({variable: function}))
    except tvm.error.InternalError as error:
        why = str(error).strip().splitlines()[-1][:WHY]
        what = f"float convolutions run in TVM's own loops: their order of storage cannot be changed ({why})"
        warnings.warn(SlowerOrder(what), stacklevel=2)
        return function
    return found[variable]


def _has_convolution(function: Any) -> bool:
    values = [b.value for block in function.body.blocks for b in block.bindings]
    return any(
        isinstance(v, ir.Call) and isinstance(v.op, ir.Op) and v.op.name in CHANNELS_LAST for v in values
    )


def _wanted(call: Any) -> dict[str, list[str]]:
    """Return the order a convolution is to have: one that no kernel replaces keeps its own, which TVM can lower."""
    name = call.op.name
    if not name.startswith("relax.nn.conv"):
        return {}
    weight = constant(call.args[1])
    if name in CHANNELS_LAST and weight is not None and weight.dtype.name in FLOATS:
        return {name: CHANNELS_LAST[name]}
    return {name: [str(call.attrs.data_layout), str(call.attrs.kernel_layout)]}


@mutator
class _Simplify(PyExprMutator):  # type: ignore[misc]
    """Computes what is constant, joins transposes, and writes limits as operators."""

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self.module = module
        self.turned: dict[Any, bool] = {}

    def run(self) -> tvm.IRModule:
        for variable, function in self.module.functions_items():
            if isinstance(function, relax.Function):
                self.builder_.update_func(variable, self.visit_expr(function))
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if not isinstance(call.op, ir.Op):
            return call
        literal = [self.literal(argument) for argument in call.args]
        if any(found is not argument for found, argument in zip(literal, call.args, strict=True)):
            call = self.builder_.normalize(relax.Call(call.op, literal, call.attrs, call.ty_args))
        name = call.op.name
        if name == "relax.permute_dims":
            return self.transpose(call)
        if name == "relax.call_tir":
            return self.limit(call)
        if name == "relax.clip":
            return self.clip(call)
        if name.removeprefix("relax.") in BINARY:
            return self.of_rank(call)
        if name in STACKED:
            return self.unstacked(call)
        arrays = [self.array(argument) for argument in call.args]
        if name == "relax.reshape" and arrays[0] is not None:
            return _literal(arrays[0].reshape([int(d) for d in call.ty.shape]))
        if name == "relax.isnan" and arrays[0] is not None:
            return _literal(np.isnan(arrays[0]))
        if name == "relax.where" and len(known := [a for a in arrays if a is not None]) == 3:
            return _literal(np.where(known[0], known[1], known[2]))
        return call

    def array(self, value: Any) -> np.ndarray | None:
        """Return the array of a constant or of a variable that is one, else None."""
        if isinstance(value, ir.Var):
            value = self.lookup_binding(value)
        return None if value is None else constant(value)

    def literal(self, value: Any) -> Any:
        """Return the constant that a variable is, else the value."""
        found = self.lookup_binding(value) if isinstance(value, ir.Var) else None
        return value if found is None or constant(found) is None else found

    def of_rank(self, call: Any) -> Any:
        """Return a binary operator whose constant operand has all axes: TVM turns no others."""
        ranks = [len(argument.ty.shape) for argument in call.args]
        arrays = [self.array(argument) for argument in call.args]
        arguments = [
            argument
            if array is None or not 0 < array.ndim < max(ranks)
            else _literal(array.reshape((1,) * (max(ranks) - array.ndim) + array.shape))
            for argument, array in zip(call.args, arrays, strict=True)
        ]
        if call.op.name in COMMUTATIVE and self.is_turned(arguments[1]) and not self.is_turned(arguments[0]):
            arguments.reverse()  # the first operand decides the order of the result
        return relax.Call(call.op, arguments, call.attrs, call.ty_args)

    def is_turned(self, value: Any) -> bool:
        """Tell whether a value comes from a convolution through operators that can have any order."""
        if value not in self.turned:
            found = self.lookup_binding(value) if isinstance(value, ir.Var) else None
            name = found.op.name if isinstance(found, ir.Call) and isinstance(found.op, ir.Op) else ""
            through = name.removeprefix("relax.").removeprefix("nn.") in THROUGH
            first = found.args[0] if through and found is not None else None
            self.turned[value] = name in CHANNELS_LAST or (first is not None and self.is_turned(first))
        return self.turned[value]

    def transpose(self, call: Any) -> Any:
        (value,), axes = call.args, permuted(call)
        array = self.array(value)
        if array is not None:
            return _literal(array.transpose(axes))
        inner = self.lookup_binding(value) if isinstance(value, ir.Var) else None
        if isinstance(inner, ir.Call) and inner.op == call.op:
            first = permuted(inner)
            value, axes = inner.args[0], tuple(first[axis] for axis in axes)
        shape = value.ty.shape
        moving = [
            axis for axis in axes if not (isinstance(shape[axis], tirx.IntImm) and int(shape[axis]) == 1)
        ]
        if axes == tuple(range(len(axes))):
            return value
        if moving == sorted(moving):  # the bytes stay where they are
            return relax.op.reshape(value, [shape[axis] for axis in axes])
        return relax.op.permute_dims(value, axes)

    def unstacked(self, call: Any) -> Any:
        """Return the sum or extreme of a stack of tensors as operators of two."""
        stack = self.call(call.args[0], "relax.stack")
        axes = [int(axis) for axis in call.attrs.axis or ()]
        if stack is None or axes != [0] or call.attrs.keepdims or int(stack.attrs.axis or 0) != 0:
            return call
        if not isinstance(stack.args[0], relax.Tuple):
            return call
        total, *others = (self.narrow(value) for value in stack.args[0].fields)
        for value in others:
            total = self.builder_.emit(STACKED[call.op.name](total, value))
        shapes = [[int(extent) for extent in value.ty.shape] for value in (total, call)]
        return total if shapes[0] == shapes[1] else call

    def narrow(self, value: Any) -> Any:
        """Return what a value is broadcast from."""
        found = self.call(value, "relax.broadcast_to")
        return value if found is None else found.args[0]

    def call(self, value: Any, name: str) -> Any | None:
        """Return the call of the named operator that computes a value, else None."""
        found = self.lookup_binding(value) if isinstance(value, ir.Var) else None
        is_call = isinstance(found, ir.Call) and isinstance(found.op, ir.Op)
        return found if is_call and found is not None and found.op.name == name else None

    def clip(self, call: Any) -> Any:
        x, low, high = call.args
        if str(x.ty.dtype) not in FLOATS:
            return call
        numbers = [float(getattr(limit, "value", limit)) for limit in (low, high)]
        dtype = str(x.ty.dtype)
        low, high = (relax.const(np.array(number, dtype), dtype) for number in numbers)
        return relax.op.minimum(self.builder_.emit(relax.op.maximum(x, low)), high)

    def limit(self, call: Any) -> Any:
        """Return a maximum or minimum with one number as an operator."""
        function = self.module[call.args[0]] if isinstance(call.args[0], ir.GlobalVar) else None
        arguments = list(call.args[1].fields) if isinstance(call.args[1], relax.Tuple) else []
        if len(arguments) != 2 or not isinstance(function, tirx.PrimFunc) or len(call.args) != 2:
            return call
        number = self.array(arguments[1])
        kind = _extreme(function)
        if kind is None or number is None or number.size != 1:
            return call
        operator = relax.op.maximum if kind is tirx.Max else relax.op.minimum
        return operator(arguments[0], _literal(number.reshape(())))


def _extreme(function: tirx.PrimFunc) -> type | None:
    """Return Max or Min if the function is nothing but that of its two parameters' elements, else None."""
    if not isinstance(function.body, s_tir.SBlockRealize):
        return None
    schedule = s_tir.Schedule(function)
    blocks = [schedule.get(b) for b in blocks_of(schedule)]
    value = getattr(blocks[0].body, "value", None) if len(blocks) == 1 else None
    if not isinstance(value, tirx.Max | tirx.Min):
        return None
    loads = [operand for operand in (value.a, value.b) if isinstance(operand, ir.expr.TensorLoad)]
    return type(value) if len(loads) == 2 else None


def _literal(array: np.ndarray) -> Any:
    return relax.const(np.array(array, order="C"), array.dtype.name)
