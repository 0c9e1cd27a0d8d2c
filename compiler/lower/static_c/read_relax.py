"""From the Relax function of a lowered model to a static network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax

from bitwright.compiler.errors import ModelError
from bitwright.compiler.lower.kernel_table import KernelCall, Stored
from bitwright.compiler.lower.static_c.network import Call, Network, Place, Recorded, unique_constants
from bitwright.compiler.program.ops import Program

Value = Any  # a Place, or a tuple of values


def read_network(
    main: Any, program: Program, table: Sequence[KernelCall], scratch: Mapping[str, Sequence[int]]
) -> Network:
    """Return the calls of ``main`` with a place for every argument.

    Args:
        main: Relax function of call_tir, reshapes and tuples, with static shapes.
        program: Names its parameters and results.
        table: Its integer kernel calls in execution order.
        scratch: Function -> bytes of the scratch buffers behind its other arguments.

    Raises:
        ModelError: An operator needs a runtime.
    """
    reader = _Reader(program, scratch, iter(table))
    for number, parameter in enumerate(main.params):
        reader.values[parameter] = Place("input", number)
    for block in main.body.blocks:
        for binding in block.bindings:
            reader.bind(binding.var, binding.value)
    return reader.network(reader.value(main.body.body))


def called_functions(main: Any) -> set[str]:
    """Return the names of the TensorIR functions that ``main`` calls."""
    values = [b.value for block in main.body.blocks for b in block.bindings]
    return {v.args[0].name_hint for v in values if _is_kernel_call(v)}


def _is_kernel_call(value: Any) -> bool:
    return _operator(value) == "relax.call_tir"


def _operator(value: Any) -> str | None:
    return str(value.op.name) if isinstance(value, relax.Call) and hasattr(value.op, "name") else None


@dataclass
class _Reader:
    program: Program
    scratch: Mapping[str, Sequence[int]]
    table: Any
    values: dict[Any, Value] = field(default_factory=dict)
    buffers: list[int] = field(default_factory=list)
    constants: list[np.ndarray] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.expected = next(self.table, None)
        self.steps = {name: step for step in self.program.steps for name in step.outputs}

    def bind(self, variable: Any, value: Any) -> None:
        """Read one binding."""
        if _is_kernel_call(value):
            self.values[variable] = self.call(variable, value)
        else:
            self.values[variable] = self.value(value)

    def value(self, value: Any) -> Value:
        """Return where an expression that computes nothing lies."""
        if isinstance(value, relax.Tuple):
            return tuple(self.value(part) for part in value.fields)
        if isinstance(value, relax.TupleGetItem):
            return self.value(value.tuple_value)[value.index]
        if isinstance(value, tvm.ir.GenericConst):
            self.constants.append(value.value.numpy())
            return Place("constant", len(self.constants) - 1)
        if _operator(value) == "relax.reshape":
            return self.value(value.args[0])
        if value in self.values:
            return self.values[value]
        what = (
            f"'{_operator(value) or type(value).__name__}' needs a runtime on the device, and there is none"
        )
        raise ModelError(
            what, fix="choose a target with an operating system, or take this part out of the model"
        )

    def call(self, variable: Any, value: Any) -> Value:
        """Add a call; return the places of its results."""
        function = value.args[0].name_hint
        arguments = [self.value(argument) for argument in value.args[1].fields]
        types = list(variable.ty.fields) if hasattr(variable.ty, "fields") else [variable.ty]
        results = [self.buffer(_type_bytes(kind)) for kind in types]
        extra = [self.buffer(size) for size in self.scratch.get(function, ())]
        label, recorded = self.described(function)
        self.calls.append(Call(function, (*arguments, *results, *extra), label, recorded))
        return tuple(results) if hasattr(variable.ty, "fields") else results[0]

    def buffer(self, size: int) -> Place:
        self.buffers.append(size)
        return Place("buffer", len(self.buffers) - 1)

    def described(self, function: str) -> tuple[str, tuple[Recorded, ...]]:
        """Return the label of a call and what a trace records of it."""
        entry = self.expected
        if entry is None or entry.function != function:
            return "float operators", ()
        self.expected = next(self.table, None)
        if entry.step is None:
            label = f"storage order of {entry.output.tensor}"
        else:
            step = self.steps.get(entry.output.tensor)
            nodes = ", ".join(step.nodes) if step is not None and step.nodes else entry.step
            label = f"{entry.operation} {entry.step}: ONNX nodes {nodes}"
        return label, tuple(map(_recorded, (*entry.inputs, entry.output)))

    def network(self, result: Value) -> Network:
        """Let calls write the outputs directly where they can."""
        results = result if isinstance(result, tuple) else (result,)
        direct = {p: Place("output", k) for k, p in reversed(list(enumerate(results))) if p.kind == "buffer"}
        copies = [(p, k) for k, p in enumerate(results) if direct.get(p) != Place("output", k)]
        constants, numbers = unique_constants(self.constants)

        def final(place: Place) -> Place:
            if place.kind == "constant":
                return Place("constant", numbers[place.index])
            return direct.get(place, place)

        calls = [Call(c.function, tuple(map(final, c.arguments)), c.label, c.recorded) for c in self.calls]
        return Network(
            tuple(self.program.tensor(n) for n in self.program.inputs),
            tuple(self.program.tensor(n) for n in self.program.outputs),
            tuple(self.buffers),
            constants,
            tuple(calls),
            tuple((final(p), k) for p, k in copies),
        )


def _recorded(stored: Stored) -> Recorded:
    return Recorded(stored.argument, stored.dtype, stored.buffer_shape)


def _type_bytes(kind: Any) -> int:
    elements = int(np.prod([int(d) for d in kind.shape], dtype=np.int64))
    return elements * np.dtype(str(kind.dtype)).itemsize
