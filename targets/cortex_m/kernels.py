"""The dot-product kernels of 32-bit Arm: which template and which instruction a step gets."""

from __future__ import annotations

from bitwright.compiler.errors import ProfileError
from bitwright.compiler.lower.templates.choice import (
    as_choice,
    available_intrinsics,
    dot_of,
    no_kernel,
    params_of,
    require_candidate,
)
from bitwright.compiler.program.ops import Program, Step
from bitwright.targets.backend import Kernel, KernelChoice
from bitwright.targets.cortex_m import depthwise, patch_gemm
from bitwright.targets.cortex_m.instruction import INSTRUCTIONS, PatchInstruction
from bitwright.targets.schema import Profile

PATCH_GEMM, DEPTHWISE = "patch_gemm", "depthwise"


def instruction_for(available: tuple[str, ...]) -> PatchInstruction:
    """Return the first compute row that is an instruction known here.

    Raises:
        ProfileError: There is none.
    """
    for name in available:
        if name in INSTRUCTIONS:
            return INSTRUCTIONS[name]
    raise no_kernel(available, INSTRUCTIONS)


def candidates(step: Step, program: Program, profile: Profile) -> tuple[KernelChoice, ...]:
    """Return the ways to compute a QGemm or QConv step, the default first.

    Raises:
        InternalError: The step is not a dot product.
        ProfileError: The profile allows no instruction known here, or other activations than int8.
    """
    _, geometry = dot_of(step, program)
    dtype = program.tensor(step.inputs[0]).dtype
    if dtype != "int8":
        what = f"the kernels multiply int8 activations, not {dtype}"
        raise ProfileError(what, where=step.name, fix="let the profile's qspaces be signed")
    instruction = instruction_for(available_intrinsics(step, program, profile))
    if geometry.is_depthwise:
        return tuple(as_choice(DEPTHWISE, "llvm", p) for p in depthwise.space(geometry))
    tiles = patch_gemm.space(geometry, instruction)
    return tuple(as_choice(PATCH_GEMM, instruction.name, p) for p in tiles)


def dot_kernel(step: Step, program: Program, profile: Profile, choice: KernelChoice | None = None) -> Kernel:
    """Return the kernel of a QGemm or QConv step of any shape.

    Raises:
        InternalError: The step is not a dot product.
        ProfileError: The profile allows no instruction known here, or ``choice`` is not a candidate.
    """
    dot, geometry = dot_of(step, program)
    known = candidates(step, program, profile)
    chosen = known[0] if choice is None else require_candidate(choice, known, step)
    instruction = instruction_for(available_intrinsics(step, program, profile))
    if chosen.template == DEPTHWISE:
        blocking = params_of(chosen, depthwise.DepthwiseParams)
        return depthwise.depthwise_kernel(dot, program, geometry, instruction, blocking)
    tile = params_of(chosen, patch_gemm.PatchGemmParams)
    exact = instruction.for_weights(dot.weight)
    return patch_gemm.patch_gemm_kernel(dot, program, geometry, exact, tile)
