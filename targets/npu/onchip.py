"""Addresses in the accelerator's buffers: TensorIR's own plan of what lies where, turned into words.

TensorIR allocates a buffer for what one fill holds, at the loop that the fill belongs to. All fills of a buffer begin
at its first word, or, if it is doubled, in its two halves in turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import s_tir, tirx

from bitwright.compiler.errors import InternalError
from bitwright.compiler.lower.templates.root_block import with_root_block
from bitwright.targets.npu.intrinsics import ACTIVATIONS, SUMS, WEIGHTS
from bitwright.targets.npu.machine import Machine
from bitwright.targets.npu.tiling import Tiling

Expr = Any


def with_addresses(function: tirx.PrimFunc, machine: Machine, tiling: Tiling) -> tirx.PrimFunc:
    """Return a tensorized function with numbers for addresses, its loops inside one root block.

    Raises:
        InternalError: A fill is larger than the buffer.
    """
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    for step in (
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
        s_tir.transform.StmtSimplify(),
    ):
        module = step(module)
    found = module["main"]
    rewriter = _Rewriter(_buffers(machine, tiling))
    body = rewriter.whole(found.body)
    done = found.with_body(body).with_attr("tirx.is_scheduled", True).without_attr("global_symbol")
    return with_root_block(done)


@dataclass(frozen=True)
class _Buffer:
    """One memory: bytes of a word as TensorIR counts elements, words, and whether its fills take turns."""

    elements: int
    words: int
    doubled: bool


def _buffers(machine: Machine, tiling: Tiling) -> dict[str, _Buffer]:
    return {
        ACTIVATIONS: _Buffer(machine.rows, machine.activation_words, tiling.double_activations),
        WEIGHTS: _Buffer(machine.columns, machine.weight_words, tiling.double_weights),
        SUMS: _Buffer(machine.columns, machine.accumulator_words, tiling.double_sums),
    }


@dataclass
class _Rewriter:
    buffers: dict[str, _Buffer]
    loops: list[Any] = field(default_factory=list)
    # TensorIR's buffer -> its memory, and the address of the current fill.
    places: dict[Any, tuple[_Buffer, Expr]] = field(default_factory=dict)
    commands: int = 0

    def whole(self, body: Any) -> Any:
        """Return the body of a function; it waits for the accelerator behind the loops with commands."""
        parts, last = [], 0
        for part in body.seq if isinstance(body, tirx.SeqStmt) else [body]:
            before, done = self.commands, self.statement(part)
            parts += [] if done is None else [done]
            last = len(parts) if self.commands > before else last
        finish = tirx.Evaluate(tirx.call_extern("int32", "npu_finish"))
        return tirx.SeqStmt([*parts[:last], finish, *parts[last:]])

    def statement(self, node: Any) -> Any:
        """Return a statement without allocations of the accelerator's memories."""
        match node:
            case tirx.SeqStmt():
                parts = [done for part in node.seq if (done := self.statement(part)) is not None]
                return tirx.SeqStmt(parts) if len(parts) > 1 else parts[0]
            case tirx.For():
                self.loops.append(node)
                body = self.statement(node.body)
                self.loops.pop()
                return tirx.For(
                    node.loop_var, node.min, node.extent, node.kind, body, None, node.annotations, node.step
                )
            case tirx.AttrStmt():
                return tirx.AttrStmt(node.node, node.attr_key, node.value, self.statement(node.body))
            case tirx.IfThenElse():
                other = None if node.else_case is None else self.statement(node.else_case)
                return tirx.IfThenElse(node.condition, self.statement(node.then_case), other)
            case tirx.AllocBuffer():
                return self._allocation(node)
            case tirx.Evaluate():
                return tirx.Evaluate(self._call(node.value))
        return node

    def _allocation(self, node: Any) -> Any:
        memory = self.buffers.get(node.buffer.scope())
        if memory is None:
            return node
        size = 1
        for extent in node.buffer.shape:
            size *= int(extent)
        if size > memory.elements * memory.words // (2 if memory.doubled else 1):
            what = f"a fill of {size} elements does not fit {memory}"
            raise InternalError(what)
        number: Expr = tirx.const(0, "int32")
        for loop in self.loops:
            number = number * int(loop.extent) + loop.loop_var
        start = number % 2 * (memory.words // 2) if memory.doubled else tirx.const(0, "int32")
        self.places[node.buffer] = (memory, start)
        return None

    def _call(self, value: Any) -> Any:
        if not isinstance(value, tvm.ir.Call):
            return value
        self.commands += 1
        arguments = [self._argument(a) for a in value.args]
        return tirx.call_extern("int32", *arguments)

    def _argument(self, argument: Any) -> Any:
        """Return an argument of a command; an access pointer into a memory of the accelerator becomes a word."""
        if not isinstance(argument, tvm.ir.Call) or argument.op.name != "tirx.tvm_access_ptr":
            return argument
        place = self.places.get(argument.args[1].args[0])  # type, data of a buffer, offset, ...
        if place is None:
            return argument
        memory, start = place
        return start + tirx.floordiv(argument.args[2], memory.elements)
