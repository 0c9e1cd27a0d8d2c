"""The Arm family: 64-bit processors under Linux, executed in an emulator where the machine is another."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bitwright.targets.arm_cpu import emulated, modelled_cycles
from bitwright.targets.backend import Backend
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.cpu_backend import CpuBackend
from bitwright.targets.toolchain.process import ToolCrashError
from bitwright.targets.toolchain.runner import execute

BACKEND: Backend = CpuBackend(
    family="arm_cpu",
    kernels="bitwright.targets.arm_cpu.kernels",
    missing=emulated.why_not_executable,
    launch=emulated.launch,
    timer=modelled_cycles.timer,
)


def executes_on(bundle: Path, feeds: Mapping[str, np.ndarray], profile: Profile, cpu: str) -> bool:
    """Tell whether the emulated processor ``cpu`` has every instruction that the artifact executes.

    Raises:
        ToolchainError: The run failed for another reason than an illegal instruction.
    """
    try:
        execute(bundle, feeds, emulated.launch(profile, cpu), trace=False, repeat=0)
    except ToolCrashError as error:
        if error.signal == signal.SIGILL:
            return False
        raise
    return True
