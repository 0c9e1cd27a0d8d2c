"""Where every buffer of a static executor lies in the one arena.

Buffers that are alive during one call never share a byte. Placement is best fit, tried in several orders: no order is
best for every network, and planning costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bitwright.compiler.errors import InternalError

# The widest vector of the processors this is for.
ALIGNMENT = 16


@dataclass(frozen=True)
class Lifetime:
    """A buffer and the calls during which its content counts.

    Attributes:
        name: Unique.
        size: Bytes, at least 1.
        first: Number of the call that writes it first.
        last: Number of the last call that uses it, at least ``first``.
    """

    name: str
    size: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Tell whether both are alive during some call."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class ArenaPlan:
    """The layout of an arena.

    Attributes:
        offsets: Buffer -> first byte, a multiple of ``ALIGNMENT``.
        size: Bytes of the arena.
        lower_bound: The most bytes that are alive during one call: no layout can be smaller.
    """

    offsets: Mapping[str, int]
    size: int
    lower_bound: int


def aligned(size: int) -> int:
    """Round up to the next multiple of ``ALIGNMENT``."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan_arena(buffers: Sequence[Lifetime]) -> ArenaPlan:
    """Return the smallest layout that best fit finds over several orders of placement."""
    orders = (
        sorted(buffers, key=lambda b: (-b.size, b.first, b.name)),
        sorted(buffers, key=lambda b: (-b.size * (b.last - b.first + 1), b.first, b.name)),
        sorted(buffers, key=lambda b: (b.first - b.last, -b.size, b.name)),
        sorted(buffers, key=lambda b: (b.first, -b.size, b.name)),
        sorted(buffers, key=lambda b: (-b.last, -b.size, b.name)),
    )
    plans = [_placed(order) for order in orders]
    offsets = min(plans, key=lambda found: _extent(buffers, found))
    plan = ArenaPlan(offsets, _extent(buffers, offsets), max(live_bytes(buffers), default=0))
    check_plan(buffers, plan)
    return plan


def live_bytes(buffers: Sequence[Lifetime]) -> list[int]:
    """Return the aligned bytes that are alive during each call, from call 0 to the last that uses a buffer."""
    calls = 1 + max((b.last for b in buffers), default=-1)
    return [sum(aligned(b.size) for b in buffers if b.first <= call <= b.last) for call in range(calls)]


def check_plan(buffers: Sequence[Lifetime], plan: ArenaPlan) -> None:
    """Prove that a layout is sound.

    Raises:
        InternalError: Two buffers that are alive together overlap, or one lies outside the arena.
    """
    for number, buffer in enumerate(buffers):
        start = plan.offsets[buffer.name]
        if start < 0 or start % ALIGNMENT or start + buffer.size > plan.size:
            msg = (
                f"buffer '{buffer.name}' lies at {start}, outside an arena of {plan.size} bytes or unaligned"
            )
            raise InternalError(msg)
        for other in buffers[:number]:
            at = plan.offsets[other.name]
            if buffer.meets(other) and start < at + other.size and at < start + buffer.size:
                msg = f"buffers '{buffer.name}' and '{other.name}' are alive together and overlap"
                raise InternalError(msg)


def _extent(buffers: Sequence[Lifetime], offsets: Mapping[str, int]) -> int:
    return max((offsets[b.name] + aligned(b.size) for b in buffers), default=0)


def _placed(order: Iterable[Lifetime]) -> dict[str, int]:
    offsets: dict[str, int] = {}
    placed: list[Lifetime] = []
    for buffer in order:
        taken = sorted(
            (offsets[p.name], offsets[p.name] + aligned(p.size)) for p in placed if buffer.meets(p)
        )
        offsets[buffer.name] = _best_fit(aligned(buffer.size), taken)
        placed.append(buffer)
    return offsets


def _best_fit(size: int, taken: Sequence[tuple[int, int]]) -> int:
    """Return the start of the smallest gap between intervals that holds ``size``; the end if there is none."""
    best, room, end = -1, 0, 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (best < 0 or gap < room):
            best, room = end, gap
        end = max(end, stop)
    return end if best < 0 else best
