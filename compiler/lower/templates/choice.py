"""Which dot-product instructions the target profile allows for a step."""

from __future__ import annotations

from bitwright.compiler.program.ops import Program, QConv, Step
from bitwright.targets.schema import Combo, Profile

INTEGERS = ("s8", "u8", "s16")


def available_intrinsics(step: Step, program: Program, profile: Profile) -> tuple[str, ...]:
    """Return the names of the compute rows a step may use, best first.

    These are the rows of the operator's combinations for the step's activation type; where the profile
    lists none, all its rows that multiply integers of at most 16 bits.
    """
    operators = ("Conv",) if isinstance(step, QConv) else ("Gemm", "MatMul")
    rules = profile.runtimes.artifact.ops
    signed = program.tensor(step.inputs[0]).dtype == "int8"
    combos = [c for op in operators if op in rules for c in rules[op].combos]
    matching = [c for c in combos if _reads(c, profile, signed=signed)]
    names = tuple(dict.fromkeys(name for c in matching or combos for name in c.intrinsics))
    return names or tuple(row.name for row in profile.compute if row.act in INTEGERS)


def _reads(combo: Combo, profile: Profile, *, signed: bool) -> bool:
    space = profile.qspaces.get(combo.act)
    return space is not None and space.float_type is None and space.bits == 8 and space.signed == signed
