"""The dot-product kernels of x86 CPUs: which template and which instruction a step gets."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from bitwright.compiler.lower.templates.choice import (
    as_choice,
    available_intrinsics,
    dot_of,
    interleaved,
    no_kernel,
    params_of,
    require_candidate,
)
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.instruction import DotInstruction
from bitwright.compiler.lower.templates.vector_choice import (
    depthwise_choices,
    implicit_gemm_choices,
    vector_kernel,
)
from bitwright.compiler.lower.templates.weight_only_choice import (
    weight_only_candidates,
    weight_only_choice_kernel,
)
from bitwright.compiler.program.ops import Program, Step, WeightOnlyDot
from bitwright.targets.backend import Kernel, KernelChoice
from bitwright.targets.schema import Profile
from bitwright.targets.x86_cpu import amx
from bitwright.targets.x86_cpu.avx2 import AVX2
from bitwright.targets.x86_cpu.codes import CODE_AVX2, CODE_VNNI
from bitwright.targets.x86_cpu.vnni import VNNI

VECTOR_INSTRUCTIONS = {i.name: i for i in (VNNI, AVX2)}
CODE_INSTRUCTIONS = {i.name: i for i in (CODE_VNNI, CODE_AVX2)}
REGISTER_BYTES = {VNNI.name: 64, AVX2.name: 32}
AMX = "amx"
MAX_CANDIDATES = 300


def choose_intrinsic(geometry: DotGeometry, available: tuple[str, ...]) -> str:
    """Return the compute row to build a step on.

    Args:
        geometry: The step's loop bounds.
        available: Compute rows the profile allows, best first.

    Raises:
        ProfileError: None of them is an x86 instruction known here.
    """
    vectors = [name for name in available if name in VECTOR_INSTRUCTIONS]
    if amx.NAME in available:
        fewer = vectors and _vector_cycles(geometry, VECTOR_INSTRUCTIONS[vectors[0]]) < amx.cycles(geometry)
        return vectors[0] if fewer else amx.NAME
    if not vectors:
        raise no_kernel(available, (amx.NAME, *VECTOR_INSTRUCTIONS))
    return vectors[0]


def _vector_cycles(geometry: DotGeometry, instruction: DotInstruction) -> float:
    """Return an estimate for Sapphire Rapids: half a cycle a product, four for the epilogue of a vector."""
    vectors = geometry.group * -(-geometry.group_outputs // instruction.lanes)
    products = prod(geometry.taps) * -(-geometry.run // instruction.step)
    return geometry.pixels * vectors * (0.5 * products + amx.EPILOGUE_CYCLES)


def candidates(step: Step, program: Program, profile: Profile) -> tuple[KernelChoice, ...]:
    """Return the ways to compute a QGemm, QConv or WeightOnlyDot step, the default first.

    Raises:
        InternalError: The step is not a dot product.
        ProfileError: The profile allows no instruction known here.
    """
    if isinstance(step, WeightOnlyDot):
        return weight_only_candidates(step, program, profile, CODE_INSTRUCTIONS)
    return candidates_for(step, program, available_intrinsics(step, program, profile))


def candidates_for(step: Step, program: Program, available: tuple[str, ...]) -> tuple[KernelChoice, ...]:
    """Return the ways to compute a step, given the compute rows it may use.

    Raises:
        InternalError: The step is not a dot product.
        ProfileError: None of ``available`` is known here.
    """
    _, geometry = dot_of(step, program)
    if geometry.is_depthwise:
        vectors = [VECTOR_INSTRUCTIONS[n] for n in available if n in VECTOR_INSTRUCTIONS]
        return tuple(depthwise_choices(geometry, vectors, _register_bytes(available)))[:MAX_CANDIDATES]
    first = choose_intrinsic(geometry, available)
    known = [n for n in available if n == amx.NAME or n in VECTOR_INSTRUCTIONS]
    names = sorted(known, key=lambda name: name != first)
    return tuple(interleaved((_space(geometry, name) for name in names), MAX_CANDIDATES))


def _space(geometry: DotGeometry, name: str) -> Iterator[KernelChoice]:
    if name == amx.NAME:
        return (as_choice(AMX, name, p) for p in amx.space(geometry))
    return implicit_gemm_choices(geometry, VECTOR_INSTRUCTIONS[name])


def _register_bytes(available: tuple[str, ...]) -> int:
    names = [n for n in available if n in REGISTER_BYTES]
    return max((REGISTER_BYTES[n] for n in names), default=64 if amx.NAME in available else 32)


def dot_kernel(step: Step, program: Program, profile: Profile, choice: KernelChoice | None = None) -> Kernel:
    """Return the kernel of a QGemm, QConv or WeightOnlyDot step of any shape.

    Raises:
        InternalError: The step is not a dot product.
        ProfileError: The profile allows no instruction known here, or ``choice`` is not a candidate.
    """
    if isinstance(step, WeightOnlyDot):
        return weight_only_choice_kernel(step, program, profile, CODE_INSTRUCTIONS, choice)
    return kernel_for(step, program, available_intrinsics(step, program, profile), choice)


def kernel_for(
    step: Step, program: Program, available: tuple[str, ...], choice: KernelChoice | None = None
) -> Kernel:
    """Return the kernel of a step, given the compute rows it may use.

    Raises:
        InternalError: The step is not a dot product.
        ProfileError: None of ``available`` is known here, or ``choice`` is not a candidate.
    """
    dot, geometry = dot_of(step, program)
    known = candidates_for(step, program, available)
    chosen = known[0] if choice is None else require_candidate(choice, known, step)
    if chosen.template == AMX:
        return amx.amx_kernel(dot, program, geometry, params_of(chosen, amx.AmxParams))
    return vector_kernel(chosen, dot, program, geometry, VECTOR_INSTRUCTIONS, _register_bytes(available))
