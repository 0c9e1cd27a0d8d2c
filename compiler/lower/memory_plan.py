"""Working memory of a compiled function: what is held at every kernel call, and what the process keeps.

TVM's planner gives every intermediate tensor a storage; tensors whose lives do not overlap share one. At run time a
storage comes from a pool that hands out whole pages and keeps what is returned, so after one call the process keeps,
for every size, as many blocks as were in use at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PAGE_BYTES = 4096  # of TVM's pooled allocator


@dataclass(frozen=True)
class Storage:
    """A block of memory.

    Attributes:
        bytes: Its size.
        first: Position of the first call whose output or operand lies in it.
        last: Position of the last one.
    """

    bytes: int
    first: int
    last: int

    @property
    def pages_bytes(self) -> int:
        """What the pool hands out for it."""
        return -(-self.bytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True)
class MemoryStep:
    """One kernel call.

    Attributes:
        function: Symbol of the kernel.
        live_bytes: Tensors that are needed then: its operands and what later calls read.
        held_bytes: Storages that are in use then, in whole pages.
        workspace_bytes: Scratch memory of the kernel itself, of all threads.
    """

    function: str
    live_bytes: int
    held_bytes: int
    workspace_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Working memory of one function of a library; weights, inputs and code are no part of it.

    Attributes:
        storages: How many blocks it asks for.
        steps: Its kernel calls in order.
        pool_bytes: What the process keeps after a call.
        live_bytes: Most bytes of tensors needed at once: what a perfect plan would take.
        constant_bytes: Read-only data that stays in flash, where there is flash.
    """

    storages: int
    steps: tuple[MemoryStep, ...]
    pool_bytes: int
    live_bytes: int
    constant_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """What a call takes: the pool, and the largest scratch memory of a kernel."""
        return self.pool_bytes + max((step.workspace_bytes for step in self.steps), default=0)


def plan_memory(
    calls: Sequence[tuple[str, int]], storages: Sequence[Storage], tensors: Sequence[Storage]
) -> MemoryPlan:
    """Put together the plan of one function.

    Args:
        calls: (kernel, bytes of its scratch memory) in order.
        storages: Blocks with the calls between which they are in use.
        tensors: The same for the tensors in them.
    """
    steps = tuple(
        MemoryStep(
            function,
            live_bytes=sum(t.bytes for t in tensors if t.first <= at <= t.last),
            held_bytes=sum(s.pages_bytes for s in storages if s.first <= at <= s.last),
            workspace_bytes=workspace,
        )
        for at, (function, workspace) in enumerate(calls)
    )
    return MemoryPlan(
        storages=len(storages),
        steps=steps,
        pool_bytes=_pool_bytes(storages, len(calls)),
        live_bytes=max((step.live_bytes for step in steps), default=0),
    )


def _pool_bytes(storages: Iterable[Storage], calls: int) -> int:
    """Return the bytes the pool has asked the system for: by size, the most blocks in use at once."""
    blocks = list(storages)
    most: Counter[int] = Counter()
    for at in range(calls):
        used = Counter(s.pages_bytes for s in blocks if s.first <= at <= s.last)
        most |= used
    return sum(size * count for size, count in most.items())


def dump_plans(plans: Mapping[str, MemoryPlan]) -> str:
    """Return the plans of a library's functions as JSON."""
    return json.dumps({name: asdict(plan) for name, plan in plans.items()}, indent=1) + "\n"


def write_plans(plans: Mapping[str, MemoryPlan], path: Path) -> None:
    """Write plans where another process waits for them: it finds the whole file or none."""
    draft = path.with_suffix(".draft")
    draft.write_text(dump_plans(plans))
    draft.replace(path)


def load_plans(text: str) -> dict[str, MemoryPlan]:
    """Return what :func:`dump_plans` wrote."""
    found = json.loads(text)
    return {
        name: MemoryPlan(**{**data, "steps": tuple(MemoryStep(**step) for step in data["steps"])})
        for name, data in found.items()
    }
