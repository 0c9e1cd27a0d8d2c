"""A formulation with an objective and budgets, scaled for the solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from bitwright.compiler.allocate.formulation import Formulation, Vector
from bitwright.compiler.allocate.problem import Metric, tolerance

# Right sides and objectives are scaled to this: the solver's 1e-6 becomes 1e-9 of a limit.
MAGNITUDE = 1e3
# A limit of zero leaves nothing to be relative to.
SMALLEST = 1e-300
# A choice that misses a limit this many times over is hopeless; how hopeless does not matter.
HOPELESS = 1e6


@dataclass(frozen=True)
class Program:
    """A formulation with an objective and limits, perhaps with a few more columns behind its own.

    Attributes:
        form: The columns' meaning.
        cost: Objective, entries >= 0, one for each column.
        limits: Rows, right sides scaled to ``MAGNITUDE`` by the caller.
        right_sides: Of ``limits``.
        upper: Upper bounds of the columns.
        value: Objective of exact picks (of the formulation's own columns), in the units of ``cost``.
    """

    form: Formulation
    cost: Vector
    limits: sp.csr_array
    right_sides: Vector
    upper: Vector
    value: Callable[[Vector], float]


def budgeted(form: Formulation, limits: Mapping[Metric, float], objective: Metric) -> Program:
    """Return the program of minimising a metric under limits.

    A peak is one more column, between the smallest and the largest possible one.
    """
    rows_below, sides, upper = _limits(form, limits)
    if objective != "peak_ram_bytes":
        cost = form.rows[form.rows_of(objective), :].toarray().ravel()
        return Program(form, cost, rows_below, sides, upper, lambda picks: float(cost @ picks))
    rows = form.rows_of(objective)
    steps, constants = form.rows[rows, :], form.constants[rows]
    least = float(constants.max())
    span = float((constants + steps.sum(axis=1)).max()) - least or 1.0
    peak = np.zeros(len(upper) + 1)
    peak[-1] = span
    scale = MAGNITUDE / span
    below = sp.hstack([steps * scale, sp.csr_array(np.full((len(rows), 1), -MAGNITUDE))])
    wider = sp.hstack([rows_below, sp.csr_array((rows_below.shape[0], 1))])
    return Program(
        form,
        peak,
        sp.csr_array(sp.vstack([wider, below])),
        np.concatenate([sides, (least - constants) * scale]),
        np.append(upper, 1.0),
        lambda picks: float((steps @ picks + constants).max()) - least,
    )


def _limits(form: Formulation, limits: Mapping[Metric, float]) -> tuple[sp.csr_array, Vector, Vector]:
    """Return scaled rows and right sides, and upper bounds that close what alone is over a limit."""
    upper, rows, sides = form.allowed.copy(), [], []
    for metric, limit in limits.items():
        for k in form.rows_of(metric):
            row, slack = form.rows[[k], :], limit - form.constants[k]
            allowance = tolerance(limit) or SMALLEST
            over = row.data > slack + allowance
            upper[row.indices[over]] = 0.0
            if slack < -allowance:
                upper[:] = 0.0
            scale = MAGNITUDE / row_unit(form, int(k), limit)
            row.data = np.where(over, 0.0, row.data) * scale
            rows.append(row)
            sides.append(max(slack, 0.0) * scale)
    empty = sp.csr_array((0, len(upper)))
    return (sp.csr_array(sp.vstack(rows)) if rows else empty), np.array(sides), upper


def row_unit(form: Formulation, row: int, limit: float) -> float:
    """Return what a limited row is scaled by: the part of the limit that choices decide about."""
    return max(limit - float(form.constants[row]), tolerance(limit) or SMALLEST)


def elastic(form: Formulation, limits: Mapping[Metric, float]) -> Program:
    """Return the program of missing limits by as little as possible.

    The objective is the sum of the excesses, each relative to its limit, or to the least that the metric can
    be where that is larger. Every limit has one column more, its excess.
    """
    rows, sides, units = [], [], []
    own, count = len(form.allowed), len(limits)
    for number, (metric, limit) in enumerate(limits.items()):
        numbers = form.rows_of(metric)
        unit = max(abs(limit), float(form.constants[numbers].max()), SMALLEST)
        for k in numbers:
            row = form.rows[[k], :] * (MAGNITUDE / unit)
            row.data = np.minimum(row.data, MAGNITUDE * HOPELESS)
            excess = sp.csr_array(([-MAGNITUDE], ([0], [number])), shape=(1, count))
            rows.append(sp.hstack([row, excess]))
            sides.append((limit - form.constants[k]) * (MAGNITUDE / unit))
        units.append((numbers, limit, unit))

    def missed(picks: Vector) -> float:
        reached = form.rows @ picks + form.constants
        return sum(max(0.0, float(reached[k].max()) - limit) / unit for k, limit, unit in units)

    cost = np.concatenate([np.zeros(own), np.ones(count)])
    upper = np.concatenate([form.allowed, np.full(count, np.inf)])
    return Program(form, cost, sp.csr_array(sp.vstack(rows)), np.array(sides), upper, missed)
