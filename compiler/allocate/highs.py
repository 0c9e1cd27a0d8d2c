"""Calling HiGHS so that coefficients of any magnitude are told apart.

HiGHS works with absolute tolerances of about 1e-6, while the losses of one model may range from 1e-9 to 1e3. Rows are
therefore scaled to their right side, and the objective in rounds: once a solution of value U is known, no column of
a larger entry can be part of a better one (all entries are >= 0), so these are closed and the rest is scaled by U.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp

from bitwright.compiler.allocate.formulation import Formulation, Vector
from bitwright.compiler.allocate.program import MAGNITUDE, Program
from bitwright.compiler.errors import ToolchainError

_SHRINKS = 1e-3
_ROUNDS = 8
_ROUGH = 0.5
_ROUGH = 0.5
_INFEASIBLE, _SOLVED = 2, 0


@dataclass(frozen=True)
class Optimum:
    """What HiGHS found.

    Attributes:
        picks: Exact 0/1 columns of the formulation.
        value: Objective, in the units of ``Program.cost``.
        bound: No assignment is below this.
        upper: Upper bounds of the last round.
    """

    picks: Vector
    value: float
    bound: float
    upper: Vector


def minimise(
    program: Program, *, gap: float, time_limit_s: float, known: Optimum | None = None
) -> Optimum | None:
    """Return an optimum of the integer program, or None if nothing is feasible.

    Args:
        program: What to minimise.
        gap: Relative gap at which to stop.
        time_limit_s: Stop after this time with the best known solution.
        known: A solution, e.g. of the same program under tighter limits.

    Raises:
        ToolchainError: No solution was found in time.
    """
    end = time.monotonic() + time_limit_s
    upper, scale = program.upper, _largest(program.cost, program.upper)
    found = known
    # A value that is known roughly is enough to scale by; only the last round is solved to the wanted gap.
    final = known is not None
    if known is not None:
        if known.value <= 0:
            return known
        upper, scale = _closed(program, upper, known.value), known.value
    for _ in range(_ROUNDS):
        left = max(end - time.monotonic(), 0.1)
        result = _milp(program, upper, scale, gap=gap if final else max(gap, _ROUGH), time_limit_s=left)
        if result.status == _INFEASIBLE:
            return found
        if result.x is None:
            break
        picks = program.form.picks(result.x)
        value = program.value(picks)
        bound = float(result.mip_dual_bound) * scale / MAGNITUDE
        if found is None or value <= found.value:
            found = Optimum(picks, value, min(value, bound), upper)
        if value <= 0 or final or end < time.monotonic():
            break
        final = value > scale * _SHRINKS
        upper, scale = _closed(program, upper, value), value
    if found is None:
        msg = f"the solver found no assignment in {time_limit_s:g} s: {result.message}"
        raise ToolchainError(msg, where="allocation", fix="allow more time, or fewer formats")
    return found


def _closed(program: Program, upper: Vector, value: float) -> Vector:
    """Return the bounds without the columns that a solution as good as ``value`` cannot have."""
    own = len(program.form.allowed)
    closed = upper.copy()
    closed[:own][program.cost[:own] > value * (1 + 1e-9)] = 0.0
    return closed


@contextmanager
def _silent() -> Iterator[None]:
    """Send what HiGHS prints from C++, whatever its options say, to nowhere: standard output may be a JSON."""
    if sys.stdout is not None:  # a service may have none
        sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _largest(cost: Vector, upper: Vector) -> float:
    return float(np.max(cost[upper > 0], initial=0.0)) or 1.0


def _milp(
    program: Program, upper: Vector, scale: float, *, gap: float, time_limit_s: float
) -> OptimizeResult:
    form = program.form
    integrality = np.zeros(len(program.cost), np.int64)
    integrality[: form.choices] = 1
    constraints = [LinearConstraint(_padded(form, len(upper)), form.right_sides, form.right_sides)]
    if program.limits.shape[0]:
        constraints.append(LinearConstraint(program.limits, -np.inf, program.right_sides))
    with _silent():
        return milp(
            np.where(upper > 0, program.cost, 0.0) * (MAGNITUDE / scale),
            integrality=integrality,
            bounds=Bounds(0.0, upper),
            constraints=constraints,
            options={"mip_rel_gap": gap, "time_limit": time_limit_s},
        )


def _padded(form: Formulation, columns: int) -> sp.csr_array:
    more = columns - form.equalities.shape[1]
    if not more:
        return form.equalities
    return sp.csr_array(sp.hstack([form.equalities, sp.csr_array((form.equalities.shape[0], more))]))


def marginals(program: Program, optimum: Optimum) -> Vector:
    """Return by how much the relaxation's objective changes for each unit of a right side (<= 0).

    The relaxation is that of the last round, so it is scaled as well as the integer program was.
    """
    upper = optimum.upper
    scale = _largest(program.cost, upper)
    limits: Any = program.limits  # sparse matrices are accepted; the type stubs know arrays only
    equalities: Any = _padded(program.form, len(upper))
    bounds: Any = np.column_stack([np.zeros(len(upper)), upper])
    result = linprog(
        np.where(upper > 0, program.cost, 0.0) * (MAGNITUDE / scale),
        A_ub=limits,
        b_ub=program.right_sides,
        A_eq=equalities,
        b_eq=program.form.right_sides,
        bounds=bounds,
        method="highs",
    )
    if result.status != _SOLVED:
        msg = f"the relaxation of a solved allocation could not be solved: {result.message}"
        raise ToolchainError(msg, where="allocation", fix="please report this problem")
    found: Vector = np.asarray(result.ineqlin.marginals, np.float64) * (scale / MAGNITUDE)
    return found
