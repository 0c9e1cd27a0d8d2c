"""The allocation problem as a mixed-integer linear program.

One binary column for each choice, one for each pair of formats (or classes of formats that cost the same) at a
boundary. With ``x`` the choices of the
producer, ``y`` of the consumer and ``z`` the pairs, ``sum_j z_ij = x_i`` and ``sum_i z_ij = y_j``: that is the convex
hull of the products ``x_i y_j``, so ``z`` need not be declared integer and the relaxation is as tight as it can be
for one boundary. The textbook form ``z_ij >= x_i + y_j - 1`` is much weaker.

Exactly one column of every group and boundary is 1, so the smallest entry of a group can be subtracted from all of them
and added to the constant. Rows then have entries from 0 up, and what matters in them is the difference between choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from bitwright.compiler.allocate.problem import CELLS, Metric, Problem

LINEAR: tuple[Metric, ...] = ("loss", *CELLS, "latency_s", "weight_bytes", "energy_j")
_CROSSING = ("latency_s", "weight_bytes", "energy_j")

Vector = NDArray[np.float64]
Tables = dict[tuple[int, int], Vector]


@dataclass(frozen=True)
class Formulation:
    """The program without an objective and without budgets.

    Attributes:
        groups: For each group its first column and its formats.
        left: For each pair column, the choice columns of its producer's formats (0 or 1 each).
        right: The same for the consumer; the pair is the product of the two sums.
        equalities: One row each; all right sides are ``right_sides``.
        right_sides: 1 for groups, 0 for boundaries.
        rows: Metrics of an assignment as ``rows @ x + constants``: those of ``LINEAR`` first, then the RAM of
            every step. Entries are >= 0, and the smallest of every group is 0.
        constants: Of ``rows``.
        allowed: Upper bounds of the columns: 0 for forbidden pairs.
    """

    groups: tuple[tuple[str, int, tuple[str, ...]], ...]
    left: sp.csr_array
    right: sp.csr_array
    equalities: sp.csr_array
    right_sides: Vector
    rows: sp.csr_array
    constants: Vector
    allowed: Vector

    @property
    def choices(self) -> int:
        """Number of choice columns; pair columns follow."""
        return int(self.left.shape[1])

    def rows_of(self, metric: Metric) -> NDArray[np.int64]:
        """Return the rows of a metric: one, or for RAM one a step."""
        if metric == "peak_ram_bytes":
            return np.arange(len(LINEAR), len(self.constants))
        return np.array([LINEAR.index(metric)])

    def picks(self, solution: Vector) -> Vector:
        """Return the exact 0/1 columns of a solver's solution."""
        exact = np.zeros(len(self.allowed))
        for _, first, formats in self.groups:
            exact[first + int(np.argmax(solution[first : first + len(formats)]))] = 1.0
        chosen = exact[: self.choices]
        exact[self.choices :] = (self.left @ chosen) * (self.right @ chosen)
        return exact

    def formats(self, picks: Vector) -> dict[str, str]:
        """Return the format of every group."""
        return {
            name: formats[int(np.argmax(picks[first : first + len(formats)]))]
            for name, first, formats in self.groups
        }


def formulate(problem: Problem) -> Formulation:
    """Return the program of a problem whose choices are all finite."""
    starts = np.cumsum([0, *(len(g.choices) for g in problem.groups)])
    index = {g.name: k for k, g in enumerate(problem.groups)}
    costs = np.array(
        [[getattr(c, m) for m in LINEAR] for g in problem.groups for c in g.choices], np.float64
    ).reshape(-1, len(LINEAR))
    constants = np.array([problem.fixed.of(m) for m in LINEAR])
    tables = _merged(problem, index)
    _absorb(tables, costs, constants, starts)
    crossings = [_crossing(table, starts[p], starts[c]) for (p, c), table in tables.items()]
    crossing = np.concatenate([np.zeros((0, len(_CROSSING))), *(c.costs for c in crossings)])
    allowed = np.concatenate([np.ones(len(costs)), np.isfinite(crossing).all(axis=1).astype(np.float64)])
    crossing = np.where(np.isfinite(crossing), crossing, 0.0)
    linear = np.concatenate(
        [costs, np.column_stack([np.zeros((len(crossing), len(LINEAR) - len(_CROSSING))), crossing])]
    ).T
    widths = [len(g.choices) for g in problem.groups] + [len(c.costs) for c in crossings]
    steps, step_constants = _steps(problem, index, starts, len(allowed))
    rows, constants = _shifted(
        sp.csr_array(sp.vstack([sp.csr_array(linear), steps])), np.append(constants, step_constants), widths
    )
    return Formulation(
        tuple(
            (g.name, int(starts[k]), tuple(c.format for c in g.choices)) for k, g in enumerate(problem.groups)
        ),
        _members([left for c in crossings for left, _ in c.classes], len(costs)),
        _members([right for c in crossings for _, right in c.classes], len(costs)),
        *_equalities(crossings, starts, len(allowed)),
        rows,
        constants,
        allowed,
    )


