"""Fused multiply-add of float32 arrays, rounded once, from float64 arithmetic."""

from __future__ import annotations

import numpy as np


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return ``a * b + c`` rounded to float32 once.

    The product of two float32 is exact in float64. The sum is rounded to float64 *to odd*: when it is
    inexact, the neighbour whose last bit is 1 is taken. Rounding that to float32 equals rounding the exact
    sum, because an odd last bit far below float32's keeps the value off every tie.

    Args:
        a: float32 array.
        b: float32 array.
        c: float32 array; all broadcast together.

    Returns:
        float32 array of the broadcast shape.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        return np.asarray(_add_to_odd(product, np.asarray(c, np.float64)).astype(np.float32))


def _add_to_odd(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return x + y in float64, rounded to odd."""
    total, error = _two_sum(x, y)
    bits = np.atleast_1d(total).view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & ((bits.reshape(total.shape) & 1) == 0)
    # One step away from zero is +1 on the bit pattern for either sign.
    step = np.where((error > 0) == (total > 0), 1, -1)
    odd = (bits.reshape(total.shape) + step).view(np.float64)
    return np.where(inexact, odd, total)


def _two_sum(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounded sum and its exact error (Knuth)."""
    total = np.asarray(x + y)
    y_part = total - x
    x_part = total - y_part
    return total, (x - x_part) + (y - y_part)
