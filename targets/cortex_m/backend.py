"""The ``Backend`` of Arm's microcontrollers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.targets.backend import Backend, Execution
from bitwright.targets.cortex_m import emulated
from bitwright.targets.cortex_m.linking import link_static
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.kernel_module import KernelModule


@dataclass(frozen=True)
class CortexMBackend(KernelModule):
    """Kernels as object code in a static C executor, executed on an emulated board."""

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


BACKEND: Backend = CortexMBackend("cortex_m", "bitwright.targets.cortex_m.kernels")
