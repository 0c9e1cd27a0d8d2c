"""Modelled cycles of kernels: how often qemu executes each block, times what LLVM's model of the core says it takes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.arm_cpu import emulated
from bitwright.targets.arm_cpu.counting import Count, counted, read_counts, why_not_countable
from bitwright.targets.arm_cpu.cycle_model import CycleModel, find_cycle_model
from bitwright.targets.arm_cpu.kernel_calls import KernelArguments, call_kernels
from bitwright.targets.backend import KernelTimer
from bitwright.targets.schema import Profile


@dataclass(frozen=True)
class Cycles:
    """A modelled figure; never a measurement.

    Attributes:
        cycles: Of the named core, without caches, memory and mispredicted branches.
        instructions: Executed, counted.
        model: What the cycles come from.
    """

    cycles: float
    instructions: float
    model: str


def modelled_cycles(count: Count, file: str, model: CycleModel) -> Cycles:
    """Return the cycles of everything that was executed in one file.

    Args:
        count: With blocks.
        file: Name of the library.
        model: Of the core.

    Raises:
        ToolchainError: A tool failed.
    """
    executed = [(block, times) for block, times in count.blocks.items() if block.file == file]
    each = model.cycles({block.code for block, _ in executed})
    return Cycles(sum(each[block.code] * times for block, times in executed), count.within(file), model.name)


def modelled_call(library: Path, call: KernelArguments, profile: Profile) -> tuple[Cycles, np.ndarray]:
    """Execute one kernel under the emulator and return its modelled cycles and its output.

    Raises:
        ToolchainError: Nothing can be counted here, the kernel crashed, or a tool failed.
    """
    model = find_cycle_model(profile.codegen.mcpu)
    with tempfile.TemporaryDirectory(prefix="bitwright-cycles-") as work:
        file = Path(work, "counts")
        launch = counted(emulated.launch(profile), file, blocks=True)
        (output,) = call_kernels(library, [call], profile, launch)
        return modelled_cycles(read_counts(file), library.name, model), output


@dataclass(frozen=True)
class ModelledTimer:
    """Gives the tuner modelled seconds: cycles over the profile's clock.

    Attributes:
        profile: The processor.
        model: LLVM's tools.
    """

    profile: Profile
    model: CycleModel

    @property
    def hardware(self) -> str:
        """What the figures hold for."""
        return f"modelled {self.profile.codegen.mcpu}, {self.model.name}"

    @property
    def executed(self) -> str:
        """``"modelled"``."""
        return "modelled"

    def run(self, library: Path, symbol: str, arguments: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
        """Execute a kernel in the emulator and return (modelled seconds of one call, its output).

        Raises:
            ToolchainError: The kernel crashed, or a tool failed.
        """
        found, output = modelled_call(library, KernelArguments(symbol, arguments), self.profile)
        return found.cycles / self.profile.clock_hz, output


def timer(profile: Profile) -> KernelTimer | None:
    """Return the timer for a profile, or None where something it needs is missing or the code runs natively."""
    if why_not_countable(profile) is not None:
        return None
    try:
        return ModelledTimer(profile, find_cycle_model(profile.codegen.mcpu))
    except ToolchainError:
        return None
