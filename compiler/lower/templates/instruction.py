"""What the shared templates must know about one dot-product instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitwright.compiler.lower.templates.scaffold import Expr


@dataclass(frozen=True)
class Narrowing:
    """How a processor turns four vectors of rounded sums into one vector of bytes.

    Attributes:
        lanes: float32 lanes of one vector.
        emit: (four float32 x lanes vectors, each of magnitude below 2^30, dtype ``uint8`` or ``int8``, zero
            point) -> dtype x 4 * lanes, the values in order: rounded half to even, moved by the zero point
            and saturated.
    """

    lanes: int
    emit: Callable[[list[Expr], str, int], Expr]


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
        lanewise: The same for activations operand x lanes * step that differ from lane to lane; None where the
            processor has no such form.
        narrowing: The way from sums to bytes; None leaves it to LLVM.
        interleaved: Bytes of each row that ``depthwise_dot`` interleaves at once.
        parallel_macs: Multiply-accumulates that one core does in the time for which threads are worth starting.
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
    lanewise: Callable[[Expr, Expr, Expr], Expr] | None = None
    narrowing: Narrowing | None = None
    interleaved: int = 64
    parallel_macs: int = 1 << 20

    def fits(self, pixels: int, vectors: int) -> bool:
        """Tell whether a register tile of pixels x vectors stays in registers."""
        return (pixels + self.weight_registers) * vectors + self.scratch_registers <= self.registers
