"""What the families of processors under Linux have in common: LLVM code, a shared library, the C++ runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.targets.backend import Execution, KernelTimer
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.codegen import llvm_target
from bitwright.targets.toolchain.host import processor_name
from bitwright.targets.toolchain.kernel_module import KernelModule
from bitwright.targets.toolchain.linker import link_shared
from bitwright.targets.toolchain.runner import Launch, execute


@dataclass(frozen=True)
class CpuBackend(KernelModule):
    """The ``Backend`` of a processor family.

    Attributes:
        missing: Why this machine cannot execute artifacts of a profile, or None if it can.
        launch: How the runner is started for a profile.
        prepare: Asks the operating system for what kernels need in this process.
        timer: What times kernels that this machine cannot execute natively.
        flags: Features of a processor, in the names of /proc/cpuinfo, that code for a profile may need.
    """

    missing: Callable[[Profile], str | None]
    launch: Callable[[Profile], Launch]
    prepare: Callable[[Profile], None] = lambda _: None
    timer: Callable[[Profile], KernelTimer | None] = lambda _: None
    flags: Callable[[Profile], tuple[str, ...]] = lambda _: ()

    def tvm_target(self, profile: Profile) -> dict[str, Any]:
        """Return the dictionary for ``tvm.target.Target``."""
        return llvm_target(profile)

    def link(self, objects: Sequence[Path], library: Path, profile: Profile) -> str:
        """Link object files into a shared library; returns the tool's name and version."""
        return link_shared(objects, library, profile.toolchain.triple)

    def why_not_executable(self, profile: Profile) -> str | None:
        """Return why this machine cannot execute artifacts of ``profile``, or None if it can."""
        return self.missing(profile)

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
        """Run a library in ``bundle``/lib on one set of inputs; the time of an emulator is not reported."""
        launch = self.launch(profile)
        timed = repeat if launch.executed == "native" else 0
        return execute(bundle, feeds, launch, trace=trace, repeat=timed, library=library)

    def hardware(self) -> str:
        """Return the name of this machine's processor."""
        return processor_name()

    def executes_natively(self, profile: Profile) -> bool:
        """Tell whether artifacts of ``profile`` run on this machine's processor itself."""
        return self.missing(profile) is None and self.launch(profile).executed == "native"

    def prepare_process(self, profile: Profile) -> None:
        """Ask the operating system for what kernels of ``profile`` need in this process."""
        self.prepare(profile)

    def kernel_timer(self, profile: Profile) -> KernelTimer | None:
        """Return what times kernels that this machine cannot execute natively, or None if nothing does."""
        return self.timer(profile)
