"""The dot-product kernels of 64-bit ARM CPUs: which template and which instruction a step gets."""

from __future__ import annotations

from bitwright.compiler.errors import ProfileError
from bitwright.compiler.lower.templates.choice import available_intrinsics, dot_of
from bitwright.compiler.lower.templates.depthwise import depthwise_kernel
from bitwright.compiler.lower.templates.implicit_gemm import implicit_gemm_kernel
from bitwright.compiler.program.ops import Program, Step
from bitwright.targets.arm_cpu.neon import NEON
from bitwright.targets.arm_cpu.sdot import SDOT
from bitwright.targets.backend import Kernel
from bitwright.targets.schema import Profile

INSTRUCTIONS = {i.name: i for i in (SDOT, NEON)}
REGISTER_BYTES = 16


def choose_intrinsic(available: tuple[str, ...]) -> str:
    """Return the first compute row that is an ARM instruction known here; both suit every shape.

    Raises:
        ProfileError: There is none.
    """
    for name in available:
        if name in INSTRUCTIONS:
            return name
    what = f"no kernel for any of the compute rows {', '.join(available) or '(none)'}"
    raise ProfileError(what, fix=f"give the operator intrinsics out of: {', '.join(INSTRUCTIONS)}")


def dot_kernel(step: Step, program: Program, profile: Profile) -> Kernel:
    """Return the kernel of a QGemm or QConv step of any shape.

    Raises:
        InternalError: The step is not a dot product.
        ProfileError: The profile allows no instruction known here.
    """
    return kernel_for(step, program, available_intrinsics(step, program, profile))


def kernel_for(step: Step, program: Program, available: tuple[str, ...]) -> Kernel:
    """Return the kernel of a step, given the compute rows it may use.

    Raises:
        InternalError: The step is not a dot product.
        ProfileError: None of ``available`` is known here.
    """
    dot, geometry = dot_of(step, program)
    if geometry.is_depthwise:
        return depthwise_kernel(dot, program, geometry, register_bytes=REGISTER_BYTES)
    return implicit_gemm_kernel(dot, program, geometry, INSTRUCTIONS[choose_intrinsic(available)])
