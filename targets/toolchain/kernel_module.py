"""Families whose kernels are one module: it is imported when a kernel is asked for, because tvm takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from bitwright.targets.backend import Kernel, KernelChoice
from bitwright.targets.schema import Profile

if TYPE_CHECKING:
    from bitwright.compiler.program.ops import Program, Step


@dataclass(frozen=True)
class KernelModule:
    """The part of a ``Backend`` that knows the kernels.

    Attributes:
        family: Folder name, equal to the profile's ``family``.
        kernels: Name of the module that provides ``candidates`` and ``dot_kernel``.
    """

    family: str
    kernels: str

    def candidates(self, step: Step, program: Program, profile: Profile) -> tuple[KernelChoice, ...]:
        """Return the ways to compute a dot product, the default first."""
        found: tuple[KernelChoice, ...] = import_module(self.kernels).candidates(step, program, profile)
        return found

    def dot_kernel(
        self, step: Step, program: Program, profile: Profile, choice: KernelChoice | None = None
    ) -> Kernel:
        """Return the kernel of a dot product."""
        kernel: Kernel = import_module(self.kernels).dot_kernel(step, program, profile, choice)
        return kernel
