"""The Arm family (aarch64 Linux): kernels, cross linker and execution under emulation."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.targets.arm_cpu import emulated
from bitwright.targets.backend import Backend, Execution, Kernel
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.codegen import llvm_target
from bitwright.targets.toolchain.linker import link_shared
from bitwright.targets.toolchain.process import ToolCrashError
from bitwright.targets.toolchain.runner import execute

if TYPE_CHECKING:
    from bitwright.compiler.program.ops import Program, Step


class ArmBackend:
    """64-bit Arm processors under Linux."""

    family = "arm_cpu"

    def dot_kernel(self, step: Step, program: Program, profile: Profile) -> Kernel:
        """Return the kernel of a QGemm or QConv step."""
        from bitwright.targets.arm_cpu.kernels import dot_kernel  # imports tvm, which takes seconds

        return dot_kernel(step, program, profile)

    def tvm_target(self, profile: Profile) -> dict[str, Any]:
        """Return the dictionary for ``tvm.target.Target``."""
        return llvm_target(profile)

    def link(self, objects: Sequence[Path], library: Path, profile: Profile) -> str:
        """Link object files into a shared library; returns the tool's name and version."""
        return link_shared(objects, library, profile.toolchain.triple)

    def why_not_executable(self, profile: Profile) -> str | None:
        """Return why this machine cannot execute artifacts of ``profile``, or None if it can."""
        return emulated.why_not_executable(profile)

    def execute(
        self,
        bundle: Path,
        feeds: Mapping[str, np.ndarray],
        profile: Profile,
        *,
        trace: bool,
        repeat: int = 1,
        library: str = "",
    ) -> Execution:
        """Run a library in ``bundle``/lib on one set of inputs; emulated times are not reported."""
        launch = emulated.launch(profile)
        timed = repeat if launch.executed == "native" else 0
        return execute(bundle, feeds, launch, trace=trace, repeat=timed, library=library)


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


BACKEND: Backend = ArmBackend()
