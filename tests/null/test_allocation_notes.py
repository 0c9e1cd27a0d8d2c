"""Groups from single sites, and an allocation in words."""

from __future__ import annotations

import math

import pytest

from bitwright.compiler.allocate.grouping import tied_groups
from bitwright.compiler.allocate.notes import allocation_notes
from bitwright.compiler.allocate.problem import Budget, Choice, Cost, Group, Problem
from bitwright.compiler.allocate.sensitivity import SiteLoss
from bitwright.compiler.allocate.solve import allocate

LOSSES = [
    SiteLoss("a", "int8", 0.1),
    SiteLoss("a", "w4", 0.5),
    SiteLoss("b", "int8", 0.2),
    SiteLoss("b", "w4", math.inf, "the output is not finite"),
    SiteLoss("c", "int8", 0.3),
]
COSTS = {
    (site, fmt): Cost(seconds, size, seconds / 10)
    for site in "abc"
    for fmt, seconds, size in (("float", 4.0, 400), ("int8", 1.0, 100), ("w4", 2.0, 50))
}


def test_tied_sites_add_up() -> None:
    both, alone = tied_groups(LOSSES, COSTS, [("b", "a"), ("a", "not measured")])
    assert (both.name, both.members) == ("a", ("a", "b"))
    assert both.choices[:2] == (
        Choice("float", 0.0, 8.0, 800, 0.8),
        Choice("int8", pytest.approx(0.3), 2.0, 200, 0.2),  # type: ignore[arg-type]
    )
    assert math.isinf(both.choice("w4").loss)
    assert (alone.members, [c.format for c in alone.choices]) == (("c",), ["float", "int8"])


def test_a_format_that_one_member_lacks_is_no_choice() -> None:
    (group,) = tied_groups(LOSSES, COSTS, [("a", "c", "b")])
    assert [c.format for c in group.choices] == ["float", "int8"]
    costs = {k: v for k, v in COSTS.items() if k != ("b", "int8")}
    assert [c.format for c in tied_groups(LOSSES, costs)[1].choices] == ["float", "w4"]


def layers(*losses: float) -> Problem:
    return Problem(
        tuple(
            Group(f"g{k}", (f"g{k}",), (Choice("float", 0.0, 4.0, 400), Choice("int8", loss, 1.0, 100)))
            for k, loss in enumerate(losses)
        )
    )


def test_notes_name_the_mix_the_proof_the_prices_and_what_was_left_out() -> None:
    found = allocate(layers(1.0, 2.0, 4.0, math.nan), Budget(latency_s=13.0, weight_bytes=1e6))
    mix, proof, latency, weights, dropped = allocation_notes(found)
    assert mix == "formats: 3 in float, 1 in int8"
    assert proof.startswith("loss 1, proven optimal, in ")
    assert latency == "latency: 13000 ms of 13000 ms, binding: 13650 ms would buy nothing"
    assert weights == "weights: 1300 bytes of 1000000 bytes, not binding"
    assert dropped == "g3: int8 left out: loss is nan"


def test_notes_say_what_a_wider_budget_buys() -> None:
    found = allocate(layers(*[1.0] * 40), Budget(latency_s=100.0))
    assert allocation_notes(found)[2].endswith("binding: 105000 ms would buy loss 19 (5.0% less)")