def _merged(problem: Problem, index: Mapping[str, int]) -> Tables:
    """Return one table of costs (formats, formats, metrics) for each pair of groups that have a boundary."""
    tables: Tables = {}
    for boundary in problem.boundaries:
        key = (index[boundary.producer], index[boundary.consumer])
        left, right = ([c.format for c in problem.groups[k].choices] for k in key)
        table = tables.setdefault(key, np.zeros((len(left), len(right), len(_CROSSING))))
        for (a, b), cost in boundary.costs.items():
            if a in left and b in right:
                row = np.array([getattr(cost, m) for m in _CROSSING], np.float64)
                # An impossible pair is one whose cost is not finite; NaN must not survive as a number.
                table[left.index(a), right.index(b)] += np.where(np.isfinite(row), row, np.inf)
    return tables


def _absorb(tables: Tables, costs: Vector, constants: Vector, starts: NDArray[np.int64]) -> None:
    """Remove tables that need no columns: of a group with itself, and those that are the same for every pair."""
    columns = [LINEAR.index(m) for m in _CROSSING]
    for (p, c), table in list(tables.items()):
        own = table[np.arange(len(table)), np.arange(len(table))] if p == c else table[:1, 0]
        if not np.isfinite(own).all():
            continue
        if p == c:
            costs[starts[p] : starts[p + 1], columns] += own
            del tables[p, c]
        elif (table == table[0, 0]).all():
            constants[columns] += table[0, 0]
            del tables[p, c]


@dataclass(frozen=True)
class _Crossing:
    """A boundary between classes of formats: formats that cost the same whatever is on the other side are one."""

    left: tuple[NDArray[np.int64], ...]
    right: tuple[NDArray[np.int64], ...]
    costs: Vector

    @property
    def classes(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        return [(left, right) for left in self.left for right in self.right]


def _crossing(table: Vector, start: int, other: int) -> _Crossing:
    left, rows = _classes(table)
    right, columns = _classes(table.transpose(1, 0, 2))
    return _Crossing(
        tuple(start + k for k in left),
        tuple(other + k for k in right),
        table[np.ix_(rows, columns)].reshape(-1, table.shape[2]),
    )


def _classes(table: Vector) -> tuple[list[NDArray[np.int64]], list[int]]:
    """Return the groups of equal rows, and one row of each."""
    _, first, owner = np.unique(table.reshape(len(table), -1), axis=0, return_index=True, return_inverse=True)
    return [np.flatnonzero(owner.ravel() == k) for k in range(len(first))], [int(k) for k in first]


def _members(classes: list[NDArray[np.int64]], columns: int) -> sp.csr_array:
    entries = [(row, int(column), 1.0) for row, members in enumerate(classes) for column in members]
    return _sparse(entries, len(classes), columns)


def _equalities(
    crossings: list[_Crossing], starts: NDArray[np.int64], columns: int
) -> tuple[sp.csr_array, Vector]:
    """Return one choice a group, and pairs that are the products of the choices."""
    entries: list[tuple[int, int, float]] = []
    count = len(starts) - 1
    for k in range(count):
        entries.extend((k, column, 1.0) for column in range(starts[k], starts[k + 1]))
    row, column = count, int(starts[-1])
    for crossing in crossings:
        numbers = column + np.arange(len(crossing.costs)).reshape(len(crossing.left), len(crossing.right))
        for members, pairs in [
            *zip(crossing.left, numbers, strict=True),
            *zip(crossing.right, numbers.T, strict=True),
        ]:
            entries.extend((row, int(member), -1.0) for member in members)
            entries.extend((row, int(pair), 1.0) for pair in pairs)
            row += 1
        column += len(crossing.costs)
    return _sparse(entries, row, columns), np.concatenate([np.ones(count), np.zeros(row - count)])


def _steps(
    problem: Problem, index: Mapping[str, int], starts: NDArray[np.int64], columns: int
) -> tuple[sp.csr_array, list[float]]:
    entries = [
        (row, int(starts[index[name]]) + k, float(sizes.get(choice.format, 0.0)))
        for row, live in enumerate(problem.live_sets)
        for name, sizes in live.sizes.items()
        for k, choice in enumerate(problem.groups[index[name]].choices)
    ]
    constants = [problem.fixed.peak_ram_bytes + s.fixed_bytes for s in problem.live_sets]
    return _sparse(entries, len(problem.live_sets), columns), constants


def _sparse(entries: Sequence[tuple[int, int, float]] | Vector, rows: int, columns: int) -> sp.csr_array:
    table = np.asarray(entries, np.float64).reshape(-1, 3)
    where = (table[:, 0].astype(np.int64), table[:, 1].astype(np.int64))
    return sp.csr_array(sp.coo_array((table[:, 2], where), shape=(rows, columns)))


def _shifted(rows: sp.csr_array, constants: Vector, widths: list[int]) -> tuple[sp.csr_array, Vector]:
    """Subtract the smallest entry of every group and boundary, row by row, and add it to the constants."""
    starts = np.cumsum([0, *widths])[:-1]
    owners = np.repeat(np.arange(len(widths)), widths)
    moved, shifted = constants.astype(np.float64), []
    for k in range(rows.shape[0]):
        part = slice(rows.indptr[k], rows.indptr[k + 1])
        dense = np.zeros(rows.shape[1])
        dense[rows.indices[part]] = rows.data[part]
        if len(starts):
            least = np.minimum.reduceat(dense, starts)
            moved[k] += math.fsum(least)
            dense -= least[owners]
        where = np.flatnonzero(dense)
        shifted.append((np.full(len(where), k), where, dense[where]))
    table = np.concatenate([np.zeros((0, 3)), *(np.column_stack(t) for t in shifted)])
    return _sparse(table, *rows.shape), moved
