"""The Pareto front: for a row of budgets the smallest loss, from the cheapest assignment to the most accurate."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bitwright.compiler.allocate.problem import CELLS, METRICS, Budget, Metric, Problem, Totals
from bitwright.compiler.allocate.solve import GAP, TIME_LIMIT_S, Allocation, allocate
from bitwright.compiler.errors import UsageError

POINTS = 17


@dataclass(frozen=True)
class Measured:
    """A point that was built.

    Attributes:
        loss: Of the whole model, on the samples that judge formats.
        file_bytes: Of the model's files.
    """

    loss: float
    file_bytes: int


@dataclass(frozen=True)
class FrontPoint:
    """One assignment of the front.

    Attributes:
        formats: Format by group.
        totals: What it costs.
        gap: Optimality gap of its loss; NaN for an assignment that was not solved for.
        whole: The half-precision format that everything is in, groups and what is between them; None otherwise.
        measured: What the real model loses, if it was built.
    """

    formats: dict[str, str]
    totals: Totals
    gap: float
    whole: str | None = None
    measured: Measured | None = None


def sweep(
    problem: Problem,
    cost: Metric = "latency_s",
    *,
    points: int = POINTS,
    budget: Budget | None = None,
    gap: float = GAP,
    time_limit_s: float = TIME_LIMIT_S,
    progress: Callable[[int, int], None] | None = None,
) -> list[FrontPoint]:
    """Return the front of loss against a cost, the cheapest point first.

    Args:
        problem: What to choose from.
        cost: The metric on the other axis.
        points: Budgets tried, evenly spaced between the extremes; several may have one optimum.
        budget: Limits that every point keeps (of ``cost`` and the loss, too).
        gap: Relative optimality gap of each solution.
        time_limit_s: For each solution.
        progress: Called with (budgets done, all).

    Raises:
        InfeasibleBudgetError: Nothing meets ``budget``.
        UsageError: Fewer than two points, or the loss as its own cost.
    """
    if points < 2 or cost == "loss":
        msg = "a front has at least two points, and a cost that is not the loss"
        raise UsageError(msg, where="sweep", fix="pass 2 or more points and e.g. latency_s")
    budget = budget or Budget()

    def solve(limits: Budget, objective: Metric = "loss") -> Allocation:
        return allocate(
            problem, limits, objective=objective, prices=False, gap=gap, time_limit_s=time_limit_s
        )

    least = solve(budget, cost).value
    best = solve(budget)
    # Of the assignments without more loss, the cheapest is the other end of the front.
    highest = solve(budget.with_limit("loss", best.value * (1 + gap) if best.value > 0 else best.value), cost)
    found = [_point(highest)]
    limits = list(np.linspace(least, highest.value, points)[:-1])
    for done, limit in enumerate(reversed(limits), 2):
        # A cheaper point that was found already is the optimum of every budget above it.
        if found[-1].totals.of(cost) > limit:
            found.append(_point(solve(budget.with_limit(cost, float(limit)))))
        if progress is not None:
            progress(done, points)
    return not_dominated(found, cost)


def _point(allocation: Allocation) -> FrontPoint:
    return FrontPoint(allocation.formats, allocation.totals, allocation.gap)


def not_dominated(points: Sequence[FrontPoint], cost: Metric) -> list[FrontPoint]:
    """Return the points than which no other is cheaper and loses no more, the cheapest first."""
    kept: list[FrontPoint] = []
    for point in sorted(points, key=lambda p: (p.totals.of(cost), p.totals.loss)):
        if not kept or point.totals.loss < kept[-1].totals.loss:
            kept.append(point)
    return kept


def front_csv(points: Sequence[FrontPoint]) -> str:
    """Return one row a point: its totals, its gap, what was measured of it, and the format of every group.

    Numbers have all digits that tell them apart; groups are in the order of the first point.
    """
    groups = list(points[0].formats) if points else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    built = bool(points) and all(point.measured is not None for point in points)
    metrics = [m for m in METRICS if m not in CELLS or any(p.totals.of(m) for p in points)]
    writer.writerow([*metrics, "gap", *(("measured_loss", "file_bytes") if built else ()), *groups])
    for point in points:
        numbers = [repr(point.totals.of(m)) for m in metrics] + [repr(point.gap)]
        if built and point.measured is not None:
            numbers += [repr(point.measured.loss), repr(point.measured.file_bytes)]
        writer.writerow([*numbers, *(point.formats[g] for g in groups)])
    return text.getvalue()
