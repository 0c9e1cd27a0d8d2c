"""Formats and foldings chosen together: the answer equals a search of all assignments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.compiler.allocate.folded import FoldedProblem, allocate_folded, folded_problem, least_interval
from bitwright.compiler.allocate.problem import Budget, Choice, Totals, totals
from bitwright.compiler.errors import InfeasibleBudgetError

amounts = st.integers(0, 8).map(float)


@st.composite
def problems(draw: st.DrawFn) -> FoldedProblem:
    layers = []
    for number in range(draw(st.integers(1, 4))):
        choices = [
            (
                Choice(
                    f"w{k}",
                    draw(amounts) / 8,
                    luts=draw(amounts) * 100,
                    dsps=draw(amounts),
                    brams=draw(amounts),
                ),
                draw(st.sampled_from([10, 20, 40, 80])),
            )
            for k in range(draw(st.integers(1, 4)))
        ]
        layers.append((f"layer{number}", choices))
    return folded_problem(layers)


def assignments(folded: FoldedProblem) -> Iterator[tuple[Totals, int]]:
    groups = folded.problem.groups
    for picked in itertools.product(*([c.format for c in g.choices] for g in groups)):
        labels = dict(zip((g.name for g in groups), picked, strict=True))
        yield totals(folded.problem, labels), folded.interval_of(labels)


@settings(max_examples=120, deadline=None)
@given(problems(), st.data())
def test_equals_a_search_of_all_assignments(folded: FoldedProblem, data: st.DataObject) -> None:
    every = list(assignments(folded))
    drawn = [data.draw(st.sampled_from(every))[0] for _ in range(3)]
    budget = Budget(luts=drawn[0].luts, dsps=drawn[1].dsps, loss=drawn[2].loss)
    interval = data.draw(st.sampled_from([10, 20, 40, 80, None]))
    within = [(t, i) for t, i in every if budget.met_by(t)]
    assert least_interval(folded, budget) == min((i for _, i in within), default=None)
    feasible = [t for t, i in within if interval is None or i <= interval]
    if not feasible:
        with pytest.raises(InfeasibleBudgetError) as caught:
            allocate_folded(folded, budget, interval=interval, prices=False)
        assert caught.value.exit_code == 4
        return
    found = allocate_folded(folded, budget, interval=interval, prices=False)
    reached = folded.interval_of(found.formats)
    limit = min(i for _, i in within) if interval is None else interval
    assert budget.met_by(found.totals)
    assert reached <= limit
    assert found.value == pytest.approx(min(t.loss for t, i in within if i <= limit), rel=1e-4, abs=1e-12)


def two_layers() -> FoldedProblem:
    wide = [(Choice("int8 pe=1", 0.0, luts=800), 400), (Choice("int8 pe=4", 0.0, luts=3200), 100)]
    narrow = [(Choice("w2a8 pe=1", 0.5, luts=200), 400), (Choice("w2a8 pe=4", 0.5, luts=800), 100)]
    return folded_problem([("a", [*wide, *narrow]), ("b", [(Choice("pe=1", 0.0, luts=50), 200)])])


def test_a_frame_rate_is_bought_with_bits_where_the_cells_are_few() -> None:
    found = allocate_folded(two_layers(), Budget(luts=1000), interval=200)
    assert found.formats == {"a": "w2a8 pe=4", "b": "pe=1"}
    assert (found.totals.luts, found.value) == (850, 0.5)


def test_the_shortest_interval_under_a_bound_of_the_loss() -> None:
    found = allocate_folded(two_layers(), Budget(luts=4000, loss=0.1), interval=None, objective="luts")
    assert found.formats["a"] == "int8 pe=4"


def test_what_cannot_be_met_names_cells_and_interval_that_can() -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        allocate_folded(two_layers(), Budget(luts=300, loss=1.0), interval=200)
    assert "LUTs 850" in caught.value.fix
    assert "a frame every 400 cycles" in caught.value.fix
    with pytest.raises(InfeasibleBudgetError, match="layer 'b' takes at least 200"):
        allocate_folded(two_layers(), Budget(), interval=100)
