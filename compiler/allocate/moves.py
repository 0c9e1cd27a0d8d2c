"""Steps from one assignment to a better or cheaper one, ranked by loss per cost; boundaries and budgets included."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from bitwright.compiler.allocate.problem import (
    Boundary,
    Budget,
    Group,
    LiveSet,
    Metric,
    Problem,
    Totals,
    drop_unusable,
    totals,
)
from bitwright.compiler.errors import InfeasibleBudgetError


@dataclass(frozen=True)
class Move:
    """One group changes its format.

    Attributes:
        group: Name of the group.
        before: Its format so far.
        after: Its new format.
        loss: Change of the predicted loss.
        cost: Change of the cost, that of its boundaries included.
    """

    group: str
    before: str
    after: str
    loss: float
    cost: float

    @property
    def rate(self) -> float:
        """Loss saved for each unit of cost; infinite for a move that saves both."""
        return math.inf if self.cost <= 0 and self.loss < 0 else -self.loss / self.cost if self.cost else 0.0


class _State:
    """An assignment, and what moves would do to it, without adding up the whole model each time."""

    def __init__(self, problem: Problem, formats: Mapping[str, str]) -> None:
        self.problem, self.formats = problem, dict(formats)
        self.groups = {g.name: g for g in problem.groups}
        self._boundaries: dict[str, list[Boundary]] = {name: [] for name in self.groups}
        for b in problem.boundaries:
            for name in {b.producer, b.consumer}:
                self._boundaries[name].append(b)
        self._live: dict[str, list[LiveSet]] = {name: [] for name in self.groups}
        for live in problem.live_sets:
            for name in live.sizes:
                self._live[name].append(live)

    def neighbours(self, group: str) -> set[str]:
        """Return the groups whose moves cost something else once ``group`` has moved."""
        ends = {name for b in self._boundaries[group] for name in (b.producer, b.consumer)}
        return ends | {name for live in self._live[group] for name in live.sizes} | {group}

    def local(self, group: str, fmt: str) -> Totals:
        """Return the costs that depend on the format of ``group``.

        The peak is that of the steps the group lives in, which ranks moves even where another step is worse.
        """
        choice, formats = self.groups[group].choice(fmt), self.formats | {group: fmt}
        part = Problem(
            (replace(self.groups[group], choices=(choice,)), *self._others(group)),
            tuple(self._boundaries[group]),
            tuple(self._live[group]),
        )
        return totals(part, formats)

    def _others(self, group: str) -> list[Group]:
        """Return the neighbours at no cost of their own."""
        names = sorted(self.neighbours(group) - {group})
        return [_free(self.groups[name], self.formats[name]) for name in names]


def _free(group: Group, fmt: str) -> Group:
    choice = replace(group.choice(fmt), loss=0.0, latency_s=0.0, weight_bytes=0.0, energy_j=0.0)
    return replace(group, choices=(choice,))


def upgrades(
    problem: Problem,
    formats: Mapping[str, str],
    *,
    cost: Metric = "latency_s",
    budget: Budget | None = None,
) -> list[Move]:
    """Return the moves that lower the loss, in the order in which they should be made.

    Each moves one group up one format: to the choice of a smaller loss that saves most per cost. The next move is
    the best one of all groups, given those before it.

    Args:
        problem: The problem that ``formats`` solves.
        formats: Format by group, the start.
        cost: What is paid for a smaller loss.
        budget: Moves that would leave it are not made; its limit of the loss is not looked at.

    Returns:
        The moves; none left means that every group has its best format, or the best that the budget allows.
    """
    usable, _ = drop_unusable(problem)
    budget = (budget or Budget()).with_limit("loss", None)
    state = _State(usable, formats)
    best = {name: _best_upgrade(state, name, cost) for name in state.groups}
    order: list[Move] = []
    closed: set[tuple[str, str, str]] = set()
    while moves := [m for m in best.values() if m is not None]:
        move = max(moves, key=lambda m: m.rate)
        tried = state.formats | {move.group: move.after}
        if budget.limits() and not budget.met_by(totals(usable, tried)):
            closed.add((move.group, move.before, move.after))
            best[move.group] = _best_upgrade(state, move.group, cost, closed)
            continue
        state.formats = tried
        order.append(move)
        for name in state.neighbours(move.group):
            best[name] = _best_upgrade(state, name, cost, closed)
    return order


def _best_upgrade(
    state: _State, group: str, cost: Metric, closed: Collection[tuple[str, str, str]] = ()
) -> Move | None:
    here = state.formats[group]
    now = state.local(group, here)
    found = []
    for choice in state.groups[group].choices:
        if choice.loss >= state.groups[group].choice(here).loss or (group, here, choice.format) in closed:
            continue
        then = state.local(group, choice.format)
        if math.isfinite(then.latency_s):
            found.append(Move(group, here, choice.format, then.loss - now.loss, then.of(cost) - now.of(cost)))
    return max(found, key=lambda m: (m.rate, m.loss), default=None)


def greedy(problem: Problem, budget: Budget) -> dict[str, str]:
    """Return what greedy selection chooses; for comparison with the exact optimum only.

    Starts at the smallest loss and takes, while a limit is exceeded, the move that loses least for each unit of what
    is exceeded most (relative to its limit).

    Raises:
        InfeasibleBudgetError: It finds no move that helps; there may be a solution nevertheless.
    """
    usable, _ = drop_unusable(problem)
    formats = {g.name: min(g.choices, key=lambda c: c.loss).format for g in usable.groups}
    state = _State(usable, formats)
    left: set[tuple[str, str]] = set()  # a format that was left is not taken again, so this ends
    focus: Metric | None = None
    moved = ""
    best: dict[str, Move | None] = {}
    while not budget.met_by(paid := totals(usable, state.formats)):
        metric = max(budget.limits(), key=lambda m: paid.of(m) / (budget.limits()[m] or 1e-300))
        stale = state.groups if metric != focus else state.neighbours(moved)
        focus = metric
        best |= {name: _cheapest_downgrade(state, name, metric, left) for name in stale}
        move = min((m for m in best.values() if m), key=lambda m: m.loss / -m.cost, default=None)
        if move is None:
            msg = f"greedy selection is stuck at {metric} {paid.of(metric):.6g}"
            raise InfeasibleBudgetError(msg, where="budget", fix="use the exact allocation")
        left.add((move.group, move.before))
        state.formats[move.group] = move.after
        moved = move.group
    return state.formats


def _cheapest_downgrade(state: _State, group: str, metric: Metric, left: set[tuple[str, str]]) -> Move | None:
    here = state.formats[group]
    now = state.local(group, here)
    found: list[Move] = []
    for choice in state.groups[group].choices:
        then = state.local(group, choice.format)
        if then.of(metric) < now.of(metric) and (group, choice.format) not in left:
            cost = then.of(metric) - now.of(metric)
            found.append(Move(group, here, choice.format, then.loss - now.loss, cost))
    return min(found, key=lambda m: m.loss / -m.cost, default=None)
