"""The loop that moves groups up until the measured metric holds, and the ranking that it follows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.compiler.allocate.accuracy_loop import after, hold_accuracy
from bitwright.compiler.allocate.moves import Move, greedy, upgrades
from bitwright.compiler.allocate.problem import Boundary, Budget, Choice, Cost, Group, Problem, totals
from bitwright.compiler.allocate.solve import allocate
from bitwright.compiler.errors import AccuracyGateError, InfeasibleBudgetError


def layers(*losses: tuple[float, float], boundaries: tuple[Boundary, ...] = ()) -> Problem:
    """Return groups with float (0 loss, 4 s), int8 (first loss, 2 s) and w4 (second loss, 1 s)."""
    return Problem(
        tuple(
            Group(
                f"g{k}",
                (f"g{k}",),
                (Choice("float", 0.0, 4.0), Choice("int8", eight, 2.0), Choice("w4", four, 1.0)),
            )
            for k, (eight, four) in enumerate(losses)
        ),
        boundaries,
    )


def test_moves_are_ranked_by_loss_saved_per_cost() -> None:
    problem = layers((1.0, 9.0), (3.0, 4.0))
    moves = upgrades(problem, {"g0": "w4", "g1": "w4"})
    assert [(m.group, m.before, m.after, m.loss, m.cost) for m in moves] == [
        ("g0", "w4", "int8", -8.0, 1.0),
        ("g1", "w4", "float", -4.0, 3.0),  # 4/3 a second, where int8 would save 1/1
        ("g0", "int8", "float", -1.0, 2.0),
    ]


def test_a_move_that_saves_loss_and_cost_comes_first() -> None:
    # g0 alone between float neighbours pays two conversions; back in float it is cheaper.
    change = {("float", "int8"): Cost(3.0), ("int8", "float"): Cost(3.0)}
    bounds = (Boundary("g1", "g0", change), Boundary("g0", "g2", change))
    problem = layers((0.1, 9.0), (1.0, 9.0), (5.0, 9.0), boundaries=bounds)
    moves = upgrades(problem, {"g0": "int8", "g1": "float", "g2": "float"})
    assert [(m.group, m.after, m.cost, m.rate) for m in moves] == [("g0", "float", -4.0, math.inf)]


def test_moves_stay_in_the_budget() -> None:
    problem = layers((1.0, 9.0), (3.0, 4.0))
    moves = upgrades(problem, {"g0": "w4", "g1": "w4"}, budget=Budget(latency_s=4.0, loss=0.0))
    reached = after({"g0": "w4", "g1": "w4"}, moves)
    assert totals(problem, reached).latency_s <= 4.0
    assert reached == {"g0": "int8", "g1": "int8"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5))
def test_moves_end_where_nothing_is_better(losses: list[tuple[float, float]]) -> None:
    problem = layers(*losses)
    start = {g.name: "w4" for g in problem.groups}
    moves = upgrades(problem, start)
    assert totals(problem, after(start, moves)).loss == 0.0
    formats = dict(start)
    for move in moves:
        assert formats[move.group] == move.before
        before = totals(problem, formats)
        formats[move.group] = move.after
        now = totals(problem, formats)
        assert now.loss - before.loss == pytest.approx(move.loss)
        assert now.latency_s - before.latency_s == pytest.approx(move.cost)
        assert move.loss < 0


MOVES = [Move(f"g{k}", "w4", "int8", -1.0, 1.0) for k in range(100)]
START = {f"g{k}": "w4" for k in range(100)}


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 7, 40, 63, 64, 99, 100])
def test_the_fewest_moves_that_hold_by_few_measurements(needed: int) -> None:
    def metric(formats: Mapping[str, str]) -> float:
        return 0.5 + 0.005 * list(formats.values()).count("int8")

    bound = 1.0 - metric(after(START, MOVES[:needed]))
    result = hold_accuracy(metric, START, MOVES, float_value=1.0, max_drop=bound + 1e-9)
    assert len(result.moved) == needed
    assert result.formats == after(START, MOVES[:needed])
    assert result.trial.drop == pytest.approx(bound)
    # Doubling steps reach 100 in 7 more, the last gap of 64 closes in 6 halvings.
    assert len(result.trials) <= 14


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, math.nan]), min_size=1, max_size=12))
def test_whatever_the_metric_does_the_result_was_measured_to_hold(values: list[float]) -> None:
    moves = MOVES[: len(values) - 1]

    def metric(formats: Mapping[str, str]) -> float:
        return values[list(formats.values()).count("int8")]

    try:
        result = hold_accuracy(metric, START, moves, float_value=1.0, max_drop=0.1)
    except AccuracyGateError:
        assert values[-1] != 1.0
    else:
        assert metric(result.formats) == result.trial.value == 1.0
        assert len({t.moves for t in result.trials}) == len(result.trials)


def test_what_is_reachable_is_said() -> None:
    values = iter([0.2, 0.7, 0.6])
    with pytest.raises(AccuracyGateError) as caught:
        hold_accuracy(
            lambda _: next(values), {"a": "w4", "b": "w4"}, MOVES[:2], float_value=0.8, max_drop=0.01
        )
    assert caught.value.exit_code == 5
    assert "reachable is 0.7, a drop of 12.500%, with 1 of 2 groups moved up" in caught.value.what
    assert "allow a drop of 12.500%" in caught.value.fix


def test_greedy_meets_the_budget_and_is_never_better_than_the_optimum() -> None:
    # Per second saved, the first looks best at every step; the optimum takes the other two.
    problem = layers((1.0, 30.0), (1.5, 2.0), (2.5, 3.0))
    budget = Budget(latency_s=8.0)
    found = totals(problem, greedy(problem, budget))
    best = allocate(problem, budget)
    assert budget.met_by(found)
    assert best.value <= found.loss
    exact = min(
        totals(problem, dict(zip(("g0", "g1", "g2"), f, strict=True))).loss
        for f in itertools.product(("float", "int8", "w4"), repeat=3)
        if sum({"float": 4, "int8": 2, "w4": 1}[x] for x in f) <= 8
    )
    assert best.value == exact


def test_greedy_says_that_it_is_stuck() -> None:
    with pytest.raises(InfeasibleBudgetError, match="stuck at latency_s 2"):
        greedy(layers((1.0, 2.0), (1.0, 2.0)), Budget(latency_s=1.5))
