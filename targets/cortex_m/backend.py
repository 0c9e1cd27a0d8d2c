"""The ``Backend`` of Arm's microcontrollers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.targets.backend import Backend, Execution, Kernel, KernelChoice
from bitwright.targets.cortex_m import emulated
from bitwright.targets.cortex_m.linking import link_static
from bitwright.targets.schema import Profile

if TYPE_CHECKING:
    from bitwright.compiler.program.ops import Program, Step

KERNELS = "bitwright.targets.cortex_m.kernels"  # by name: it imports tvm, which takes seconds


@dataclass(frozen=True)
class CortexMBackend:
    """Kernels as object code in a static C executor, executed on an emulated board."""

    family: str = "cortex_m"

    def candidates(self, step: Step, program: Program, profile: Profile) -> tuple[KernelChoice, ...]:
        """Return the ways to compute a QGemm or QConv step, the default first."""
        found: tuple[KernelChoice, ...] = import_module(KERNELS).candidates(step, program, profile)
        return found

    def dot_kernel(
        self, step: Step, program: Program, profile: Profile, choice: KernelChoice | None = None
    ) -> Kernel:
        """Return the kernel of a QGemm or QConv step."""
        kernel: Kernel = import_module(KERNELS).dot_kernel(step, program, profile, choice)
        return kernel

    def tvm_target(self, profile: Profile) -> dict[str, Any]:
        """Return the dictionary for ``tvm.target.Target``; without the ABI LLVM would pass floats in integers."""
        codegen = profile.codegen
        target = {"kind": codegen.kind, "mtriple": codegen.mtriple, "mcpu": codegen.mcpu}
        attributes = {"mattr": list(codegen.mattr)} if codegen.mattr else {}
        return {**target, **attributes, "mfloat-abi": "hard"}

    def link(self, objects: Sequence[Path], library: Path, profile: Profile) -> str:
        """Build the programs beside ``library``, which itself is not written; returns the compiler's version."""
        return link_static(objects, library.parent, profile)

    def why_not_executable(self, profile: Profile) -> str | None:
        """Return why this machine cannot emulate the profile's board, or None if it can."""
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
        """Run the network on one set of inputs; there are no segments, and an emulator's time means nothing."""
        return emulated.execute(bundle, feeds, profile, trace=trace)


BACKEND: Backend = CortexMBackend()
