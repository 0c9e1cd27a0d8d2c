"""How the integers of a tensor travel: moved by a constant so that all that can occur fits the fewest bits.

Streams have bytes. Engines that multiply keep only the bits that a tensor needs: activations that are clipped to 16
levels have windows and multipliers of four bits, whatever type the model stores them in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitwright.compiler.program.ops import (
    Dot,
    Move,
    Program,
    QAdd,
    QConcat,
    QLut,
    QPool,
    QuantParams,
    Step,
)

STREAM_BITS = 8
FEWEST_BITS = 2
Range = tuple[int, int]


@dataclass(frozen=True)
class Carried:
    """A tensor as it travels.

    Attributes:
        offset: What is subtracted from its integers.
        bits: Of two's complement that hold every one of them, and the zero point.
    """

    offset: int
    bits: int


def carried(program: Program) -> dict[str, Carried]:
    """Return how every quantized tensor of a program travels."""
    return {name: _fitting(*found, _quant(program, name)) for name, found in ranges(program).items()}


def ranges(program: Program) -> dict[str, Range]:
    """Return the smallest and largest integer that every quantized tensor can hold, its zero point included.

    Tensors that hold each other's integers (concatenation, maxima, reshapes) share one range, because nothing moves
    the integers between them.
    """
    found: dict[str, Range] = {}
    for name in dict.fromkeys(n for step in program.steps for n in (*step.inputs, *step.outputs)):
        quant = program.tensor(name).quant
        if quant is not None:
            found[name] = quant.bounds
    for step in program.steps:
        for name in step.outputs:
            if name in found:
                found[name] = _with_zero(_written(step, program, found), _quant(program, name))
    groups = [g for step in program.steps if len(g := _same_integers(step, found)) > 1]
    changed = True
    while changed:
        changed = False
        for group in groups:
            whole = min(found[n][0] for n in group), max(found[n][1] for n in group)
            changed = changed or any(found[n] != whole for n in group)
            found |= dict.fromkeys(group, whole)
    return found


def _fitting(low: int, high: int, quant: QuantParams) -> Carried:
    bits = max(FEWEST_BITS, (high - low).bit_length())
    half = 1 << (bits - 1)
    if bits == STREAM_BITS:
        return Carried(quant.bounds[0] + half, bits)
    return Carried(0 if -half <= low and high < half else low + half, bits)


def _written(step: Step, program: Program, found: Mapping[str, Range]) -> Range:
    """Return what a step can write, by its own bounds and those of what it reads."""
    least, most = _quant(program, step.output).bounds
    if isinstance(step, Dot | QAdd):
        return max(least, step.lower), min(most, step.upper)
    if isinstance(step, QLut):
        first = _quant(program, step.inputs[0]).bounds[0]
        low, high = found[step.inputs[0]]
        entries = step.table[low - first : high - first + 1]
        return int(entries.min()), int(entries.max())
    copied = _same_integers(step, found)
    # An average lies between the smallest and the largest of what it averages, if its scale is theirs.
    averaged = isinstance(step, QPool) and program.tensor(step.inputs[0]).quant == _quant(
        program, step.output
    )
    if copied or averaged:
        return min(found[n][0] for n in step.inputs), max(found[n][1] for n in step.inputs)
    return least, most


def _same_integers(step: Step, found: Mapping[str, Range]) -> list[str]:
    if isinstance(step, Move | QConcat) or (isinstance(step, QPool) and step.kind == "max"):
        return [name for name in (*step.inputs, *step.outputs) if name in found]
    return []


def _with_zero(found: Range, quant: QuantParams) -> Range:
    return min(found[0], quant.zero_point), max(found[1], quant.zero_point)


def _quant(program: Program, name: str) -> QuantParams:
    quant = program.tensor(name).quant
    assert quant is not None
    return quant
