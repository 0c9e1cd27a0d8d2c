"""What to say when no assignment meets the budgets: the nearest one, and what every budget would have to be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitwright.compiler.allocate.formulation import Formulation
from bitwright.compiler.allocate.highs import minimise
from bitwright.compiler.allocate.problem import CELLS, Budget, Metric, Problem, Totals, totals
from bitwright.compiler.allocate.program import budgeted, elastic
from bitwright.compiler.errors import InfeasibleBudgetError

NAMES: dict[Metric, str] = {
    "loss": "loss",
    "latency_s": "latency",
    "weight_bytes": "weights",
    "peak_ram_bytes": "RAM",
    "energy_j": "energy",
    "luts": "LUTs",
    "ffs": "flip-flops",
    "dsps": "DSP blocks",
    "brams": "block RAMs",
}


@dataclass(frozen=True)
class Nearest:
    """What comes closest to budgets that cannot be met.

    Attributes:
        formats: The assignment of the smallest violation (sum of the relative excesses).
        totals: What it costs: budgets of these values can be met together.
        alone: For each budget the smallest value it would have to have if the others stay as they are;
            None where the others cannot be met either.
    """

    formats: dict[str, str]
    totals: Totals
    alone: dict[Metric, float | None]


def nearest_point(
    problem: Problem, form: Formulation, budget: Budget, *, gap: float, time_limit_s: float
) -> Nearest:
    """Return what comes closest to a budget that cannot be met."""
    closest = minimise(elastic(form, budget.limits()), gap=gap, time_limit_s=time_limit_s)
    if closest is None:
        msg = "no choice of formats is possible at all: every one needs a conversion that does not exist"
        raise InfeasibleBudgetError(msg, where="allocation", fix="allow float, or more formats")
    formats = form.formats(closest.picks)
    alone: dict[Metric, float | None] = {}
    for metric in budget.limits():
        program = budgeted(form, budget.with_limit(metric, None).limits(), metric)
        least = minimise(program, gap=gap, time_limit_s=time_limit_s)
        alone[metric] = None if least is None else totals(problem, form.formats(least.picks)).of(metric)
    return Nearest(formats, totals(problem, formats), alone)


def infeasible(
    problem: Problem, form: Formulation, budget: Budget, *, gap: float, time_limit_s: float
) -> InfeasibleBudgetError:
    """Return the error that tells what would be feasible."""
    found = nearest_point(problem, form, budget, gap=gap, time_limit_s=time_limit_s)
    limits = budget.limits()
    asked = " and ".join(f"{NAMES[m]} <= {figure(m, v)}" for m, v in limits.items())
    reached = ", ".join(f"{NAMES[m]} {figure(m, found.totals.of(m))}" for m in limits)
    alone = [f"{NAMES[m]} {figure(m, v)}" for m, v in found.alone.items() if v is not None]
    fix = f"allow {reached}"
    if len(limits) > 1 and alone:
        fix += "; or raise one alone, to " + " or ".join(alone)
    msg = f"no choice of formats meets {asked}; the nearest takes {reached}"
    return InfeasibleBudgetError(msg, where="budget", fix=fix)


def figure(metric: Metric, value: float) -> str:
    """Return a value in its unit, rounded up, so that it can be given as a limit."""
    if metric in ("weight_bytes", "peak_ram_bytes"):
        return f"{math.ceil(value - 1e-6)} bytes"
    if metric in CELLS:
        return f"{math.ceil(value - 1e-6)}"
    if metric == "latency_s":
        return f"{_up(value * 1e3)} ms"
    return f"{_up(value)} J" if metric == "energy_j" else _up(value)


def _up(value: float) -> str:
    """Return six significant digits of a number that is at least ``value``."""
    if value == 0:
        return "0"
    digit = 10.0 ** (math.floor(math.log10(abs(value))) - 5)
    return f"{math.ceil(value / digit - 1e-9) * digit:.6g}"
