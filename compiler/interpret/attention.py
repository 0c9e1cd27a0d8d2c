"""Attention over a cache, in float64: what a kernel's float32 sums are compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.program.ops import CachedAttention

# Of the largest value: float32 sums over thousands of positions stay below a tenth of it, one position that is
# missing, or one too many, is a hundred times as much.
BOUND = 1e-4


def cached_attention(
    step: CachedAttention, inputs: tuple[np.ndarray, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return the result and both caches with the new rows, as :class:`CachedAttention` defines them.

    Args:
        step: Heads and rotary tables.
        inputs: Query, key, value, index of the last position, cache of keys, cache of values.
    """
    query, key, value, last, keys, values = inputs
    length, capacity = query.shape[1], keys.shape[2]
    first = min(max(int(last[0]) + 1 - length, 0), capacity)
    positions = np.arange(first, first + length)
    held = positions < capacity
    turned = _turned(step, key, positions).astype(np.float32)
    keys, values = keys.copy(), values.copy()
    keys[0, :, positions[held]] = turned[held]
    values[0, :, positions[held]] = value.reshape(length, step.key_heads, step.width)[held]
    rotated = _turned(step, query, positions)
    y = np.empty((length, step.heads, step.width))
    for t, position in enumerate(positions):
        seen = min(position + 1, capacity)
        shown = slice(0 if step.window is None else max(0, seen - step.window), seen)
        for head in range(step.heads):
            of = head * step.key_heads // step.heads
            scores = keys[0, of, shown].astype(np.float64) @ rotated[t, head] / np.sqrt(step.width)
            weights = np.exp(scores - scores.max())
            y[t, head] = weights @ values[0, of, shown].astype(np.float64) / weights.sum()
    return y.reshape(query.shape).astype(np.float32), keys, values


def allowed_difference(inputs: tuple[np.ndarray, ...]) -> float:
    """Return how far a kernel's float32 result may be from :func:`cached_attention` of the same inputs.

    A result is a mean of values, so rounding is judged by the largest of those that are read.
    """
    query, _, value, last, _, values = inputs
    past = max(0, int(last[0]) + 1 - query.shape[1])
    held = values[:, :, :past]
    return BOUND * max(float(np.abs(value).max()), float(np.abs(held).max(initial=0.0)))


def _turned(step: CachedAttention, rows: np.ndarray, positions: np.ndarray) -> NDArray[np.float64]:
    """Return rows as [length, heads, width] with their heads rotated; behind the table its last row serves."""
    heads = rows.reshape(len(positions), -1, step.width).astype(np.float64)
    at = np.minimum(positions, len(step.cos) - 1)
    cos, sin = step.cos[at, None].astype(np.float64), step.sin[at, None].astype(np.float64)
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
