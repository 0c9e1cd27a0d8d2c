"""The best schedule of a product: an exact search of the cycle model, and the first legal one beside it."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.compiler.errors import InfeasibleBudgetError
from bitwright.targets.npu.cycle_model import command_bound, commands, count_cycles
from bitwright.targets.npu.machine import Machine
from bitwright.targets.npu.tiling import Grid, Tiling, legal_tilings


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        best: The schedule of fewest cycles.
        cycles: Its cycles.
        first_cycles: Cycles of the first legal schedule.
        legal: Legal schedules.
        counted: Those whose cycles had to be counted; the others cannot be better.
    """

    best: Tiling
    cycles: int
    first_cycles: int
    legal: int
    counted: int


def cycles_of(grid: Grid, tiling: Tiling, machine: Machine) -> int:
    """Return the cycles of a schedule."""
    return count_cycles(commands(grid, tiling, machine))


def tune(grid: Grid, machine: Machine) -> Tuned:
    """Return the best schedule of the space.

    Schedules are counted in the order of what they take at least; once that is no less than the best count, no other
    can be better.

    Raises:
        InfeasibleBudgetError: The buffers hold no schedule.
    """
    legal = list(legal_tilings(grid, machine))
    if not legal:
        what = f"the buffers hold no tile of {grid.pixels} x {grid.depth} x {grid.blocks} blocks"
        raise InfeasibleBudgetError(what, fix="give the array larger buffers")
    first_cycles = cycles_of(grid, legal[0], machine)
    best, least, counted = legal[0], first_cycles, 1
    for bound, _, tiling in sorted((command_bound(grid, t, machine), n, t) for n, t in enumerate(legal)):
        if bound >= least:
            break
        found, counted = cycles_of(grid, tiling, machine), counted + 1
        if found < least:
            best, least = tiling, found
    return Tuned(best, least, first_cycles, len(legal), counted)
