"""The ``Backend`` of NVIDIA's graphics processors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.targets.backend import Backend, Execution
from bitwright.targets.nvidia_gpu import execution
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.kernel_module import KernelModule
from bitwright.targets.toolchain.linker import is_native

if TYPE_CHECKING:
    from bitwright.compiler.lower.device import Device

# By name: they import tvm, which takes seconds.
CODEGEN = "bitwright.targets.nvidia_gpu.codegen"
LOWERING = "bitwright.targets.nvidia_gpu.lowering"


@dataclass(frozen=True)
class NvidiaBackend(KernelModule):
    """Kernels as machine code for a GPU inside a shared library for its host; executed by emulation."""

    def tvm_target(self, profile: Profile) -> dict[str, Any]:
        """Return the dictionary for ``tvm.target.Target``: the GPU, and the host that calls its kernels."""
        codegen = profile.codegen
        host = {"kind": "llvm", "mtriple": codegen.mtriple, "mcpu": codegen.mcpu}
        if codegen.mattr:
            host["mattr"] = list(codegen.mattr)  # type: ignore[assignment]
        return _with_host(profile, host)

    def missing_compiler(self) -> str | None:
        """Return why this machine cannot generate machine code, or None if it can."""
        found = import_module(CODEGEN).find_nvcc()
        return None if found else "machine code for NVIDIA's GPUs is made by nvcc, which is not installed"

    def lowering(self, profile: Profile, folder: Path) -> AbstractContextManager[Device]:
        """Prepare this process for generating code for the profile's GPU."""
        foreign = not is_native(profile.toolchain.triple)
        emulated = _with_host(profile, {"kind": "llvm"}) if foreign else None
        found: AbstractContextManager[Device] = import_module(LOWERING).lowering(profile, folder, emulated)
        return found

    def link(self, objects: Sequence[Path], library: Path, profile: Profile) -> str:
        """Link a library, and beside it what this machine executes in its place; returns the linker's version."""
        return execution.link(objects, library, profile)

    def why_not_executable(self, profile: Profile) -> str | None:
        """Return why this machine cannot emulate the kernels, or None if it can."""
        del profile
        return execution.why_not_executable()

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
        """Run a library in ``bundle``/lib on one set of inputs by emulation, whose time means nothing."""
        del profile, repeat
        return execution.run(bundle, feeds, trace=trace, library=library)


def _with_host(profile: Profile, host: Mapping[str, Any]) -> dict[str, Any]:
    assert profile.gpu is not None  # checked when the profile is read
    gpu = profile.gpu
    return {
        "kind": "cuda",
        "arch": gpu.architecture,
        "max_threads_per_block": gpu.threads_per_block,
        "max_shared_memory_per_block": 49152,  # what needs no request at launch: dlight's kernels make none
        "thread_warp_size": 32,
        "host": dict(host),
    }


BACKEND: Backend = NvidiaBackend("nvidia_gpu", "bitwright.targets.nvidia_gpu.kernels")
