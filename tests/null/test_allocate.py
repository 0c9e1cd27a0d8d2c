"""The allocator against brute force, its certificate, its prices and what it says when nothing fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.compiler.allocate.problem import (
    METRICS,
    Boundary,
    Budget,
    Choice,
    Cost,
    Group,
    LiveSet,
    Metric,
    Problem,
    Totals,
    drop_unusable,
    totals,
)
from bitwright.compiler.allocate.solve import allocate
from bitwright.compiler.errors import InfeasibleBudgetError, InternalError, UsageError

FORMATS = ("float", "int8", "w4")
# The solver stops at a relative gap of 1e-4; asked for less, it is exact up to the rounding of sums.
EXACT = 1e-8
numbers = st.integers(0, 60)
# A cost may be what a format saves against another.
signed = st.integers(-30, 60)
# Losses of one model differ by many orders of magnitude, and the small ones decide.
losses = st.builds(lambda m, e: m * 10.0**e, st.integers(-9, 99), st.integers(-9, 1))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    count = draw(st.integers(1, 4))
    groups = tuple(
        Group(
            f"g{k}",
            (f"g{k}",),
            tuple(
                Choice(f, draw(losses), draw(signed) * 1e-4, draw(numbers) * 1000, draw(numbers) * 1e-3)
                for f in FORMATS[: draw(st.integers(1, 3))]
            ),
        )
        for k in range(count)
    )
    names = st.sampled_from([g.name for g in groups])
    pairs = st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS))
    costs = st.builds(lambda t, b: Cost(t * 1e-4, b * 100.0), signed, signed)
    boundaries = draw(
        st.lists(st.builds(Boundary, names, names, st.dictionaries(pairs, costs, max_size=5)), max_size=4)
    )
    sizes = st.dictionaries(names, st.dictionaries(st.sampled_from(FORMATS), numbers, max_size=3))
    lives = draw(st.lists(st.builds(LiveSet, st.just("step"), sizes, numbers), max_size=3))
    return Problem(groups, tuple(boundaries), tuple(lives), Totals(0.5, 1e-3, 100, 7, 0.25))


def assignments(problem: Problem) -> Iterator[tuple[dict[str, str], Totals]]:
    for picked in itertools.product(*([c.format for c in g.choices] for g in problem.groups)):
        formats = dict(zip((g.name for g in problem.groups), picked, strict=True))
        yield formats, totals(problem, formats)


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(METRICS), st.data())
def test_equals_brute_force(problem: Problem, objective: Metric, data: st.DataObject) -> None:
    every = [paid for _, paid in assignments(problem)]
    limited = [m for m in METRICS if m != "peak_ram_bytes" or problem.live_sets]
    budget = Budget()
    for metric in data.draw(st.sets(st.sampled_from(limited))):
        # Limits that are met exactly by some assignment are the hardest; others lie in between.
        limit = data.draw(st.sampled_from([t.of(metric) for t in every]))
        budget = budget.with_limit(metric, limit * data.draw(st.sampled_from([0.9, 1.0, 1.1])))
    if objective == "peak_ram_bytes" and not problem.live_sets:
        return
    feasible = [t.of(objective) for t in every if budget.met_by(t)]
    if not feasible:
        with pytest.raises(InfeasibleBudgetError):
            allocate(problem, budget, objective=objective, prices=False)
        return
    found = allocate(problem, budget, objective=objective, prices=False, gap=1e-9)
    best = min(feasible)
    assert budget.met_by(found.totals)
    assert found.totals == totals(problem, found.formats)
    assert found.value <= best + EXACT * abs(best) + 1e-15
    assert found.bound <= best + EXACT * abs(best) + 1e-15


def chain(losses_of_int8: list[float]) -> Problem:
    return Problem(
        tuple(
            Group(f"g{k}", (f"g{k}",), (Choice("float", 0.0, 4.0, 400), Choice("int8", loss, 1.0, 100)))
            for k, loss in enumerate(losses_of_int8)
        )
    )


def test_losses_nine_orders_of_magnitude_apart_are_all_told_apart() -> None:
    problem = chain([1e3, 1e-9, 2e-9, 3e-9, 4e-9, 1e2])
    found = allocate(problem, Budget(latency_s=18.0))
    assert {g for g, f in found.formats.items() if f == "int8"} == {"g1", "g2"}
    assert found.value == pytest.approx(3e-9, rel=1e-12)
    assert found.gap <= 1e-4


def test_prices_tell_what_is_binding_and_what_more_would_buy() -> None:
    problem = chain([1.0, 2.0, 3.0, 4.0])
    found = allocate(problem, Budget(latency_s=10.2, weight_bytes=1e6))
    latency, size = found.prices
    assert (latency.metric, latency.binding, latency.limit, latency.used) == ("latency_s", True, 10.2, 10.0)
    assert found.value == pytest.approx(1.0 + 2.0)
    # Three seconds buy the float form of a layer that loses 2; half a second buys no layer at all.
    assert latency.per_unit == pytest.approx(2.0 / 3.0)
    assert latency.more_limit == pytest.approx(10.71)
    assert latency.more_objective == pytest.approx(3.0)
    assert (size.binding, size.per_unit) == (False, 0.0)
    richer = allocate(chain([1.0] * 40), Budget(latency_s=100.0))
    assert richer.value == 20.0
    assert richer.prices[0].more_objective == 19.0  # 5 s more: one layer, and two seconds left over


def test_a_boundary_decides_between_equal_layers() -> None:
    change = {("float", "int8"): Cost(0.5), ("int8", "float"): Cost(0.5)}
    problem = chain([1.0, 1.0, 1.0, 1.0])
    bound = tuple(Boundary(f"g{k}", f"g{k + 1}", change) for k in range(3))
    problem = Problem(problem.groups, bound)
    found = allocate(problem, Budget(latency_s=10.5))
    assert found.value == 2.0
    assert list(found.formats.values()) in (
        ["int8", "int8", "float", "float"],
        ["float", "float", "int8", "int8"],
    )


@pytest.mark.parametrize("impossible", [math.inf, math.nan])
def test_an_impossible_pair_of_formats_is_never_chosen(impossible: float) -> None:
    problem = chain([1.0, 5.0])
    never = Boundary("g0", "g1", {("int8", "float"): Cost(impossible)})
    found = allocate(Problem(problem.groups, (never,)), Budget(latency_s=5.0))
    assert found.formats == {"g0": "float", "g1": "int8"}
    every = {(a, b): Cost(impossible) for a in ("float", "int8") for b in ("float", "int8")}
    with pytest.raises(InfeasibleBudgetError, match="needs a conversion that does not exist"):
        allocate(Problem(problem.groups, (Boundary("g0", "g1", every),)), Budget(latency_s=5.0))


def test_ram_is_the_worst_step() -> None:
    sizes = {"g0": {"float": 40.0, "int8": 10.0}}, {"g1": {"float": 20.0, "int8": 5.0}}
    problem = Problem(
        chain([1.0, 1.0]).groups, (), tuple(LiveSet(f"s{k}", s, 2.0) for k, s in enumerate(sizes))
    )
    found = allocate(problem, Budget(peak_ram_bytes=30.0))
    assert found.formats == {"g0": "int8", "g1": "float"}
    assert found.totals.peak_ram_bytes == 22.0
    assert found.prices[0].binding or found.prices[0].per_unit == 0.0
    assert allocate(problem, objective="peak_ram_bytes").totals.peak_ram_bytes == 12.0


def test_ram_without_live_sets_is_refused() -> None:
    with pytest.raises(UsageError, match="activations is not known"):
        allocate(chain([1.0]), Budget(peak_ram_bytes=1.0))


def test_infeasible_names_the_nearest_point_and_each_limit_alone() -> None:
    problem = Problem(
        (
            Group("a", ("a",), (Choice("fast", 0.0, 0.001, 900), Choice("small", 0.0, 0.004, 100))),
            Group("b", ("b",), (Choice("fast", 0.0, 0.001, 900), Choice("small", 0.0, 0.004, 100))),
        )
    )
    with pytest.raises(InfeasibleBudgetError) as caught:
        allocate(problem, Budget(latency_s=0.003, weight_bytes=500))
    assert caught.value.exit_code == 4
    assert "latency <= 3 ms and weights <= 500 bytes" in caught.value.what
    # fast + small: 2/3 too slow and 1.0 too large; both small: 5/3 too slow; both fast: 2.6 too large.
    assert "the nearest takes latency 5 ms, weights 1000 bytes" in caught.value.what or (
        "the nearest takes latency 8 ms, weights 200 bytes" in caught.value.what
    )
    assert caught.value.fix.endswith("or raise one alone, to latency 8 ms or weights 1800 bytes")


@settings(max_examples=60, deadline=None)
@given(problems(), st.data())
def test_the_nearest_point_can_be_asked_for(problem: Problem, data: st.DataObject) -> None:
    every = [paid for _, paid in assignments(problem)]
    least = {m: min(t.of(m) for t in every) for m in ("latency_s", "loss")}
    budget = Budget(**{m: v - 0.5 * abs(v) - 1e-3 for m, v in least.items()})
    with pytest.raises(InfeasibleBudgetError) as caught:
        allocate(problem, budget)
    words = caught.value.fix.split(";")[0].removeprefix("allow ").split(", ")
    asked = Budget(loss=float(words[0].split()[1]), latency_s=float(words[1].split()[1]) / 1e3)
    assert any(asked.met_by(t) for t in every)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_choices_that_are_not_finite_are_dropped_with_a_reason(bad: float) -> None:
    group = Group("a", ("a",), (Choice("float", 0.0, 4.0), Choice("int8", bad, 1.0)))
    found = allocate(Problem((group,)), Budget(latency_s=4.0))
    assert found.formats == {"a": "float"}
    (dropped,) = found.dropped
    assert (dropped.group, dropped.format, dropped.reason) == ("a", "int8", f"loss is {bad}")


def test_a_group_without_a_usable_choice_keeps_float() -> None:
    known = Group("a", ("a",), (Choice("float", math.nan, 4.0), Choice("int8", math.nan, 1.0)))
    unknown = Group("b", ("b",), (Choice("int8", math.inf, 1.0),))
    usable, dropped = drop_unusable(Problem((known, unknown)))
    assert usable.groups[0].choices == (Choice("float", 0.0, 4.0),)
    assert usable.groups[1].choices == (Choice("float", 0.0),)
    assert [d.format for d in dropped] == ["float", "int8", "float", "int8", "float"]
    assert allocate(Problem((known, unknown))).formats == {"a": "float", "b": "float"}


@pytest.mark.parametrize(
    "problem",
    [
        lambda: Problem((Group("a", (), (Choice("x", 0),)),) * 2),
        lambda: Problem((Group("a", (), (Choice("x", 0), Choice("x", 1))),)),
        lambda: Problem((Group("a", (), (Choice("x", 0),)),), (Boundary("a", "b", {}),)),
        lambda: Problem((Group("a", (), (Choice("x", 0),)),), (), (LiveSet("s", {"b": {}}),)),
        lambda: Problem((Group("a", (), (Choice("x", 0),)),), (), (LiveSet("s", {}, math.nan),)),
        lambda: Problem((Group("a", (), (Choice("x", 0),)),), fixed=Totals(loss=math.inf)),
        lambda: Problem(()),
        lambda: Problem((Group("a", (), ()),)),
        lambda: Budget(latency_s=math.nan),
        lambda: totals(Problem((Group("a", (), (Choice("x", 0),)),)), {"a": "y"}),
    ],
)
def test_contradictions_are_refused(problem: object) -> None:
    with pytest.raises(InternalError):
        problem()  # type: ignore[operator]
