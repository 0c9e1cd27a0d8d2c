"""The x86 family: 64-bit processors under Linux, executed on this machine."""

from __future__ import annotations

from bitwright.targets.backend import Backend
from bitwright.targets.toolchain.cpu_backend import CpuBackend
from bitwright.targets.x86_cpu import native

BACKEND: Backend = CpuBackend(
    family="x86_cpu",
    kernels="bitwright.targets.x86_cpu.kernels",
    missing=native.why_not_executable,
    launch=native.launch,
    prepare=native.prepare,
    flags=native.required_flags,
)
