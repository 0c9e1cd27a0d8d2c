"""What kernel selection needs in every family: the step as a dot product, and the instructions it may use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from itertools import zip_longest
from typing import Any, TypeVar

from bitwright.compiler.errors import InternalError, ProfileError
from bitwright.compiler.lower.templates.geometry import DotGeometry, geometry_of
from bitwright.compiler.program.ops import Dot, Program, QConv, Step, WeightOnlyDot
from bitwright.targets.backend import KernelChoice
from bitwright.targets.schema import Combo, Profile

INTEGERS = ("s8", "u8", "s16")

Params = TypeVar("Params")


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


def no_kernel(available: Sequence[str], known: Iterable[str]) -> ProfileError:
    """Return the error of a family that has a kernel for none of the compute rows a step may use."""
    what = f"no kernel for any of the compute rows {', '.join(available) or '(none)'}"
    return ProfileError(what, fix=f"give the operator intrinsics out of: {', '.join(known)}")


def _reads(combo: Combo, profile: Profile, *, signed: bool) -> bool:
    space = profile.qspaces.get(combo.act)
    return space is not None and space.float_type is None and space.bits == 8 and space.signed == signed


def dot_of(step: Step, program: Program) -> tuple[Dot, DotGeometry]:
    """Return the step as a dot product with its loop bounds.

    Raises:
        ProfileError: It is a product with grouped weights, which a family without kernels for them is asked for.
        InternalError: The step is not a dot product.
    """
    if isinstance(step, WeightOnlyDot):
        what = "this family has no kernel for float activations and grouped weights"
        raise ProfileError(what, where=step.name, fix="quantize the weight for 8-bit kernels (int8, w4a8)")
    if not isinstance(step, Dot):
        what = f"{type(step).__name__} is not a dot product"
        raise InternalError(what, where=step.name)
    return step, geometry_of(step, program)


def as_choice(template: str, intrinsic: str, params: Any) -> KernelChoice:
    """Return a template's parameters (a dataclass of integers and flags) as a choice."""
    plain = sorted((name, int(value)) for name, value in asdict(params).items())
    return KernelChoice(template, intrinsic, tuple(plain))


def params_of(choice: KernelChoice, kind: type[Params]) -> Params:
    """Return the parameters of a choice as the template's dataclass, whose fields are ``int`` or ``bool``.

    Raises:
        ProfileError: The names are not those of ``kind``.
    """
    found = dict(choice.params)
    declared = {f.name: f.type for f in fields(kind)}  # type: ignore[arg-type]
    if found.keys() != declared.keys():
        what = (
            f"{choice.template} has the parameters {', '.join(declared)}, not {', '.join(found) or '(none)'}"
        )
        raise ProfileError(what)
    return kind(**{name: value if declared[name] == "int" else bool(value) for name, value in found.items()})


def require_candidate(choice: KernelChoice, candidates: Sequence[KernelChoice], step: Step) -> KernelChoice:
    """Return ``choice`` if it is one of ``candidates``.

    Raises:
        ProfileError: It is not.
    """
    if choice not in candidates:
        what = f"no way to compute this step: {choice.label()}"
        raise ProfileError(what, where=step.name, fix="tune again, or remove this choice")
    return choice


def interleaved(spaces: Iterable[Iterable[KernelChoice]], limit: int) -> Iterator[KernelChoice]:
    """Yield from several spaces by turns, each choice once, at most ``limit`` of them.

    Templates estimate their costs in units of their own, so only the order within one of them means something.
    """
    seen: dict[KernelChoice, None] = {}
    for row in zip_longest(*spaces):
        seen.update((choice, None) for choice in row if choice is not None)
    yield from list(seen)[:limit]
