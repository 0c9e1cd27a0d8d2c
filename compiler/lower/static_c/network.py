"""A static network: calls of functions on places in memory, and the plan of that memory. No TVM here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from bitwright.compiler.errors import InfeasibleBudgetError
from bitwright.compiler.lower import memory_plan
from bitwright.compiler.lower.static_c.arena import ArenaPlan, Lifetime, aligned, live_bytes, plan_arena
from bitwright.compiler.lower.static_c.stack import network_stack
from bitwright.compiler.program.ops import Tensor
from bitwright.targets.schema import Limits

# Frames of net_run and of one kernel: saved registers of both files and spilled values. The arrays that a kernel keeps
# outside the arena are added.
FRAMES_BYTES = 512


@dataclass(frozen=True)
class Place:
    """Where an argument lies.

    Attributes:
        kind: The caller's memory, the arena, or constants.
        index: Number of the input, output, buffer or constant.
    """

    kind: Literal["input", "output", "buffer", "constant"]
    index: int


@dataclass(frozen=True)
class Recorded:
    """An argument that a trace records.

    Attributes:
        argument: Its position.
        dtype: numpy name.
        shape: Of the kernel's buffer.
    """

    argument: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        function: Symbol.
        arguments: Every pointer, scratch buffers last.
        label: What it computes, and the ONNX nodes it covers.
        recorded: For a trace: the activations, then the output; empty for float operators.
    """

    function: str
    arguments: tuple[Place, ...]
    label: str
    recorded: tuple[Recorded, ...] = ()


@dataclass(frozen=True)
class Network:
    """Everything a static executor consists of, but for the machine code.

    Attributes:
        inputs: The caller's tensors that are read.
        outputs: The caller's tensors that are written; a later call may read them, too.
        buffers: Bytes of every arena buffer.
        constants: Arrays that stay in flash.
        calls: In execution order.
        copies: Outputs that no call writes: (where the value lies, number of the output).
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    buffers: tuple[int, ...]
    constants: tuple[np.ndarray, ...]
    calls: tuple[Call, ...]
    copies: tuple[tuple[Place, int], ...] = ()


@dataclass(frozen=True)
class MemoryPlan:
    """What a network needs, known before any machine code exists; only the stack is an estimate then.

    Attributes:
        arena: Layout of the arena; buffers are named by their numbers.
        live: Bytes of the arena that are in use during each call.
        io_bytes: The caller's inputs and outputs.
        stack_bytes: Of net_run and everything below it.
        constant_bytes: In flash, beside the code.
    """

    arena: ArenaPlan
    live: tuple[int, ...]
    io_bytes: int
    stack_bytes: int
    constant_bytes: int

    @property
    def ram_bytes(self) -> int:
        """Arena, inputs, outputs and stack."""
        return self.arena.size + self.io_bytes + self.stack_bytes

    def offset(self, buffer: int) -> int:
        """Return where a buffer lies in the arena."""
        return self.arena.offsets[str(buffer)]

    def sentence(self) -> str:
        """Return the plan in one line."""
        return (
            f"memory plan: {self.ram_bytes} bytes of RAM (arena {self.arena.size}, of which at most "
            f"{self.arena.lower_bound} are in use at once; inputs and outputs {self.io_bytes}; stack "
            f"{self.stack_bytes}), {self.constant_bytes} bytes of constants"
        )


def plan_memory(network: Network, local_bytes: Mapping[str, int]) -> MemoryPlan:
    """Plan the memory of a network.

    Args:
        network: Its calls name every buffer, scratch included.
        local_bytes: Function -> bytes of the arrays that it keeps on the stack.
    """
    lifetimes = buffer_lifetimes(network)
    frames = max((local_bytes.get(call.function, 0) for call in network.calls), default=0)
    return MemoryPlan(
        arena=plan_arena(lifetimes),
        live=tuple(live_bytes(lifetimes)),
        io_bytes=sum(aligned(tensor_bytes(t)) for t in (*network.inputs, *network.outputs)),
        stack_bytes=FRAMES_BYTES + frames,
        constant_bytes=sum(c.nbytes for c in network.constants),
    )


def with_stack(network: Network, plan: MemoryPlan, needs: Mapping[str, int]) -> MemoryPlan:
    """Return the plan with the stack that machine code takes instead of the estimate.

    Args:
        network: What was planned.
        plan: From ``plan_memory``.
        needs: Function -> bytes of stack, from ``stack_needs``.
    """
    calls = [(call.function, len(call.arguments)) for call in network.calls]
    return replace(plan, stack_bytes=network_stack(calls, needs))


def working_memory(network: Network, plan: MemoryPlan) -> memory_plan.MemoryPlan:
    """Return a plan in the form that all targets report: one block, which holds inputs, outputs and the stack, too."""
    beside = plan.io_bytes + plan.stack_bytes
    steps = tuple(
        memory_plan.MemoryStep(call.function, live, plan.arena.size + beside, 0)
        for call, live in zip(network.calls, plan.live, strict=False)
    )
    return memory_plan.MemoryPlan(1, steps, plan.ram_bytes, plan.arena.lower_bound, plan.constant_bytes)


def buffer_lifetimes(network: Network) -> list[Lifetime]:
    """Return the lifetime of every arena buffer; copies to outputs count as one call behind the last."""
    uses: dict[int, list[int]] = {}
    for number, call in enumerate(network.calls):
        for place in call.arguments:
            if place.kind == "buffer":
                uses.setdefault(place.index, []).append(number)
    for place, _ in network.copies:
        if place.kind == "buffer":
            uses.setdefault(place.index, []).append(len(network.calls))
    return [Lifetime(str(b), network.buffers[b], min(at), max(at)) for b, at in sorted(uses.items())]


def check_limits(plan: MemoryPlan, limits: Limits, where: str) -> None:
    """Refuse a plan that the device cannot hold.

    Raises:
        InfeasibleBudgetError: It needs more RAM than there is, or its constants alone more flash.
    """
    needs = (("RAM", plan.ram_bytes, limits.ram_bytes), ("flash", plan.constant_bytes, limits.flash_bytes))
    for memory, needed, limit in needs:
        if limit is not None and needed > limit:
            what = f"{plan.sentence()}; the target has {limit:.0f} bytes of {memory}"
            raise InfeasibleBudgetError(
                what, where=where, fix="a smaller model or input (--dim), or a target with more memory"
            )


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor."""
    return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize


def unique_constants(arrays: Sequence[np.ndarray]) -> tuple[tuple[np.ndarray, ...], tuple[int, ...]]:
    """Return every array once, and for each given one the number of its copy there."""
    found: dict[tuple[str, bytes], int] = {}
    kept: list[np.ndarray] = []
    numbers = []
    for array in arrays:
        key = (array.dtype.name, array.tobytes())
        if key not in found:
            found[key] = len(kept)
            kept.append(array)
        numbers.append(found[key])
    return tuple(kept), tuple(numbers)
