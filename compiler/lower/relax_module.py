"""From a Program to one Relax function that calls a TensorIR kernel for each integer step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from tvm import relax

from bitwright.compiler.errors import InternalError
from bitwright.compiler.lower.device import Reorder, StepKernel, host_reorder, host_step
from bitwright.compiler.lower.island import emit_copy, import_model
from bitwright.compiler.lower.kernel_table import KernelCall, Stored
from bitwright.compiler.lower.kernels.attention import cached_attention
from bitwright.compiler.lower.kernels.loops import OPAQUE
from bitwright.compiler.lower.layout import (
    CHANNELS_LAST,
    Order,
    demanded_orders,
    dot_order,
    elementwise_order,
    is_read_as_image,
    is_written_as_image,
    order_free,
    physical_shape,
    row_major,
    same_storage,
    transposed,
)
from bitwright.compiler.program.ops import (
    CachedAttention,
    Dequantize,
    Dot,
    FloatIsland,
    Move,
    Program,
    QAdd,
    QConcat,
    QLut,
    QMul,
    QPool,
    Quantize,
    Step,
    WeightOnlyDot,
)
from bitwright.targets.backend import Kernel
from bitwright.targets.schema import Profile

DotKernel: TypeAlias = Callable[[Step, Program, Profile], Kernel]
Progress: TypeAlias = Callable[[str], None]

_ELEMENTWISE: dict[type[Step], str] = {QAdd: "add", QMul: "multiply", QLut: "lut", QConcat: "concat"}


@dataclass(frozen=True)
class LoweredModule:
    """A module ready to be compiled.

    Attributes:
        ir_module: ``tvm.IRModule`` with one Relax function ``main`` and one PrimFunc per distinct kernel.
        kernel_table: Kernel calls of ``main`` in execution order.
    """

    ir_module: Any
    kernel_table: tuple[KernelCall, ...]


@dataclass(frozen=True)
class LoweredFunctions:
    """A module with several Relax functions, which share kernels and constants, ready to be compiled.

    Attributes:
        ir_module: ``tvm.IRModule``.
        kernel_tables: Function name -> its kernel calls in execution order.
    """

    ir_module: Any
    kernel_tables: Mapping[str, tuple[KernelCall, ...]]


@dataclass(frozen=True)
class _Value:
    """A tensor under construction: the Relax expression (of any shape) and the order its bytes are in."""

    expr: Any
    order: Order


def build_module(
    program: Program, profile: Profile, dot_kernel: DotKernel, progress: Progress = lambda _: None
) -> LoweredModule:
    """Assemble the Relax module of a program.

    Args:
        program: Static shapes; steps in topological order.
        profile: Passed on to ``dot_kernel``.
        dot_kernel: Gives the kernel of a QGemm or QConv step. Gemm activations are row-major [..., K], Conv
            activations
            channels-last.
        progress: Called with each step's name before it is lowered.

    Raises:
        ToolchainError: TVM cannot import a float island.
        InternalError: A kernel's buffers do not fit the step's tensors.
    """
    lowered = build_functions({"main": program}, profile, dot_kernel, progress)
    return LoweredModule(lowered.ir_module, lowered.kernel_tables["main"])


def build_functions(
    programs: Mapping[str, Program],
    profile: Profile,
    dot_kernel: DotKernel,
    progress: Progress = lambda _: None,
    *,
    step_kernel: StepKernel = host_step,
    reorder: Reorder = host_reorder,
) -> LoweredFunctions:
    """Assemble one Relax module from several programs, e.g. those of one model for several shapes.

    Equal kernels are one function; equal constants become one when the module is compiled.

    Args:
        programs: Function name -> program. Names begin with ``main``.
        profile: As for :func:`build_module`, as are ``dot_kernel``, ``progress`` and the errors.
        dot_kernel: Gives the kernel of a QGemm or QConv step.
        progress: Called with each step's name before it is lowered.
        step_kernel: Gives the kernel of every other integer step.
        reorder: Gives the kernel of a change of storage order.
    """
    builder = relax.BlockBuilder()
    kernels: dict[str, Any] = {}
    tables = {}
    for name, program in programs.items():
        assembler = _Assembler(program, profile, (dot_kernel, step_kernel, reorder), builder, kernels)
        assembler.assemble(name, progress)
        tables[name] = tuple(assembler.calls)
    return LoweredFunctions(builder.get(), tables)


def _needed_steps(program: Program) -> set[str]:
    """Return the names of the steps whose results are used: Relax drops the others."""
    wanted, needed = set(program.outputs), set()
    for step in reversed(program.steps):
        if wanted.intersection(step.outputs):
            needed.add(step.name)
            wanted.update(step.inputs)
    return needed


class _Assembler:
    """Walks the steps once and keeps where each tensor is."""

    def __init__(
        self,
        program: Program,
        profile: Profile,
        kernels: tuple[DotKernel, StepKernel, Reorder],
        builder: relax.BlockBuilder,
        functions: dict[str, Any],
    ) -> None:
        self.program, self.profile = program, profile
        self.dot_kernel, self.step_kernel, self.reorder = kernels
        self.builder, self.functions = builder, functions
        self.values: dict[str, _Value] = {}
        self.reordered: dict[tuple[str, Order], _Value] = {}
        self.demand = demanded_orders(program)
        self.occurrences: Counter[str] = Counter()
        self.calls: list[KernelCall] = []
        for name, array in program.constants.items():
            self.values[name] = self.constant(name, array)

    def assemble(self, name: str, progress: Progress) -> None:
        """Emit the whole program as the Relax function ``name``."""
        needed = _needed_steps(self.program)
        parameters = [self.parameter(tensor, i) for i, tensor in enumerate(self.program.inputs)]
        with self.builder.function(name, parameters):
            with self.builder.dataflow():
                for step in self.program.steps:
                    if step.name in needed:
                        progress(step.name)
                        self.lower(step)
                results = [self.row_major_result(tensor) for tensor in self.program.outputs]
                whole = results[0] if len(results) == 1 else relax.Tuple(results)
                output = self.builder.emit_output(whole)
            self.builder.emit_func_output(output)

    def parameter(self, name: str, position: int) -> Any:
        """Return the Relax parameter of a graph input; its name is a number, not the model's."""
        tensor = self.program.tensor(name)
        parameter = relax.Var(f"input_{position}", relax.TensorType(tensor.shape, tensor.dtype))
        self.values[name] = _Value(parameter, row_major(len(tensor.shape)))
        return parameter

    def constant(self, name: str, array: np.ndarray) -> _Value:
        """Return a constant operand, stored in the order its first consumer wants."""
        order = self.demand.get(name, row_major(array.ndim))
        stored = array.transpose(order).copy(order="C")
        return _Value(relax.const(stored, stored.dtype.name), order)

    def row_major_result(self, name: str) -> Any:
        """Return a graph output in row-major order and logical shape."""
        shape = self.program.tensor(name).shape
        return self.shaped(self.in_order(name, row_major(len(shape))).expr, shape)

    def shaped(self, expr: Any, shape: tuple[int, ...]) -> Any:
        """View an expression's bytes under another shape."""
        found = tuple(int(d) for d in expr.ty.shape)
        return expr if found == shape else self.builder.emit(relax.op.reshape(expr, shape))

    def in_order(self, name: str, order: Order) -> _Value:
        """Return a tensor in the wanted storage order, converting it at most once."""
        value, tensor = self.values[name], self.program.tensor(name)
        if same_storage(tensor.shape, value.order, order):
            return _Value(value.expr, order)
        if (name, order) not in self.reordered:
            kernel = self.reorder(tensor, value.order, order)
            call = (None, "Layout", kernel, {name: value.order})
            self.reordered[name, order] = _Value(self.call(*call, (name,), name, order), order)
        return self.reordered[name, order]

    def lower(self, step: Step) -> None:
        """Emit one step."""
        if isinstance(step, FloatIsland):
            self.island(step)
        elif isinstance(step, CachedAttention):
            self.attention(step)
        elif isinstance(step, Dot | WeightOnlyDot | QPool):
            self.fixed_order(step)
        elif isinstance(step, Quantize | Dequantize):
            self.edge(step)
        elif isinstance(step, Move):
            self.move(step)
        else:
            self.any_order(step, _ELEMENTWISE[type(step)])

    def island(self, step: FloatIsland) -> None:
        """Copy the nodes of a float island into main."""
        module = import_model(step.model, step.name)
        order = self.island_order(step)
        arguments = [self.island_input(step, name, order) for name in step.inputs]
        for name, expr in zip(step.outputs, emit_copy(self.builder, module, arguments), strict=True):
            self.values[name] = self.island_output(step, name, order, expr)

    def attention(self, step: CachedAttention) -> None:
        """Emit attention; the kernel writes into the caches it is given, so these are its results, too."""
        result, *presents = step.outputs
        orders = {name: row_major(len(self.program.tensor(name).shape)) for name in (*step.inputs, result)}
        kernel = cached_attention(step, self.program)
        operation = type(step).__name__
        expr = self.call(
            step.name, operation, kernel, orders, step.inputs, result, orders[result], "attention"
        )
        self.values[result] = _Value(expr, orders[result])
        for name, source in zip(presents, step.inputs[-2:], strict=True):
            self.values[name] = self.in_order(source, orders[source])

    def island_input(self, step: FloatIsland, name: str, order: Order | None) -> Any:
        """Return what an island reads; what its convolutions read is turned by operators, which cancel theirs."""
        shape, found = self.program.tensor(name).shape, self.values[name].order
        if order is None and found == CHANNELS_LAST and is_read_as_image(step, name):
            expr = self.shaped(self.values[name].expr, physical_shape(shape, found))
            return self.builder.emit(relax.op.permute_dims(expr, transposed(row_major(4), found)))
        return self.shaped(self.in_order(name, order or row_major(len(shape))).expr, shape)

    def island_output(self, step: FloatIsland, name: str, order: Order | None, expr: Any) -> _Value:
        """Return what an island writes, in the order of its convolutions if its first consumer wants it so."""
        rank = len(self.program.tensor(name).shape)
        wanted = self.demand.get(name)
        if order is None and wanted == CHANNELS_LAST and is_written_as_image(step, name):
            return _Value(self.builder.emit(relax.op.permute_dims(expr, wanted)), wanted)
        return _Value(expr, order or row_major(rank))

    def island_order(self, step: FloatIsland) -> Order | None:
        """Return the order an island that maps elements works in, or None: each tensor row-major."""
        if not step.inputs or not order_free(step, self.program):
            return None
        first = self.values[step.inputs[0]].order
        return elementwise_order(
            step.inputs,
            step.outputs[0],
            self.program,
            {name: self.values[name].order for name in step.inputs},
            {step.outputs[0]: self.demand.get(step.outputs[0], first)},
        )

    def fixed_order(self, step: Step) -> None:
        """Conv and pool run channels-last, Gemm row-major."""
        shape = self.program.tensor(step.output).shape
        (source,) = step.inputs
        order = dot_order(step, len(self.program.tensor(source).shape))
        orders = {source: order, step.output: dot_order(step, len(shape))}
        if isinstance(step, QPool):
            kernel, name = self.step_kernel(step, self.program, orders), "pool"
        else:
            kernel = self.dot_kernel(step, self.program, self.profile)
            name = "conv" if order == CHANNELS_LAST else "gemm"
        self.finish(step, name, kernel, orders)

    def edge(self, step: Quantize | Dequantize) -> None:
        """Quantize into the order the first consumer wants; dequantize into it if it needs no transposition."""
        rank = len(self.program.tensor(step.output).shape)
        orders = {name: self.values[name].order for name in step.inputs}
        if isinstance(step, Quantize):
            orders[step.output] = self.demand.get(step.output, row_major(rank))
            self.finish(step, "quantize", self.step_kernel(step, self.program, orders), orders)
        else:
            (source,) = step.inputs
            wanted = self.demand.get(step.output, row_major(rank))
            orders[step.output] = wanted if wanted == orders[source] else row_major(rank)
            self.finish(step, "dequantize", self.step_kernel(step, self.program, orders), orders)

    def move(self, step: Move) -> None:
        """Transposes and reshapes relabel bytes; the rest are kernels."""
        (source,) = step.inputs
        if step.kind == "transpose":
            value = self.values[source]
            self.values[step.output] = _Value(value.expr, transposed(value.order, step.perm))
        elif step.kind == "reshape":
            value = self.in_order(source, row_major(len(self.program.tensor(source).shape)))
            self.values[step.output] = _Value(
                value.expr, row_major(len(self.program.tensor(step.output).shape))
            )
        else:
            self.any_order(step, step.kind)

    def any_order(self, step: Step, name: str) -> None:
        """Emit a step whose kernel reads every input in the order it is in."""
        orders = {tensor: self.values[tensor].order for tensor in step.inputs}
        out = elementwise_order(step.inputs, step.output, self.program, orders, self.demand)
        orders[step.output] = out
        self.finish(step, name, self.step_kernel(step, self.program, orders), orders)

    def finish(self, step: Step, name: str, kernel: Kernel, orders: Mapping[str, Order]) -> None:
        """Call a step's kernel and remember its output."""
        operation = type(step).__name__ + (f".{step.kind}" if isinstance(step, Move | QPool) else "")
        order = orders[step.output]
        expr = self.call(step.name, operation, kernel, orders, step.inputs, step.output, order, name)
        self.values[step.output] = _Value(expr, order)

    def call(
        self,
        step: str | None,
        operation: str,
        kernel: Kernel,
        orders: Mapping[str, Order],
        inputs: tuple[str, ...],
        output: str,
        output_order: Order,
        name: str = "layout",
    ) -> Any:
        """Emit one call_tir and its table entry."""
        function = self.function(kernel, name)
        shapes = [tuple(int(d) for d in p.ty.shape) for p in kernel.function.params]
        last = len(shapes) - 1
        stored = [self.stored(n, orders[n], i, shapes[i]) for i, n in enumerate(inputs)]
        result = self.stored(output, output_order, last, shapes[last])
        if last != len(inputs) + len(kernel.constants) or shapes[last] != kernel.output_shape:
            what = f"kernel '{kernel.key}' has {last + 1} parameters {shapes}"
            raise InternalError(what, where=step or output)
        activations = [self.shaped(self.in_order(s.tensor, s.order).expr, s.buffer_shape) for s in stored]
        constants = [relax.const(c, c.dtype.name) for c in kernel.constants]
        symbol = function.name_hint
        self.calls.append(
            KernelCall(
                step, operation, symbol, self.occurrences[symbol], kernel.intrinsic, tuple(stored), result
            )
        )
        self.occurrences[symbol] += 1
        result_type = relax.TensorType(kernel.output_shape, kernel.output_dtype)
        arguments = relax.Tuple([*activations, *constants])
        return self.builder.emit(relax.call_tir(function, arguments, out_ty=result_type))

    def stored(self, name: str, order: Order, argument: int, buffer_shape: tuple[int, ...]) -> Stored:
        """Describe one tensor argument of a kernel."""
        tensor = self.program.tensor(name)
        if int(np.prod(buffer_shape, dtype=np.int64)) != int(np.prod(tensor.shape, dtype=np.int64)):
            what = f"a kernel declares {list(buffer_shape)} for a tensor of shape {list(tensor.shape)}"
            raise InternalError(what, where=name)
        return Stored(name, tensor.shape, order, tensor.dtype, argument, buffer_shape)

    def function(self, kernel: Kernel, name: str) -> Any:
        """Return the shared function of a kernel, adding it to the module the first time."""
        if kernel.key not in self.functions:
            symbol = f"bw_{len(self.functions):03d}_{name}"
            marked = kernel.function.with_attr("op_pattern", OPAQUE)
            self.functions[kernel.key] = self.builder.add_func(marked, symbol)
        return self.functions[kernel.key]
