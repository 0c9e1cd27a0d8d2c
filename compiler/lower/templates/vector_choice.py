"""The templates that every family with vector instructions has: a step's choices among them, a choice's kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from bitwright.compiler.lower.templates import depthwise, depthwise_dot, implicit_gemm
from bitwright.compiler.lower.templates.choice import as_choice, params_of
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.instruction import DotInstruction
from bitwright.compiler.program.ops import Dot, Program
from bitwright.targets.backend import Kernel, KernelChoice

IMPLICIT_GEMM, DEPTHWISE, DEPTHWISE_DOT = "implicit_gemm", "depthwise", "depthwise_dot"


def depthwise_choices(
    geometry: DotGeometry, instructions: Iterable[DotInstruction], register_bytes: int
) -> Iterator[KernelChoice]:
    """Yield the ways to compute a depthwise step, the default first.

    Args:
        geometry: Its loop bounds; ``geometry.is_depthwise``.
        instructions: What may be used, best first.
        register_bytes: Length of a vector, for code that LLVM vectorizes.
    """
    for instruction in instructions:
        if instruction.lanewise is not None:
            for cut in depthwise_dot.space(geometry, instruction):
                yield as_choice(DEPTHWISE_DOT, instruction.name, cut)
    for plan in depthwise.space(geometry, register_bytes):
        yield as_choice(DEPTHWISE, "llvm", plan)


def implicit_gemm_choices(geometry: DotGeometry, instruction: DotInstruction) -> Iterator[KernelChoice]:
    """Yield the ways to compute a step with one instruction, the default first."""
    for blocking in implicit_gemm.space(geometry, instruction):
        yield as_choice(IMPLICIT_GEMM, instruction.name, blocking)


def vector_kernel(
    choice: KernelChoice,
    step: Dot,
    program: Program,
    geometry: DotGeometry,
    instructions: Mapping[str, DotInstruction],
    register_bytes: int,
) -> Kernel:
    """Return the kernel of a choice that one of the functions above gave.

    Args:
        choice: Which template, instruction and parameters.
        step: Gemm or convolution.
        program: For shapes, scales and zero points.
        geometry: ``geometry_of(step, program)``.
        instructions: By compute row.
        register_bytes: As in ``depthwise_choices``.
    """
    if choice.template == DEPTHWISE:
        plan = params_of(choice, depthwise.DepthwiseParams)
        return depthwise.depthwise_kernel(step, program, geometry, register_bytes=register_bytes, params=plan)
    instruction = instructions[choice.intrinsic]
    if choice.template == DEPTHWISE_DOT:
        cut = params_of(choice, depthwise_dot.DepthwiseDotParams)
        return depthwise_dot.depthwise_dot_kernel(step, program, geometry, instruction, cut)
    blocking = params_of(choice, implicit_gemm.ImplicitGemmParams)
    return implicit_gemm.implicit_gemm_kernel(step, program, geometry, instruction, blocking)
