"""A function for one element of the batch, turned into one for any number of elements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeAlias

import numpy as np
import tvm
from tvm import relax, tirx

from bitwright.compiler.errors import InternalError, ToolchainError
from bitwright.compiler.lower.dynamic.kernels import Body, any_number
from bitwright.compiler.lower.kernel_table import KernelCall, Stored
from bitwright.targets.backend import Kernel

_CALL_TIR = tvm.ir.Op.get("relax.call_tir")
_RESHAPE = tvm.ir.Op.get("relax.reshape")
OPTION = "--dynamic"


@dataclass(frozen=True)
class Larger:
    """A kernel call's step, computed for more than one element at once.

    Attributes:
        elements: How many.
        kernel: Reads the same weights as the kernel for one element if it can.
    """

    elements: int
    kernel: Kernel


Blocks: TypeAlias = Callable[[KernelCall], Sequence[Larger]]


@dataclass(frozen=True)
class DynamicFunction:
    """What turns one function of a library into a dynamic one.

    Attributes:
        name: Of the function, which computes one element.
        batched: Positions of its inputs that hold elements in their outermost dimension.
        table: Its kernel calls.
        blocks: Kernels for several elements, for a call; the largest first, none if one element is enough work.
        cost: What a call costs for one element, in values written.
    """

    name: str
    batched: frozenset[int]
    table: Sequence[KernelCall]
    blocks: Blocks
    cost: Callable[[KernelCall], int]


def make_dynamic(
    module: tvm.IRModule, wanted: DynamicFunction
) -> tuple[tvm.IRModule, tuple[KernelCall, ...]]:
    """Replace a function for one element by one for any number of them.

    Every tensor that depends on a batched input holds its elements one behind the other, whatever the model's axes
    are: each kernel computes one element after the other (or blocks of them), so no kernel needs to know more.

    Args:
        module: Every operator is a scheduled kernel, tensors have no storage yet.
        wanted: The function.

    Returns:
        The module, and the kernel calls of the function; their shapes are those of one element.

    Raises:
        ToolchainError: The function has an operator that is no kernel.
    """
    variable = module.get_global_var(wanted.name)
    rest = tvm.IRModule({v: f for v, f in module.functions_items() if v.name_hint != wanted.name})
    rewriter = _Rewriter(module, relax.BlockBuilder(rest), wanted)
    rewriter.rewrite(module[variable])
    return _used(rewriter.builder.get()), tuple(rewriter.calls)


def _used(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module without kernels that no function calls any more."""
    called: set[str] = set()
    for _, function in module.functions_items():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(
                function,
                lambda node: called.add(node.name_hint) if isinstance(node, tvm.ir.GlobalVar) else None,
            )
    kept = {
        v: f for v, f in module.functions_items() if isinstance(f, relax.Function) or v.name_hint in called
    }
    return tvm.IRModule(kept)


