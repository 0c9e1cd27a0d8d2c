"""The x86 family: kernels, linker and execution on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.targets.backend import Backend, Execution, Kernel
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.codegen import llvm_target
from bitwright.targets.toolchain.linker import link_shared
from bitwright.targets.toolchain.runner import execute
from bitwright.targets.x86_cpu import native

if TYPE_CHECKING:
    from bitwright.compiler.program.ops import Program, Step


class X86Backend:
    """x86-64 processors under Linux."""

    family = "x86_cpu"

    def dot_kernel(self, step: Step, program: Program, profile: Profile) -> Kernel:
        """Return the kernel of a QGemm or QConv step."""
        from bitwright.targets.x86_cpu.kernels import dot_kernel  # imports tvm, which takes seconds

        return dot_kernel(step, program, profile)

    def tvm_target(self, profile: Profile) -> dict[str, Any]:
        """Return the dictionary for ``tvm.target.Target``."""
        return llvm_target(profile)

    def link(self, objects: Sequence[Path], library: Path, profile: Profile) -> str:
        """Link object files into a shared library; returns the tool's name and version."""
        return link_shared(objects, library, profile.toolchain.triple)

    def why_not_executable(self, profile: Profile) -> str | None:
        """Return why this machine cannot execute artifacts of ``profile``, or None if it can."""
        return native.why_not_executable(profile)

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
        """Run a library in ``bundle``/lib on one set of inputs, natively."""
        return execute(bundle, feeds, native.launch(profile), trace=trace, repeat=repeat, library=library)


BACKEND: Backend = X86Backend()
