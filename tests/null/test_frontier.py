"""The Pareto front against brute force, its table and its picture."""

from __future__ import annotations

import csv
import io
import itertools
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.compiler.allocate.frontier import FrontPoint, front_csv, not_dominated, sweep
from bitwright.compiler.allocate.problem import Budget, Choice, Group, Problem, Totals, totals
from bitwright.compiler.errors import InfeasibleBudgetError, UsageError
from bitwright.compiler.report.front_picture import front_picture

choices = st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(1, 20))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    return Problem(
        tuple(
            Group(
                f"g{k}",
                (f"g{k}",),
                tuple(
                    Choice(f"f{n}", loss * 1e-3, time * 1e-3, size)
                    for n, (loss, time, size) in enumerate(draw(st.lists(choices, min_size=1, max_size=3)))
                ),
            )
            for k in range(draw(st.integers(1, 3)))
        )
    )


def every(problem: Problem) -> list[Totals]:
    names = [g.name for g in problem.groups]
    return [
        totals(problem, dict(zip(names, picked, strict=True)))
        for picked in itertools.product(*([c.format for c in g.choices] for g in problem.groups))
    ]


@settings(max_examples=40, deadline=None)
@given(problems())
def test_no_assignment_dominates_a_point_of_the_front(problem: Problem) -> None:
    front = sweep(problem, points=6)
    assert len(front) >= 1
    costs, losses = [p.totals.latency_s for p in front], [p.totals.loss for p in front]
    assert costs == sorted(set(costs))
    assert losses == sorted(set(losses), reverse=True)
    for point in front:
        assert point.totals == totals(problem, point.formats)
        # Losses are multiples of 1e-3 here, far above the solver's gap.
        assert not any(
            t.latency_s <= point.totals.latency_s + 1e-12 and t.loss < point.totals.loss - 1e-6
            for t in every(problem)
        )
    assert min(t.latency_s for t in every(problem)) == pytest.approx(costs[0])
    assert min(t.loss for t in every(problem)) == pytest.approx(losses[-1])


TWO = Problem(
    tuple(
        Group(name, (name,), (Choice("float", 0.0, 4.0, 400), Choice("int8", loss, 1.0, 100)))
        for name, loss in (("a", 1.0), ("b", 2.0))
    )
)


def test_the_front_of_two_layers() -> None:
    front = sweep(TWO, points=4)
    assert [(p.totals.latency_s, p.totals.loss) for p in front] == [(2.0, 3.0), (5.0, 1.0), (8.0, 0.0)]
    assert front[1].formats == {"a": "int8", "b": "float"}
    by_size = sweep(TWO, "weight_bytes", points=4, budget=Budget(latency_s=6.0))
    assert [p.totals.weight_bytes for p in by_size] == [200.0, 500.0]


def test_a_front_needs_two_points_and_a_cost() -> None:
    with pytest.raises(UsageError):
        sweep(TWO, points=1)
    with pytest.raises(UsageError):
        sweep(TWO, "loss")
    with pytest.raises(InfeasibleBudgetError):
        sweep(TWO, budget=Budget(latency_s=1.0))


def test_the_table_has_every_number_and_every_format() -> None:
    front = sweep(TWO, points=4)
    rows = list(csv.DictReader(io.StringIO(front_csv(front))))
    assert list(rows[0]) == [
        "loss",
        "latency_s",
        "weight_bytes",
        "peak_ram_bytes",
        "energy_j",
        "gap",
        "a",
        "b",
    ]
    assert [(float(r["latency_s"]), float(r["loss"]), r["a"], r["b"]) for r in rows] == [
        (2.0, 3.0, "int8", "int8"),
        (5.0, 1.0, "int8", "float"),
        (8.0, 0.0, "float", "float"),
    ]
    assert front_csv([]) == "loss,latency_s,weight_bytes,peak_ram_bytes,energy_j,gap\n"


def test_dominated_points_go() -> None:
    points = [
        FrontPoint({}, Totals(loss, cost), 0.0) for loss, cost in [(3, 1), (3, 2), (2, 2), (2, 2), (5, 9)]
    ]
    assert [(p.totals.loss, p.totals.latency_s) for p in not_dominated(points, "latency_s")] == [
        (3, 1),
        (2, 2),
    ]


@pytest.mark.parametrize("losses", [(3.0, 1.0, 0.0), (1e3, 1e-9, 0.0), (0.0, 0.0, 0.0)])
def test_the_picture_is_svg_and_always_the_same(losses: tuple[float, ...]) -> None:
    front = list(zip((0.002, 0.005, 0.008), losses, strict=True))
    text = front_picture(front, others={"greedy <selection>": [(0.004, 2.0)]})
    assert ElementTree.fromstring(text).tag.endswith("svg")
    for words in ("latency in ms", "predicted loss", "exact optimum", "greedy &lt;selection&gt;"):
        assert words in text
    assert text == front_picture(front, others={"greedy <selection>": [(0.004, 2.0)]})
