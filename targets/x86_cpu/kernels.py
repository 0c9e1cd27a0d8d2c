"""The dot-product kernels of x86 CPUs: which template and which instruction a step gets."""

from __future__ import annotations

from bitwright.compiler.errors import ProfileError
from bitwright.compiler.lower.templates.choice import available_intrinsics, dot_of
from bitwright.compiler.lower.templates.depthwise import depthwise_kernel
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.implicit_gemm import implicit_gemm_kernel
from bitwright.compiler.program.ops import Program, Step
from bitwright.targets.backend import Kernel
from bitwright.targets.schema import Profile
from bitwright.targets.x86_cpu import amx
from bitwright.targets.x86_cpu.avx2 import AVX2
from bitwright.targets.x86_cpu.vnni import VNNI

VECTOR_INSTRUCTIONS = {i.name: i for i in (VNNI, AVX2)}
REGISTER_BYTES = {VNNI.name: 64, AVX2.name: 32}
# Below these a tile is mostly empty and the vector instructions win (measured on Sapphire Rapids).
AMX_MIN_PIXELS, AMX_MIN_RUN = 16, 64


def choose_intrinsic(geometry: DotGeometry, available: tuple[str, ...]) -> str:
    """Return the compute row to build a step on.

    Args:
        geometry: The step's loop bounds.
        available: Compute rows the profile allows, best first.

    Raises:
        ProfileError: None of them is an x86 instruction known here.
    """
    vectors = [name for name in available if name in VECTOR_INSTRUCTIONS]
    worth_tiles = geometry.pixels >= AMX_MIN_PIXELS and geometry.run >= AMX_MIN_RUN
    if amx.NAME in available and (worth_tiles or not vectors):
        return amx.NAME
    if not vectors:
        known = ", ".join((amx.NAME, *VECTOR_INSTRUCTIONS))
        what = f"no kernel for any of the compute rows {', '.join(available) or '(none)'}"
        raise ProfileError(what, fix=f"give the operator intrinsics out of: {known}")
    return vectors[0]


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
        names = [n for n in available if n in REGISTER_BYTES]
        wide = max((REGISTER_BYTES[n] for n in names), default=64 if amx.NAME in available else 32)
        return depthwise_kernel(dot, program, geometry, register_bytes=wide)
    name = choose_intrinsic(geometry, available)
    if name == amx.NAME:
        return amx.amx_kernel(dot, program, geometry)
    return implicit_gemm_kernel(dot, program, geometry, VECTOR_INSTRUCTIONS[name])
