"""Reading TVM's memory plan from a module in which storages are assigned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from types import MappingProxyType
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.sym import Analyzer
from tvm.tirx.analysis import undefined_vars

from bitwright.compiler.lower.memory_plan import MemoryPlan, Storage, plan_memory

# Smaller scratch buffers are on the stack.
LARGEST_STACK_BYTES = 1024
_ALLOC_STORAGE = tvm.ir.Op.get("relax.memory.alloc_storage")
_ALLOC_TENSOR = tvm.ir.Op.get("relax.memory.alloc_tensor")
_ALLOC_OUTPUT = tvm.ir.Op.get("relax.builtin.alloc_tensor")


def memory_plans(
    module: tvm.IRModule, threads: int, longest: Mapping[str, int] = MappingProxyType({})
) -> dict[str, MemoryPlan]:
    """Return the plan of every Relax function whose tensors have fixed sizes, or a largest one.

    Args:
        module: After ``StaticPlanBlockMemory``.
        threads: Threads that a kernel with a parallel loop runs on, each with scratch memory of its own.
        longest: Function for sequences of any length -> the length that its plan is for.
    """
    workspaces = {
        variable.name_hint: _workspace(function, threads)
        for variable, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc)
    }
    return {
        variable.name_hint: _Reader(workspaces, longest.get(variable.name_hint, 0)).read(function)
        for variable, function in module.functions_items()
        if isinstance(function, relax.Function) and (_is_static(function) or variable.name_hint in longest)
    }


def _is_static(function: relax.Function) -> bool:
    return all(isinstance(size, tirx.IntImm) for p in function.params for size in p.ty.shape)


class _Reader:
    """Walks one function: which call touches which tensor, and in which storage that lies."""

    def __init__(self, workspaces: dict[str, int], length: int) -> None:
        self.workspaces = workspaces
        self.length = length  # of sequences, where shapes follow it
        self.calls: list[tuple[str, int]] = []
        self.storage_bytes: dict[Any, int] = {}
        self.home: dict[Any, Any] = {}  # tensor -> storage
        self.tensor_bytes: dict[Any, int] = {}
        self.behind: dict[Any, tuple[Any, ...]] = {}  # variable -> tensors whose memory it shows
        self.storage_lives: dict[Any, tuple[int, int]] = {}  # first and last call
        self.tensor_lives: dict[Any, tuple[int, int]] = {}

    def read(self, function: relax.Function) -> MemoryPlan:
        for block in function.body.blocks:
            for binding in block.bindings:
                self.bind(binding.var, binding.value)
        self.touch(self.tensors_in(function.body.body), max(len(self.calls) - 1, 0))
        storages = self.lives(self.storage_bytes, self.storage_lives)
        tensors = self.lives(self.tensor_bytes, self.tensor_lives)
        return plan_memory(self.calls, storages, tensors)

    @staticmethod
    def lives(sizes: dict[Any, int], found: dict[Any, tuple[int, int]]) -> list[Storage]:
        """Return the blocks that a call touches."""
        return [Storage(size, *found[owner]) for owner, size in sizes.items() if owner in found]

    def bind(self, variable: Any, value: Any) -> None:
        """Take note of one binding."""
        if not isinstance(value, tvm.ir.Call):
            self.behind[variable] = self.tensors_in(value)
        elif value.op == _ALLOC_STORAGE:
            self.storage_bytes[variable] = self.product(value.args[0])
        elif value.op == _ALLOC_TENSOR:
            size = self.product(value.args[2]) * _item_bytes(value.args[3])
            self.add_tensor(variable, value.args[0], size)
        elif value.op == _ALLOC_OUTPUT:
            size = self.product(value.args[0]) * _item_bytes(value.args[1])
            self.storage_bytes[variable] = size
            self.add_tensor(variable, variable, size)
        elif isinstance(value.op, tvm.ir.GlobalVar):
            self.touch(self.tensors_in(value), len(self.calls))
            name = value.op.name_hint
            self.calls.append((name, self.workspaces.get(name, 0)))
        else:  # a view, or a packed function whose result may be one
            self.touch(self.tensors_in(value), max(len(self.calls) - 1, 0))
            self.behind[variable] = self.tensors_in(value)

    def product(self, shape: Any) -> int:
        """Return the product of a shape's sizes."""
        return int(prod(_at(size, self.length) for size in shape.values))

    def add_tensor(self, variable: Any, storage: Any, size: int) -> None:
        """A tensor begins to live in a storage."""
        self.home[variable], self.tensor_bytes[variable] = storage, size
        self.behind[variable] = (variable,)

    def tensors_in(self, expression: Any) -> tuple[Any, ...]:
        """Return the tensors whose memory an expression shows."""
        if isinstance(expression, relax.Var):
            return self.behind.get(expression, ())
        if isinstance(expression, relax.TupleGetItem):
            return self.tensors_in(expression.tuple_value)
        parts = expression.fields if isinstance(expression, relax.Tuple) else getattr(expression, "args", ())
        return tuple(tensor for part in parts for tensor in self.tensors_in(part))

    def touch(self, tensors: tuple[Any, ...], at: int) -> None:
        """Extend the lives of tensors and their storages to a call."""
        for tensor in tensors:
            for owner, lives in ((tensor, self.tensor_lives), (self.home[tensor], self.storage_lives)):
                first, last = lives.get(owner, (at, at))
                lives[owner] = (min(first, at), max(last, at))


def _at(size: Any, length: int) -> int:
    """Return a size that may follow the length of a sequence."""
    analyzer = Analyzer()
    for variable in undefined_vars(size):
        analyzer.bind(variable, tirx.const(length, "int64"))
    return int(analyzer.simplify(size))


def _item_bytes(dtype: Any) -> int:
    return -(-int(tvm.DataType(str(dtype.value)).bits) // 8)


def _workspace(function: tirx.PrimFunc, threads: int) -> int:
    statements = list(statements_of(function.body))
    found_in = [buffer for statement in statements for buffer in _allocated(statement)]
    sizes = [_buffer_bytes(b) for b in found_in if not b.scope().startswith("shared")]
    found = sum(size for size in sizes if size > LARGEST_STACK_BYTES)
    parallel = any(isinstance(s, tirx.For) and int(s.kind) == tirx.ForKind.PARALLEL for s in statements)
    return found * (threads if parallel else 1)


def statements_of(statement: Any) -> Iterator[Any]:
    """Yield a TensorIR statement and every statement inside it, the outer ones first."""
    yield statement
    children = [
        getattr(statement, name, None) for name in ("body", "block", "init", "then_case", "else_case")
    ]
    for child in (*children, *(getattr(statement, "seq", None) or ())):
        if child is not None:
            yield from statements_of(child)


def _allocated(statement: Any) -> tuple[Any, ...]:
    if isinstance(statement, tirx.AllocBuffer):
        return (statement.buffer,)
    return tuple(getattr(statement, "alloc_buffers", None) or ())


def _buffer_bytes(buffer: Any) -> int:
    shape = [int(d) for d in buffer.shape if isinstance(d, tirx.IntImm)]
    return prod(shape) * -(-int(tvm.DataType(str(buffer.dtype)).bits) // 8)
