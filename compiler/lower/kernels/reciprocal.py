"""Quantization by multiplication, where that is proven to give the very integers that division gives.

``rint(x / s)`` and ``rint(fma(x, high, x * low))``, with ``high + low`` close to ``1 / s``, are step functions that
never decrease with x. They are equal for all x if their steps are, and inside the range of an 8-bit type there are 255.
"""

from __future__ import annotations

import numpy as np

NEIGHBOURS = 8  # float32 numbers on either side of a step among which both functions must change


def reciprocal(scale: float) -> tuple[np.float32, np.float32]:
    """Return 1 / scale as a sum of two positive float32; (0, 0) where it has none.

    Both are positive, so that infinity times each of them has infinity's sign and their sum is not NaN.
    """
    whole = 1.0 / float(np.float32(scale))
    if not whole < float(np.finfo(np.float32).max):
        return np.float32(0), np.float32(0)
    high = np.float32(whole)
    if float(high) >= whole:
        high = np.nextafter(high, np.float32(0))
    rest = np.float32(whole - float(high))
    return (high, rest) if rest > 0 else (np.float32(0), np.float32(0))


def multiplies_exactly(scale: float, zero_point: int, low: int, high: int) -> bool:
    """Tell whether multiplying by ``reciprocal(scale)`` quantizes every float32 as dividing by ``scale`` does.

    Args:
        scale: Positive float32.
        zero_point: Of the integers.
        low: Smallest integer.
        high: Largest integer.
    """
    factor, rest = reciprocal(scale)
    if not factor:
        return False
    below = np.arange(low, high) - zero_point
    divisor = np.float32(scale)
    middle = ((below + 0.5) * float(divisor)).astype(np.float32)
    x = _neighbours(middle)
    if not np.isfinite(x).all() or np.abs(x[x != 0]).min(initial=1) < 1e-30:
        return False  # too close to what float32 can hold
    by_division = np.rint(x / divisor)
    small = (x * rest).astype(np.float64)
    exact = (
        x.astype(np.float64) * float(factor) + small
    )  # the product is exact, the sum off by 2^-53 of itself
    slack = np.abs(exact) * 2.0**-50
    sides = [np.rint((exact + s).astype(np.float32)) for s in (-slack, slack)]
    steps_inside = (by_division[:, 0] <= below) & (by_division[:, -1] > below)
    return bool(steps_inside.all() and all((s == by_division).all() for s in sides))


def _neighbours(x: np.ndarray) -> np.ndarray:
    """Return [n, 2 * NEIGHBOURS + 1]: each number among those just below and above it."""
    found = [x]
    for _ in range(NEIGHBOURS):
        infinity = np.float32(np.inf)
        found = [np.nextafter(found[0], -infinity), *found, np.nextafter(found[-1], infinity)]
    return np.stack(found, axis=1)
