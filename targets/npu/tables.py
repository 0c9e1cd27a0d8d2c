"""What the report shows of an artifact: layers and their schedules, cycles, area."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitwright.targets.backend import Measurement
from bitwright.targets.generator import Table
from bitwright.targets.npu.area import predicted_area
from bitwright.targets.npu.machine import Machine
from bitwright.targets.npu.problem import Problem
from bitwright.targets.npu.search import Tuned
from bitwright.targets.sections.systolic import SystolicArray


@dataclass(frozen=True)
class LayerPlan:
    """One product on the array.

    Attributes:
        name: Step of the program, its ONNX node.
        problem: Its sizes.
        tuned: Its schedule.
    """

    name: str
    problem: Problem
    tuned: Tuned

    def busy(self, machine: Machine) -> float:
        """Return the share of the array's multiply-accumulates that the model asked for."""
        return self.problem.macs / (self.tuned.cycles * machine.macs_per_cycle)


def layer_table(plans: Sequence[LayerPlan], machine: Machine) -> Table:
    """Return cycles of every product."""
    rows = tuple(
        (
            plan.name,
            _sizes(plan.problem),
            plan.problem.macs,
            plan.tuned.cycles,
            plan.tuned.first_cycles,
            round(plan.tuned.first_cycles / plan.tuned.cycles, 2),
            round(100 * plan.busy(machine), 1),
        )
        for plan in plans
    )
    columns = ("Node", "Products", "#MACs", "#Cycles", "#First legal", "#Gain", "#Array busy %")
    note = "Cycles of the chosen schedule, as the simulated circuit takes them; beside them the first legal schedule's."
    return Table("Products on the array", columns, rows, note)


def _sizes(problem: Problem) -> str:
    groups = f"{problem.groups} x " if problem.groups > 1 else ""
    return f"{groups}{problem.pixels}x{problem.depth}x{problem.outputs}"


def schedule_table(plans: Sequence[LayerPlan]) -> Table:
    """Return what the search chose."""
    rows = tuple((plan.name, plan.tuned.best.label(), plan.tuned.legal, plan.tuned.counted) for plan in plans)
    columns = ("Node", "Schedule", "#Legal schedules", "#Counted")
    note = (
        "Block of pixels x outputs x depth in units of the array, order of the loops over blocks, where operands are "
        "fetched, which buffers (activations, weights, sums) are doubled. Schedules that were not counted cannot be "
        "better."
    )
    return Table("Schedules", columns, rows, note)


def measurements(plans: Sequence[LayerPlan], machine: Machine) -> tuple[Measurement, ...]:
    """Return the totals."""
    cycles = sum(plan.tuned.cycles for plan in plans)
    first = sum(plan.tuned.first_cycles for plan in plans)
    macs = sum(plan.problem.macs for plan in plans)
    if not cycles:
        return ()
    milliseconds = 1e3 * cycles / machine.clock_hz
    busy = 100 * macs / (cycles * machine.macs_per_cycle)
    return (
        Measurement(
            "Predicted cycles",
            f"{cycles:,}",
            f"{milliseconds:.3f} ms at {machine.clock_hz / 1e6:.0f} MHz, array busy {busy:.0f} %; the host's work is "
            "not counted",
        ),
        Measurement(
            "First legal schedules",
            f"{first:,} cycles",
            f"the chosen ones take {first / cycles:.2f} times fewer",
        ),
    )


def area_measurement(machine: Machine, array: SystolicArray | None) -> Measurement:
    """Return the predicted area."""
    if array is None or array.area is None:
        return Measurement("Area", "unknown", "the profile has no table of cells: array.area")
    area = predicted_area(machine, array.area)
    return Measurement(
        "Area",
        f"{area.total:,.0f} {area.unit}",
        f"{machine.macs_per_cycle} cells {area.cells:,.0f}, requantization {area.requantize:,.0f}; {area.source}; "
        "without memories and control",
    )
