"""Layers that pass elements on one by one: sums of two streams, tables, concatenation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import gcd

from bitwright.targets.fpga.engines.requantization import Signed
from bitwright.targets.fpga.network import Engine, Folding, Integers, Layer, Memory, WeightCode, divisors


@dataclass(frozen=True, kw_only=True)
class PointwiseLayer(Layer):
    """Every channel of a pixel is computed alone: ``pe`` of them side by side."""

    def legal_foldings(self) -> tuple[Folding, ...]:
        """Return every number of channels side by side."""
        return tuple(Folding(pe) for pe in divisors(self.channels))

    def cycles(self, folding: Folding) -> int:
        """Return the elements of a frame over ``pe``."""
        return self.positions * self.channels // folding.pe

    def input_lanes(self, folding: Folding) -> int:
        """Return ``pe``."""
        return folding.pe

    def output_lanes(self, folding: Folding) -> int:
        """Return ``pe``."""
        return folding.pe

    def _engine(self, folding: Folding, module: str, parameters: dict[str, int], note: str) -> Engine:
        return Engine(
            name=self.name,
            node=self.node,
            module=module,
            parameters={"LANES": folding.pe, **parameters},
            cycles=self.cycles(folding),
            capacity=12 * folding.pe,
            step=self.name,
            note=note,
        )


@dataclass(frozen=True, kw_only=True)
class AddLayer(PointwiseLayer):
    """Sum of two streams: ``((a * ma + b * mb + offset) >> shift, rounded) + zero``, clipped.

    Attributes:
        multipliers: (ma, mb).
        shift: Places.
        offset: Minus both zero points times their multipliers.
        output: Zero point and bounds of the sum.
    """

    multipliers: tuple[int, int]
    shift: int
    offset: int
    output: Signed

    def engines(self, folding: Folding, code: WeightCode | None = None) -> tuple[Engine, ...]:
        """Return the adder."""
        del code
        parameters = {
            "MULT_A": self.multipliers[0],
            "MULT_B": self.multipliers[1],
            "SHIFT": self.shift,
            "OFFSET": self.offset,
            "ZERO": self.output.zero_point,
            "LOW": self.output.lower,
            "HIGH": self.output.upper,
        }
        return (self._engine(folding, "stream_add", parameters, "residual sum with fixed-point scales"),)


@dataclass(frozen=True, kw_only=True)
class TableLayer(PointwiseLayer):
    """Any function of one 8-bit stream.

    Attributes:
        table: 256 signed results; index 0 belongs to -128.
        function: What it computes.
    """

    table: Integers = field(repr=False)
    function: str

    def engines(self, folding: Folding, code: WeightCode | None = None) -> tuple[Engine, ...]:
        """Return the table, once a lane."""
        del code
        engine = self._engine(folding, "stream_table", {}, f"table of {self.function}")
        # The memory is addressed by the bit pattern of the input: 0 to 127, then -128 to -1.
        words = tuple(int(v) & 0xFF for v in (*self.table[128:], *self.table[:128]))
        return (_with_memory(engine, Memory(8, words)),)


def _with_memory(engine: Engine, memory: Memory) -> Engine:
    return replace(engine, memories={"TABLE_FILE": lambda: memory})


@dataclass(frozen=True, kw_only=True)
class ConcatLayer(PointwiseLayer):
    """Channels of two streams, pixel by pixel.

    Attributes:
        parts: Channels of each stream.
    """

    parts: tuple[int, int]

    def legal_foldings(self) -> tuple[Folding, ...]:
        """Return every number of channels side by side that divides both parts."""
        return tuple(Folding(pe) for pe in divisors(gcd(*self.parts)))

    def engines(self, folding: Folding, code: WeightCode | None = None) -> tuple[Engine, ...]:
        """Return the switch between the streams."""
        del code
        first, second = (part // folding.pe for part in self.parts)
        return (
            self._engine(folding, "stream_concat", {"FIRST": first, "SECOND": second}, "channels joined"),
        )
