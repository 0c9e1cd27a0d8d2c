"""Exact allocation: the best format for every group under budgets, with its certificate and its prices."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from bitwright.compiler.allocate.formulation import Formulation, formulate
from bitwright.compiler.allocate.highs import Optimum, marginals, minimise
from bitwright.compiler.allocate.nearest import infeasible
from bitwright.compiler.allocate.problem import (
    Budget,
    Dropped,
    Metric,
    Problem,
    Totals,
    drop_unusable,
    totals,
)
from bitwright.compiler.allocate.program import MAGNITUDE, Program, budgeted, row_unit
from bitwright.compiler.errors import UsageError

GAP = 1e-4
TIME_LIMIT_S = 30.0
MORE = 0.05
_TRIES = 4


@dataclass(frozen=True)
class Price:
    """What one budget costs.

    Attributes:
        metric: The budget.
        limit: What is allowed.
        used: What the plan takes.
        binding: The objective would improve if the limit were raised.
        per_unit: Decrease of the relaxation's objective for each unit more.
        more_limit: A limit a few per cent higher.
        more_objective: The exact optimum under that limit.
    """

    metric: Metric
    limit: float
    used: float
    binding: bool
    per_unit: float
    more_limit: float
    more_objective: float


@dataclass(frozen=True)
class Allocation:
    """A plan of formats.

    Attributes:
        formats: Format by group name.
        totals: What it costs.
        objective: The metric that was minimised.
        value: Its value.
        bound: No assignment within the budgets is below this.
        prices: One for each budget.
        dropped: Choices that were taken out before.
        seconds: Time of the solver, prices included.
    """

    formats: dict[str, str]
    totals: Totals
    objective: Metric
    value: float
    bound: float
    prices: tuple[Price, ...]
    dropped: tuple[Dropped, ...]
    seconds: float

    @property
    def gap(self) -> float:
        """Distance to the bound relative to the value; 0 for a proven optimum."""
        return max(0.0, self.value - self.bound) / abs(self.value) if self.value else 0.0


def allocate(
    problem: Problem,
    budget: Budget | None = None,
    *,
    objective: Metric = "loss",
    prices: bool = True,
    gap: float = GAP,
    time_limit_s: float = TIME_LIMIT_S,
) -> Allocation:
    """Choose one format for every group.

    Args:
        problem: Groups, choices, boundaries, RAM.
        budget: Upper limits; a limit of the loss is a quality bound.
        objective: The metric to minimise under the budget.
        prices: Also find out what each budget costs (a relaxation, and one more solution for each limit).
        gap: Relative optimality gap at which the solver may stop.
        time_limit_s: For each solution; the best known one is returned then, and its gap says how good it is.

    Raises:
        InfeasibleBudgetError: No assignment meets the budget; the message names the nearest one.
        UsageError: RAM is limited or minimised, but the problem has no live sets.
        ToolchainError: The solver found nothing in time.
    """
    start = time.monotonic()
    budget = budget or Budget()
    usable, dropped = drop_unusable(problem)
    _check_ram(usable, budget, objective)
    form = formulate(usable)
    found = _within(usable, form, budget, objective, gap=gap, time_limit_s=time_limit_s)
    if found is None:
        raise infeasible(usable, form, budget, gap=gap, time_limit_s=time_limit_s)
    program, optimum = found
    formats = form.formats(optimum.picks)
    paid = totals(usable, formats)
    value = paid.of(objective)
    costs: tuple[Price, ...] = ()
    if prices and budget.limits():
        better = _with_more(form, budget, objective, optimum, gap=gap, time_limit_s=time_limit_s)
        costs = _prices(program, optimum, budget, paid, value, better)
    # The objective's row was shifted; the distance to the bound is the same.
    bound = value - (optimum.value - optimum.bound)
    return Allocation(formats, paid, objective, value, bound, costs, dropped, time.monotonic() - start)


def reachable(problem: Problem, budget: Budget, *, time_limit_s: float = TIME_LIMIT_S) -> bool:
    """Tell whether some assignment meets a budget."""
    usable, _ = drop_unusable(problem)
    form = formulate(usable)
    found = _within(usable, form, budget, "luts", gap=1.0, time_limit_s=time_limit_s)
    return found is not None


def _check_ram(problem: Problem, budget: Budget, objective: Metric) -> None:
    if problem.live_sets or ("peak_ram_bytes" not in budget.limits() and objective != "peak_ram_bytes"):
        return
    msg = "the memory of this model's activations is not known, so it can be neither limited nor minimised"
    raise UsageError(msg, where="RAM budget", fix="leave the RAM budget out, or give static shapes")


def _within(
    problem: Problem,
    form: Formulation,
    budget: Budget,
    objective: Metric,
    *,
    gap: float,
    time_limit_s: float,
) -> tuple[Program, Optimum] | None:
    """Solve; where the solver's tolerance lets a limit be exceeded by a hair, ask for that much less."""
    limits = budget.limits()
    for _ in range(_TRIES):
        program = budgeted(form, limits, objective)
        optimum = minimise(program, gap=gap, time_limit_s=time_limit_s)
        if optimum is None:
            return None
        paid = totals(problem, form.formats(optimum.picks))
        if budget.met_by(paid):
            return program, optimum
        limits = {m: v - max(0.0, paid.of(m) - budget.limits()[m]) * 1.5 for m, v in limits.items()}
    return None


def _with_more(
    form: Formulation,
    budget: Budget,
    objective: Metric,
    known: Optimum,
    *,
    gap: float,
    time_limit_s: float,
) -> dict[Metric, tuple[float, float]]:
    """Return, for each limit, a higher one and by how much the exact objective under it exceeds its minimum."""
    found: dict[Metric, tuple[float, float]] = {}
    for metric, limit in budget.limits().items():
        more = limit + MORE * abs(limit)
        program = budgeted(form, budget.with_limit(metric, more).limits(), objective)
        optimum = minimise(program, gap=gap, time_limit_s=time_limit_s, known=known)
        assert optimum is not None, "a solution was known"
        found[metric] = (more, optimum.value)
    return found


def _prices(
    program: Program,
    optimum: Optimum,
    budget: Budget,
    paid: Totals,
    value: float,
    better: Mapping[Metric, tuple[float, float]],
) -> tuple[Price, ...]:
    form, slopes = program.form, marginals(program, optimum)
    found, row = [], 0
    for metric, limit in budget.limits().items():
        per_unit = 0.0
        for k in form.rows_of(metric):
            per_unit -= float(slopes[row]) * MAGNITUDE / row_unit(form, int(k), limit)
            row += 1
        more, reached = better[metric]
        gain = max(0.0, optimum.value - reached)
        binding = per_unit > 0 or gain > GAP * abs(value)
        found.append(Price(metric, limit, paid.of(metric), binding, per_unit, more, value - gain))
    return tuple(found)
