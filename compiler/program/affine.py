"""Affine quantization of arrays: the two formulas that everything else is built on."""

from __future__ import annotations

import numpy as np

from bitwright.compiler.program.ops import QuantParams


def quantize(x: np.ndarray, params: QuantParams) -> np.ndarray:
    """Return ``clip(rint(x / s) + z)``.

    Args:
        x: float32 array of any shape.
        params: How to quantize.

    Returns:
        Array of ``params.dtype``, same shape. Ties round to even; NaN becomes the lower bound.
    """
    low, high = params.bounds
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.rint(np.asarray(x, np.float32) / np.float32(params.scale))
    # float64 so that adding the zero point to a large quotient is exact before the clip.
    shifted = np.clip(steps.astype(np.float64) + params.zero_point, low, high)
    return np.where(np.isnan(shifted), low, shifted).astype(params.dtype)


def dequantize(q: np.ndarray, params: QuantParams) -> np.ndarray:
    """Return ``f32(q - z) * s``: float32, same shape as ``q``."""
    return (q.astype(np.int32) - params.zero_point).astype(np.float32) * np.float32(params.scale)


def all_integers(params: QuantParams) -> np.ndarray:
    """Return the 256 integers of ``params.dtype`` in rising order (the index order of a QLut table)."""
    low, high = params.bounds
    return np.arange(low, high + 1).astype(params.dtype)
