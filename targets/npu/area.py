"""Area of the array and its requantization unit: from the profile's table, or by synthesis with a cell library."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.compiler.errors import ProfileError, ToolchainError
from bitwright.targets.npu.machine import Machine
from bitwright.targets.npu.programs import CIRCUIT_FILES, shipped_text
from bitwright.targets.sections.systolic import SystolicArea
from bitwright.targets.toolchain.yosys import run_yosys

NAND2_TRANSISTORS = 4
REQUANTIZE = "npu_requantize"
# Mapping for area. Abc's own script also merges equivalent registers and nodes, which took it minutes on a multiplier
# of 32 x 17 bits, and came out larger.
FOR_AREA = "+strash;dc2;dc2;strash;dch;map,-a"


@dataclass(frozen=True)
class Area:
    """What the arithmetic takes; memories and control are not counted.

    Attributes:
        cells: All multiply-accumulators, with the registers that skew their operands if they were synthesized.
        requantize: All lanes of the requantization unit.
        unit: Of both.
        source: Where the figures come from.
    """

    cells: float
    requantize: float
    unit: str
    source: str

    @property
    def total(self) -> float:
        """The sum."""
        return self.cells + self.requantize


def predicted_area(machine: Machine, table: SystolicArea) -> Area:
    """Return the area by the table's figures, in gate equivalents; widths between its rows are interpolated.

    Raises:
        ProfileError: The table has no row for a width as small, or as large.
    """
    flow = "weight_stationary" if machine.weight_stationary else "output_stationary"
    points = sorted((row.weight_bits, float(getattr(row, flow))) for row in table.cells)
    cell = _interpolated(points, machine.weight_bits)
    requantize = machine.columns * table.requantize_lane
    return Area(machine.macs_per_cycle * cell, requantize, "gate equivalents", table.source)


def _interpolated(points: list[tuple[int, float]], bits: int) -> float:
    below = [p for p in points if p[0] <= bits]
    above = [p for p in points if p[0] >= bits]
    if not below or not above:
        what = f"no area is given for weights of {bits} bits"
        raise ProfileError(what, where="array.area.cells", fix=f"add a row with weight_bits: {bits}")
    (low, first), (high, last) = below[-1], above[0]
    return first if low == high else first + (last - first) * (bits - low) / (high - low)


def synthesized_area(machine: Machine, liberty: Path | None, *, timeout_s: float) -> Area:
    """Return the area by synthesis.

    Args:
        machine: The accelerator.
        liberty: A cell library; None counts transistors of simple gates, four of which make a gate equivalent.
        timeout_s: Longest time of yosys.

    Raises:
        ProfileError: The library is no file.
        ToolchainError: Yosys failed.
    """
    if liberty is not None and not liberty.is_file():
        msg = "there is no such cell library"
        raise ProfileError(msg, where=str(liberty), fix="correct 'array.liberty'")
    flow = "weight_stationary" if machine.weight_stationary else "output_stationary"
    sizes = {"ROWS": machine.rows, "COLUMNS": machine.columns, "WEIGHT_BITS": machine.weight_bits}
    cells = module_area(f"npu_{flow}_array", sizes, liberty, timeout_s=timeout_s)
    lane = module_area(REQUANTIZE, {}, liberty, timeout_s=timeout_s)
    unit = "gate equivalents" if liberty is None else "um2"
    source = "yosys: transistors of CMOS gates / 4" if liberty is None else f"yosys with {liberty.name}"
    return Area(cells, machine.columns * lane, unit, source)


def module_area(
    module: str, parameters: Mapping[str, int], liberty: Path | None, *, timeout_s: float = 600.0
) -> float:
    """Return the area of one module of the circuit and everything in it.

    Raises:
        ToolchainError: Yosys failed, or counted nothing.
    """
    with tempfile.TemporaryDirectory(prefix="bitwright-area-") as place:
        work = Path(place)
        for name in CIRCUIT_FILES:
            (work / name).write_text(shipped_text(name))
        script = list(_script(module, parameters, liberty))
        run_yosys(script, what=f"synthesizing {module}", timeout_s=timeout_s, folder=work)
        text = (work / "stat.json").read_text()
    found = json.loads(text[text.index("{") : text.rindex("}") + 1])
    area = _area_of(found["design"], liberty is not None)
    if area is None:
        msg = "yosys counted no cells"
        raise ToolchainError(msg, where=module, fix="look at the cell library: it needs gates and flip-flops")
    return area


def _script(module: str, parameters: Mapping[str, int], liberty: Path | None) -> Iterator[str]:
    yield f"read_verilog {' '.join(CIRCUIT_FILES)}"
    for name, value in parameters.items():
        yield f"chparam -set {name} {value} {module}"
    yield f"hierarchy -check -top {module}"
    yield "synth -noabc -noshare"
    if liberty is None:
        # Only plain flip-flops are counted: enables and resets become gates in front of them.
        yield "dfflegalize -cell $_DFF_P_ x"
        yield f"abc -g cmos4 -script {FOR_AREA}"
        yield "opt_clean"
        yield "tee -q -o stat.json stat -tech cmos -json"
        return
    path = f'"{liberty.resolve()}"'
    yield f"dfflibmap -liberty {path}"
    yield f"abc -liberty {path} -script {FOR_AREA}"
    yield "opt_clean"
    yield f"tee -q -o stat.json stat -liberty {path} -json"


def _area_of(design: Mapping[str, Any], by_library: bool) -> float | None:
    if by_library:
        area = design.get("area")
        return float(area) if area else None
    transistors = str(design.get("estimated_num_transistors", ""))
    if transistors.endswith("+"):
        msg = f"yosys counts the transistors of some cells only: {transistors}"
        raise ToolchainError(msg, fix="name a cell library with 'array.liberty'")
    return float(transistors) / NAND2_TRANSISTORS if transistors else None
