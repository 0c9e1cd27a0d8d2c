"""The dot-product kernels of 64-bit ARM CPUs: which template and which instruction a step gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bitwright.compiler.lower.templates import mmla
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
from bitwright.compiler.lower.templates.mmla import MatrixInstruction
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
from bitwright.targets.arm_cpu.codes import CODE_NEON, CODE_SDOT
from bitwright.targets.arm_cpu.neon import NEON
from bitwright.targets.arm_cpu.sdot import SDOT, SDOT_BY_ELEMENT
from bitwright.targets.arm_cpu.smmla import SMMLA
from bitwright.targets.backend import Kernel, KernelChoice
from bitwright.targets.schema import Profile

INSTRUCTIONS = {i.name: i for i in (SDOT, NEON)}
MATRIX_INSTRUCTIONS = {i.name: i for i in (SDOT_BY_ELEMENT, SMMLA)}
CODE_INSTRUCTIONS = {i.name: i for i in (CODE_SDOT, CODE_NEON)}
KNOWN = tuple(dict.fromkeys((*INSTRUCTIONS, *MATRIX_INSTRUCTIONS)))
REGISTER_BYTES = 16
MMLA = "mmla"
MAX_CANDIDATES = 300


def usable(available: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the compute rows that are ARM instructions known here; each suits every shape.

    Raises:
        ProfileError: There is none.
    """
    names = tuple(name for name in available if name in KNOWN)
    if names:
        return names
    raise no_kernel(available, KNOWN)


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
        vectors = [INSTRUCTIONS[n] for n in available if n in INSTRUCTIONS]
        return tuple(depthwise_choices(geometry, vectors, REGISTER_BYTES))[:MAX_CANDIDATES]
    names = usable(available)
    spaces = [_matrix_space(geometry, [MATRIX_INSTRUCTIONS[n] for n in names if n in MATRIX_INSTRUCTIONS])]
    spaces += [implicit_gemm_choices(geometry, INSTRUCTIONS[n]) for n in names if n in INSTRUCTIONS]
    return tuple(interleaved(spaces, MAX_CANDIDATES))


def _matrix_space(geometry: DotGeometry, instructions: Sequence[MatrixInstruction]) -> Iterator[KernelChoice]:
    """Yield the members of several instructions' spaces in one order: their estimates have one unit."""
    members = [
        (mmla.estimate(geometry, i, p.groups, p.vectors), as_choice(MMLA, i.name, p))
        for i in instructions
        for p in mmla.space(geometry, i)
    ]
    for _, choice in sorted(members, key=lambda member: member[0]):
        yield choice


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
    if chosen.template == MMLA:
        tile = params_of(chosen, mmla.MmlaParams)
        return mmla.mmla_kernel(dot, program, geometry, MATRIX_INSTRUCTIONS[chosen.intrinsic], tile)
    return vector_kernel(chosen, dot, program, geometry, INSTRUCTIONS, REGISTER_BYTES)
