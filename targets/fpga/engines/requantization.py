"""Parameters of the circuits that turn accumulators into 8-bit integers.

Activations travel as signed integers, moved by a constant together with their zero points (:mod:`.carried`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitwright.compiler.errors import ProfileError
from bitwright.compiler.interpret.fixed_point import FixedPoint, fixed_point
from bitwright.compiler.program.ops import QuantParams
from bitwright.targets.fpga.carried import Carried
from bitwright.targets.fpga.network import Integers, Memory
from bitwright.targets.schema import Profile

# Blocks multiply 18 bits with their sign.
MOST_MULTIPLIER_BITS = 17


@dataclass(frozen=True)
class Signed:
    """Parameters of a tensor as it travels.

    Attributes:
        zero_point: Within [-128, 127].
        lower, upper: Smallest and largest integer.
        offset: What was subtracted.
        bits: Of two's complement that hold it.
    """

    zero_point: int
    lower: int
    upper: int
    offset: int
    bits: int = 8


def signed(
    quant: QuantParams, travelling: Carried, lower: int | None = None, upper: int | None = None
) -> Signed:
    """Return a tensor's parameters as it travels, with the bounds of its type unless others are given."""
    offset = travelling.offset
    low, high = quant.bounds
    low, high = low if lower is None else max(low, lower), high if upper is None else min(high, upper)
    return Signed(quant.zero_point - offset, low - offset, high - offset, offset, travelling.bits)


def multiplier_bits(profile: Profile) -> int:
    """Return the bits of requantization multipliers.

    Raises:
        ProfileError: The profile asks for a requantization that the circuits do not have.
    """
    requantize = profile.numerics.requantize
    if requantize.kind != "fixed_point" or requantize.rounding != "half_up" or requantize.rounding_of:
        what = "the circuits requantize by a fixed-point multiplier and add a half before one shift"
        fix = "set numerics.requantize: {kind: fixed_point, rounding: half_up}"
        raise ProfileError(what, where=f"profile '{profile.name}'", fix=fix)
    if requantize.multiplier_bits > MOST_MULTIPLIER_BITS:
        what = f"multipliers of {requantize.multiplier_bits} bits do not fit the device's multiplier blocks"
        fix = f"set numerics.requantize.multiplier_bits to {MOST_MULTIPLIER_BITS} or less"
        raise ProfileError(what, where=f"profile '{profile.name}'", fix=fix)
    return requantize.multiplier_bits


@dataclass(frozen=True)
class Requantization:
    """What follows an accumulator, one entry a channel.

    Attributes:
        bias: Added to the accumulator, zero point of the input included.
        by: Multipliers and shifts; None if accumulators leave the circuit as they are.
        output: Parameters of the output.
    """

    bias: Integers
    by: FixedPoint | None
    output: Signed

    @property
    def least_shift(self) -> int:
        """The smallest shift; what exceeds it is chosen a channel."""
        return 1 if self.by is None else int(self.by.shift.min())

    @property
    def shift_bits(self) -> int:
        """Bits of the shift's variable part."""
        return 0 if self.by is None else (int(self.by.shift.max()) - self.least_shift).bit_length()

    def parameters(self, accumulator_bits: int) -> dict[str, int]:
        """Return the parameters of the requantizing circuits."""
        return {
            "ACC_BITS": accumulator_bits,
            "MULT_BITS": 0 if self.by is None else self.by.bits,
            "SHIFT_MIN": self.least_shift,
            "SHIFT_BITS": self.shift_bits,
            "ZERO": self.output.zero_point,
            "LOW": self.output.lower,
            "HIGH": self.output.upper,
        }

    def memory(self, accumulator_bits: int, lanes: int) -> Memory:
        """Return words of ``{bias, multiplier, shift}`` a lane, the first channel in the lowest bits."""
        count = len(self.bias)
        multipliers = np.zeros(count, np.int64) if self.by is None else self.by.multiplier
        shifts = np.zeros(count, np.int64) if self.by is None else self.by.shift - self.least_shift
        bits, places = (0 if self.by is None else self.by.bits), self.shift_bits
        width = accumulator_bits + bits + places
        mask = (1 << accumulator_bits) - 1
        fields = [
            ((int(b) & mask) << (bits + places)) | (int(m) << places) | int(s)
            for b, m, s in zip(self.bias, multipliers, shifts, strict=True)
        ]
        words = (fields[k : k + lanes] for k in range(0, count, lanes))
        return Memory(width * lanes, tuple(sum(f << (width * k) for k, f in enumerate(w)) for w in words))


def requantization(bias: Integers, real: np.ndarray | None, output: Signed, bits: int) -> Requantization:
    """Return what follows an accumulator; ``real`` are the real multipliers [channels], None without any."""
    return Requantization(bias, None if real is None else fixed_point(real, bits), output)


def bits_for(low: int, high: int) -> int:
    """Return the bits of two's complement that hold both bounds, at least 2."""
    return max(2, (-low - 1).bit_length() + 1 if low < 0 else 1, high.bit_length() + 1)
