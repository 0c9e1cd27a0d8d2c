"""What the shared templates must know about one dot-product instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitwright.compiler.lower.templates.scaffold import Expr


@dataclass(frozen=True)
class DotInstruction:
    """An instruction (or a short exact sequence) that adds products into int32 lanes.

    Attributes:
        name: Name of the profile's compute row.
        lanes: int32 lanes of an accumulator: output channels of one weight vector.
        step: Reduction elements consumed at once; the same activations meet every lane.
        fold: Of those, how many lie side by side in one lane of the weight vector (step: a true dot product;
            1: one multiply-accumulate after the other).
        operand: Element type activations must have: ``uint8``, ``int8`` or ``int16``.
        registers: Vector registers.
        weight_registers: Of those, how many one weight vector takes once it is widened.
        scratch_registers: How many more an accumulation needs.
        chains: Independent accumulations that keep the unit busy: latency times units.
        emit: (accumulator int32 x lanes, activations operand x step, weights int8 x lanes * step) -> the new
            accumulator.
    """

    name: str
    lanes: int
    step: int
    fold: int
    operand: str
    registers: int
    weight_registers: int
    scratch_registers: int
    chains: int
    emit: Callable[[Expr, Expr, Expr], Expr]

    def fits(self, pixels: int, vectors: int) -> bool:
        """Tell whether a register tile of pixels x vectors stays in registers."""
        return (pixels + self.weight_registers) * vectors + self.scratch_registers <= self.registers
