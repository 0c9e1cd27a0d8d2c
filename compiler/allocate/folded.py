"""Allocation of circuits: the format and the folding of every layer together, under cells and a frame interval.

A circuit of streaming engines starts a frame every ``max`` cycles of its layers, so an interval is no sum and needs no
row in the integer program: under a limit of the interval, slower choices are simply not there. The least interval is
found by bisection over the cycles that occur; whether one is reachable is monotone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from bitwright.compiler.allocate.nearest import NAMES, figure
from bitwright.compiler.allocate.problem import CELLS, Budget, Choice, Group, Metric, Problem
from bitwright.compiler.allocate.solve import Allocation, allocate, reachable
from bitwright.compiler.errors import InfeasibleBudgetError

COMPARED: tuple[Metric, ...] = ("loss", *CELLS)


@dataclass(frozen=True)
class FoldedProblem:
    """Layers, and what every format and folding of each would take.

    Attributes:
        problem: One group a layer; the format of a choice is a label that names its folding, too.
        cycles: Layer -> label -> cycles of a frame.
    """

    problem: Problem
    cycles: Mapping[str, Mapping[str, int]]

    @property
    def least(self) -> int:
        """The least interval that any folding has: of the layer whose fastest choice is slowest."""
        return max(min(found.values()) for found in self.cycles.values())

    def intervals(self) -> list[int]:
        """Return every interval that a circuit can have, the shortest first."""
        found = {c for by_label in self.cycles.values() for c in by_label.values()}
        return sorted(c for c in found if c >= self.least)

    def within(self, interval: int) -> Problem:
        """Return the problem with only those choices that take no more cycles and are not dominated.

        Args:
            interval: At least :attr:`least`.
        """
        groups = tuple(
            replace(
                g, choices=not_dominated(c for c in g.choices if self.cycles[g.name][c.format] <= interval)
            )
            for g in self.problem.groups
        )
        return replace(self.problem, groups=groups)

    def interval_of(self, formats: Mapping[str, str]) -> int:
        """Return the cycles of the slowest layer."""
        return max(self.cycles[name][label] for name, label in formats.items())


def not_dominated(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """Return the choices than which no other loses no more and takes no more of any cell."""
    kept: list[tuple[tuple[float, ...], Choice]] = []
    keyed = (((*(getattr(c, m) for m in COMPARED),), c) for c in choices)
    for key, choice in sorted(keyed, key=lambda pair: pair[0]):
        if not any(all(a <= b for a, b in zip(known, key, strict=True)) for known, _ in kept):
            kept.append((key, choice))
    return tuple(choice for _, choice in kept)


def allocate_folded(
    folded: FoldedProblem,
    budget: Budget,
    *,
    interval: int | None,
    objective: Metric = "loss",
    prices: bool = True,
) -> Allocation:
    """Choose a format and a folding for every layer.

    Args:
        folded: What to choose from.
        budget: Upper limits of loss and cells.
        interval: Most cycles between two frames; None: as few as the budget allows.
        objective: Minimised under both: the loss, or a kind of cells.
        prices: Also find out what each budget costs.

    Returns:
        The optimum; its formats are labels.

    Raises:
        InfeasibleBudgetError: Nothing meets both; the message names the nearest assignment and the nearest interval.
    """
    if interval is None:
        interval = least_interval(folded, budget)
        if interval is None:
            interval = folded.intervals()[-1]
    if interval < folded.least:
        name = max(folded.cycles, key=lambda n: min(folded.cycles[n].values()))
        what = (
            f"no folding starts a frame every {interval} cycles: layer '{name}' takes at least {folded.least}"
        )
        raise InfeasibleBudgetError(what, where="budget", fix=f"allow {folded.least} cycles a frame")
    try:
        return allocate(folded.within(interval), budget, objective=objective, prices=prices)
    except InfeasibleBudgetError as error:
        reached = least_interval(folded, budget)
        instead = "" if reached is None else f"; or start a frame every {reached} cycles"
        raise InfeasibleBudgetError(error.what, where=error.where, fix=f"{error.fix}{instead}") from error


def least_interval(folded: FoldedProblem, budget: Budget) -> int | None:
    """Return the fewest cycles between two frames within a budget, None if no folding is within it."""
    known = folded.intervals()
    low, high = 0, len(known) - 1
    if not reachable(folded.within(known[high]), budget):
        return None
    while low < high:
        middle = (low + high) // 2
        if reachable(folded.within(known[middle]), budget):
            high = middle
        else:
            low = middle + 1
    return known[low]


def cells_text(cells: Mapping[Metric, float]) -> str:
    """Return kinds of cells and how many of each, e.g. ``LUTs 1200, DSP blocks 4``."""
    return ", ".join(
        f"{NAMES[m]} {figure(m, v)}" for m, v in cells.items() if m in CELLS and math.isfinite(v)
    )


def folded_problem(
    layers: Iterable[tuple[str, Iterable[tuple[Choice, int]]]], fixed: Problem | None = None
) -> FoldedProblem:
    """Put a problem together.

    Args:
        layers: Name of each layer, and its choices with their cycles.
        fixed: A problem whose fixed costs are taken over.
    """
    groups, cycles = [], {}
    for name, choices in layers:
        pairs = list(choices)
        groups.append(Group(name, (name,), tuple(choice for choice, _ in pairs)))
        cycles[name] = {choice.format: count for choice, count in pairs}
    problem = Problem(tuple(groups)) if fixed is None else Problem(tuple(groups), fixed=fixed.fixed)
    return FoldedProblem(problem, cycles)