@dataclass
class _Rewriter:
    module: tvm.IRModule
    builder: relax.BlockBuilder
    wanted: DynamicFunction
    values: dict[Any, Any] = field(default_factory=dict)  # variable -> its expression in the new function
    batched: set[Any] = field(default_factory=set)  # variables that hold elements
    made: dict[object, Any] = field(default_factory=dict)
    calls: list[KernelCall] = field(default_factory=list)
    occurrences: Counter[str] = field(default_factory=Counter)
    count: Any = field(default_factory=lambda: tirx.Var("elements", "int64"))

    def rewrite(self, function: relax.Function) -> None:
        """Emit the new function."""
        parameters = [self.parameter(p, k in self.wanted.batched) for k, p in enumerate(function.params)]
        with self.builder.function(self.wanted.name, parameters):
            with self.builder.dataflow():
                for block in function.body.blocks:
                    for binding in block.bindings:
                        self.bind(binding.var, binding.value)
                output = self.builder.emit_output(self.value(function.body.body))
            self.builder.emit_func_output(output)
        if len(self.calls) != len(self.wanted.table):
            what = f"{len(self.calls)} of {len(self.wanted.table)} kernel calls were found again"
            raise InternalError(what, where=self.wanted.name)

    def parameter(self, old: Any, batched: bool) -> Any:
        """Return a parameter, with any number of elements if it is batched."""
        kind = self.of_any_number(old.ty) if batched else old.ty
        new = relax.Var(old.name, kind)
        self.values[old] = new
        if batched:
            self.batched.add(old)
        return new

    def of_any_number(self, kind: Any) -> Any:
        """Return the type of a tensor that has the elements of the batch one behind the other."""
        shape = [int(d) for d in kind.shape]
        if not shape:
            what = "a value without dimensions depends on the batch"
            raise ToolchainError(what, where=OPTION, fix="compile for a fixed size with --dim, or use --loop")
        return relax.TensorType([self.count * shape[0], *shape[1:]], kind.dtype)

    def bind(self, variable: Any, value: Any) -> None:
        """Emit one binding."""
        if not self.depends(value):
            self.values[variable] = self.builder.emit(self.mapped(value))
            return
        self.batched.add(variable)
        if isinstance(value, relax.Var | relax.Tuple | relax.TupleGetItem):
            self.values[variable] = self.builder.emit(self.value(value))
        elif value.op == _RESHAPE:
            shape = list(self.of_any_number(variable.ty).shape)
            self.values[variable] = self.builder.emit(relax.op.reshape(self.value(value.args[0]), shape))
        elif value.op == _CALL_TIR:
            self.values[variable] = self.builder.emit(self.kernel_call(variable, value))
        else:
            operator = getattr(value.op, "name", value.op)
            what = f"the operator {operator} has no kernel that could run for any number of elements"
            raise ToolchainError(what, where=OPTION, fix="compile for a fixed size with --dim, or use --loop")

    def depends(self, expression: Any) -> bool:
        """Tell whether a value has elements of the batch."""
        if isinstance(expression, relax.Var):
            return expression in self.batched
        if isinstance(expression, relax.TupleGetItem):
            return self.depends(expression.tuple_value)
        parts = expression.fields if isinstance(expression, relax.Tuple) else getattr(expression, "args", ())
        return any(self.depends(part) for part in parts)

    def value(self, expression: Any) -> Any:
        """Return an expression of variables and constants in the new function."""
        if isinstance(expression, relax.Var):
            return self.values[expression]
        if isinstance(expression, relax.Tuple):
            return relax.Tuple([self.value(part) for part in expression.fields])
        if isinstance(expression, relax.TupleGetItem):
            return relax.TupleGetItem(self.value(expression.tuple_value), expression.index)
        return expression

    def mapped(self, value: Any) -> Any:
        """Return an operator that no element of the batch reaches."""
        if not isinstance(value, tvm.ir.Call):
            return self.value(value)
        if value.op != _CALL_TIR:
            return tvm.ir.Call(value.op, [self.value(a) for a in value.args], value.attrs, value.ty_args)
        symbol, arguments = value.args[0], value.args[1]
        self.note(symbol.name_hint, symbol.name_hint, len(arguments.fields))
        return relax.call_tir(symbol, self.value(arguments), out_ty=value.ty)

    def kernel_call(self, variable: Any, value: Any) -> Any:
        """Return the call of a kernel for any number of elements."""
        symbol, arguments = value.args[0], list(value.args[1].fields)
        outputs = list(variable.ty.fields) if hasattr(variable.ty, "fields") else [variable.ty]
        positions = {k for k, argument in enumerate(arguments) if self.depends(argument)}
        call = self.next_call(symbol.name_hint)
        larger = self.wanted.blocks(call) if call is not None else ()
        bodies, constants = self.bodies(self.module[symbol], arguments, larger)
        given = len(arguments) + len(constants)
        batched = frozenset(positions | {given + k for k in range(len(outputs))})
        key = (symbol.name_hint, batched, tuple(part.kernel.key for part in larger))
        if key not in self.made:
            function = any_number(bodies, batched, self.work(call, outputs))
            self.made[key] = self.builder.add_func(function, f"{symbol.name_hint}_any")
        name = self.made[key]
        self.note(symbol.name_hint, name.name_hint, given)
        operands = [self.value(a) for a in arguments] + [relax.const(c, c.dtype.name) for c in constants]
        kinds = [self.of_any_number(kind) for kind in outputs]
        return relax.call_tir(name, relax.Tuple(operands), out_ty=kinds if len(kinds) > 1 else kinds[0])

    def bodies(
        self, one: Any, arguments: Sequence[Any], larger: Sequence[Larger]
    ) -> tuple[list[Body], list[np.ndarray]]:
        """Return the bodies of a kernel, and the constants that only those for several elements read."""
        inputs = len(one.params) - 1
        known = [a.value.numpy() if isinstance(a, tvm.ir.GenericConst) else None for a in arguments]
        places: list[tuple[int, ...]] = []
        for part in larger:
            own = range(len(part.kernel.function.params) - 1 - len(part.kernel.constants))
            places.append((*own, *(place_of(constant, known) for constant in part.kernel.constants)))
        outputs = len(one.params) - len(arguments)
        last = tuple(range(len(known), len(known) + outputs))
        bodies = [
            Body(part.elements, part.kernel.function, (*place, *last))
            for part, place in zip(larger, places, strict=True)
        ]
        bodies.append(Body(1, one, (*range(len(arguments)), *last)))
        assert len(arguments) == inputs or not larger, "kernels for several elements have one output"
        return bodies, [array for array in known[len(arguments) :] if array is not None]

    def work(self, call: KernelCall | None, outputs: Sequence[Any]) -> int:
        """Return what one element costs, in values written."""
        if call is not None:
            return self.wanted.cost(call)
        return sum(prod(int(d) for d in kind.shape) for kind in outputs)

    def next_call(self, symbol: str) -> KernelCall | None:
        """Return the table's entry of the call to be emitted, None for float kernels."""
        table, at = self.wanted.table, len(self.calls)
        return table[at] if at < len(table) and table[at].function == symbol else None

    def note(self, symbol: str, name: str, inputs: int) -> None:
        """Describe a kernel call that was emitted, if the table has it."""
        call = self.next_call(symbol)
        if call is None:
            return
        stored = tuple(map(_elements_first, call.inputs))
        output = replace(_elements_first(call.output), argument=inputs)
        self.calls.append(
            replace(call, function=name, occurrence=self.occurrences[name], inputs=stored, output=output)
        )
        self.occurrences[name] += 1


def place_of(constant: np.ndarray, known: list[np.ndarray | None]) -> int:
    """Return where a constant is among the operands; it is added if it is not."""
    for place, array in enumerate(known):
        if array is not None and array.dtype == constant.dtype and np.array_equal(array, constant):
            return place
    known.append(constant)
    return len(known) - 1


def _elements_first(stored: Stored) -> Stored:
    """Describe a tensor in memory whatever the number of elements: an axis of size 1 may stand anywhere."""
    if not stored.order or stored.order[0] == 0:
        return stored
    if stored.shape[0] != 1:
        what = f"'{stored.tensor}' is stored in an order that mixes the elements of the batch"
        raise ToolchainError(what, where=OPTION, fix="compile for a fixed size with --dim, or use --loop")
    return replace(stored, order=(0, *(axis for axis in stored.order if axis != 0)))
