"""What kernel selection needs in every family: the step as a dot product, and the instructions it may use."""

from __future__ import annotations

from bitwright.compiler.errors import InternalError
from bitwright.compiler.lower.templates.geometry import DotGeometry, geometry_of
from bitwright.compiler.program.ops import Dot, Program, QConv, Step
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


def dot_of(step: Step, program: Program) -> tuple[Dot, DotGeometry]:
    """Return the step as a dot product with its loop bounds.

    Raises:
        InternalError: The step is not a dot product.
    """
    if not isinstance(step, Dot):
        what = f"{type(step).__name__} is not a dot product"
        raise InternalError(what, where=step.name)
    return step, geometry_of(step, program)
