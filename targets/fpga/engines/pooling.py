"""Pooling: maxima under a window, and the average of a whole image."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.targets.fpga.engines.requantization import Requantization, bits_for
from bitwright.targets.fpga.engines.window import Window
from bitwright.targets.fpga.network import Engine, Folding, Layer, WeightCode, divisors


@dataclass(frozen=True, kw_only=True)
class MaxPoolLayer(Layer):
    """Largest value under a window, channel by channel."""

    window: Window

    def legal_foldings(self) -> tuple[Folding, ...]:
        """Return every number of channels side by side."""
        return tuple(Folding(pe) for pe in divisors(self.channels))

    def input_lanes(self, folding: Folding) -> int:
        """Return ``pe``."""
        return folding.pe

    def output_lanes(self, folding: Folding) -> int:
        """Return ``pe``."""
        return folding.pe

    def engines(self, folding: Folding, code: WeightCode | None = None) -> tuple[Engine, ...]:
        """Return the sliding window and the comparators."""
        del code
        own = Engine(
            name=self.name,
            node=self.node,
            module="pool_maximum",
            parameters={"LANES": folding.pe, "TAPS": self.window.taps},
            cycles=self.positions * self.channels // folding.pe * self.window.taps,
            capacity=(self.window.taps + 4) * folding.pe,
            step=self.name,
            note=f"maximum of {self.window.taps} pixels",
        )
        return self.window.engine(self.name, self.node, folding.pe, taps_inside=True), own


@dataclass(frozen=True, kw_only=True)
class GlobalAverageLayer(Layer):
    """Average of every channel over the whole image, summed while it passes.

    Attributes:
        pixels: Pixels of the image.
        requantization: One entry: all channels share it.
    """

    pixels: int
    requantization: Requantization

    def legal_foldings(self) -> tuple[Folding, ...]:
        """Return every number of channels side by side."""
        return tuple(Folding(pe) for pe in divisors(self.channels))

    def input_lanes(self, folding: Folding) -> int:
        """Return ``pe``."""
        return folding.pe

    def output_lanes(self, folding: Folding) -> int:
        """Return ``pe``."""
        return folding.pe

    def cycles(self, folding: Folding) -> int:
        """Return the elements of the image over ``pe``."""
        return self.pixels * self.channels // folding.pe

    def engines(self, folding: Folding, code: WeightCode | None = None) -> tuple[Engine, ...]:
        """Return the accumulators."""
        del code
        by = self.requantization.by
        assert by is not None
        bias = int(self.requantization.bias[0])
        bits = bits_for(min(0, bias) - 128 * self.pixels, max(0, bias) + 128 * self.pixels)
        parameters = self.requantization.parameters(bits)
        engine = Engine(
            name=self.name,
            node=self.node,
            module="pool_global_average",
            parameters={
                "LANES": folding.pe,
                "GROUPS": self.channels // folding.pe,
                "PIXELS": self.pixels,
                "BIAS": bias,
                "MULT": int(by.multiplier[0]),
                **{name: parameters[name] for name in parameters if name != "SHIFT_BITS"},
            },
            cycles=self.cycles(folding),
            capacity=self.pixels * self.channels,
            step=self.name,
            note=f"average of {self.pixels} pixels",
        )
        return (engine,)
