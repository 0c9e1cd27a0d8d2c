"""A function for sequences of any length, put together from the same model at a few lengths.

Unlike the elements of a batch, the positions of a sequence meet in attention, so no kernel for one of them can be put
into a loop. Instead the model is lowered at several lengths; what is the same stays, shapes become polynomials of the
length, and every kind of kernel has its own way to any length: integer steps compute rows in blocks, float products
and passes over rows have loops of bounds known at run time, and TVM writes what is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
import tvm
from tvm import relax, tirx
from tvm_ffi import structural_equal

from bitwright.compiler.errors import UsageError
from bitwright.compiler.lower.dynamic.functions import OPTION, place_of
from bitwright.compiler.lower.dynamic.islands import without_code
from bitwright.compiler.lower.dynamic.kernels import Body, any_number
from bitwright.compiler.lower.dynamic.products import any_matmul_function, any_params, why_not
from bitwright.compiler.lower.dynamic.rows import any_row_function
from bitwright.compiler.lower.dynamic.sizes import Unlike, expression, unified
from bitwright.compiler.lower.dynamic.steps import NoRows, RowStep, in_order, reorders, row_step
from bitwright.compiler.lower.dynamic.versions import Version, version_of
from bitwright.compiler.lower.float.matmul import MatmulGeometry
from bitwright.compiler.lower.float.replace import Replacement
from bitwright.compiler.lower.float.row_program import RowProgram
from bitwright.compiler.lower.float.vectors import VectorUnit, vector_unit
from bitwright.compiler.lower.kernel_table import KernelCall, Stored
from bitwright.compiler.lower.kernels.loops import OPAQUE
from bitwright.compiler.lower.layout import Order, physical_shape
from bitwright.compiler.lower.relax_module import DotKernel
from bitwright.compiler.program.ops import Dot, Program, Step, WeightOnlyDot
from bitwright.targets.schema import Profile

_CALL_TIR = tvm.ir.Op.get("relax.call_tir")
FIX = "give the lengths functions of their own, e.g. --bucket T=16,32,64 --pad INPUT=VALUE"


@dataclass(frozen=True)
class AnyLength:
    """What a function for sequences of any length is made from.

    Attributes:
        name: Of the function.
        lengths: At which the model was lowered: at least three, ascending.
        programs: The model's program at each; read once, one after the other.
        bounded: The last length is the longest that will be asked for: constants that grow with the length are
            stored for it.
    """

    name: str
    lengths: tuple[int, ...]
    programs: Iterable[Program]
    bounded: bool


def add_any_length(
    module: tvm.IRModule,
    wanted: AnyLength,
    profile: Profile,
    dot_kernel: DotKernel,
    target: dict[str, Any],
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[tvm.IRModule, tuple[KernelCall, ...]]:
    """Add a function for sequences of any length to a module whose operators are not legalized yet.

    Args:
        module: Gets the function and its kernels.
        wanted: The function.
        profile: Passed on to ``dot_kernel``.
        dot_kernel: Gives the kernels of dot products. Is asked for the largest of a step first.
        target: Fields of ``tvm.target.Target``, for the width of its vectors.
        progress: Called with each step's name.

    Returns:
        The module, and the function's kernel calls; their shapes are those at the first length.

    Raises:
        UsageError: Something cannot be computed for any length; the message names the node.
    """
    found = tvm.target.Target(target)
    versions: list[Version] = []
    for program in wanted.programs:
        version = version_of(wanted.name, program, profile, found)
        # What is asked of the others is in their modules and tables.
        versions.append(replace(version, program=None) if versions else version)
    builder = relax.BlockBuilder(module)
    unifier = _Unifier(wanted, versions, profile, dot_kernel, vector_unit(found), builder, progress)
    unifier.unify()
    return unifier.builder.get(), tuple(unifier.calls)


def refuse(where: str, why: str) -> NoReturn:
    """Refuse a part of a model that has no kernel for sequences of any length."""
    msg = f"{where} has no kernel for sequences of any length: {why}"
    raise UsageError(msg, where=OPTION, fix=FIX)


@dataclass
class _Unifier:
    """Walks the bindings of all versions in step and emits the function for any length."""

    wanted: AnyLength
    versions: list[Version]
    profile: Profile
    dot_kernel: DotKernel
    unit: VectorUnit
    builder: relax.BlockBuilder
    progress: Callable[[str], None] = lambda _: None
    length: Any = field(default_factory=lambda: tirx.Var("length", "int64"))
    values: dict[Any, Any] = field(default_factory=dict)  # variable of the first version -> expression
    symbols: dict[object, Any] = field(default_factory=dict)
    calls: list[KernelCall] = field(default_factory=list)
    done: int = 0  # kernel calls of the versions' tables
    occurrences: Counter[str] = field(default_factory=Counter)

    @property
    def first(self) -> Version:
        return self.versions[0]

    def unify(self) -> None:
        """Emit the whole function."""
        self.check_structure()
        parameters = []
        for versions in zip(*(v.function.params for v in self.versions), strict=True):
            new = relax.Var(versions[0].name, self.kind(versions, "an input"))
            self.values[versions[0]] = new
            parameters.append(new)
        with self.builder.function(self.wanted.name, parameters):
            with self.builder.dataflow():
                for position in range(len(self.first.bindings)):
                    self.bind(position)
                bodies = [v.function.body.body for v in self.versions]
                output = self.builder.emit_output(self.value(bodies, "an output"))
            self.builder.emit_func_output(output)

    def check_structure(self) -> None:
        """Refuse nodes without code for any length, and a model whose operators differ from length to length."""
        node = without_code([v.nodes for v in self.versions])
        if node is not None:
            refuse(node, "nothing but TVM's code for one length")
        forms = [
            (len(v.bindings), sorted(v.replaced), sorted(v.dropped), [c.operation for c in v.table])
            for v in self.versions
        ]
        if any(form != forms[0] for form in forms[1:]):
            refuse("the model", "its operators differ from length to length")

    def bind(self, position: int) -> None:
        """Emit one binding."""
        if position in self.first.dropped:
            return
        variables = [v.bindings[position][0] for v in self.versions]
        values = [v.bindings[position][1] for v in self.versions]
        first = values[0]
        if position in self.first.replaced:
            found = self.float_kernel([v.replaced[position] for v in self.versions], variables)
        elif isinstance(first, tvm.ir.Call) and first.op == _CALL_TIR:
            found = self.kernel_call(variables, values)
        elif isinstance(first, tvm.ir.Call):
            found = self.operator(variables, values)
        else:
            found = self.builder.emit(self.value(values, "a value"))
        self.values[variables[0]] = found

    def sizes(self, found: Sequence[Any], what: str) -> Any:
        """Return sizes, found at every length, as one record."""
        try:
            return unified(self.wanted.lengths, found)
        except Unlike as unlike:
            refuse(what, f"it has {unlike}")

    def shape(self, variables: Sequence[Any], what: str) -> list[Any]:
        """Return the shape of a tensor as expressions of the length."""
        found = self.sizes([tuple(int(d) for d in v.ty.shape) for v in variables], what)
        return [expression(size, self.length) for size in found]

    def kind(self, variables: Sequence[Any], what: str) -> Any:
        """Return the type of a tensor for any length."""
        return relax.TensorType(self.shape(variables, what), variables[0].ty.dtype)

    def value(self, versions: Sequence[Any], what: str) -> Any:
        """Return an operand in the new function."""
        first = versions[0]
        if isinstance(first, relax.Tuple):
            return relax.Tuple([self.value(v, what) for v in zip(*(t.fields for t in versions), strict=True)])
        if isinstance(first, relax.TupleGetItem):
            return relax.TupleGetItem(self.value([v.tuple_value for v in versions], what), first.index)
        if isinstance(first, tvm.ir.GenericConst):
            return self.constant([v.value.numpy() for v in versions], what)
        if isinstance(first, relax.ShapeExpr):
            found = self.sizes([tuple(int(d) for d in v.values) for v in versions], what)
            return relax.ShapeExpr([expression(size, self.length) for size in found])
        if isinstance(first, tirx.IntImm):
            return expression(self.sizes([int(v) for v in versions], what), self.length)
        if isinstance(first, tvm.ir.Var) and first in self.values:
            return self.values[first]
        if any(not structural_equal(first, other) for other in versions[1:]):
            refuse(what, "an operand changes with the length")
        return first

    def constant(self, arrays: Sequence[np.ndarray], what: str) -> Any:
        """Return a constant; one that grows with the length is stored for the longest and cut."""
        first, last = arrays[0], arrays[-1]
        if all(a.shape == first.shape and a.tobytes() == first.tobytes() for a in arrays[1:]):
            return relax.const(first, first.dtype.name)
        shape = self.sizes([a.shape for a in arrays], what)
        leading = [last[tuple(slice(n) for n in a.shape)] for a in arrays]
        if any(
            a.shape != part.shape or a.tobytes() != part.tobytes()
            for a, part in zip(arrays, leading, strict=True)
        ):
            refuse(what, "it holds values that change with the length")
        if not self.wanted.bounded:
            msg = f"{what} holds values for every position, so they must end somewhere"
            raise UsageError(
                msg,
                where=OPTION,
                fix="name the longest sequence: --dynamic NAME=SIZE",
            )
        whole = self.builder.emit(relax.const(last, last.dtype.name))
        axes = [k for k, size in enumerate(shape) if not isinstance(size, int)]
        ends = [expression(shape[k], self.length) for k in axes]
        return self.builder.emit(relax.op.strided_slice(whole, axes, [0] * len(axes), ends))

    def operator(self, variables: Sequence[Any], values: Sequence[Any]) -> Any:
        """Return a Relax operator for any length; TVM infers its shape."""
        first = values[0]
        what = f"operator {getattr(first.op, 'name', first.op)}"
        if any(v.op != first.op or not structural_equal(v.attrs, first.attrs) for v in values[1:]):
            refuse(what, "it changes with the length")
        arguments = [self.value(versions, what) for versions in zip(*(v.args for v in values), strict=True)]
        found = self.builder.emit(tvm.ir.Call(first.op, arguments, first.attrs, first.ty_args))
        if not isinstance(variables[0].ty, relax.TensorType):
            return found
        expected = self.kind(variables, what)
        if structural_equal(found.ty, expected):
            return found
        return self.builder.match_cast(found, expected)

    def float_kernel(self, found: Sequence[Replacement], variables: Sequence[Any]) -> Any:
        """Return what a float kernel computes."""
        first = found[0]
        what = f"{first.name} of {list(variables[0].ty.shape)}"
        key = self.sizes([r.key for r in found], what)
        operands = [r.operands() if r.product is None else r.product.arguments for r in found]
        if key == first.key:
            make, constants = first.make, list(first.operands()[len(operands[0]) :])
        elif isinstance(key, MatmulGeometry):
            make, constants = self.product(key, found, what)
        elif isinstance(key, RowProgram):
            make, constants = (lambda: any_row_function(key, self.unit)), []
        elif isinstance(key, tuple) and key[0] == "transpose":
            (turned,) = (self.value(v, what) for v in zip(*operands, strict=True))
            return self.builder.emit(relax.op.permute_dims(turned, list(key[2])))
        else:
            refuse(what, "it slides over the positions")
        arguments = [self.value(versions, what) for versions in zip(*operands, strict=True)]
        arguments += [relax.const(c, c.dtype.name) for c in constants]
        symbol = self.symbol(key, first.name, make)
        return self.builder.emit(
            relax.call_tir(symbol, relax.Tuple(arguments), out_ty=self.kind(variables, what))
        )

    def product(
        self, key: MatmulGeometry, found: Sequence[Replacement], what: str
    ) -> tuple[Callable[[], tirx.PrimFunc], list[np.ndarray]]:
        """Return the kernel and the constants of a matrix product."""
        reason = why_not(key)
        if reason is not None:
            refuse(what, reason)
        product = found[0].product
        assert product is not None
        arrays = [a for a in (product.weight, product.bias) if a is not None]
        for other in found[1:]:
            assert other.product is not None
            others = [a for a in (other.product.weight, other.product.bias) if a is not None]
            if any(not np.array_equal(a, b) for a, b in zip(arrays, others, strict=True)):
                refuse(what, "its weight changes with the length")
        if product.weight is not None:
            arrays = product.packed(self.unit, any_params(self.unit))
        return (lambda: any_matmul_function(key, self.unit)), arrays

    def symbol(self, key: object, name: str, make: Callable[[], tirx.PrimFunc]) -> Any:
        """Return the function of a kernel, adding it to the module the first time."""
        if key not in self.symbols:
            self.symbols[key] = self.builder.add_func(make().with_attr("op_pattern", OPAQUE), name)
        return self.symbols[key]

    def kernel_call(self, variables: Sequence[Any], values: Sequence[Any]) -> Any:
        """Return what an integer kernel, or a function of TVM's import, computes."""
        names = [v.args[0].name_hint for v in values]
        tables = [v.table for v in self.versions]
        at = self.done
        known = at < len(tables[0]) and all(t[at].function == n for t, n in zip(tables, names, strict=True))
        operands = [v.args[1].fields for v in values]
        if not known:
            return self.foreign(variables, values)
        self.done += 1
        calls = [table[at] for table in tables]
        step = self.step(calls[0])
        what = (
            f"node '{calls[0].step}' ({calls[0].operation})"
            if calls[0].step
            else f"'{calls[0].output.tensor}'"
        )
        self.progress(calls[0].step or calls[0].output.tensor)
        count = len(calls[0].inputs)
        arguments = [self.value(v, what) for v in zip(*(o[:count] for o in operands), strict=True)]
        shapes = [[s.shape for s in (*c.inputs, c.output)] for c in calls]
        if all(shape == shapes[0] for shape in shapes[1:]):
            rest = operands[0][count:]
            return self.fixed(calls[0], step, values[0].args[0], arguments, rest, variables[0])
        moved = reorders(calls[0], step)
        for k in moved:
            arguments[k] = self.turned(
                arguments[k], [call.inputs[k] for call in calls], calls[0].output.order
            )
        if step is None:
            return arguments[0]
        calls = [in_order(call, moved) for call in calls]
        try:
            rows = row_step(self.wanted.lengths, calls, self.program, step)
        except NoRows as reason:
            refuse(what, str(reason))
        return self.any_rows(rows, arguments, self.shape(variables, what))

    @property
    def program(self) -> Program:
        """The program at the first length."""
        assert self.first.program is not None
        return self.first.program

    def step(self, call: KernelCall) -> Step | None:
        """Return the step of a kernel call of the first version."""
        if call.step is None:
            return None
        return next(s for s in self.program.steps if call.output.tensor in s.outputs)

    def turned(self, value: Any, versions: Sequence[Stored], order: Order) -> Any:
        """Return a tensor in another storage order."""
        found = versions[0].order
        shapes = [physical_shape(s.shape, s.order) for s in versions]
        sizes = self.sizes(shapes, f"'{versions[0].tensor}'")
        value = self.reshaped(value, [expression(size, self.length) for size in sizes])
        return self.builder.emit(relax.op.permute_dims(value, [found.index(axis) for axis in order]))

    def foreign(self, variables: Sequence[Any], values: Sequence[Any]) -> Any:
        """Return the call of a function that TVM's import wrote."""
        symbol = values[0].args[0]
        what = f"function {symbol.name_hint} of TVM"
        if self.shape(variables, what) != [tirx.const(int(d), "int64") for d in variables[0].ty.shape]:
            refuse(what, "it was written for one length")
        operands = [v.args[1].fields for v in values]
        arguments = [self.value(v, what) for v in zip(*operands, strict=True)]
        added = self.builder.add_func(self.first.module[symbol], symbol.name_hint)
        return self.builder.emit(relax.call_tir(added, relax.Tuple(arguments), out_ty=variables[0].ty))

    def fixed(
        self,
        call: KernelCall,
        step: Step | None,
        symbol: Any,
        arguments: list[Any],
        constants: Sequence[Any],
        variable: Any,
    ) -> Any:
        """Return what a kernel computes whose tensors do not follow the length."""
        function = self.first.module[symbol]
        if isinstance(step, Dot | WeightOnlyDot):
            made = self.dot_kernel(step, self.program, self.profile)
            function, constants = made.function, [relax.const(c, c.dtype.name) for c in made.constants]
        added = self.builder.add_func(function.with_attr("op_pattern", OPAQUE), symbol.name_hint)
        self.note(call, added.name_hint, len(arguments) + len(constants))
        buffers = [list(p.ty.shape) for p in function.params]
        arguments = [self.reshaped(a, shape) for a, shape in zip(arguments, buffers, strict=False)]
        kind = relax.TensorType(buffers[-1], variable.ty.dtype)
        found = self.builder.emit(relax.call_tir(added, relax.Tuple([*arguments, *constants]), out_ty=kind))
        return self.reshaped(found, list(variable.ty.shape))

    def any_rows(self, rows: RowStep, arguments: list[Any], shape: list[Any]) -> Any:
        """Return what an integer step computes for any number of rows."""
        larger = [(r, rows.kernel(r, self.dot_kernel, self.profile)) for r in rows.blocks]
        one = rows.kernel(1, self.dot_kernel, self.profile)
        known: list[np.ndarray | None] = [None] * len(arguments) + list(one.constants)
        inputs = tuple(range(len(arguments)))
        places = [(*inputs, *(place_of(c, known) for c in k.constants)) for _, k in larger]
        output = (len(known),)
        bodies = [
            Body(r, k.function, (*place, *output)) for (r, k), place in zip(larger, places, strict=True)
        ]
        bodies.append(Body(1, one.function, (*range(len(arguments) + len(one.constants)), *output)))
        constants = [c for c in known if c is not None]
        batched = frozenset((*rows.following, *output))
        key = (one.key, tuple(k.key for _, k in larger), batched, tuple(places))
        symbol = self.symbol(key, "bw_rows", lambda: any_number(bodies, batched, rows.cost))
        count = expression(rows.rows, self.length)
        buffers = [[int(d) for d in p.ty.shape] for p in one.function.params]
        operands = [
            self.reshaped(a, [count * buffers[k][0], *buffers[k][1:]]) if k in rows.following else a
            for k, a in enumerate(arguments)
        ]
        operands += [relax.const(c, c.dtype.name) for c in constants]
        kind = relax.TensorType([count * buffers[-1][0], *buffers[-1][1:]], one.output_dtype)
        found = self.builder.emit(relax.call_tir(symbol, relax.Tuple(operands), out_ty=kind))
        self.note(rows.call, symbol.name_hint, len(operands))
        return self.reshaped(found, shape)

    def reshaped(self, value: Any, shape: list[Any]) -> Any:
        """View a tensor under another shape."""
        wanted = relax.TensorType(shape, value.ty.dtype)
        return (
            value if structural_equal(value.ty, wanted) else self.builder.emit(relax.op.reshape(value, shape))
        )

    def note(self, call: KernelCall, function: str, inputs: int) -> None:
        """Describe a kernel call that was emitted."""
        self.calls.append(
            replace(
                call,
                function=function,
                occurrence=self.occurrences[function],
                output=replace(call.output, argument=inputs),
            )
        )
        self.occurrences[function] += 1
