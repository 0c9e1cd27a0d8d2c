"""Running Vela, Arm's compiler for the Ethos-U, and reading what it says about the result."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.sections.vela import Vela
from bitwright.targets.toolchain.process import run_tool

MODULE = "ethosu.vela"
NPU, SRAM = "NPU", "SRAM"
KIBI = 1024


@dataclass(frozen=True)
class VelaLayer:
    """One operator in Vela's estimate.

    Attributes:
        tensor: The tensor it writes.
        operator: As the file names it.
        target: ``"NPU"`` or ``"CPU"``.
        cycles: Of the operator: the largest of those below, and what does not overlap.
        npu_cycles: Of the multiply-accumulators and the rest of the datapath.
        memory_cycles: Memory -> cycles of its transfers.
        macs: Multiply-accumulates.
        utilisation: Share of the multiply-accumulators that work, in per cent.
    """

    tensor: str
    operator: str
    target: str
    cycles: int
    npu_cycles: int
    memory_cycles: Mapping[str, int]
    macs: int
    utilisation: float

    @property
    def bound(self) -> str:
        """What decides the cycles: ``"NPU"`` or the name of a memory."""
        slowest = max(self.memory_cycles, key=lambda name: self.memory_cycles[name])
        return NPU if self.npu_cycles >= self.memory_cycles[slowest] else slowest


@dataclass(frozen=True)
class VelaReport:
    """What Vela says about a compiled file.

    Attributes:
        optimised: The file it wrote.
        layers: Every operator.
        cycles: Of one inference.
        seconds: The same at the clock of the system configuration.
        memory_bytes: Memory -> bytes used.
        weights: Weights before they were encoded.
        encoded_bytes: Bytes of the encoded weights.
    """

    optimised: Path
    layers: tuple[VelaLayer, ...]
    cycles: int
    seconds: float
    memory_bytes: Mapping[str, int]
    weights: int
    encoded_bytes: int

    @property
    def on_cpu(self) -> tuple[VelaLayer, ...]:
        """Operators that were left to the processor beside the accelerator."""
        return tuple(layer for layer in self.layers if layer.target != NPU)

    @property
    def bits_per_weight(self) -> float:
        """Encoded bits of a weight; biases and scales are stored elsewhere."""
        return 8 * self.encoded_bytes / self.weights if self.weights else 0.0


def run_vela(model: Path, options: Vela, folder: Path, timeout_s: float) -> VelaReport:
    """Compile a TFLite file.

    Args:
        model: The file.
        options: What the profile says.
        folder: Gets Vela's files.
        timeout_s: Longest time.

    Raises:
        ToolchainError: Vela failed, ran too long or wrote none of its tables.
    """
    command = [
        *(sys.executable, "-m", MODULE, str(model)),
        *("--accelerator-config", options.accelerator),
        *("--config", options.config),
        *("--system-config", options.system),
        *("--memory-mode", options.memory_mode),
        *("--optimise", options.optimise),
        *("--output-dir", str(folder)),
        "--verbose-performance",
    ]
    said = run_tool(command, what=f"Vela on {model.name}", timeout_s=timeout_s, folder=folder)
    optimised = folder / f"{model.stem}_vela.tflite"
    summary = folder / f"{model.stem}_summary_{options.system}.csv"
    layers = folder / f"{model.stem}_per-layer.csv"
    if not (optimised.exists() and summary.exists() and layers.exists()):
        what = f"Vela wrote no result\n{said.strip()[-1000:]}"
        raise ToolchainError(what, where=f"Vela on {model.name}")
    return read_report(optimised, _rows(summary), _rows(layers))


def read_report(
    optimised: Path, summary: Sequence[Mapping[str, str]], layers: Sequence[Mapping[str, str]]
) -> VelaReport:
    """Read Vela's two tables.

    Args:
        optimised: The file it wrote.
        summary: Rows of the summary: one.
        layers: Rows of the table of layers.

    Raises:
        ToolchainError: A column is missing: another version of Vela.
    """
    try:
        (total,) = summary
        memories = ("sram", "dram", "on_chip_flash", "off_chip_flash")
        return VelaReport(
            optimised,
            tuple(_layer(row) for row in layers if row["Name"] or float(row["Op Cycles"])),
            int(float(total["cycles_total"])),
            float(total["inference_time"]),
            {m: round(float(total[f"{m}_memory_used"]) * KIBI) for m in memories},
            int(float(total["total_original_weights"])),
            int(float(total["total_npu_encoded_weights"])),
        )
    except (KeyError, ValueError) as error:
        what = f"Vela's tables are not those of version 5: {error}"
        raise ToolchainError(what, fix="pip install 'ethos-u-vela>=5.0,<6'") from error


def _layer(row: Mapping[str, str]) -> VelaLayer:
    columns = {SRAM: "SRAM AC", "DRAM": "DRAM AC", "on-chip flash": "OnFlash AC", "flash": "OffFlash AC"}
    return VelaLayer(
        row["Name"].strip(),
        row["Original Operator"].strip(),
        row["Target"].strip(),
        int(float(row["Op Cycles"])),
        int(float(row["NPU"])),
        {name: int(float(row[column])) for name, column in columns.items()},
        int(float(row["MAC Count"])),
        float(row["Util% (MAC)"]),
    )


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))
