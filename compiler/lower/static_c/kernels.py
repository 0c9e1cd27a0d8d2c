"""TensorIR functions with raw pointer arguments, as one object file.

Scratch buffers become arguments, too: the executor gives them places in its arena, so that nothing is allocated at run
time and the plan knows every byte. Loops that would run in a thread pool run one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from bitwright.compiler.lower.static_c.stack import stack_needs

# Up to so many bytes a buffer is left to LLVM, which keeps it in registers if it can; behind a pointer it could not.
LARGEST_LOCAL = 256


@dataclass(frozen=True)
class RawKernels:
    """Functions whose arguments are pointers.

    Attributes:
        module: Lowered ``tvm.IRModule``, ready for code generation.
        scratch: Function -> bytes of each scratch buffer, in the order of its last arguments.
        locals: Function -> bytes of the small arrays that it keeps in registers or on the stack.
    """

    module: Any
    scratch: dict[str, tuple[int, ...]]
    locals: dict[str, int]


def raw_kernels(module: tvm.IRModule, target: dict[str, Any]) -> RawKernels:
    """Lower the TensorIR functions of a module; nothing is compiled yet.

    Args:
        module: Scheduled functions; others in it are left out.
        target: Fields of ``tvm.target.Target``.
    """
    found = tvm.target.Target(target)
    functions = {
        variable: function.with_attr("global_symbol", variable.name_hint)
        for variable, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc)
    }
    bound = tirx.transform.BindTarget(found.with_host(found))(tvm.IRModule(functions))
    lowered = tvm.ir.transform.Sequential(_loop_passes())(bound)
    raw = {variable: _Raw(function) for variable, function in lowered.functions_items()}
    result = tvm.IRModule({variable: one.function() for variable, one in raw.items()})
    names = {variable.name_hint: one for variable, one in raw.items()}
    return RawKernels(
        result,
        {name: tuple(_bytes(b) for b in one.scratch) for name, one in names.items()},
        {name: one.local_bytes for name, one in names.items()},
    )


def write_object(
    kernels: RawKernels, names: Collection[str], target: dict[str, Any], path: Path
) -> dict[str, int]:
    """Generate machine code for the named functions and write it as an object file.

    Returns:
        Function -> bytes of stack that it takes.
    """
    functions = {v: f for v, f in kernels.module.functions_items() if v.name_hint in names}
    finish = tvm.ir.transform.Sequential(
        [
            tirx.transform.FP8StorageLegalize(),
            tirx.transform.BF16StorageLegalize(),
            tirx.transform.LowerIntrin(),
        ]
    )
    found = tvm.target.Target(target)
    build = tvm_ffi.get_global_func(f"target.build.{found.kind.name}")
    module = tirx.transform.BindTarget(found.with_host(found))(tvm.IRModule(functions))
    code = build(finish(module), found)
    code.write_to_file(str(path), "o")
    return stack_needs(code.inspect_source("asm"))


def _loop_passes() -> list[Any]:
    """TVM's own list for CPUs up to its packed calling convention, which needs a runtime."""
    return [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.FP8ComputeLegalize(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
    ]


@dataclass
class _Raw:
    """One function on its way to raw pointers."""

    source: tirx.PrimFunc
    scratch: list[Any] = field(default_factory=list)
    pointers: list[Any] = field(default_factory=list)
    local_bytes: int = 0

    def __post_init__(self) -> None:
        self.body = self._statement(self.source.body)

    def function(self) -> tirx.PrimFunc:
        """Return the function with a pointer for every buffer parameter, and behind them one for every scratch."""
        declared, parameters = [], []
        for buffer in self.source.params:
            pointer = tirx.Var(f"{buffer.name}_ptr", buffer.data.ty)
            parameters.append(pointer)
            declared.append(tirx.DeclBuffer(buffer, data=pointer))
        done = tirx.stmt.Return(tirx.IntImm("int32", 0))
        whole = tirx.SeqStmt([*declared, self.body, done])
        return tirx.PrimFunc(
            [*parameters, *self.pointers], whole, tvm.ir.PrimType("int32"), self.source.attrs
        )

    def _statement(self, node: Any) -> Any:
        """Return the statement with serial loops, and with its scratch buffers given from outside."""
        match node:
            case tirx.SeqStmt():
                return tirx.SeqStmt([self._statement(part) for part in node.seq])
            case tirx.For():
                return self._loop(node)
            case tirx.IfThenElse():
                other = None if node.else_case is None else self._statement(node.else_case)
                return tirx.IfThenElse(node.condition, self._statement(node.then_case), other)
            case tirx.AttrStmt():
                return tirx.AttrStmt(node.node, node.attr_key, node.value, self._statement(node.body))
            case tirx.While():
                return tirx.While(node.condition, self._statement(node.body))
            case tirx.AllocBuffer():
                return self._allocation(node)
        return node

    def _loop(self, node: Any) -> Any:
        serial = node.kind == tirx.ForKind.PARALLEL
        kind = tirx.ForKind.SERIAL if serial else node.kind
        body = self._statement(node.body)
        return tirx.For(node.loop_var, node.min, node.extent, kind, body, None, node.annotations, node.step)

    def _allocation(self, node: Any) -> Any:
        if _bytes(node.buffer) <= LARGEST_LOCAL:
            self.local_bytes += _bytes(node.buffer)
            return node
        pointer = tirx.Var(f"scratch_{len(self.scratch)}", node.buffer.data.ty)
        self.scratch.append(node.buffer)
        self.pointers.append(pointer)
        return tirx.DeclBuffer(node.buffer, data=pointer)


def _bytes(buffer: Any) -> int:
    elements = math.prod(int(extent) for extent in buffer.ty.shape)
    kind = tvm_ffi.dtype(str(buffer.ty.dtype))  # of one element, which may be a vector
    return elements * -(-int(kind.bits) * int(kind.lanes) // 8)
