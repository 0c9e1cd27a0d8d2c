"""Which instruction and which blocking a WeightOnlyDot step gets: the same in every family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bitwright.compiler.errors import ProfileError
from bitwright.compiler.lower.templates.choice import as_choice, interleaved, params_of, require_candidate
from bitwright.compiler.lower.templates.weight_only import weight_only_kernel
from bitwright.compiler.lower.templates.weight_only_geometry import (
    CodeInstruction,
    WeightOnlyParams,
    space,
    weight_only_geometry,
)
from bitwright.compiler.program.ops import Program, WeightOnlyDot
from bitwright.targets.backend import Kernel, KernelChoice
from bitwright.targets.schema import Combo, Profile

TEMPLATE = "weight_only"
OPERATORS = ("MatMul", "Gemm")
MAX_CANDIDATES = 300

Instructions = Mapping[str, CodeInstruction]


def weight_only_candidates(
    step: WeightOnlyDot, program: Program, profile: Profile, instructions: Instructions
) -> tuple[KernelChoice, ...]:
    """Return the ways to compute a step, the default first.

    Args:
        step: The step.
        program: For shapes.
        profile: Its combinations with float activations and grouped weights name the rows, best first; where
            they name none, every row known here may be used.
        instructions: Compute row -> how the family multiplies codes with it.

    Raises:
        ProfileError: The profile allows no instruction known here.
    """
    names = [name for name in _rows(profile) if name in instructions]
    if not names:
        what = f"no kernel for grouped weights on any of the compute rows {', '.join(_rows(profile))}"
        raise ProfileError(what, fix=f"give the operator intrinsics out of: {', '.join(instructions)}")
    spaces = (_choices(step, program, instructions[name]) for name in names)
    return tuple(interleaved(spaces, MAX_CANDIDATES))


def weight_only_choice_kernel(
    step: WeightOnlyDot,
    program: Program,
    profile: Profile,
    instructions: Instructions,
    choice: KernelChoice | None,
) -> Kernel:
    """Return the kernel of a step; ``choice`` is one of its candidates, or None for the first.

    Raises:
        ProfileError: The profile allows no instruction known here, or ``choice`` is not a candidate.
    """
    known = weight_only_candidates(step, program, profile, instructions)
    chosen = known[0] if choice is None else require_candidate(choice, known, step)
    params = params_of(chosen, WeightOnlyParams)
    return weight_only_kernel(step, program, instructions[chosen.intrinsic], params)


def _choices(step: WeightOnlyDot, program: Program, instruction: CodeInstruction) -> Iterator[KernelChoice]:
    geometry = weight_only_geometry(step, program, instruction)
    for params in space(geometry, instruction):
        yield as_choice(TEMPLATE, instruction.name, params)


def _rows(profile: Profile) -> tuple[str, ...]:
    rules = profile.runtimes.artifact.ops
    combos = [c for op in OPERATORS if op in rules for c in rules[op].combos if _is_weight_only(c, profile)]
    named = tuple(dict.fromkeys(name for combo in combos for name in combo.intrinsics))
    return named or tuple(row.name for row in profile.compute)


def _is_weight_only(combo: Combo, profile: Profile) -> bool:
    if combo.weight is None:
        return False
    return (
        profile.qspace(combo.act).float_type == "f32" and profile.qspace(combo.weight).granularity == "group"
    )
