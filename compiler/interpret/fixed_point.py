"""Requantization by integers alone, as circuits and accelerators do it: a multiplier, a rounding shift to the right.

A real multiplier ``m`` is held as ``multiplier * 2**-shift`` with a multiplier of a given number of bits, the highest
of which is set. The error of that is at most ``2**-bits`` of ``m``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.compiler.errors import ModelError

Rounding = Literal["half_up", "double"]
GEMMLOWP_BITS = 31
LONGEST_SHIFT = 62


@dataclass(frozen=True)
class FixedPoint:
    """Real multipliers as integers.

    Attributes:
        multiplier: int64, in ``[2**(bits - 1), 2**bits)``; 0 for the multiplier 0.
        shift: int64, at least 1 and at most 62: places that the product is shifted to the right.
        bits: Width of the multipliers.
    """

    multiplier: NDArray[np.int64]
    shift: NDArray[np.int64]
    bits: int

    def value(self) -> NDArray[np.float64]:
        """Return the real multipliers that are meant."""
        exact: NDArray[np.float64] = self.multiplier.astype(np.float64) * np.exp2(
            -self.shift.astype(np.float64)
        )
        return exact


def fixed_point(real: ArrayLike, bits: int) -> FixedPoint:
    """Return the nearest multipliers of ``bits`` bits.

    Args:
        real: Finite multipliers, not negative, any shape. Those too small for the longest shift lose low bits.
        bits: 8 to 31.

    Raises:
        ModelError: A multiplier is so large that nothing is left to shift, or is not finite, or negative.
    """
    values = np.asarray(real, np.float64)
    pairs = [_one(float(value), bits) for value in values.ravel()]
    found = np.array(pairs, np.int64).reshape(*values.shape, 2)
    return FixedPoint(found[..., 0], found[..., 1], bits)


def _one(value: float, bits: int) -> tuple[int, int]:
    if not math.isfinite(value) or value < 0 or value >= 2.0 ** (bits - 1):
        msg = f"{value:g} cannot be a fixed-point multiplier of {bits} bits"
        raise ModelError(msg, fix="a scale is far out of range; look at the ranges of the calibration data")
    if value == 0:
        return 0, 1
    fraction, exponent = math.frexp(value)
    multiplier, shift = round(fraction * 2**bits), bits - exponent
    if multiplier == 2**bits:
        multiplier, shift = multiplier // 2, shift - 1
    if shift > LONGEST_SHIFT:
        return round(multiplier * 2.0 ** (LONGEST_SHIFT - shift)), LONGEST_SHIFT
    return multiplier, shift


def requantize(accumulator: NDArray[np.int64], by: FixedPoint, rounding: Rounding) -> NDArray[np.int64]:
    """Return ``accumulator * multiplier >> shift``, rounded.

    Args:
        accumulator: int64 values within int32, broadcast with the multipliers.
        by: The multipliers.
        rounding: ``half_up``: half is added before one shift. ``double``: the high half of twice the product, rounded
            half away from zero, then a shift that rounds half away from zero (gemmlowp; 31-bit multipliers only).
    """
    if rounding == "half_up":
        half = np.int64(1) << (by.shift - 1)
        result: NDArray[np.int64] = (accumulator * by.multiplier + half) >> by.shift
        return result
    return _double(accumulator, by)


def _double(accumulator: NDArray[np.int64], by: FixedPoint) -> NDArray[np.int64]:
    """Round twice, as gemmlowp's ``SaturatingRoundingDoublingHighMul`` and ``RoundingDivideByPOT`` do."""
    assert by.bits == GEMMLOWP_BITS
    places = by.shift - GEMMLOWP_BITS  # a multiplier of at least 1 is applied to a shifted accumulator
    product = (accumulator << np.maximum(-places, 0)) * by.multiplier
    nudge = np.where(product >= 0, np.int64(1 << 30), np.int64(1 - (1 << 30)))
    high = _towards_zero(product + nudge, 31)
    right = np.maximum(places, 0)
    mask = (np.int64(1) << right) - 1
    threshold = (mask >> 1) + (high < 0)
    result: NDArray[np.int64] = (high >> right) + ((high & mask) > threshold)
    return result


def _towards_zero(values: NDArray[np.int64], places: int) -> NDArray[np.int64]:
    """Divide by a power of two as C does."""
    magnitude = np.abs(values) >> places
    return np.where(values < 0, -magnitude, magnitude)
