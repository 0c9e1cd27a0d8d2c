"""The arena plan: nothing alive together overlaps, and the arena is no smaller than what must be alive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.compiler.errors import InternalError
from bitwright.compiler.lower.static_c.arena import (
    ALIGNMENT,
    ArenaPlan,
    Lifetime,
    aligned,
    check_plan,
    live_bytes,
    plan_arena,
)

CALLS = 12


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    spans = draw(
        st.lists(st.tuples(st.integers(0, CALLS), st.integers(0, CALLS), st.integers(1, 5000)), max_size=25)
    )
    return [Lifetime(str(k), size, min(a, b), max(a, b)) for k, (a, b, size) in enumerate(spans)]


def bytes_of(buffer: Lifetime, plan: ArenaPlan) -> set[int]:
    return set(range(plan.offsets[buffer.name], plan.offsets[buffer.name] + buffer.size))


@given(lifetimes())
def test_no_two_live_buffers_share_a_byte(buffers: list[Lifetime]) -> None:
    plan = plan_arena(buffers)
    for call in range(CALLS + 1):
        alive = [b for b in buffers if b.first <= call <= b.last]
        assert sum(b.size for b in alive) == len(set().union(*(bytes_of(b, plan) for b in alive)))


@given(lifetimes())
def test_the_arena_lies_between_the_live_bytes_and_the_sum(buffers: list[Lifetime]) -> None:
    plan = plan_arena(buffers)
    assert plan.lower_bound == max(live_bytes(buffers), default=0)
    assert plan.lower_bound <= plan.size <= sum(aligned(b.size) for b in buffers)
    assert all(offset % ALIGNMENT == 0 for offset in plan.offsets.values())
    assert all(plan.offsets[b.name] + b.size <= plan.size for b in buffers)


def test_a_chain_of_layers_needs_two_neighbours_at_a_time() -> None:
    sizes = (1600, 3200, 800, 4000, 16)
    plan = plan_arena([Lifetime(str(k), size, k, k + 1) for k, size in enumerate(sizes)])
    assert plan.size == plan.lower_bound == 800 + 4000


def test_the_proof_refuses_an_overlap_and_a_buffer_outside() -> None:
    buffers = [Lifetime("a", 32, 0, 1), Lifetime("b", 32, 1, 2)]
    with pytest.raises(InternalError, match="'b' and 'a' are alive together"):
        check_plan(buffers, ArenaPlan({"a": 0, "b": 16}, 64, 64))
    with pytest.raises(InternalError, match="outside an arena of 32 bytes"):
        check_plan(buffers, ArenaPlan({"a": 0, "b": 32}, 32, 64))
    check_plan(buffers, ArenaPlan({"a": 0, "b": 32}, 64, 64))
