"""Softmax of 8-bit integers as TensorFlow Lite's kernel computes it: a table of 256 exponentials in float32."""

from __future__ import annotations

import numpy as np

from bitwright.compiler.program.ops import QuantParams

STEP = np.float32(1 / 256)
LOWEST = -128
LEVELS = 256


def softmax(x: np.ndarray, quant: QuantParams) -> np.ndarray:
    """Return the Softmax along the last axis.

    Args:
        x: int8 of any shape.
        quant: Of ``x``.

    Returns:
        int8 of the same shape, in steps of 1/256 from -128 on.
    """
    table = np.exp(-np.float32(quant.scale) * np.arange(LEVELS, dtype=np.float32)).astype(np.float32)
    below = x.max(axis=-1, keepdims=True).astype(np.int64) - x
    exponentials = table[below]
    # Summed one by one, in the kernel's order: float32 sums depend on it.
    total = np.zeros(x.shape[:-1], np.float32)
    for k in range(x.shape[-1]):
        total = total + exponentials[..., k]
    steps = exponentials * (np.float32(1) / (total * STEP))[..., None]
    rounded = np.floor(steps + np.float32(0.5)) + LOWEST
    clipped: np.ndarray = np.clip(rounded, LOWEST, -LOWEST - 1).astype(np.int8)
    return clipped
